"""A spec from a model, derived by watching it run, or given by hand; checked in either case.

`trace` follows the units from tensor to tensor, `bundles` concludes which of them can trade places.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from merging.tracing.bundles import groups
from merging.tracing.rules import RULES
from merging.tracing.running import converted, is_mixed, own_copy, run, unwrapped
from merging.tracing.spec import Member, PermutationSpec, Read
from merging.tracing.trace import Source, Trace
from merging.tracing.units import MISSING, RANKS, Labels, Layout, Units, varied
from merging.tracing.verification import Arguments, Choice, Example, arguments, samples, verify, with_rows_as_it_takes
from merging.tracing.watch import UnsupportedOperation, Watch, tensors_of, tensors_within


def derive_spec(model: nn.Module, example: Example, kwargs: Mapping[str, Any] | None = None, *,
                outputs: Choice | None = None, check: bool = True) -> PermutationSpec:
    """Watch `model` at work and find which entries of its tensors can be permuted together.

    model: any network; it is not changed. DataParallel and torch.compile are taken off it: names are those within.
    example: an input batch (B, ...), a tuple or list of the forward pass's arguments, or a dict of its keyword
        arguments, nested as it takes them. kwargs: keyword arguments besides. Only shapes and types of tensors count,
        unless the network gives nothing finite for random values (see `verify`). What else it takes is passed as it is,
        and so is a tensor without a dimension. Tensors with as many rows as the first one are batches.
    outputs: what of the outputs has to stay as it is: a name ("logits"), a number or a function of them. None: all.
        Hidden states that nobody reads are outputs, too, whose units would be fixed.
    check: permute the units that were found, and compare the outputs in float64 (see `verify`): an error in the
        derivation is an exception here, never a wrong merge later.
    What the model's inputs and outputs hold is never permuted. What can't be permuted is listed in `spec.fixed`: an
    operation that is not known fixes what goes into it, and a tensor that the forward pass doesn't use stays as it is.

    Values of whole numbers that are put in (tokens) may decide what the forward pass does: the spec is of what it does
    for the example then, for which it must use all tensors.

    Raises UnsupportedOperation (a ValueError) where values of other tensors decide what the forward pass does, for
    scripted, traced and quantised models, and where parameters or buffers may be used in training only, but that can't
    be watched; ValueError when the model refuses the example, can't be copied, or doesn't pass the check.
    """
    original = unwrapped(model)
    if what := converted(original):
        raise UnsupportedOperation(f"{what}, so it can't be watched at work: pass the model that it was made from")
    return with_rows_as_it_takes(arguments(example, kwargs, outputs), lambda given: _derive(original, given, check))


def _derive(original: nn.Module, example: Arguments, check: bool) -> PermutationSpec:
    inputs = samples(original, example)
    model = own_copy(original)
    own = [*model.named_parameters(), *model.named_buffers()]  # held: it may replace them, and no id is to come twice
    shared = units, names, state, _ = Units(), _names(own, model.state_dict(keep_vars=True)), {}, {}
    trace = _watch(model, inputs, *shared)
    failure = None
    if any(_matters(name) for name in set(names.values()) - state.keys()):  # auxiliary heads work in training only
        try:
            model.train()
            _watch(model, inputs, *shared, kept=trace.constants)
        except ValueError as error:
            failure = error
    everything = model.state_dict(keep_vars=True)
    unused = _unused(everything, names, state)
    some = ", ".join(unused[:5]) + (" ..." if len(unused) > 5 else "")
    if unused and trace.decided:
        raise UnsupportedOperation(
            f"{len(unused)} tensors are not used by the forward pass of this example: {some}. Values that are put in "
            f"may decide that, as {trace.decided[0]} takes them: pass an example for which all are used")
    if unused and failure:
        raise UnsupportedOperation(
            f"{len(unused)} tensors are not used by the forward pass, so how to permute them is unknown: {some}. "
            f"Remove them from the model. Those of training only can't be seen, because {failure}")
    spec = _spec(units, trace, everything, names)
    spec.fixed.update(dict.fromkeys(unused, "the forward pass does not use it"))
    if check and spec.sizes:
        model.eval()
        _check_reads(model, spec, trace, samples(model, example, 3))
        verify(original, spec, example)
    return spec


def _unused(everything: Mapping[str, Tensor], names: Mapping[int, str], state: Mapping[str, Layout]) -> list[str]:
    """Those of a model's tensors that may hold units, and that no forward pass has met."""
    first = {id(tensor): name for name, tensor in reversed(everything.items())}
    return [name for name, tensor in everything.items() if names.get(id(tensor), first[id(tensor)]) not in state
            and _matters(name) and is_mixed(name, tensor) and _may_hold_units(tensor)]


@torch.no_grad()
def _check_reads(model: nn.Module, spec: PermutationSpec, trace: Trace, inputs: Arguments) -> None:
    """Reads are found by counting calls, which must not depend on the size of the batch."""
    count = Watch()
    run(model, *inputs.args, keywords=inputs.kwargs, within=count, what="inputs")
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


def _names(tensors: Sequence[tuple[str, Tensor]], exchanged: Container[str]) -> dict[int, str]:
    """id -> name of every tensor of a model; the first of several names.

    Not of a buffer that no state dict holds, as agents don't exchange it: its entries stay where they are. One whose
    entries are all the same has no order, though (an attention's zeros in place of a bias).
    """
    names: dict[int, str] = {}
    for name, tensor in tensors:
        if name in exchanged or not tensor.numel() or bool((tensor == tensor.flatten()[0]).all()):
            names.setdefault(id(tensor), name)
    return names


@torch.no_grad()
def _watch(model: nn.Module, inputs: Arguments, units: Units, names: dict[int, str],
           state: dict[str, Layout], grouped: dict[str, Labels], kept: Mapping[Tensor, bool] | None = None) -> Trace:
    """kept: constants that an earlier pass made, which may have stayed in a cache."""
    attributes = [value for module in model.modules() for key, value in vars(module).items()
                  if key not in ("_parameters", "_buffers", "_modules")]
    attributes += [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in names]
    trace = Trace(units, names, state, grouped, tensors_of(attributes), RULES)
    trace.constants.update(kept or {})
    for x in tensors_of(inputs):
        trace.layouts[x], trace.alive[x] = (), True
        if not x.is_floating_point():
            trace.given[x] = True
    outputs = run(model, *inputs.args, keywords=inputs.kwargs, within=trace, what="an example")
    for tensor in tensors_within(outputs if model.training else inputs.chosen(outputs)):
        trace.refuse_unseen(tensor, "the output")
        units.fix(trace.layout(tensor), "the model's output")
    return trace


def _spec(units: Units, trace: Trace, everything: Mapping[str, Tensor], names: dict[int, str]) -> PermutationSpec:
    found = groups(units)
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
        if axis.tensor in everything:
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
                by.removesuffix(".weight"), trace.written.get(source.storage, 0) > source.content)


def spec_from_axes(model: nn.Module, axes: Mapping[str, Sequence[str | None]], *, example: Example,
                   kwargs: Mapping[str, Any] | None = None, outputs: Choice | None = None) -> PermutationSpec:
    """A spec by hand: tensor -> one name for each dimension, None where nothing is permuted.

    Dimensions of the same name are permuted together; one that is longer than the shortest of its name holds each unit
    as a run of consecutive entries (a flattened map). Tensors that are left out hold no units. The layers' inputs whose
    features are read are found by watching the model. The spec is verified before it is returned. The example, its
    kwargs and outputs: as in `derive_spec`.

    Raises ValueError for unknown tensors, wrong numbers of dimensions or sizes, and where the function would change.
    """
    model, example = unwrapped(model), arguments(example, kwargs, outputs)
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
