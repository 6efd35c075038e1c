"""What a permutation spec is - which entries of which tensors move together - and what is done with one.

A spec is data; `permute` and the rest are pure functions of it. `merging.tracing.derive` makes one from a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Permutations = dict[str, Tensor]
"""Group -> int64 (units,): the new unit k is the old unit p[k]."""


@dataclass(frozen=True, eq=False)
class Member:
    """Where a tensor holds the units of a group: entries (units, repeat) of its dimensions `dims`, taken as one.

    blocks: nonzero where dimension 0 falls into as many blocks and `dims`, (1,), holds other units in each of them:
    entry b * length + k is entry k within block b (a grouped convolution's weight).
    """

    tensor: str
    dims: tuple[int, ...]
    entries: Tensor
    blocks: int = 0


@dataclass(frozen=True, eq=False)
class Read:
    """Where to read a group's features: entries (units, repeat) of the dimensions `dims` of a tensor.

    The tensor is the slot-th among the arguments of the number-th call of `function` in a forward pass.
    shape: of these dimensions. averaged: dimensions that hold other units, whose order differs from model to model.
    layer: what consumes them. written: the tensor may be changed in place later.
    """

    function: str
    number: int
    slot: int
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    entries: Tensor
    averaged: tuple[int, ...]
    layer: str
    written: bool

    @cached_property
    def start(self) -> int | None:
        """The first of the entries, where they follow one another; else None."""
        start, numbers = int(self.entries[0, 0]), self.entries.flatten()
        return start if torch.equal(numbers, torch.arange(start, start + len(numbers))) else None


@dataclass(frozen=True, eq=False)
class PermutationSpec:
    """Which entries of which tensors move together.

    sizes: group -> units, in execution order; only groups of two or more units that may be permuted.
    members: group -> every place that holds its units.
    blocks: group -> the group of the blocks that its units lie in, in order and equally many in each: heads of
        attention, groups of channels. A block moves as a whole, and units change their order within it.
    fixed: what can't be permuted -> why.
    reads: group -> where the layers that consume it read its features, in execution order.
    tensors: the state dict's names.
    """

    sizes: dict[str, int]
    members: dict[str, tuple[Member, ...]]
    blocks: dict[str, str]
    fixed: dict[str, str]
    reads: dict[str, tuple[Read, ...]]
    tensors: tuple[str, ...]

    @property
    def stuck(self) -> dict[str, str]:
        """Hidden layers without a unit that can be permuted -> why: what is fixed but inputs, outputs, single units."""
        return {name: reason for name, reason in self.fixed.items() if " dim " not in name and "[" not in name
                and reason not in ("the model's output", "a single unit", "no layer reads it")}

    def reads_at(self, group: str, at: str) -> tuple[Read, ...]:
        """Where a group is read: "last", by its last consumer only, or by "all" of them."""
        return self.reads[group][-1:] if at == "last" else self.reads[group]

    @cached_property
    def of_tensor(self) -> dict[str, list[tuple[str, Member]]]:
        """State-dict name -> (group, member) of all that moves in it."""
        found: dict[str, list[tuple[str, Member]]] = {name: [] for name in self.tensors}
        for group, members in self.members.items():
            for member in members:
                found[member.tensor].append((group, member))
        return found


def identity(spec: PermutationSpec) -> Permutations:
    """The permutations that change nothing."""
    return {group: torch.arange(size) for group, size in spec.sizes.items()}


def random_permutations(spec: PermutationSpec, generator: torch.Generator | None = None) -> Permutations:
    """A uniformly random permutation for every group, units within blocks included."""
    found: Permutations = {}
    for group, size in spec.sizes.items():
        if group in spec.blocks:
            outer = found[spec.blocks[group]]
            within = torch.stack([torch.randperm(size // len(outer), generator=generator) for _ in outer])
            found[group] = nest(outer, within)
        else:
            found[group] = torch.randperm(size, generator=generator)
    return found


def nest(outer: Tensor, within: Tensor) -> Tensor:
    """Blocks in the order outer (blocks,), and in the new block b its old units in the order within[b] (blocks, units).

    The permutation of all the units (blocks * units,).
    """
    return (outer[:, None] * within.shape[1] + within).flatten()


def invert(permutations: Permutations) -> Permutations:
    """The permutations that undo `permutations`."""
    return {group: torch.argsort(p) for group, p in permutations.items()}


def permute(spec: PermutationSpec, permutations: Permutations, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A new state dict whose unit k of every group is unit p[k] of `state`'s. The network's function stays the same.

    Tensors without a permuted axis are shared with `state`, not copied.
    Raises ValueError when groups, sizes or state-dict names do not fit the spec, or blocks are torn apart.
    """
    if permutations.keys() != spec.sizes.keys():
        odd = sorted(permutations.keys() ^ spec.sizes.keys())
        raise ValueError(f"permutations and spec differ in their groups: {', '.join(odd[:5])}")
    for group, p in permutations.items():
        if not torch.equal(torch.sort(p).values.cpu(), torch.arange(spec.sizes[group])):
            raise ValueError(f"group {group!r}: not a permutation of {spec.sizes[group]} units")
        if group in spec.blocks:
            outer = permutations[spec.blocks[group]]
            blocks = p.reshape(len(outer), -1) // (len(p) // len(outer))
            if not torch.equal(blocks, outer.to(p.device)[:, None].expand_as(blocks)):
                raise ValueError(f"group {group!r}: its units leave the blocks of group {spec.blocks[group]!r}")
    if state.keys() != spec.of_tensor.keys():
        odd = sorted(state.keys() ^ spec.of_tensor.keys())
        raise ValueError(f"state dict and spec differ in their tensors: {', '.join(odd[:5])}")
    return {name: permute_tensor(tensor, spec.of_tensor[name], permutations) for name, tensor in state.items()}


def permute_tensor(tensor: Tensor, members: Iterable[tuple[str, Member]], permutations: Permutations) -> Tensor:
    """`tensor` with the units of the given (group, member) reordered."""
    orders: dict[tuple[tuple[int, ...], int], Tensor] = {}
    for group, member in members:
        length = math.prod(tensor.shape[d] for d in member.dims) * max(member.blocks, 1)
        order = orders.setdefault((member.dims, member.blocks), torch.arange(length))
        order[member.entries.flatten()] = member.entries[permutations[group].cpu()].flatten()
    for (dims, blocks), order in sorted(orders.items(), key=lambda item: item[0][1]):  # blocks of rows move first
        if blocks:
            within = (order % tensor.shape[1]).reshape(blocks, 1, -1, *[1] * (tensor.ndim - 2)).to(tensor.device)
            rows = tensor.unflatten(0, (blocks, -1))
            tensor = rows.take_along_dim(within, 2).flatten(0, 1)
        elif len(dims) == 1:
            tensor = tensor.index_select(dims[0], order.to(tensor.device))
        else:
            first = tuple(range(len(dims)))
            moved = tensor.movedim(dims, first)
            rows = moved.flatten(0, len(dims) - 1).index_select(0, order.to(tensor.device))
            tensor = rows.reshape(moved.shape).movedim(first, dims).contiguous()
    return tensor


def describe(spec: PermutationSpec) -> str:
    """The groups with their sizes, members and read points, then what is fixed and why."""
    lines = []
    for group, size in spec.sizes.items():
        outer = spec.blocks.get(group)
        within = f" in {spec.sizes[outer]} blocks, those of {outer}" if outer else ""
        lines.append(f"{group}: {size} units{within}")
        for member in spec.members[group]:
            lines.append(f"    {member.tensor} dim {', '.join(map(str, member.dims))}{_place(member)}")
        layers = ", ".join(dict.fromkeys(read.layer for read in spec.reads[group]))
        lines += [f"    read at the input of {layers}"] if layers else []
    lines.append(f"{len(spec.sizes)} groups, {sum(spec.sizes.values())} units")
    lines += [f"fixed: {name} ({reason})" for name, reason in spec.fixed.items()]
    return "\n".join(lines)


def _place(member: Member) -> str:
    flat = member.entries.flatten()
    words = f" from {int(flat.min())}" if flat.min() else ""
    if not torch.equal(flat, torch.arange(int(flat.min()), int(flat.min()) + len(flat))):
        words += " scattered"
    repeat = member.entries.shape[1]
    words += f", {repeat} entries each" if repeat > 1 else ""
    return words + (f", within {member.blocks} blocks" if member.blocks else "")
