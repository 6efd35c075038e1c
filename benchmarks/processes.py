"""One process with many threads, many processes with few, or all agents at once: what an iteration of main.py takes.

    python -m benchmarks.processes                                  # digits, ResNet-20 of width 1, all cores
    python -m benchmarks.processes --dataset=cifar10 --train_samples=2000 --num_models=5

Every run is a real one, from the command line to its run folder; seconds are those of metrics.csv: an iteration's
training with its evaluation, and its merge with its evaluation, of the iterations after the first. Settings take turns,
`--repeats` times, and medians are compared: read the ratios, on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def measure(options: Sequence[str], threads: int) -> dict[str, float]:
    """A run of main.py from random models: seconds per iteration of its phases, and of everything with the start.

    Three iterations, if `options` don't say more: the first is left out, and the last ends with the merge.
    """
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "main", "--randominit", "--diffinit", "--exp=2", "--training", "--merg_itr=3",
                   f"--data_dir={ROOT / 'datasets'}", f"--results_dir={home}", *options]
        began = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True,
                       stdout=subprocess.DEVNULL)
        taken = {"whole": time.perf_counter() - began}
        table, = Path(home).glob("**/metrics.csv")
        rows = [row for row in csv.DictReader(table.open()) if row["agent"] == "0" and int(row["iteration"]) > 1]
    for phase in ("trained", "merged"):
        taken[phase] = statistics.median(float(row["seconds"]) for row in rows if row["phase"] == phase)
    return taken


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="digits")
    p.add_argument("--train_samples", type=int, default=0)
    p.add_argument("--num_models", type=int, default=5)
    p.add_argument("--opt", default="DIMAT")
    p.add_argument("--match_data", default="local")
    p.add_argument("--merg_itr", type=int, default=4)
    p.add_argument("--batch_size", type=int, default=100)
    p.add_argument("--repeats", type=int, default=3)
    o = p.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(cores, o.num_models)
    settings = {"one process, one thread": (1, 1, 1), f"one process, {cores} threads": (1, cores, 1),
                f"{processes} processes, {cores} threads in all": (processes, cores, 1),
                f"one process, {cores} threads, at once": (1, cores, o.num_models),
                f"{processes} processes, their agents at once": (processes, cores, o.num_models)}
    options = [f"--dataset={o.dataset}", f"--train_samples={o.train_samples}", "--test_samples=500", "--epochs=2",
               f"--num_models={o.num_models}", "--width_multiplier=1", f"--opt={o.opt}",
               f"--match_data={o.match_data}", f"--merg_itr={o.merg_itr}", f"--batch_size={o.batch_size}"]
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for _ in range(o.repeats):
        for name, (workers, threads, at_once) in settings.items():
            taken[name].append(measure([*options, f"--workers={workers}", f"--train_at_once={at_once}"], threads))
    first = None
    print(f"{'':38}{'training':>18}{'merge':>18}{'whole run':>18}")
    for name, runs in taken.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in ("trained", "merged", "whole")}
        first = first or medians
        print(f"{name:38}" + "".join(f"{seconds:9.2f} s {seconds / first[key]:5.2f}x"
                                     for key, seconds in medians.items()))


if __name__ == "__main__":
    main()
