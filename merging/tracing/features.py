"""A group's features, read where the layers that consume it take them in."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from merging.tracing.running import Slots, own_copy, run
from merging.tracing.spec import PermutationSpec, Read
from merging.tracing.watch import Recorder


def read_units(x: Tensor, read: Read) -> Tensor:
    """The features that `read` tells of, from its tensor x: (rows, units); rows run over all the other entries.

    The rows share x's memory only where x is not written to later, and where they are all that lies in it.
    """
    if tuple(x.shape[d] for d in read.dims) != read.shape:
        raise ValueError(f"{read.layer} reads units in dimensions {read.dims} of a tensor of shape {tuple(x.shape)}, "
                         f"where the spec was derived with {read.shape}: derive it from images of the same size")
    if read.averaged:
        x = x.mean(read.averaged, keepdim=True)
    x = x.movedim(read.dims, tuple(range(-len(read.dims), 0))).flatten(-len(read.dims))
    units, repeat = read.entries.shape
    if read.start is None:
        rows = x.index_select(-1, read.entries.flatten().to(x.device))
    else:
        rows = x if x.shape[-1] == units * repeat else x.narrow(-1, read.start, units * repeat)
    if repeat > 1:
        rows = rows.unflatten(-1, (units, repeat)).movedim(-2, -1)
    rows = rows.reshape(-1, units)
    memory = rows.untyped_storage()
    shared = memory.data_ptr() == x.untyped_storage().data_ptr()
    return rows.clone() if shared and (read.written or memory.nbytes() > rows.nbytes) else rows


class _Enough(BaseException):
    """All features are there."""


class FeatureReader:
    """reader(state, x) gives group -> list of features (rows, units), one row per sample and position.

    at: "last" reads a group once, at the input of the last layer that consumes it (after the activation; before a
    global pool, flatten or dropout that leads there), as in the paper; "all" at every distinct consumer input.
    Runs a copy of the model in eval mode, as far as the last read, with the tensors of `state` in its own precision.
    """

    def __init__(self, model: nn.Module, spec: PermutationSpec, at: str = "all", device: torch.device | None = None):
        if at not in ("last", "all"):
            raise ValueError(f"at={at!r}: choose 'last' or 'all'")
        self.model = own_copy(model).to(device)
        self.slots = Slots(self.model)
        self.groups = list(spec.reads)
        self.by_place: dict[tuple[str, int, int], list[tuple[str, int, Read]]] = {}
        for group in self.groups:
            for n, read in enumerate(spec.reads_at(group, at)):
                self.by_place.setdefault((read.function, read.number, read.slot), []).append((group, n, read))
        self.wanted: dict[tuple[str, int], list[int]] = {}
        for function, number, slot in self.by_place:
            self.wanted.setdefault((function, number), []).append(slot)

    @torch.no_grad()
    def __call__(self, state: Mapping[str, Tensor], *inputs: Tensor) -> dict[str, list[Tensor]]:
        features: dict[str, dict[int, Tensor]] = {group: {} for group in self.groups}
        left = len(self.by_place)

        def take(call: tuple[str, int], slot: int, x: Tensor) -> None:
            nonlocal left
            for group, n, read in self.by_place[(*call, slot)]:
                features[group][n] = read_units(x, read)
            left -= 1
            if not left:
                raise _Enough

        self.slots.put(state)
        with contextlib.suppress(_Enough):
            run(self.model, *inputs, within=Recorder(self.wanted, take))
        if left:
            raise ValueError(f"{left} of the layers that read features were not reached: the forward pass of "
                             f"{type(self.model).__name__} takes another way than when the spec was derived")
        return {group: [found[n] for n in sorted(found)] for group, found in features.items()}
