"""A device that isn't there: tensors say that they are on it, their values lie on the CPU, and what a real accelerator
would refuse or wait for is refused or counted. Through it code that was written for GPUs runs where there is none.

Refused: an operation with tensors of two devices (but for a number on the CPU, and copies), and a CPU's generator that
is to draw on the device. Counted, by the line of ours that caused it: `waits`, each moment in which the host needs a
value (item, nonzero, a copy to the CPU), and `uploads`, each copy to the device.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

OURS = f"{Path(__file__).resolve().parent.parent}{os.sep}"
NOT_OURS = (f"{OURS}tests{os.sep}", f"{OURS}.venv")
NAME = "pretend"
CAN_BE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # in new versions of PyTorch
if CAN_BE:  # at once: later than the process's first backward pass, autograd doesn't know of it
    backend_registration._setup_privateuseone_for_python_backend(NAME)
aten = torch.ops.aten
# What needs values on the host, to say what a number is or how large its outcome.
WAITING = {aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim,
           aten.unique_consecutive, aten.equal, aten.is_nonzero, aten.allclose, aten.bincount, aten.histc,
           aten.linalg_eigh, aten._linalg_eigh, aten._linalg_svd}
INDEXING = {aten.index, aten.index_put, aten.index_put_}
COPYING = {aten._to_copy, aten.copy_, aten.copy}


class Pretend(torch.Tensor):
    """A tensor on the device; `values` lie on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Pretend:
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(NAME, 0), requires_grad=False)

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    __torch_function__ = torch._C._disabled_torch_function_impl

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Pretend) -> None:
        self.values = other.values

    def __repr__(self) -> str:
        return f"{NAME}: {self.values!r}"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{function} of a tensor on the {NAME} device, where none is")


def is_ours(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == NAME


class Device(TorchDispatchMode):
    """While it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if isinstance(x, Pretend)]
        goal = kwargs.get("device")
        if not here and not is_ours(goal):
            return function(*args, **kwargs)
        kind = function.overloadpacket
        lands = is_ours(goal) if goal is not None else bool(here)
        if kind is aten.copy_:
            lands = isinstance(args[0], Pretend)
        if kind in COPYING:
            if lands and len(here) < len(tensors):
                self.uploads[caller()] += 1
            elif here and not lands:
                self.waits[caller()] += 1
        elif odd := [x for x in tensors if not isinstance(x, Pretend) and x.ndim]:
            raise RuntimeError(f"tensors of two devices meet in {function}: {tuple(odd[0].shape)} is on the CPU")
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != NAME:
            raise RuntimeError(f"{function} draws on the {NAME} device with a generator of the {generator.device}")
        masked = kind in INDEXING and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
        if kind in WAITING or masked:
            self.waits[caller()] += 1

        known = {id(x.values): x for x in here}  # what is written to in place stays the tensor that it was

        def values(x: Any) -> Any:
            return x.values if isinstance(x, Pretend) else torch.device("cpu") if is_ours(x) else x

        def wrapped(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else Pretend(x)

        outcome = function(*tree_map(values, args), **tree_map(values, kwargs))
        return tree_map(wrapped, outcome) if lands else outcome


def caller() -> str:
    """The line of ours, outside the tests, that is being run."""
    frame = sys._getframe()
    while frame:
        if frame.f_code.co_filename.startswith(OURS) and not frame.f_code.co_filename.startswith(NOT_OURS):
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            return f"{frame.f_code.co_filename.removeprefix(OURS)}:{frame.f_lineno} {line}"
        frame = frame.f_back
    return ""


@contextmanager
def pretend() -> Iterator[tuple[torch.device, Device]]:
    """The device, and what it counts."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes it on the CPU and moves it
    try:
        with Device() as counts:
            yield torch.device(NAME, 0), counts
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
