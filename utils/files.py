"""Atomic writing, checked reading, and the level of a path that names the unusual options of a run."""

from __future__ import annotations

import csv
import io
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout

# Options that change results, with the paper's values. A path names those that differ from this table; it is frozen,
# so that a later change of a default never makes an old folder mean something else.
REFERENCE = {
    "width_multiplier": 8, "train_samples": 0, "test_samples": 0, "holdout": 0, "alpha": None, "partition_seed": None,
    "phase": None, "imgntdir": "tiny-imagenet-200",
    "batch_size": 100, "optim": "adam", "lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "amp": "none",
    "match_data": "all", "match_samples": 0, "match_augment": True, "match_at": "last", "bn_reset": "both",
    "pretrain_epochs": 100, "pretrain_seed": None, "pretrain_init": "diff",
    "wire": "fp32", "link_failure": 0.0, "agent_failure": 0.0, "exchanged_by": None, "staleness": 0,
    "match_prior": "none", "align": "in_turn", "align_every": 0, "root": None, "robust": "none", "max_distance": 10.0,
}
OF_MERGES = ("optim", "match_data", "match_samples", "match_augment", "match_at", "bn_reset", "wire", "link_failure",
             "agent_failure", "exchanged_by", "staleness", "match_prior", "align", "align_every", "root", "robust",
             "max_distance")
BASELINE_REFERENCE = {key: value for key, value in REFERENCE.items() if key not in OF_MERGES} | {
    "lr": 0.01, "lr_decay": 0.981, "momentum": 0.9, "mix_buffers": True, "cga_form": "paper",
    "cga_scope": "model", "eval_bn": "running", "bn_samples": 0,
}
SHORT = {"width_multiplier": "width"}


def circumstances(command: str) -> dict[str, Any]:
    """What config.yaml says of the machine: command line, versions and threads."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    return {"command": command, "versions": versions, "num_threads": torch.get_num_threads()}


def variant(options: dict[str, Any], reference: dict[str, Any] = REFERENCE) -> str:
    """'width=1,alpha=0.5' for the options that differ from the reference table; '' if none does."""
    if options.get("imgntdir"):  # the folder's name says which data set it is, not where it lies
        options = options | {"imgntdir": Path(options["imgntdir"]).resolve().name}
    return ",".join(
        f"{SHORT.get(key, key)}={options[key]}"
        for key, usual in reference.items() if key in options and options[key] not in (None, usual)
    )


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """`write(file)` into a temporary file beside `path`, flushed to disk, then moved there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, content: Any) -> None:
    """torch.save through an open file, so that the bytes don't depend on the temporary name."""
    write_atomically(path, lambda file: torch.save(content, file))


def save_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def save_yaml(path: Path, content: dict) -> None:
    save_text(path, yaml.safe_dump(content, sort_keys=False))


def save_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV file of these columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save_text(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none when there is no such file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def load_yaml(path: Path) -> dict:
    """The mapping in `path`; {} when there is no such file. Raises ValueError, naming the file, for anything else."""
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} can't be read: expected 'option: value' lines")
    return content


def load_tensors(path: Path, device: torch.device | str = "cpu", mmap: bool = False) -> Any:
    """torch.load without running code from the file. Raises ValueError that names an unreadable file.

    mmap: leave tensors on the disk until they are looked at.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises half a dozen types for a broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read as a checkpoint (truncated or of another kind?): {reason}") from error


def lock(file: Path, timeout: float = -1) -> AbstractContextManager:
    """Holds `file` until the context or this process ends; -1 waits for whoever holds it.

    Raises filelock.Timeout after `timeout` seconds, another OSError where it can't be made or locked.
    """
    try:
        return FileLock(file).acquire(timeout=timeout)
    except NotImplementedError as error:  # an older filelock, on a file system that knows no locks
        raise OSError(f"no locks there: {error}") from error


def claim(folder: Path) -> AbstractContextManager:
    """Make `folder`, and keep other processes from writing to it until the context or this process ends.

    Raises ValueError now rather than after hours of work when it can't be written to, or another process is at it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claimed = lock(folder / ".lock", timeout=0)
        for half_written in folder.glob("**/.*.tmp"):  # by a process that was killed
            half_written.unlink()
        return claimed
    except Timeout:
        raise ValueError(f"another process is writing to {folder}: wait for it, or stop it") from None
    except OSError as error:
        raise ValueError(f"can't write to {folder}: {error.strerror or error}") from None


def clear(folder: Path) -> None:
    """Delete what is in a claimed folder."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
