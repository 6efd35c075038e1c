"""Which units of a network can trade places: derived from the model by watching it, never typed in by hand.

A hidden layer's units can be reordered without changing the function, provided that every tensor that holds them is
reordered alike. `derive_spec` finds those tensors: it watches a forward pass, follows the units from tensor to tensor
(`merging.tracing`, `merging.units`) and checks what it found by permuting them. The result is data; `permute` applies
it.

    python -m merging.permutation resnet50
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from merging.running import DoesNotRun, DoublePrecision, Slots, is_mixed, own_copy, run
from merging.tracing import Recorder, Source, Trace, UnsupportedOperation, Watch, tensors_of, tensors_within
from merging.units import MISSING, RANKS, Labels, Layout, Units, varied
from utils.plots import groups_figure
from utils.progress import print_anywhere

__all__ = ["FeatureReader", "Member", "PermutationSpec", "Permutations", "Read", "UnsupportedOperation", "derive_spec",
           "describe", "identity", "invert", "permute", "random_permutations", "spec_from_axes", "verify"]

Permutations = dict[str, Tensor]
"""Group -> int64 (units,): the new unit k is the old unit p[k]."""

Example = Tensor | Sequence[Any]


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


# --------------------------------------------------------------------------------------------------------------------
# Derivation


def derive_spec(model: nn.Module, example: Example, *, check: bool = True) -> PermutationSpec:
    """Watch `model` at work and find which entries of its tensors can be permuted together.

    model: any network; it is not changed.
    example: an input batch (B, ...), or a tuple of the forward pass's inputs, of which those that are no tensors (or
        have no dimension) are passed as they are. Only shapes and types count, unless the network gives nothing finite
        for random values (see `verify`).
    check: permute the units that were found, and compare the outputs in float64 (see `verify`): an error in the
        derivation is an exception here, never a wrong merge later.
    What the model's inputs and outputs hold is never permuted. What can't be permuted is listed in `spec.fixed`: an
    operation that is not known fixes what goes into it.

    Raises UnsupportedOperation (a ValueError) where the values of a tensor decide what the forward pass does, and for
    parameters or buffers that it does not use and that may hold units; ValueError when the model refuses the example,
    can't be copied, or doesn't pass the check.
    """
    inputs = _samples(model, example)
    original, model = model, own_copy(model)
    shared = units, names, state, _ = Units(), _names(model), {}, {}
    trace = _watch(model, inputs, *shared)
    failure = ""
    if any(_matters(name) for name in set(names.values()) - state.keys()):  # auxiliary heads work in training only
        try:
            _watch(model.train(), inputs, *shared)
        except ValueError as error:
            failure = f" Those of training only can't be seen, because {error}"
    everything = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(everything.items())}
    unused = [name for name, tensor in everything.items() if names.get(id(tensor), first[id(tensor)]) not in state
              and _matters(name) and is_mixed(name, tensor) and _may_hold_units(tensor)]
    if unused:
        raise UnsupportedOperation(
            f"{len(unused)} tensors are not used by the forward pass, so how to permute them is unknown: "
            f"{', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}. Remove them from the model.{failure}"
        )
    spec = _spec(units, trace, everything, names)
    if check and spec.sizes:
        _check_reads(model.eval(), spec, trace, _samples(model, example, 3))
        verify(original, spec, example)
    return spec


@torch.no_grad()
def _check_reads(model: nn.Module, spec: PermutationSpec, trace: Trace, inputs: tuple[Tensor, ...]) -> None:
    """Reads are found by counting calls, which must not depend on the size of the batch."""
    count = Watch()
    run(model, *inputs, within=count, what="inputs")
    for function in {read.function for reads in spec.reads.values() for read in reads}:
        if count.calls[function] != trace.calls[function]:
            raise UnsupportedOperation(f"{type(model).__name__} calls {function} {trace.calls[function]} times for two "
                                       f"samples and {count.calls[function]} times for three, one after the other")


def _matters(name: str) -> bool:
    """Whether a tensor must take part in a forward pass; BatchNorm's counter does not, in evaluation mode."""
    return not name.endswith("num_batches_tracked")


def _may_hold_units(tensor: Tensor) -> bool:
    """Counters, masks and single numbers are nothing that units could be permuted in."""
    return tensor.numel() > 1 and (tensor.is_floating_point() or tensor.is_complex())


def _normal(x: Tensor, shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=noise)


def _uniform(x: Tensor, shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=noise)


def _near(x: Tensor, shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    """The example's own values, each up to a tenth larger: equal ones would hide faults."""
    return x.detach().cpu()[torch.arange(shape[0]) % len(x)] * (1 + 0.1 * torch.rand(shape, generator=noise))


def _samples(model: nn.Module, example: Example, number: int = 2, draw: Callable[..., Tensor] = _normal) -> tuple:
    """Inputs of several samples, so that the batch doesn't pass for a dimension of length 1."""
    if isinstance(example, (Mapping, str)):
        raise ValueError(f"an example is a tensor or a tuple of the forward pass's inputs, not a "
                         f"{type(example).__name__}: pass its inputs in their order")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.Generator().manual_seed(0)

    def sample(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        shape = (number, *x.shape[1:])
        if x.is_floating_point() or x.is_complex():
            return draw(x, shape, noise).to(like.device, like.dtype if x.is_floating_point() else x.dtype)
        top = int(x.max()) + 1 if x.numel() and x.dtype != torch.bool else 1  # numbers as large as the example's
        return torch.randint(max(top, 1), shape, generator=noise).to(like.device, x.dtype)

    return tuple(map(sample, (example,) if isinstance(example, Tensor) else example))


def _names(model: nn.Module) -> dict[int, str]:
    """id -> name of every tensor of the model; the first of several names."""
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


@torch.no_grad()
def _watch(model: nn.Module, inputs: tuple, units: Units, names: dict[int, str],
           state: dict[str, Layout], grouped: dict[str, Labels]) -> Trace:
    attributes = [value for module in model.modules() for key, value in vars(module).items()
                  if key not in ("_parameters", "_buffers", "_modules")]
    trace = Trace(units, names, state, grouped, tensors_of(attributes))
    for x in tensors_of(inputs):
        trace.layouts[x], trace.alive[x] = (), True
    for tensor in tensors_within(run(model, *inputs, within=trace, what="an example")):
        units.fix(trace.layout(tensor), "the model's output")
    return trace


def _spec(units: Units, trace: Trace, everything: Mapping[str, Tensor], names: dict[int, str]) -> PermutationSpec:
    for axis in units.axes:
        if axis.tensor and axis.tensor not in everything:  # agents don't exchange it
            units.fix((axis.labels,), f"{axis.tensor} is not in the state dict")
    found = units.groups()
    group_of = np.full(found.bundle.max(initial=-1) + 1, MISSING)
    place = np.zeros_like(group_of)
    for g, group in enumerate(found.groups):
        group_of[group.bundles], place[group.bundles] = g, np.arange(len(group.bundles))
    all_names = [group.name for group in found.groups]

    def entries(labels: Labels) -> dict[int, Tensor]:
        """Group -> (units, repeat) positions in the flattened labels."""
        unit, rank = np.divmod(labels.ravel(), RANKS)
        bundle = found.bundle[unit]
        group = group_of[bundle]
        result = {}
        for g in np.unique(group[group != MISSING]).tolist():
            where = np.flatnonzero(group == g)
            order = where[np.lexsort((rank[where], unit[where], place[bundle[where]]))]
            result[g] = torch.from_numpy(order.reshape(len(found.groups[g].bundles), -1))
        return result

    members: dict[int, list[Member]] = {g: [] for g in range(len(found.groups))}
    for axis in units.axes:
        if axis.tensor:
            for g, where in entries(axis.labels).items():
                members[g].append(Member(axis.tensor, axis.dims, where, axis.blocks))
    for name, tensor in everything.items():  # the other names of a shared tensor
        known = names.get(id(tensor))
        if known is not None and known != name:
            for of_group in members.values():
                of_group += [Member(name, m.dims, m.entries, m.blocks) for m in of_group if m.tensor == known]

    reads: dict[int, dict[int, Read]] = {g: {} for g in members}
    for reading in trace.readings:
        wanted = entries(reading.labels)
        for labels in reading.source.layout:
            for g, where in entries(labels).items():
                if g in wanted:
                    # Several layers may read the same tensor: once is enough, where it is read last.
                    reads[g].pop(reading.source.content, None)
                    others = [other for other in reading.source.layout if other is not labels and entries(other)]
                    reads[g][reading.source.content] = _read(reading.source, labels, where, others, reading.by, trace)
    return PermutationSpec(
        sizes={name: len(group.bundles) for name, group in zip(all_names, found.groups, strict=True)},
        members={all_names[g]: tuple(of_group) for g, of_group in members.items()},
        blocks={group.name: all_names[group.outer] for group in found.groups if group.outer is not None},
        fixed=found.fixed,
        reads={all_names[g]: tuple(of_group.values()) for g, of_group in reads.items()},
        tensors=tuple(everything),
    )


def _read(source: Source, labels: Labels, where: Tensor, others: list[Labels], by: str, trace: Trace) -> Read:
    dims = tuple(sorted(varied(labels)))
    averaged = tuple(sorted(frozenset().union(*map(varied, others))))
    return Read(source.name, source.number, source.slot, dims, tuple(labels.shape[d] for d in dims), where, averaged,
                by.removesuffix(".weight"), source.storage in trace.written)


def verify(model: nn.Module, spec: PermutationSpec, example: Example, tolerance: float = 1e-9) -> float:
    """Check that permuting the units of every group leaves the function alone; the relative error of the outputs.

    On a copy in float64 on the CPU, with random inputs, and random values instead of constant ones in its tensors (as a
    fresh BatchNorm has them), which would hide a fault. Inputs are standard normal; where these don't give finite
    outputs (a logarithm), uniform between 0 and 1, or else close to the example. What the network asks for in a lower
    precision is in float64 as well. A network that can't run so is checked as it is, where it is; then `tolerance` is a
    hundred times what rounding its tensors to their precision does to the outputs.
    Each output tensor is compared on its own.

    Raises ValueError, naming a group at fault, if the outputs differ by more than `tolerance`, and where they can't be
    compared: there are none, none is finite, or they depend on more than inputs and tensors.
    """
    try:
        return _verify(model, spec, example, lambda: own_copy(model).cpu().double(), tolerance)
    except DoesNotRun as failure:
        try:
            return _verify(model, spec, example, lambda: own_copy(model), None)
        except DoesNotRun:
            raise failure from None


def _verify(original: nn.Module, spec: PermutationSpec, example: Example, fresh: Callable[[], nn.Module],
            tolerance: float | None) -> float:
    """See `verify`. fresh() is a copy to check, in float64; or, with a tolerance of None, as it is."""
    kind, wide = type(original).__name__, tolerance is not None
    model, noise = fresh(), torch.Generator().manual_seed(1)
    state = model.state_dict()
    _make_unlike(state, noise)

    @torch.no_grad()
    def outputs(state: Mapping[str, Any], model: nn.Module = model) -> list[Tensor]:
        Slots(model).put(state)
        results = run(model, *inputs, within=DoublePrecision() if wide else None, what="inputs")
        return [(torch.view_as_real(y) if y.is_complex() else y).double().flatten().cpu()
                for y in tensors_within(results)]

    tried = []
    for draw in (_normal, _uniform, _near):
        inputs = _samples(model, example, draw=draw)
        expected = outputs(state)
        tried.append((sum(int(y.isfinite().sum()) for y in expected), inputs, expected))
        if tried[-1][0] == sum(map(len, expected)):
            break
    finite, inputs, expected = max(tried, key=lambda one: one[0])
    if not finite:
        what = "only NaN and infinite values" if any(map(len, expected)) else "no values"
        raise ValueError(f"{kind} puts out {what}, so there is nothing to check a spec by: pass an example of inputs "
                         "that it puts out numbers for")

    if tolerance is None:
        rounded, coarsest = _rounded(state, noise)
        tolerance = 100 * max(_error(outputs(rounded), expected), coarsest)
        if not tolerance <= 1e-2:
            raise DoesNotRun(f"the outputs of {kind} depend too much on rounding to check a spec by")

    def fits(found: list[Tensor]) -> bool:
        return _error(found, expected) <= tolerance

    permutations = random_permutations(spec, noise)
    permuted = permute(spec, permutations, state)
    worst = _error(outputs(permuted), expected)
    if worst <= tolerance:
        return worst
    if not fits(outputs(state, fresh())):
        raise ValueError(f"{kind} puts out other values for the same inputs and tensors in evaluation mode: a spec can "
                         "be checked where its forward pass neither draws random numbers nor changes tensors")
    if fits(outputs(permuted, fresh())):
        raise ValueError(f"{kind} keeps values from one forward pass to the next that belong to the tensors it had "
                         "then, as a cache does: switch that off for merging")
    nothing = identity(spec)
    for group in spec.sizes:
        together = {group, spec.blocks.get(group, group)}
        together |= {other for other, outer in spec.blocks.items() if outer in together}
        part = permute(spec, nothing | {name: permutations[name] for name in together}, state)
        error = _error(outputs(part), expected)
        if not error <= tolerance:
            raise ValueError(f"permuting the units of group {group!r} changes the outputs by {error:.1e} (relative): "
                             f"the spec does not fit {kind}")
    raise ValueError(f"permuting all groups changes the outputs by {worst:.1e} (relative)")


def _make_unlike(state: Mapping[str, Any], noise: torch.Generator) -> None:
    """Adds noise to the tensors of a state dict that are vectors or constant, in place: equal values hide faults."""
    for name, tensor in _numbers(state).items():
        if tensor.numel() > 1 and (tensor.ndim == 1 or tensor.min() == tensor.max()):
            spread = float(tensor.std())
            scale = 0.1 * (spread if spread > 0 else float(tensor.abs().mean()) or 1.0)
            positive = name.endswith("running_var")
            noisy = torch.randn(tensor.shape, generator=noise, dtype=torch.float64).mul_(scale)
            tensor += (noisy.abs() if positive else noisy).to(tensor)


def _rounded(state: Mapping[str, Any], noise: torch.Generator) -> tuple[dict[str, Any], float]:
    """A state dict whose numbers are off by about their precision, and the coarsest of these."""
    off = {name: torch.finfo(tensor.dtype).eps for name, tensor in _numbers(state).items()}
    return {name: tensor * (1 + off[name] * torch.randn(tensor.shape, generator=noise).to(tensor)) if name in off
            else tensor for name, tensor in state.items()}, max(off.values(), default=0.0)


def _numbers(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if is_mixed(name, tensor) and tensor.is_floating_point()}


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the output tensors' relative errors; infinite where something not finite isn't what it was."""
    if [len(y) for y in found] != [len(y) for y in expected]:
        return math.inf
    differences, sizes = [], []
    for y, right in zip(found, expected, strict=True):
        finite = right.isfinite()
        if not torch.allclose(y[~finite], right[~finite], equal_nan=True):
            return math.inf
        differences.append(float((y[finite] - right[finite]).norm()))
        sizes.append(float(right[finite].norm()))
    least = max(1e-4 * math.hypot(*sizes), 1e-300)  # a small output may be nothing but the rounding of large ones
    return max(difference / max(size, least) for difference, size in zip(differences, sizes, strict=True))


def spec_from_axes(model: nn.Module, axes: Mapping[str, Sequence[str | None]], *, example: Example) -> PermutationSpec:
    """A spec by hand: tensor -> one name for each dimension, None where nothing is permuted.

    Dimensions of the same name are permuted together; one that is longer than the shortest of its name holds each unit
    as a run of consecutive entries (a flattened map). Tensors that are left out hold no units. The layers' inputs whose
    features are read are found by watching the model. The spec is verified before it is returned.

    Raises ValueError for unknown tensors, wrong numbers of dimensions or sizes, and where the function would change.
    """
    state = model.state_dict()
    sizes: dict[str, int] = {}
    for tensor, names in axes.items():
        if tensor not in state:
            raise ValueError(f"the model has no tensor {tensor!r}; it has {', '.join([*state][:5])}, ...")
        if len(names) != state[tensor].ndim:
            raise ValueError(f"{tensor!r} has {state[tensor].ndim} dimensions, its axes are {tuple(names)}")
        for name, length in zip(names, state[tensor].shape, strict=True):
            if name is not None:
                sizes[name] = min(length, sizes.get(name, length))
    members: dict[str, list[Member]] = {name: [] for name in sizes}
    for tensor, names in axes.items():
        for dim, name in enumerate(names):
            if name is not None:
                length = state[tensor].shape[dim]
                if length % sizes[name]:
                    raise ValueError(f"{tensor!r}, dimension {dim}: {length} entries for {sizes[name]} units of "
                                     f"{name!r}")
                members[name].append(Member(tensor, (dim,), torch.arange(length).reshape(sizes[name], -1)))
    derived = derive_spec(model, example, check=False)
    reads = {name: _reads_like(derived, of_group) for name, of_group in members.items()}
    spec = PermutationSpec(sizes, {name: tuple(m) for name, m in members.items()}, {}, {}, reads, tuple(state))
    verify(model, spec, example)
    return spec


def _reads_like(derived: PermutationSpec, members: list[Member]) -> tuple[Read, ...]:
    """The reads of the derived group that shares a member with a group given by hand."""
    for group, own in derived.members.items():
        for member in own:
            for given in members:
                if (member.tensor, member.dims) == (given.tensor, given.dims) and torch.equal(
                        member.entries, given.entries):
                    return derived.reads[group]
    return ()


# --------------------------------------------------------------------------------------------------------------------
# Permutations


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
        else:
            tensor = _along(tensor, dims, lambda t, order=order: t.index_select(0, order.to(t.device)))
    return tensor


def _along(tensor: Tensor, dims: tuple[int, ...], function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of dimension 0, applied to the dimensions `dims` taken as one."""
    first = tuple(range(len(dims)))
    moved = tensor.movedim(dims, first)
    shape = moved.shape
    return function(moved.flatten(0, len(dims) - 1)).reshape(shape).movedim(first, dims).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Features


def read_units(x: Tensor, read: Read) -> Tensor:
    """The features that `read` tells of, from its tensor x: (rows, units); rows run over all the other entries.

    The rows never share x's memory where x may be written to later.
    """
    if tuple(x.shape[d] for d in read.dims) != read.shape:
        raise ValueError(f"{read.layer} reads units in dimensions {read.dims} of a tensor of shape {tuple(x.shape)}, "
                         f"where the spec was derived with {read.shape}: derive it from images of the same size")
    if read.averaged:
        x = x.mean(read.averaged, keepdim=True)
    x = x.movedim(read.dims, tuple(range(-len(read.dims), 0))).flatten(-len(read.dims))
    units, repeat = read.entries.shape
    start, count = int(read.entries[0, 0]), units * repeat
    if torch.equal(read.entries.flatten(), torch.arange(start, start + count)):
        rows = x.narrow(-1, start, count)
    else:
        rows = x.index_select(-1, read.entries.flatten().to(x.device))
    rows = rows.unflatten(-1, (units, repeat)).movedim(-2, -1).reshape(-1, units)
    shared = read.written and rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return rows.clone() if shared else rows


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
        self.reads = {group: spec.reads_at(group, at) for group in spec.reads}
        self.wanted: dict[tuple[str, int], list[int]] = {}
        for reads in self.reads.values():
            for read in reads:
                slots = self.wanted.setdefault((read.function, read.number), [])
                slots += [read.slot] if read.slot not in slots else []

    @torch.no_grad()
    def __call__(self, state: Mapping[str, Tensor], *inputs: Tensor) -> dict[str, list[Tensor]]:
        by_place: dict[tuple, list[tuple[str, int, Read]]] = {}
        for group, reads in self.reads.items():
            for n, read in enumerate(reads):
                by_place.setdefault((read.function, read.number, read.slot), []).append((group, n, read))
        features: dict[str, dict[int, Tensor]] = {group: {} for group in self.reads}
        left = len(by_place)

        def take(call: tuple[str, int], slot: int, x: Tensor) -> None:
            nonlocal left
            for group, n, read in by_place[(*call, slot)]:
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


# --------------------------------------------------------------------------------------------------------------------


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


def plot(model: nn.Module, spec: PermutationSpec, path: str | os.PathLike, title: str = "") -> None:
    """Draw the groups over the model's layers, in order of the state dict (.png, .pdf or .svg)."""
    matrices = [name for name, tensor in model.state_dict().items() if tensor.ndim > 1]
    where = {layer: n for n, layer in enumerate(dict.fromkeys(name.removesuffix(".weight") for name in matrices))}
    groups, makes, reads = {}, [], []
    for group, members in spec.members.items():
        if members:  # others are blocks of units, and known by what they hold
            blocks = f" in {spec.sizes[spec.blocks[group]]} blocks" if group in spec.blocks else ""
            for member in members:
                if member.tensor in matrices:
                    place = len(groups), where[member.tensor.removesuffix(".weight")]
                    (reads if member.dims == (1,) or member.blocks else makes).append(place)
            groups[group] = f"({spec.sizes[group]}{blocks})"
    groups_figure(groups, list(where), makes, reads, path, title)


def main(argv: list[str] | None = None) -> None:
    from models import build_model

    parser = argparse.ArgumentParser(
        prog="python -m merging.permutation",
        description="Print the permutation groups of a model, once they have been checked.",
        epilog="example: python -m merging.permutation tv:densenet121 --image_size 64",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="resnet20, resnet50, vgg16 or tv:<torchvision model>")
    parser.add_argument("--num_classes", type=int, default=10)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--in_channels", type=int, default=3)
    parser.add_argument("--width_multiplier", type=int, default=8)
    parser.add_argument("--plot", metavar="FILE.png", help="draw the groups over the model's layers (png, pdf, svg)")
    print_anywhere()
    options = parser.parse_args(argv)
    try:
        model = build_model(
            options.model,
            options.num_classes,
            in_channels=options.in_channels,
            image_size=options.image_size,
            width_multiplier=options.width_multiplier,
        )
        spec = derive_spec(model, torch.empty(1, options.in_channels, options.image_size, options.image_size))
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(describe(spec))
    if options.plot:
        plot(model, spec, options.plot, f"{options.model}: {len(spec.sizes)} groups")
        print(f"drawn: {options.plot}")


if __name__ == "__main__":
    main()
