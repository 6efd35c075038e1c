"""A run folder: what an experiment writes, and how it continues after an interruption.

`state.pt` is the one commit point and is written last; whatever lies beyond it is dropped by a resume.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.options import MAIN, Settings, free, variant
from models.training import Diverged, EpochStats, Evaluation
from network.topology import short_name
from storage.files import (
    SCHEMA,
    as_level,
    claim,
    clear,
    level,
    load_state,
    load_yaml,
    open_regular,
    read_text,
    save_state,
    save_tensors,
    save_text,
    save_yaml,
    whole_numbers,
    writing,
)
from utils.progress import say

METRICS = ("iteration", "phase", "agent", "test_accuracy", "test_loss", "train_accuracy", "train_loss",
           "consensus_distance", "average_model_accuracy", "samples", "steps", "seconds", "bytes_sent",
           "bytes_received", "took_part", "merged_with")
PHASES = ("initial", "merged", "trained")  # in the order in which an iteration writes them
MERGE_STATS = ("iteration", "agent", "neighbour", "group", "units", "correlation", "moved")
STATE = {"iteration": int, "phase": str, "metrics_bytes": int, "samples": [int], "steps": [int],
         "states": [{str: Tensor}], "agents?": [int], "orders?": [int], "memory?": [{str: Tensor}],
         "correction?": [{str: Tensor}], "since?": [{str: Tensor}],
         "tail?": [{str: Tensor}], "tail_count?": [int]}


def run_folder(o: Settings, matter: dict[str, Any], script: str = MAIN) -> Path:
    """results/<dataset>/<model>/<data_dist>/<init>/<opt>/<topology>_<N>/epochs_<E>/<variant>/seed_<seed>.

    The variant names what is unusual of the options that `matter`, which are None where they have no say.
    """
    init = "trained" if not o["randominit"] else "different_random" if o["diffinit"] else "same_random"
    topology = short_name(o["topology"])
    return Path(o["results_dir"]).joinpath(*map(level, (
        as_level(o["dataset"]), as_level(o["model"]), o["data_dist"], init, o["opt"], f"{topology}_{o['num_models']}",
        f"epochs_{o['epochs']}" if o["training"] else "no_training", variant(matter, script) or "default",
        f"seed_{o['seed']}")))


def circumstances(command: str) -> dict[str, Any]:
    """What config.yaml says of the machine: command line, versions and threads."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    return {"command": command, "versions": versions, "num_threads": torch.get_num_threads()}


def is_part(folder: Path) -> bool:
    """Whether a folder is an agent's part of a run whose agents live on their own."""
    return re.fullmatch(r"agent_\d+", folder.name) is not None


def contradictions(old: Mapping[str, Any], config: Mapping[str, Any], silent: Collection[str]) -> list[str]:
    """The options in which a run that was written down as `old` isn't this one; those in `silent` have no say in it."""
    may_differ = {*free(), *silent}
    return [key for key in config if key not in may_differ and key in old and old[key] != config[key]]


def how_far(path: Path) -> tuple[int, int]:
    """How far the run in this folder is: its last finished iteration, and the bytes of its metrics.csv then; zeros if
    nothing is finished. No tensor is read: a sweep looks into hundreds of folders."""
    file = path / "state.pt"
    if not file.exists():
        return 0, 0
    said = whole_numbers(file, ("schema", "iteration", "metrics_bytes"))
    if said.get("schema", 0) > SCHEMA or not {"iteration", "metrics_bytes"} <= said.keys():
        said = read_state(file)  # which says what is wrong with it
    return said["iteration"], said["metrics_bytes"]


def read_state(file: Path) -> dict[str, Any]:
    """A run's state. Raises ValueError, naming the file, for anything else."""
    state = load_state(file, STATE)
    lists = {key: value for key, value in state.items() if isinstance(value, list)}
    counts = [state["iteration"], state["metrics_bytes"], *state["samples"], *state["steps"],
              *state.get("agents", ()), *state.get("tail_count", ())]
    if state["phase"] not in PHASES or min(counts) < 0 or len(set(map(len, lists.values()))) > 1:
        raise ValueError(f"{file} is not a state of this program: its phase, counts or numbers of agents are wrong")
    return state


def _number(file: Path) -> int:
    """K of a file called iteration_K...; -1 for another."""
    found = re.match(r"iteration_(\d+)", file.name, re.ASCII)
    return int(found[1]) if found else -1


class RunFolder:
    """Opens a run folder, fresh or to continue; every write is atomic or dropped by the next resume.

    No other process can open it before the `with` block ends. Raises ValueError when the folder holds a run of other
    options (those in `silent` have no say), an unfinished run without `resume`, or no state for `start`.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, silent: Collection[str] = (), resume: bool, start: int,
                 overwrite: bool, tensorboard: bool = False):
        self.path = path
        self.board = None
        self.make_board = _summary_writer() if tensorboard else None
        self.lock = claim(path)
        if overwrite:
            clear(path)
        old = load_yaml(path / "config.yaml")
        if old and type(old.get("merg_itr")) is not int:
            raise ValueError(f"{path}/config.yaml says merg_itr: {old.get('merg_itr')}, so it is not of a run: "
                             "restore it, or give --overwrite")
        for key in contradictions(old, config, silent):
            raise ValueError(f"{path} holds a run with {key}={old[key]}, not {config[key]}: "
                             "choose another --results_dir, or --overwrite to delete it")
        if old and old.get("num_threads") != config["num_threads"]:
            print(f"note: begun with {old.get('num_threads')} threads, now {config['num_threads']}: "
                  "figures may differ in the last digits")
        self.finished = self._last_finished(start)
        # Once the run is past `start`, resuming goes on from where it is.
        self.start = start = 0 if resume and self.finished > start else start
        if start and not self._state_file(start):
            raise ValueError(f"--merg_itr_init {start}: {path} has no state after iteration {start}; "
                             f"there is {self._kept() or 'none'} (--keep all keeps every one)")
        begun = (path / "metrics.csv").exists()
        if begun and not (resume or start) and self.finished < config["merg_itr"]:
            kind = "a shorter" if old.get("merg_itr") == self.finished else "an interrupted"
            raise ValueError(f"{path} holds {kind} run ({self.finished} of {config['merg_itr']} iterations are done): "
                             "give --resume to continue it, or --overwrite to delete it")
        if not old:
            save_yaml(path / "config.yaml", config)
        else:
            length = ("merg_itr", "epochs") if old["merg_itr"] < config["merg_itr"] or start else ()
            # `launch` is how a group that is started again knows its folder.
            now = old | {key: config.get(key) for key in (*length, "launch")}
            if now != old:
                save_yaml(path / "config.yaml", now)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.board:
            self.board.close()
        self.lock.__exit__(*exception)

    def _last_finished(self, start: int) -> int:
        """What state.pt says; where that can't be read, `start`, if its state was kept."""
        try:
            return how_far(self.path)[0]
        except ValueError:
            if start and self._kept_file(start).exists():
                return start
            raise

    def _kept_file(self, iteration: int) -> Path:
        return self.path / "states" / f"iteration_{iteration:04d}.pt"

    def _kept(self) -> list[int]:
        kept = {_number(file) for file in (self.path / "states").glob("iteration_*.pt")}
        return sorted({k for k in kept if 0 <= k <= self.finished} | {self.finished} - {0})

    def _state_file(self, iteration: int) -> Path | None:
        """The state after an iteration that is finished: state.pt says which are."""
        if self._kept_file(iteration).exists() and iteration <= self.finished:
            return self._kept_file(iteration)
        return self.path / "state.pt" if iteration == self.finished else None

    def load(self) -> dict[str, Any] | None:
        """The state to continue from (None: from the beginning), with everything beyond it dropped."""
        file = self._state_file(self.start) if self.start else self.path / "state.pt"
        state = read_state(file) if file.exists() else None
        metrics = self.path / "metrics.csv"
        iteration, length = (state["iteration"], state["metrics_bytes"]) if state else (0, 0)
        if length > (metrics.stat().st_size if metrics.exists() else 0):
            raise ValueError(f"{metrics} is shorter than when iteration {iteration} was finished: restore it, or give "
                             "--overwrite")
        if self.finished > iteration:
            print(f"note: iterations {iteration + 1} to {self.finished} are dropped and done again")
            save_state(self.path / "state.pt", state)  # first: it says what counts
            for stale in self.path.glob("*/model_*.pth"):
                stale.unlink()
            self.save_models(state["phase"], dict(zip(self.agents(state), state["states"], strict=True)))
        if metrics.exists():
            os.truncate(metrics, length)
        if self.make_board:  # what lies beyond the state is hidden from the curves
            self.board = self.make_board(str(self.path / "tensorboard"), purge_step=iteration + 1)
        merges = self.path / "merge_stats.csv"
        if merges.exists():
            lines = read_text(merges).splitlines(keepends=True)
            kept = [line for line in lines[1:] if re.fullmatch(r"(\d+),.*\n", line, re.ASCII)
                    and int(line.partition(",")[0]) <= iteration]
            merges.unlink() if not kept else save_text(merges, "".join([lines[0], *kept]))
        for stale in (*self.path.glob("accuracy_matrix/*.csv"), *self.path.glob("states/*.pt")):
            if _number(stale) > iteration:
                stale.unlink()
        return state

    @staticmethod
    def agents(state: dict[str, Any]) -> list[int]:
        """Whose models a state holds: everybody's, as a rule."""
        return state.get("agents", list(range(len(state["states"]))))

    def record(self, iteration: int, phase: str, rows: list[dict[str, Any]], matrix: np.ndarray) -> None:
        """Append one row per agent to metrics.csv and write the accuracy matrix (agents, N + 1)."""
        _append(self.path / "metrics.csv", METRICS, [{"iteration": iteration, "phase": phase} | row for row in rows])
        if self.board:
            self._draw(iteration, phase, rows)
        header = ",".join(["agent", *(f"part_{j}" for j in range(matrix.shape[1] - 1)), "all"])
        lines = [",".join([str(row["agent"]), *(f"{value:.4f}" for value in values)])
                 for row, values in zip(rows, matrix, strict=True)]
        save_text(self.path / "accuracy_matrix" / f"iteration_{iteration:04d}_{phase}.csv",
                  "\n".join([header, *lines]) + "\n")

    def _draw(self, iteration: int, phase: str, rows: list[dict[str, Any]]) -> None:
        """Live curves: every column's mean over the agents, and each agent's test accuracy."""
        for key in ("test_accuracy", "test_loss", "train_accuracy", "train_loss", "consensus_distance",
                    "average_model_accuracy", "bytes_sent"):
            values = [row[key] for row in rows if row[key] != ""]
            if values:
                self.board.add_scalar(f"{phase}/{key}", float(np.mean(values)), iteration)
        for row in rows:
            self.board.add_scalar(f"{phase}, agents/{row['agent']}", row["test_accuracy"], iteration)
        self.board.flush()

    def record_merge(self, iteration: int, stats: list[dict[str, Any]]) -> None:
        """Append what a merge matched to merge_stats.csv: a row for every agent, neighbour and group."""
        rows = [{"iteration": iteration} | row | {
            key: "" if row[key] is None else f"{row[key]:.4f}" for key in ("correlation", "moved")} for row in stats]
        if rows:
            _append(self.path / "merge_stats.csv", MERGE_STATS, rows)

    def save_models(self, phase: str, states: Mapping[int, dict[str, Tensor]]) -> None:
        """The agents' latest models of a phase, as plain state dicts."""
        for i, state in states.items():
            save_tensors(self.path / phase / f"model_{i}.pth", {k: t.cpu() for k, t in state.items()})

    def commit(self, state: dict[str, Any], keep: bool) -> None:
        """Everything up to here is done: write state.pt, and with `keep` a copy of it for --merg_itr_init."""
        state = state | {"metrics_bytes": (self.path / "metrics.csv").stat().st_size}
        if keep:
            save_state(self._kept_file(state["iteration"]), state)
        save_state(self.path / "state.pt", state)


def _summary_writer() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    return SummaryWriter


def _append(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Rows at the end of a CSV file, on the disk when this returns. A file that was begun with fewer columns keeps to
    them."""
    begun = path.exists() and path.stat().st_size > 0
    if begun:
        with open_regular(path) as file:
            begun_with = file.readline(1 << 12).decode(errors="replace").strip().split(",")
        if not set(begun_with) <= set(columns):
            raise ValueError(f"{path} begins with another line than a run's: restore it, or give --overwrite")
        columns = begun_with
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    if not begun:
        writer.writeheader()
    writer.writerows(rows)
    with writing(path), open(path, "a", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def consensus_distance(states: Sequence[dict[str, Tensor]], parameters: Iterable[str]) -> float:
    """Root of the mean squared distance of the agents' `parameters` (names; buffers don't count) to their average."""
    total = 0.0
    for name in parameters:
        tensors = torch.stack([state[name].float() for state in states])
        total += float((tensors - tensors.mean(0)).square().sum()) / len(states)
    return math.sqrt(total)


def accuracy_matrix(evaluations: Sequence[Evaluation], test_parts: Sequence[np.ndarray]) -> np.ndarray:
    """(agents, N + 1): each agent's accuracy on the test images of each part, and on all; NaN for a part without any.

    One product for all of them: a thousand agents have a million entries.
    """
    correct = torch.stack([e.correct for e in evaluations]).cpu().numpy().astype(np.float64)
    belongs = np.zeros((correct.shape[1], len(test_parts) + 1))
    for j, part in enumerate(test_parts):
        belongs[part, j] = 1
    belongs[:, -1] = 1
    with np.errstate(invalid="ignore"):
        return 100 * (correct @ belongs / belongs.sum(axis=0))


def record_agents(folder: RunFolder, iteration: int, phase: str, agents: Sequence[int],
                  evaluations: Sequence[Evaluation], of_average: Evaluation | None, test_parts: Sequence[np.ndarray],
                  began: float, stats: Sequence[EpochStats | None], *, consensus_distance: float | None,
                  **per_agent: Sequence[Any]) -> None:
    """Write a phase's figures down, and say them in one line.

    agents: those that the folder is about; evaluations: each one's on the whole test set; of_average: of the plain
    average of all models, None (as consensus_distance) for an agent that doesn't know all; test_parts: the test images
    that go with each agent's data; began: `time.perf_counter()` at the phase's start; stats: of each one's last local
    epoch, None or no steps where there was none; per_agent: further columns of metrics.csv, one value for each agent.
    Raises Diverged, before anything is written, when an agent's loss is not finite.
    """
    for i, evaluation in zip(agents, evaluations, strict=True):
        if not math.isfinite(evaluation.loss):
            raise Diverged(f"agent {i}, iteration {iteration} ({phase}): the test loss is {evaluation.loss}; "
                           "the run folder keeps what was finished before")
    matrix = accuracy_matrix(evaluations, test_parts)
    seconds = time.perf_counter() - began
    folder.record(iteration, phase, [{
        "agent": i, "test_accuracy": e.accuracy(), "test_loss": e.loss,
        "train_accuracy": trained.accuracy if trained and trained.steps else "",
        "train_loss": trained.loss if trained and trained.steps else "",
        "consensus_distance": "" if consensus_distance is None else consensus_distance,
        "average_model_accuracy": of_average.accuracy() if of_average else "",
        "seconds": round(seconds, 3), **{key: values[k] for key, values in per_agent.items()},
    } for k, (i, e, trained) in enumerate(zip(agents, evaluations, stats, strict=True))], matrix)
    accuracy = matrix[:, -1]
    spread = f" ({accuracy.min():.2f} to {accuracy.max():.2f})" if of_average else ""
    consensus = f", consensus distance {consensus_distance:.3f}" if of_average else ""
    say(f"{'' if of_average else f'agent {agents[0]}, '}iteration {iteration:>3} {phase:<7}: test accuracy "
        f"{accuracy.mean():6.2f} %{spread}{consensus}, {seconds:.1f} s")
