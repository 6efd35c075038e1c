"""The demo: five agents learn the digits, merging over a ring, and a picture shows what that brings.

Runs the real scripts, so that each line it prints can be typed by hand: `train` trains every agent on its own part of
the data, `main` lets them merge and train on with each method. Finished steps are not repeated, and an interrupted demo
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.parsing import local_epochs
from reports.drawing import LABELS, accuracy_figure, save_figure
from reports.partitions import counts_of, partition_figure
from reports.runs import Curve, accuracy_curve, read_metrics
from utils.progress import print_anywhere

ROOT = Path(__file__).resolve().parent
METHODS = {name: [f"--opt={name}"] for name in ("DIMAT", "COMMON", "WA", "NONE")} | {
    "COMMON, LED": ["--opt=COMMON", "--correction=LED"]}
DISTRIBUTIONS = {
    "iid": "IID: every agent sees all classes alike",
    "dirichlet": "Dirichlet 0.5: every agent sees its own mixture",
}
CLOSE = 1.0  # points; less is three of the 355 test images, and one seed proves nothing


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="example: python demo.py --merges 4 --seed 1 --out results/short.png",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("results/demo.png"), help="the picture")
    parser.add_argument("--results", type=Path, default=Path("results/demo"), help="folder of runs and checkpoints")
    parser.add_argument("--agents", type=int, default=5, help="agents on the ring")
    parser.add_argument("--epochs", type=int, default=10, help="epochs each agent trains alone first")
    parser.add_argument("--merges", type=int, default=6, help="merge iterations")
    parser.add_argument("--local_epochs", type=local_epochs, default=2, help="epochs between two merges")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    print_anywhere()
    return parser.parse_args(arguments)


def run_script(module: str, arguments: list[str], label: str) -> str:
    """Run `python -m module arguments`, show what it prints and return the folder named in its last line.

    The scripts run in the repository's folder, so paths go in and come out relative to it.
    """
    # In one piece, newline included: the other distribution's lines come in between.
    print(f"{label}$ python -m {module} {shlex.join(arguments)}\n", end="", flush=True)
    command = [sys.executable, "-u", "-m", module, *arguments]
    # One thread each: 8x8 images leave a second one nothing but waiting (on a busy machine, ten times as long).
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    last = ""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(label + line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        raise RuntimeError(f"python -m {module} failed with status {process.returncode}, see above")
    return last.partition(": ")[2]


def run_distribution(options: argparse.Namespace, distribution: str) -> dict[str, Curve]:
    """Pre-train the agents on one partition, then run every method from the same checkpoints: method -> curve."""
    home, label = os.path.relpath(options.results, ROOT), f"[{distribution}] "
    common = ["--dataset=digits", "--model=resnet20", "--width_multiplier=1", f"--num_models={options.agents}"]
    # Each agent has some 290 digits: the usual batch of 100 would give it three steps in an epoch.
    common += [f"--data_dist={distribution}", "--batch_size=50", f"--device={options.device}"]
    training = [f"--epochs={options.epochs}", f"--random_seed={options.seed}", f"--save_folder={home}/checkpoint"]
    checkpoints = run_script("train", [*common, *training], label)
    merging = [f"--ckp={checkpoints}", "--topology=ring", f"--merg_itr={options.merges}", "--training"]
    # A few hundred images are enough to match units and re-estimate BatchNorm; all of them take three times as long.
    merging += [f"--epochs={options.local_epochs}", "--match_samples=500", f"--seed={options.seed}"]
    merging += [f"--results_dir={home}", "--resume"]
    curves = {}
    for method, flags in METHODS.items():
        folder = run_script("main", [*flags, *common, *merging], label)
        curves[method] = accuracy_curve(read_metrics(ROOT / folder))
    return curves


def data_figure(options: argparse.Namespace) -> Path:
    """Draw which agent has how much of what, beside the demo's picture; the file."""
    path = options.out.with_name(f"{options.out.stem}_data{options.out.suffix}")
    panels = [counts_of({"dataset": "digits", "num_models": options.agents, "data_dist": name, "seed": options.seed})
              for name in DISTRIBUTIONS]
    save_figure(partition_figure(dict(panels)), path)
    return path


def verdict(curves: dict[str, Curve]) -> str:
    """Who is ahead after the last merge, in a sentence."""
    final = {method: float(curve.mean[-1]) for method, curve in curves.items()}
    first, second, *_ = sorted(final, key=final.get, reverse=True)
    gap = final[first] - final[second]
    names = [LABELS.get(method, method) for method in (first, second)]
    if gap < CLOSE:
        return f"{names[0]} and {names[1]} are level (less than {CLOSE:g} point apart)"
    return f"{names[0]} is ahead, {gap:.1f} points above {names[1]}"


def table(results: dict[str, dict[str, Curve]]) -> str:
    """Mean test accuracy over the agents (percent) after each merge, per method, and who is ahead at the end."""
    lines = ["Test accuracy in percent, mean over the agents, after each merge (0: before the first)"]
    for distribution, curves in results.items():
        iterations = next(iter(curves.values())).iterations
        lines += ["", f"{distribution:<14}" + "".join(f"{k:>6}" for k in iterations) + "   agents at the end"]
        for method, curve in curves.items():
            means = "".join(f"{value:>6.1f}" for value in curve.mean)
            lines.append(f"{LABELS.get(method, method):<14}{means}   {curve.low[-1]:.1f} to {curve.high[-1]:.1f}")
        lines.append(f"=> {distribution}: {verdict(curves)}.")
    lines += ["", "Right after local training (`trained` above) accuracy is lower: BatchNorm's running statistics lag.",
              "A merge re-estimates them. One seed and 355 test images: read gaps of a point or two with care."]
    return "\n".join(lines)


def main() -> None:
    options = parse_options()
    start = time.perf_counter()
    with ThreadPoolExecutor() as side_by_side:
        curves = side_by_side.map(lambda name: run_distribution(options, name), DISTRIBUTIONS)
        results = dict(zip(DISTRIBUTIONS, curves, strict=True))
    panels = {DISTRIBUTIONS[name]: curves for name, curves in results.items()}
    caption = (
        f"{options.agents} agents on a ring, ResNet-20 (width 1), digits; accuracy right after each merge: "
        "mean (line), lowest to highest agent (band)"
    )
    accuracy_figure(panels, options.out, caption)
    print(f"\n{table(results)}\n\nwho has what: {data_figure(options)}")
    print(f"picture: {options.out} ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        raise SystemExit(f"demo: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ndemo: interrupted; the same command goes on from here") from None
