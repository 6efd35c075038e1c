"""Does a rebuilt program still write what it wrote? Runs the main commands and compares two of their outcomes.

    git worktree add ../before COMMIT
    python -m benchmarks.behaviour run /tmp/before --code ../before
    python -m benchmarks.behaviour run /tmp/after
    python -m benchmarks.behaviour compare /tmp/before /tmp/after

Equal are all tensors bit by bit, and all tables but for timings. Each run takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = "--dataset=digits --width_multiplier=1 --num_models=3 --train_samples=300 --test_samples=100 --batch_size=50"
CHECKPOINT = ("checkpoint/digits/resnet20/diff_initialization/models_no3/data_dist_dirichlet/num_epochs_2/"
              "width=1,train_samples=300,test_samples=100,alpha=0.5,batch_size=50/random_seed_0")
MERGES = f"{DATA} --ckp={CHECKPOINT} --exp=2 --merg_itr=3 --training --epochs=1"
STEPS = f"{DATA} --ckp={CHECKPOINT} --exp=2 --epochs=2 --num_epochs=1"
GROUP = "torch.distributed.run --standalone --nproc_per_node=3"
# name -> what is run, one after the other, in a folder of the name; all start from the same checkpoints
COMMANDS = {
    **{opt: [f"main {MERGES} --opt={opt} --workers=1"] for opt in ("DIMAT", "COMMON", "WM", "C2M3", "WA", "NONE")},
    **{opt: [f"base_lines {STEPS} --opt={opt}"] for opt in ("CDSGD", "CDMSGD", "DPSGD", "SGP", "CGA")},
    "resumed": [f"main {MERGES} --opt=DIMAT --workers=1 {how}" for how in ("--merg_itr=2", "--resume")],
    "resumed steps": [f"base_lines {STEPS} --opt=SGP --epochs=1", f"base_lines {STEPS} --opt=SGP --resume"],
    "paper": [f"main {MERGES} --config={{code}}/configs/paper/dimat.yaml --workers=1"],
    "local": [f"main {MERGES} --opt=DIMAT --match_data=local --wire=int8 --workers=1"],
    "repair": [f"main {MERGES} --opt=DIMAT --bn_reset=repair --match_prior=identity --workers=1"],
    "faults": [f"main {MERGES} --opt=DIMAT --link_failure=0.3 --agent_failure=0.2 --workers=1"],
    "changing": [f"main {MERGES} --opt=COMMON --exp=1 --workers=1", f"main {DATA} --ckp={CHECKPOINT} --opt=WA "
                 "--topology=random_matching --merg_itr=3 --training --epochs=1 --workers=1"],
    "random": [f"main {DATA} --randominit --diffinit --opt=WA --merg_itr=2 --training --epochs=1 --workers=1"],
    "workers": [f"main {MERGES} --opt=DIMAT --workers=2"],
    "processes": [f"main {MERGES} --opt=COMMON --processes=3 --match_data=local"],
    "group": [f"{GROUP} {{code}}/main.py {MERGES} --opt=DIMAT", f"{GROUP} {{code}}/base_lines.py {STEPS} --opt=CDSGD"],
}


def run(out: Path, code: Path, names: list[str]) -> None:
    """Each of COMMANDS, in a folder of its own below `out`, by the program in `code`."""
    home = out / "checkpoints"
    if not (home / CHECKPOINT / "model_accuracies.csv").exists():
        start(f"train {DATA} --data_dist=dirichlet --epochs=2", home, code)
    for name in names:
        began = time.perf_counter()
        (out / name).mkdir(parents=True)
        (out / name / "checkpoint").symlink_to(home.resolve() / "checkpoint")
        for command in COMMANDS[name]:
            start(command, out / name, code)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def start(command: str, home: Path, code: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    words = shlex.split(command.replace("{code}", str(code)))
    done = subprocess.run([sys.executable, "-m", *words], cwd=home, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}\nended with {done.returncode}")


def compare(one: Path, other: Path) -> int:
    """Print what differs; how many files do."""
    files = {file.relative_to(folder) for folder in (one, other) for file in folder.rglob("*")
             if file.suffix in (".pth", ".pt", ".csv") and file.is_file() and "exchange" not in file.parts}
    different = 0
    for file in sorted(files):
        if not ((one / file).exists() and (other / file).exists()):
            difference = f"only in {one if (one / file).exists() else other}"
        elif file.suffix == ".csv":
            difference = None if table(one / file) == table(other / file) else "other figures"
        else:
            difference = None if equal(*(tensors(folder / file) for folder in (one, other))) else "other tensors"
        if difference:
            different += 1
            print(f"{file}: {difference}")
    print(f"{len(files)} files, {different} different")
    return different


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(lines)]


def tensors(file: Path) -> Any:
    """What is in a torch file, but for what is no result: the schema, and a length that depends on timings."""
    content = torch.load(file, weights_only=True)
    return {key: value for key, value in content.items() if key not in ("schema", "metrics_bytes")}


def equal(one: Any, other: Any) -> bool:
    """Nested dicts and lists, with tensors that are equal bit by bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    runs = verbs.add_parser("run", help="run the commands")
    runs.add_argument("out", type=Path, help="where they write")
    runs.add_argument("--code", type=Path, default=ROOT, help="the checkout whose program is run (default: this one)")
    runs.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), metavar="NAME",
                      help="some of: " + ", ".join(COMMANDS))
    runs.set_defaults(do=lambda o: run(o.out.resolve(), o.code.resolve(), o.only))
    compares = verbs.add_parser("compare", help="say what differs between two outcomes")
    compares.add_argument("one", type=Path)
    compares.add_argument("other", type=Path)
    compares.set_defaults(do=lambda o: int(compare(o.one, o.other) > 0))
    o = parser.parse_args()
    return o.do(o) or 0


if __name__ == "__main__":
    sys.exit(main())
