"""Run the scripts as a user would."""

import contextlib
import csv
import importlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
TINY = ["--dataset=digits", "--width_multiplier=1", "--train_samples=200"]


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def script(name: str, *arguments: str, cwd: Path, check: bool = True) -> Result:
    """What `python -m name ...` does in `cwd` with one thread, but in this process: importing torch takes seconds."""
    out, err, before, threads = io.StringIO(), io.StringIO(), Path.cwd(), torch.get_num_threads()
    os.chdir(cwd)
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = importlib.import_module(name).main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    finally:
        torch.set_num_threads(threads)
        os.chdir(before)
    result = Result(code, out.getvalue(), err.getvalue())
    assert code == 0 or not check, f"{name} {arguments} exited {code}\n{result.stdout}\n{result.stderr}"
    return result


def process(name: str, *arguments: str, cwd: Path, stdout: Any = subprocess.PIPE, **how: Any) -> subprocess.Popen:
    """A real process, for those who want to kill it; one thread, its lines on a pipe."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(cwd)}
    return subprocess.Popen([sys.executable, "-m", name, *arguments], cwd=cwd, text=True, stdout=stdout,
                            env=os.environ | ours, **how)


@contextlib.contextmanager
def launched(*launcher: str, program: str, arguments: Sequence[str], home: Path) -> Iterator[subprocess.Popen]:
    """`python -m <launcher> program <arguments>`, killed with all its children at the end; output in home/log."""
    with open(home / "log", "a") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", *launcher, str(ROOT / program), *arguments], cwd=home, stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"},
            start_new_session=True)
    try:
        yield running
    finally:
        # Workers are in sessions of their own, and a stopped one hears of no other signal.
        for pid in (*children(running.pid), running.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.wait()


def wait_for(text: str, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def children(process: int) -> list[int]:
    """A process's children as they were started: a launcher's, in order of their rank."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    return sorted(map(int, listed.read_text().split())) if listed.exists() else []


def descendants(process: int) -> list[int]:
    return [pid for child in children(process) for pid in (child, *descendants(child))]


def wait_until_gone(processes: Sequence[int], seconds: float = 30) -> None:
    def runs(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    end = time.monotonic() + seconds
    while left := [pid for pid in processes if runs(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def folder_of(said: Result | str, home: Path) -> Path:
    """The run folder that a script named last, run in `home`."""
    printed = said if isinstance(said, str) else said.stdout
    return home / re.findall("^results: (.*)$", printed, re.MULTILINE)[-1]


def home_of(folder: Path) -> Path:
    """Where the script ran that made this folder of results or checkpoints."""
    return next(above.parent for above in folder.parents if above.name in ("results", "checkpoint"))


def copied(folder: Path, home: Path) -> Path:
    """The folder in a copy of all that lies where it was made."""
    shutil.copytree(home_of(folder), home)
    return home / folder.relative_to(home_of(folder))


def rows_of(folder: Path) -> list[dict]:
    """The rows of a run's metrics.csv without their timings."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader((folder / "metrics.csv").open())]


def equal_runs(a: Path, b: Path) -> None:
    """All saved tensors, accuracy matrices and metrics.csv apart from its timings."""
    assert rows_of(a) == rows_of(b)
    for kind in ("**/*.pth", "accuracy_matrix/*.csv", "merge_stats.csv"):
        files = sorted(f.relative_to(a) for f in a.glob(kind))
        assert (files or kind == "merge_stats.csv") and files == sorted(f.relative_to(b) for f in b.glob(kind))
        for file in files:
            assert (a / file).read_bytes() == (b / file).read_bytes(), file
    x, y = (torch.load(f / "state.pt", weights_only=True) | {"metrics_bytes": 0} for f in (a, b))  # holds timings
    equal(x, y)


def equal(x: object, y: object) -> None:
    """Nested dicts and lists whose tensors are equal bit by bit."""
    assert type(x) is type(y)
    if isinstance(x, dict):
        assert x.keys() == y.keys()
        for key in x:
            equal(x[key], y[key])
    elif isinstance(x, list):
        for left, right in zip(x, y, strict=True):
            equal(left, right)
    else:
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
