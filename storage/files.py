"""Atomic writing, checked reading, and the level of a path that names the unusual options of a run."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import pickletools
import re
import reprlib
import secrets
import shutil
import stat
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
import yaml
from filelock import FileLock, Timeout

T = TypeVar("T")
SCHEMA = 1  # of the states to continue from; those of before there was a number count as 0
# Operations of a pickle: a whole number, and those that keep the value before for later.
INTEGERS = {"BININT", "BININT1", "BININT2", "LONG1"}
MEMOISED = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
MOST_TEXT = 1 << 28  # bytes of a text file; the metrics of a thousand agents over a hundred merges take 20 MB


def level(text: object) -> str:
    """One level of a path. ValueError for what would lead elsewhere, wherever it was read."""
    name = str(text)
    if name in ("", ".", "..") or set(name) & {"/", os.sep, "\0"}:
        raise ValueError(f"{reprlib.repr(name)} can't be a level of a path")
    return name


def as_level(name: str) -> str:
    """A name of a model or of a data set, which may be a file's, as one level of a path."""
    return level(re.sub(r"[:/\\]", "_", name))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file it is that can't be written: the system's own words for a full disk don't."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"can't write {path}: {error.strerror or error}; what was written before is kept") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """`write(file)` into a temporary file beside `path`, flushed to disk, then moved there in one step.

    Raises OSError that names the file; what was there before is intact then. Nobody can foretell the temporary name,
    and "x" opens nothing that exists: a link that somebody has placed there leads nowhere.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk: only then a file that was moved there survives a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems can't
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, content: Any) -> None:
    """torch.save through an open file, so that the bytes don't depend on the temporary name."""

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own, about the file's position, hides what the system said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    write_atomically(path, write)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """A state to continue from, with the number of its schema."""
    save_tensors(path, {"schema": SCHEMA} | state)


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


# --------------------------------------------------------------------------------------------------------------------
# Reading: whatever is in a file, the outcome is what it should be or a ValueError that names the file


def open_regular(path: Path) -> BinaryIO:
    """`path`, opened for reading. ValueError for what is no file: a FIFO would keep its reader waiting for ever."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb", opener=lambda name, flags: os.open(
            name, flags | getattr(os, "O_NONBLOCK", 0))))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        stack.pop_all()
        return file


def read_text(path: Path) -> str:
    """The text in a UTF-8 file, with or without a byte order mark, whatever its line ends."""
    with open_regular(path) as file:
        content = file.read(MOST_TEXT + 1)
    if len(content) > MOST_TEXT:
        raise ValueError(f"{path} is larger than {MOST_TEXT >> 20} MiB: it is no text file of this program")
    try:
        return io.TextIOWrapper(io.BytesIO(content), "utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} can't be read: it is not UTF-8 text ({error})") from None


def read_rows(path: Path, columns: Collection[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file, with these columns at least; none when there is no such file.

    A row that was cut short, or is too long, is left out.
    """
    if not path.exists():
        return []
    try:
        reader = csv.DictReader(read_text(path).splitlines())
        rows = [row for row in reader if None not in row and None not in row.values()]
    except csv.Error as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if rows and (missing := set(columns) - set(reader.fieldnames)):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
    return rows


def while_unchanged(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """`read`, called once for a file as long as it stays as it is: a sweep's runs have checkpoints in common. What it
    returns is everybody's."""
    known: dict[Path, tuple[tuple[int, ...], T]] = {}

    def once(path: Path) -> T:
        now = path.stat()
        stamp = (now.st_ino, now.st_size, now.st_mtime_ns)
        if path not in known or known[path][0] != stamp:
            known[path] = (stamp, read(path))
        return known[path][1]

    return once


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`; {} when there is no such file. Raises ValueError, naming the file, for anything else."""
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError) as error:  # a date with 13 months is a ValueError
        reason = " ".join(str(error).split()).replace(f"{path} can't be read: ", "")
        raise ValueError(f"{path} can't be read: {reason}") from None
    except RecursionError:
        raise ValueError(f"{path} can't be read: it is nested too deeply") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} can't be read: expected 'option: value' lines")
    return content


def load_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """`merging.files.read_tensors` of a regular file. Raises ValueError that names an unreadable or damaged one."""
    from merging.files import read_tensors  # here: tables and pictures, which read texts, begin without it

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with open_regular(path) as file:
        return read_tensors(file, path, device)


def load_state(path: Path, structure: Any) -> dict[str, Any]:
    """What `save_state` wrote. Raises ValueError for another structure (see `mismatch`), or a newer schema."""
    content = load_tensors(path)
    schema = content.get("schema", 0) if isinstance(content, dict) else 0
    if type(schema) is int and schema > SCHEMA:
        raise ValueError(f"{path} is of schema {schema}, and this version knows up to {SCHEMA}: update the program")
    if wrong := mismatch(content, {"schema?": int} | structure):
        raise ValueError(f"{path} is not a state of this program: {wrong}")
    return content


def whole_numbers(path: Path, names: Collection[str]) -> dict[str, int]:
    """The whole numbers of these names in what `save_state` wrote, those that are there.

    Its pickle is searched for each name as torch.save writes it, and nothing of it is carried out; the tensors are
    neither read nor checked. Raises ValueError, naming the file, for what is none of torch's.
    """
    found = {}
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            record = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(record) as content:
                pickled = content.read(MOST_TEXT)
        for name in names:
            written = b"X" + len(name).to_bytes(4, "little") + name.encode()  # BINUNICODE
            if (at := pickled.find(written)) >= 0:
                after = (step for step in pickletools.genops(pickled[at:]) if step[0].name not in MEMOISED)
                operation, value, _ = next(itertools.islice(after, 1, None))
                found |= {name: value} if operation.name in INTEGERS else {}
    except Exception as error:  # zipfile and pickletools raise half a dozen types for a broken file
        raise ValueError(f"{path} can't be read: it is damaged, cut off or of another kind ({error})") from None
    return found


def mismatch(content: Any, structure: Any, where: str = "it") -> str | None:
    """What is wrong with the structure of something that was read; None if nothing.

    structure: a type, or a tuple of types (a bool is no int here); [x]: a list of x; {str: x}: a mapping of any strings
    to x; {"a": x, "b?": y}: a mapping with just these keys, b only if it likes.
    """
    if isinstance(structure, type | tuple):
        types = structure if isinstance(structure, tuple) else (structure,)
        fits = isinstance(content, types) and not (isinstance(content, bool) and bool not in types)
        names = " or ".join("nothing" if t is type(None) else t.__name__ for t in types)
        return None if fits else f"{where} is {reprlib.repr(content)}, not of type {names}"
    if isinstance(structure, list):
        if not isinstance(content, list):
            return f"{where} is {reprlib.repr(content)}, not a list"
        found = (mismatch(value, structure[0], f"{where}[{k}]") for k, value in enumerate(content))
        return next(filter(None, found), None)
    if not isinstance(content, Mapping):
        return f"{where} is {reprlib.repr(content)}, not a mapping"
    inner = {key: structure[str] for key in content} if str in structure else {
        key.rstrip("?"): value for key, value in structure.items() if not key.endswith("?") or key[:-1] in content}
    for key in [*inner, *content]:
        if key not in inner or not isinstance(key, str):
            return f"{where} has a strange entry {reprlib.repr(key)}"
        if key not in content:
            return f"{where} has no entry {key!r}"
    found = (mismatch(content[key], value, f"{where}[{key!r}]") for key, value in inner.items())
    return next(filter(None, found), None)


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
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()
