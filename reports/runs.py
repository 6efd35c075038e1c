"""Run folders, read back: what was run, so that it can be compared, and its figures. Tables and pictures start here."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.options import BASE, MAIN, OPTIONS, SHORT, TRAIN, dealt, free, is_baseline, names, silent, usual
from experiments.run_folder import PHASES, is_part
from network.topology import short_name
from storage.files import load_yaml, read_rows

# Change no figure. Where a folder of images lies doesn't either, but its name says which images they are.
IGNORED = free() - {"imgntdir"} | {"seed", "first_models", "initial_models", "memory_layout"}
# Go with the seed, or stay: each is one experiment.
FOLLOWERS = (*names(lambda option: option.name.endswith("_seed") and MAIN in option.scripts), "pretrain_folder")
CHECKPOINT = re.compile(r"(same|diff)_initialization/.*?num_epochs_(\d+)/(?:([^/]*=[^/]*)/)?random_seed_(\d+)/*$")


@dataclass(frozen=True)
class Curve:
    """A figure per iteration over the agents: `iterations` (K,) ascending; `mean`, `low`, `high` (K,)."""

    iterations: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def read_metrics(path: str | os.PathLike, columns: Collection[str] = ()) -> list[dict[str, str]]:
    """The whole rows of a run's `metrics.csv`, which must have these columns; `path` is that file or the run's folder.

    Raises FileNotFoundError where there is none, ValueError where it has no rows or is no table.
    """
    path = Path(path)
    path = path / "metrics.csv" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}: is this the folder of a run?")
    rows = read_rows(path, columns)
    if not rows:
        raise ValueError(f"{path} has no rows yet: let the run finish an iteration first")
    return rows


def accuracy_curve(
    rows: list[dict[str, str]],
    column: str = "test_accuracy",
    phases: tuple[str, ...] = ("initial", "merged"),
) -> Curve:
    """Mean, lowest and highest `column` over the agents, for every iteration that has rows in one of `phases`.

    The default reads the agents as they came (iteration 0) and right after each merge, the point the paper plots.
    Raises ValueError where no row fits, or a column is missing.
    """
    values: dict[int, list[float]] = {}
    if rows and (missing := {"iteration", "phase", column} - rows[0].keys()):
        raise ValueError(f"no column {min(missing)}")
    for row in rows:
        if row["phase"] in phases and row[column] != "":
            values.setdefault(int(row["iteration"]), []).append(float(row[column]))
    if not values:
        raise ValueError(f"no {column} in the phases {', '.join(phases)}")
    iterations = sorted(values)
    reduce = [[function(values[k]) for k in iterations] for function in (np.mean, np.min, np.max)]
    return Curve(np.array(iterations), *map(np.array, reduce))


# --------------------------------------------------------------------------------------------------------------------
# What was run


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder: the options in its config.yaml and the rows of its metrics.csv."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, str]]

    @property
    def method(self) -> str:
        return self.config["opt"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def agents(self) -> int:
        return self.config["num_models"]

    @functools.cached_property
    def options(self) -> dict[str, Hashable]:
        """Its options as other runs' can be compared with them."""
        return comparable(self.config)

    @property
    def phases(self) -> tuple[str, str]:
        """Where its curves have their points: at the start and after each merge; base_lines.py only trains."""
        return ("initial", "trained" if is_baseline(self.config) else "merged")

    @property
    def local_epochs(self) -> float:
        """Epochs of an agent from one point of the curve to the next; 0 for merges without training between."""
        config = self.config
        return config.get("num_epochs") or (config.get("epochs", 0) if config.get("training") else 0)

    @property
    def panel(self) -> tuple[str, ...]:
        """(data set, model, topology, agents, data distribution): runs that share it can be drawn together."""
        config = self.config
        return (config["dataset"], config["model"], short_name(config["topology"]), str(self.agents), dealt(config))

    @property
    def last(self) -> int:
        """The last iteration there are figures of."""
        return max(int(row["iteration"]) for row in self.rows)

    def whole(self) -> list[dict[str, str]]:
        """The rows of those iterations of which every agent has one."""
        phases: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in self.rows:
            phases.setdefault((row["iteration"], row["phase"]), []).append(row)
        return [row for rows in phases.values() if len(rows) == len({int(row["agent"]) for row in rows}) == self.agents
                for row in rows]

    def curve(self, column: str) -> Curve:
        """`column` over the agents, at the points of this run's curves."""
        return accuracy_curve(self.rows, column, self.phases)


def comparable(config: Mapping[str, Any]) -> dict[str, Hashable]:
    """A config.yaml's options, None for those that have no say, lists as a short name, and the pre-training's.

    What it lacks is younger than it and has the value of the reference table.
    """
    of_old = {key: value for key, value in usual(BASE if is_baseline(config) else MAIN).items()
              if not key.startswith("pretrain_")}
    o = of_old | {str(key): _hashable(value) for key, value in config.items()}
    o["topology"] = short_name(str(o["topology"]))
    o["imgntdir"] = Path(str(o["imgntdir"] or usual(MAIN)["imgntdir"])).name
    if o["partition_seed"] is None:
        o["partition_seed"] = o["seed"]
    if o.get("ckp") and not o.get("randominit"):
        o |= pretraining(Path(str(o["ckp"])))
    return o | dict.fromkeys(without_say(o))


def without_say(o: Mapping[str, Any]) -> set[str]:
    """The options that change no figure of a run with these."""
    return silent(o) - {"epochs", *FOLLOWERS} | (set() if o.get("training", True) else {"epochs"})


def pretraining(ckp: Path) -> dict[str, Hashable]:
    """What the path of the checkpoints says of how they were made and a run's own options don't."""
    found = CHECKPOINT.search(ckp.as_posix())
    if not found:
        return {"pretrain_folder": ckp.as_posix()}
    init, epochs, unusual, seed = found.groups()
    was = dict(setting.partition("=")[::2] for setting in (unusual or "").split(",") if setting)
    trained = names(lambda option: option.group == "training" and TRAIN in option.scripts and option.name != "epochs")
    own = {*trained, *was} - {
        SHORT.get(key, key) for key in names(lambda option: option.inherited and not option.may_change)}
    return {"pretrain_init": init, "pretrain_epochs": int(epochs), "pretrain_seed": int(seed)} | {
        f"pretrain_{key}": was.get(key, str(usual(MAIN).get(key))) for key in sorted(own)}


def _hashable(option: Any) -> Hashable:
    return option if isinstance(option, Hashable) else f"#{hashlib.sha1(repr(option).encode()).hexdigest()[:6]}"


def of_seed(value: Hashable, seed: int) -> str:
    """An option of FOLLOWERS with SEED for the run's own: the same for all runs in which it goes with the seed."""
    own = rf"(?<!\d){seed}(?!\d)"
    return re.sub(rf"{own}(?!.*{own})", "SEED", str(value))


# --------------------------------------------------------------------------------------------------------------------
# Finding them


def read_run(folder: Path) -> Run:
    """Raises OSError or ValueError, saying why, where `folder` holds no run. A line that was cut short is left out."""
    config = {key: _printable(value) if isinstance(value, str) else value
              for key, value in load_yaml(folder / "config.yaml").items()}
    script = BASE if is_baseline(config) else MAIN
    read = {option.name: option for option in OPTIONS if option.read}
    for key in config.keys() & read.keys():
        may_lack = read[key].read == "where said" and config[key] is None
        if not (may_lack or read[key].could_be(config[key], script)):
            raise ValueError(f"config.yaml says {key}: {config[key]!r}")
    for key, option in read.items():
        if option.read == "always" and key not in config:
            raise ValueError(f"config.yaml has no {key}")
    rows = read_metrics(folder, ("iteration", "phase", "agent"))
    for row in rows:
        try:
            # Agents on their own don't know how far apart they are, and in old files nobody what was sent.
            figures = [float(row[key]) for key in ("test_accuracy", "consensus_distance", "bytes_sent")
                       if row.get(key, "") != "" or (key in row and key == "test_accuracy")]
            sound = all(map(math.isfinite, figures)) and 0 <= int(row["iteration"]) < 10**9 and row["phase"] in PHASES
            sound = sound and 0 <= int(row["agent"]) < config["num_models"]
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(f"metrics.csv has a line that is not of a run: {','.join(map(str, row.values()))[:80]}")
    run = Run(folder, config, rows)
    if not any(row["phase"] in run.phases for row in rows):
        raise ValueError(f"metrics.csv has no rows of the phases {' and '.join(run.phases)}")
    return run


def _printable(text: str) -> str:
    """Line breaks, escape codes and what no file can hold written out: names go into tables, pictures and terminals."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def find_runs(paths: Iterable[str | os.PathLike],
              only: Mapping[str, Sequence[str]] | None = None) -> tuple[list[Run], list[str]]:
    """All runs in and below `paths`, and notes about what was skipped.

    only: option -> values, as somebody writes them; other runs don't count.
    Raises FileNotFoundError for no such path, ValueError where there is no run.
    """
    folders: dict[Path, Path] = {}  # by where they really are: paths may overlap
    notes = []

    def unreadable(error: OSError) -> None:
        notes.append(f"skipped {error.filename}: {error.strerror}")

    paths = list(map(Path, paths))
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: give a folder that holds run folders")
        path = path.parent if path.is_file() else path
        for root, below, files in os.walk(path, onerror=unreadable):
            below[:] = sorted(name for name in below if not is_part(Path(name)))
            if "metrics.csv" in files:
                folders.setdefault(Path(root).resolve(), Path(root))
    runs = []
    for folder in folders.values():
        try:
            if not (folder / "config.yaml").is_file():
                raise ValueError("there is a metrics.csv, but no config.yaml beside it")
            runs.append(read_run(folder))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).replace(f"{folder}{os.sep}", "")
            notes.append(f"skipped {folder}: {reason}")
    if not runs:
        raise ValueError(f"no runs (config.yaml beside metrics.csv) below {', '.join(map(str, paths))}"
                         + (f"; {notes[0]}" if notes else ""))
    return only_those(runs, only or {}), notes


def only_those(runs: list[Run], wanted: Mapping[str, Sequence[str]]) -> list[Run]:
    """The runs with one of the `wanted` values of each option. Raises ValueError for one that no run has."""
    for name, texts in wanted.items():
        key = {"random_seed": "seed", "data": "dataset"}.get(name, name)
        there = {run.options.get(key) for run in runs}
        if there == {None}:
            raise ValueError(f"--only {name}: no run has such an option")
        for text in texts:
            if not any(_is(value, text) for value in there):
                known = ",".join(sorted(map(str, there)))
                raise ValueError(f"--only {name}={text}: no run has that; there are {key}={known}")
        runs = [run for run in runs if any(_is(run.options.get(key), text) for text in texts)]
    return runs


def _is(value: Hashable, text: str) -> bool:
    """Whether an option's value is what somebody wrote."""
    try:
        return float(text) == float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value).lower() == text.lower()
