"""What a GPU makes of it all, in one command: checks, waits, throughput, memory, and a cell of the paper.

    make gpu                                               or, where nothing can be installed,
    python -m benchmarks.gpu --minutes 25 --out gpu_results
    python -m benchmarks.gpu --pack cifar10.npz            a slice of CIFAR-10 to take along, from --data_dir
    python -m benchmarks.gpu --data cifar10.npz ...        and to use there
    python -m benchmarks.gpu --device cpu --width_multiplier 1 --train_samples 500 --minutes 8     to see what it does

Each stage is a process of its own with its share of the minutes that are left. It leaves every result at once in
OUT/STAGE.jsonl, and OUT/report.md is written anew after each. A stage that fails or takes too long stops no other one.
The same command again skips the stages that are done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu_stages import STAGES, Results, Stage, Target
from benchmarks.main_job import write_npz
from benchmarks.processes import ROOT
from data.datasets import load_dataset
from utils.progress import command

DONE = "done"


def pack(file: Path, data_dir: str, train: int, test: int) -> None:
    """Class-balanced slices of CIFAR-10 for `--data`."""
    dataset = load_dataset("cifar10", data_dir, train_samples=train, test_samples=test)
    write_npz(dataset, file)
    print(f"{file}: {train} + {test} images, {file.stat().st_size / 2**20:.0f} MiB")


def read(out: Path, stage: str) -> list[dict]:
    """What a stage has left; the last line may have been cut off."""
    rows, file = [], Results(out, stage).file
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def is_done(out: Path, stage: str) -> bool:
    return any(row.get("what") == DONE for row in read(out, stage))


def carry_out(stage: Stage, o: argparse.Namespace, out: Path, seconds: float) -> None:
    """A stage in a process of its own, which ends with all that it has started when its time is over."""
    results = Results(out, stage.name)
    if results.file.exists():
        results.file.replace(results.file.with_suffix(".jsonl.before"))
    again = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage.name, "--seconds", str(round(seconds * 0.95)),
             "--out", str(out), *given(o)]
    with open(out / f"{stage.name}.log", "w") as log:
        process = subprocess.Popen(again, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
            how = "" if not process.returncode else f"ended with status {process.returncode}, see {log.name}"
        except subprocess.TimeoutExpired:
            how = f"stopped after its {seconds:.0f} s; what it had found by then is here"
        finally:
            with_all_it_started(process)
    results.add(what=how or DONE)


def with_all_it_started(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            time.sleep(0.5)
        except ProcessLookupError:
            break
    process.wait()


def given(o: argparse.Namespace) -> list[str]:
    """What of the command line a stage is told."""
    told = {"device": o.device, "width_multiplier": o.width_multiplier, "train_samples": o.train_samples,
            "test_samples": o.test_samples, "agents": o.agents, "data": o.data}
    return [f"--{key}={value}" for key, value in told.items() if value is not None]


def machine(device: torch.device) -> list[str]:
    found = [f"Python {platform.python_version()}, PyTorch {torch.__version__}, {os.cpu_count()} CPU cores"]
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found.append(f"{torch.cuda.device_count()} x {p.name}, {p.total_memory / 2**30:.0f} GiB, CUDA "
                     f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    return found


def table(rows: list[dict]) -> list[str]:
    """Markdown: a column for each key, in the order in which they first come."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(cell(row.get(key, "")) for key in keys) + " |" for row in rows]


def cell(value: object) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "\\|").replace("\n", " ")


def report(out: Path, o: argparse.Namespace, device: torch.device) -> None:
    lines = [f"# On {device}", "", *machine(device), "",
             f"ResNet-20 of width {o.width_multiplier}, {o.agents} agents on a ring, "
             f"{o.data or f'{o.train_samples} random images'}", ""]
    for stage in STAGES.values():
        rows = read(out, stage.name)
        lines += [f"## {stage.name}", " ".join(stage.function.__doc__.split()), ""]
        ended = [row for row in rows if row.keys() == {"what"}]
        lines += table([row for row in rows if row not in ended]) if len(rows) > len(ended) else []
        lines += ["", *(row["what"] for row in ended if row["what"] != DONE), ""] if rows else ["not begun", ""]
    (out / "report.md.part").write_text("\n".join(lines))
    (out / "report.md.part").replace(out / "report.md")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=25, help="for all stages together (25)")
    p.add_argument("--out", type=Path, default=Path("gpu_results"), help="where results go (gpu_results)")
    p.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="these stages")
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, mps or cpu (cuda)")
    p.add_argument("--data", type=Path, default=None, metavar="FILE.npz", help="images, as --pack writes them")
    p.add_argument("--agents", type=int, default=5, help="on a ring (5)")
    p.add_argument("--width_multiplier", type=int, default=8, help="of ResNet-20 (8, the paper's)")
    p.add_argument("--train_samples", type=int, default=10_000, help="training images (10000)")
    p.add_argument("--test_samples", type=int, default=2_000, help="test images (2000)")
    p.add_argument("--overwrite", action="store_true", help="stages that are done, too")
    p.add_argument("--pack", type=Path, default=None, metavar="FILE.npz", help="write such a file and do nothing else")
    p.add_argument("--data_dir", default="datasets", help="where --pack finds CIFAR-10 (datasets)")
    p.add_argument("--stage", default=None, help=argparse.SUPPRESS)
    p.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    return p


@command
def main(argv: list[str] | None = None) -> int:
    o = parser().parse_args(argv)
    if o.pack:
        pack(o.pack, o.data_dir, o.train_samples, o.test_samples)
        return 0
    o.data = o.data and o.data.resolve()
    if o.data and not o.data.is_file():
        raise ValueError(f"--data {o.data} does not exist: --pack writes such a file")
    device = torch.device(o.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here (--device cpu --width_multiplier 1 shows what it "
                         "does)")
    target = Target(device, o.width_multiplier, o.agents, o.train_samples, o.test_samples, o.data)
    if o.stage:
        STAGES[o.stage].function(target, Results(o.out, o.stage), o.seconds)
        return 0
    out = o.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * o.minutes
    due = [STAGES[name] for name in STAGES if name in o.only and (o.overwrite or not is_done(out, name))]
    for k, stage in enumerate(due):
        left = ends - time.monotonic()
        seconds = left * stage.share / sum(later.share for later in due[k:])
        if left < 10:
            print(f"{stage.name}: no time is left for it (--minutes)")
            continue
        print(f"{stage.name}: at most {seconds:.0f} s ...", flush=True)
        began = time.monotonic()
        carry_out(stage, o, out, seconds)
        report(out, o, device)
        print(f"{stage.name}: {read(out, stage.name)[-1]['what']}, {time.monotonic() - began:.0f} s", flush=True)
    report(out, o, device)
    print(f"report: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
