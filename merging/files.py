"""Models in files: read without running code from them, in the ways in which people keep them, and written at once."""

from __future__ import annotations

import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from merging.averaging import State
from merging.tracing.running import PREFIXES

MOST_EXPANDED = 1 << 20  # bytes of a tensor that has fewer on the disk, as an expanded one
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
COUNT = ".num_batches_tracked"


def state_in(content: Any, name: object) -> State:
    """The state dict in what was read from a file: itself, or what lies under one of WRAPPERS beside other things;
    without the prefixes that all its names have. Raises ValueError, with the file's name, where there is none."""
    while isinstance(content, Mapping) and (
            inner := next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)):
        content = inner
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{name} is not a state dict but a {type(content).__name__}: torch.save model.state_dict()")
    while content and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in content)), None)):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    if odd := next((key for key, value in content.items() if not isinstance(value, Tensor)), None):
        raise ValueError(f"{name} is not a state dict: {odd!r} is of type {type(content[odd]).__name__}, no tensor")
    return dict(content)


def with_counts(state: State, template: State) -> State:
    """A state dict with BatchNorm's counts of batches, where they alone are missing, as in files of old: they are 0.
    In the template's order then."""
    missing = template.keys() - state.keys()
    if not missing or not all(key.endswith(COUNT) for key in missing):
        return state
    filled = {key: state[key] if key in state else torch.zeros_like(template[key], device="cpu") for key in template}
    return filled | {key: value for key, value in state.items() if key not in template}


def check_state(state: State, template: State, name: str) -> None:
    """Raise ValueError, naming the file and the mismatch, unless `state` fits the model and is finite."""
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{name} is not a state dict")
    if missing := sorted(template.keys() ^ state.keys()):
        raise ValueError(f"{name} is of another architecture: {missing[0]} is in only one of the two "
                         f"({len(missing)} such keys)")
    for key, expected in template.items():
        if state[key].shape != expected.shape:
            raise ValueError(f"{name}: {key} has shape {tuple(state[key].shape)}, the model's is "
                             f"{tuple(expected.shape)} (another width, number of classes or image size?)")
        if state[key].is_floating_point() and not torch.isfinite(state[key]).all():
            raise ValueError(f"{name}: {key} holds NaN or infinite values")


def save_model(path: Path, state: State) -> None:
    """A state dict as safetensors or, by the name's end, as torch.save has it: whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    try:
        with open(temporary, "xb") as file:
            if path.suffix == ".safetensors":
                import safetensors.torch  # by those who write such a file: nothing else needs it
                # Tensors that share memory are written once for each name: that is how they are read.
                file.write(safetensors.torch.save({key: value.clone() for key, value in plain.items()}))
            else:
                torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: Path) -> Any:
    """What torch.save or safetensors wrote. Raises ValueError that names an unreadable or damaged file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        return read_tensors(file, path)


def read_tensors(file: BinaryIO, path: Path, device: torch.device | str = "cpu") -> Any:
    """What torch.save or safetensors wrote to an opened file, without running code from it.

    Raises ValueError that names an unreadable or damaged file, by its `path`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about what the checks below refuse
        try:
            if zipfile.is_zipfile(file):
                _check_records(file)
            if _is_safetensors(file):
                import safetensors.torch  # see above
                return safetensors.torch.load_file(path, device=str(device))
            file.seek(0)
            content = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # torch raises half a dozen types for a broken file
            raise ValueError(f"{path} can't be read as a checkpoint: {_reason(file, error)}") from error
    for tensor in _tensors_in(content):
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
            raise ValueError(f"{path} holds a sparse, quantised or meta tensor: save plain ones")
        if tensor.numel() * tensor.itemsize > max(tensor.untyped_storage().nbytes(), MOST_EXPANDED):
            raise ValueError(f"{path} holds a tensor of {tuple(tensor.shape)} with next to nothing in it")
    return content


def _is_safetensors(file: BinaryIO) -> bool:
    """Whether the file begins as safetensors do: the header's length, and the header."""
    file.seek(0)
    return file.read(10)[8:9] == b"{"


def _check_records(file: BinaryIO) -> None:
    """Raise zipfile.BadZipFile unless the records in a torch file are those that were written.

    torch writes a checksum of each and doesn't look at it when it loads: a flipped bit would go unnoticed.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise zipfile.BadZipFile("it is compressed, which torch's files are not")
        if sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size:
            raise zipfile.BadZipFile("it claims to hold more than it does")
        for record in records:
            with archive.open(record) as content:
                while content.read(1 << 20):
                    pass


def _reason(file: BinaryIO, error: Exception) -> str:
    """Why a file can't be loaded, in a sentence: torch's own are about its reader and go on for a page."""
    file.seek(0)
    first = file.read(1024)
    if not first:
        return "it is empty"
    if isinstance(error, ImportError):
        return f"{error.name} is not installed"
    if first.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer instead of the file itself: fetch that by `git lfs pull`"
    if found := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        return (f"it holds {found[1]} objects, not tensors alone, and to load these could run any code: "
                "torch.save the model's state_dict() instead")
    details = f" ({error})" if isinstance(error, zipfile.BadZipFile) else ""
    return f"it is damaged, cut off or of another kind{details}"


def _tensors_in(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors_in(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors_in(value)
