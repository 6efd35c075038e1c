"""Which units of a network can trade places: derived from the model by tracing it, never typed in by hand.

A hidden layer's units can be reordered without changing the function, provided that every tensor that holds them is
reordered alike. `derive_spec` finds those tensors: it traces the model with `torch.fx`, follows the channel axis
(dimension 1) of every activation and joins axes that must move together. The result is data; `permute` applies it.

    python -m merging.permutation resnet50
"""

from __future__ import annotations

import argparse
import copy
import math
import operator
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Permutations = dict[str, Tensor]
"""Group -> int64 (units,): the new unit k is the old unit p[k]."""


class UnsupportedOperation(ValueError):
    """The trace holds an operation for which no permutation rule is known."""


@dataclass(frozen=True)
class Segment:
    """`size` units of `group`, each a run of `repeat` consecutive entries of an axis; `group` None: never permuted."""

    group: str | None
    size: int
    repeat: int = 1

    @property
    def length(self) -> int:
        return self.size * self.repeat


@dataclass(frozen=True)
class Read:
    """A group's features, as they are when node `node` runs: in dimension 1 of the result of node `source`.

    They start at entry `offset`; each unit is a run of `repeat` entries.
    """

    node: str
    source: str
    offset: int
    repeat: int = 1


@dataclass(frozen=True)
class PermutationSpec:
    """Which axes of which tensors move together.

    sizes: group -> units, in execution order; only groups of two or more units that may be permuted.
    axes: state-dict name -> one tuple of segments per dimension (() for a dimension that holds no units).
    fixed: what can't be permuted -> why.
    reads: group -> where the layers that consume it read its features, in execution order.
    """

    sizes: dict[str, int]
    axes: dict[str, tuple[tuple[Segment, ...], ...]]
    fixed: dict[str, str]
    reads: dict[str, tuple[Read, ...]]

    def members(self, group: str) -> list[tuple[str, int, int, int]]:
        """(tensor name, dimension, offset, repeat) of every place that holds the units of `group`."""
        return [
            (name, dim, offset, segment.repeat)
            for name, dims in self.axes.items()
            for dim, segments in enumerate(dims)
            for offset, segment in _offsets(segments)
            if segment.group == group
        ]


def _offsets(segments: Iterable) -> Iterable[tuple[int, Segment]]:
    offset = 0
    for segment in segments:
        yield offset, segment
        offset += segment.length


# --------------------------------------------------------------------------------------------------------------------
# Joining axes: union-find whose classes can also be split


@dataclass(frozen=True)
class _Run:
    """`size` units of the class that `unit_class` belongs to, each a run of `repeat` entries."""

    unit_class: int
    size: int
    repeat: int = 1

    @property
    def length(self) -> int:
        return self.size * self.repeat


_Layout = tuple[_Run, ...]


class _Classes:
    """Classes of unit lists that move together. A class starts whole, can be joined with others, split or fixed."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.origin: list[tuple[str, int, int, int]] = []  # (name, first unit, end, units of the whole)
        self.parts: dict[int, tuple[int, int]] = {}
        self.reasons: dict[int, str] = {}

    def new(self, name: str, size: int, reason: str | None = None) -> _Layout:
        return (_Run(self._add((name, 0, size, size), reason), size),)

    def _add(self, origin: tuple[str, int, int, int], reason: str | None) -> int:
        self.parent.append(len(self.parent))
        self.origin.append(origin)
        if reason is not None:
            self.reasons[self.parent[-1]] = reason
        return self.parent[-1]

    def name(self, root: int) -> str:
        name, first, end, whole = self.origin[root]
        return name if end - first == whole else f"{name}[{first}:{end}]"

    def find(self, index: int) -> int:
        while self.parent[index] != index:
            index = self.parent[index]
        return index

    def expand(self, layout: _Layout) -> _Layout:
        """The layout in terms of whole, current classes."""
        runs: list[_Run] = []
        for run in layout:
            root = self.find(run.unit_class)
            if root in self.parts:
                sizes = [self._size(part) for part in self.parts[root]]
                parts = zip(self.parts[root], sizes, strict=True)
                runs += self.expand(tuple(_Run(part, size, run.repeat) for part, size in parts))
            else:
                runs.append(_Run(root, run.size, run.repeat))
        return tuple(runs)

    def _size(self, index: int) -> int:
        _, first, end, _ = self.origin[index]
        return end - first

    def fix(self, layout: _Layout, reason: str) -> None:
        for run in self.expand(layout):
            self.reasons.setdefault(run.unit_class, reason)

    def join(self, left: _Layout, right: _Layout, where: str) -> None:
        """Make the units of two axes move together; split classes where their bounds differ.

        What can't move together, or meets an axis that holds no units, is fixed.
        """
        left, right = list(left), list(right)
        while left and right:
            left[:1], right[:1] = self.expand(left[:1]), self.expand(right[:1])
            a, b = left[0], right[0]
            if a.repeat != b.repeat:
                # Units of different lengths overlap from here on: nothing simple moves both.
                self.fix((*left, *right), f"units of {a.repeat} and of {b.repeat} entries meet in {where}")
                return
            if a.size != b.size:
                self._split(*((a.unit_class, b.size) if a.size > b.size else (b.unit_class, a.size)))
                continue
            self._union(a.unit_class, b.unit_class)
            del left[0], right[0]
        self.fix((*left, *right), f"also an axis that holds no units in {where}")

    def _split(self, root: int, at: int) -> None:
        name, first, end, whole = self.origin[root]
        reason = self.reasons.get(root)
        middle = first + at
        self.parts[root] = (
            self._add((name, first, middle, whole), reason),
            self._add((name, middle, end, whole), reason),
        )

    def _union(self, a: int, b: int) -> None:
        root, other = min(a, b), max(a, b)  # the class keeps the name of its first layer
        self.parent[other] = root
        if other in self.reasons:
            self.reasons.setdefault(root, self.reasons[other])


# --------------------------------------------------------------------------------------------------------------------
# Tracing


class _Tracer(fx.Tracer):
    """Remembers the innermost module in which tracing failed."""

    failed_in = ""

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or f" in {self.path_of_module(m)!r} ({type(m).__name__})"
            raise


def _trace(model: nn.Module) -> fx.Graph:
    """The graph of `model`, which must be a private copy in eval mode."""
    tracer = _Tracer()
    try:
        return tracer.trace(model)
    except Exception as error:  # the model's own code runs here: anything can be raised
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        line = f" at `{frames[-1].line}` ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        raise UnsupportedOperation(
            f"torch.fx cannot trace {type(model).__name__}{tracer.failed_in}{line}: {error}. "
            "A forward pass can only be traced if what it does depends on no tensor's values."
        ) from error


class _Shapes(fx.Interpreter):
    """Runs the graph and keeps every tensor's shape."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> object:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise ValueError(f"node {n.name!r} ({n.op} {n.target}) fails on the example: {error}") from error
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        return result


# --------------------------------------------------------------------------------------------------------------------
# Rules: one per kind of operation. A rule takes (derivation, node) and returns the layout of the node's dimension 1.

_Rule = Callable[["_Derivation", fx.Node], _Layout]
_MODULES: dict[type[nn.Module], _Rule] = {}
_FUNCTIONS: dict[Callable, _Rule] = {}
_METHODS: dict[str, _Rule] = {}


def _rule(*, modules: str = "", functions: str = "", methods: str = "") -> Callable[[_Rule], _Rule]:
    """Register a rule under names of `torch.nn`, of `torch.nn.functional`/`torch`/`operator`, and of Tensor methods."""

    def register(rule: _Rule) -> _Rule:
        _MODULES.update({getattr(nn, name): rule for name in modules.split()})
        for name in functions.split():
            _FUNCTIONS.update({getattr(home, name): rule for home in (F, torch, operator) if hasattr(home, name)})
        _METHODS.update(dict.fromkeys(methods.split(), rule))
        return rule

    return register


_ELEMENTWISE = (
    "relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ selu selu_ celu gelu silu mish softplus "
    "softsign logsigmoid sigmoid sigmoid_ hardsigmoid hardswish tanh tanh_ clamp clamp_ clip abs exp log sqrt rsqrt "
    "square neg pos"
)


@_rule(
    modules="ReLU ReLU6 Hardtanh LeakyReLU ELU SELU CELU GELU SiLU Mish Softplus Softsign LogSigmoid Sigmoid "
    "Hardsigmoid Hardswish Tanh",
    functions=_ELEMENTWISE,
    methods=_ELEMENTWISE + " contiguous clone detach to float double half bfloat16",
)
def _unary(derivation: _Derivation, node: fx.Node) -> _Layout:
    return derivation.layout(derivation.only_input(node))


@_rule(
    modules="Dropout Dropout1d Dropout2d Dropout3d AlphaDropout Identity",
    functions="dropout dropout1d dropout2d dropout3d alpha_dropout",
)
def _nothing_in_eval_mode(derivation: _Derivation, node: fx.Node) -> _Layout:
    derivation.reads_before.add(node)
    return _unary(derivation, node)


_ARITHMETIC = "add sub mul div"
_IN_PLACE = "add_ sub_ mul_ div_"


@_rule(
    functions=_ARITHMETIC + " truediv iadd isub imul itruediv maximum minimum pow",
    methods=f"{_ARITHMETIC} {_IN_PLACE} maximum minimum pow",
)
def _binary(derivation: _Derivation, node: fx.Node) -> _Layout:
    """Elementwise over one or two tensors of which a dimension of length 1 may be broadcast."""
    shape = derivation.shapes[node]
    result: _Layout | None = None
    for operand in derivation.tensor_inputs(node):
        if derivation.shapes[operand].numel() == 1:
            # One number for all units; an activation would have the batch's two samples.
            derivation.record_constant(operand, shape)
            continue
        is_constant = operand.op == "get_attr"
        if not is_constant and len(derivation.shapes[operand]) != len(shape):
            derivation.refuse(node, f"operands of {len(derivation.shapes[operand])} and {len(shape)} dimensions")
        layout = derivation.record_constant(operand, shape) if is_constant else derivation.layout(operand)
        if layout is None or sum(run.length for run in layout) != shape[1]:
            continue  # broadcast over the units
        if result is not None:
            derivation.classes.join(result, layout, node.name)
        result = result or layout
    if result is None:
        derivation.refuse(node, "no operand has the result's channels")
    return result


@_rule(functions="cat concat", methods="")
def _concatenate(derivation: _Derivation, node: fx.Node) -> _Layout:
    tensors = node.args[0] if node.args else node.kwargs["tensors"]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim %= len(derivation.shapes[node])
    layouts = [derivation.layout(tensor) for tensor in tensors]
    if dim == 1:
        return sum(layouts, ())
    if dim == 0:
        derivation.refuse(node, "concatenation over the batch")
    for first, second in pairwise(layouts):
        derivation.classes.join(first, second, node.name)
    return layouts[0]


@_rule(
    modules="Flatten Unflatten",
    functions="flatten reshape squeeze unsqueeze",
    methods="flatten view reshape squeeze unsqueeze",
)
def _reshape(derivation: _Derivation, node: fx.Node) -> _Layout:
    """Row-major reshapes in which every channel becomes a run of whole entries of dimension 1."""
    source = derivation.only_input(node)
    before, after = derivation.shapes[source], derivation.shapes[node]
    if len(after) < 2 or after[0] != before[0] or after[1] % before[1]:
        derivation.refuse(node, f"reshape from {tuple(before)} to {tuple(after)}")
    derivation.reads_before.add(node)
    repeat = after[1] // before[1]
    return tuple(_Run(run.unit_class, run.size, run.repeat * repeat) for run in derivation.layout(source))


@_rule(functions="mean sum amax amin", methods="mean sum amax amin")
def _reduce(derivation: _Derivation, node: fx.Node) -> _Layout:
    source = derivation.only_input(node)
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = dims if isinstance(dims, (tuple, list)) else [dims]
    rank = len(derivation.shapes[source])
    if not all(isinstance(dim, int) and dim % rank >= 2 for dim in dims):
        derivation.refuse(node, f"reduction over dimensions {tuple(dims)}, which are not all spatial")
    derivation.reads_before.add(node)
    return derivation.layout(source)


def _spatial(rank: int) -> _Rule:
    """Pooling, padding, resizing: each channel by itself, on `rank`-dimensional input (0: any batch of maps)."""

    def rule(derivation: _Derivation, node: fx.Node) -> _Layout:
        source = derivation.only_input(node)
        before, after = derivation.shapes[source], derivation.shapes[node]
        if len(before) != (rank or len(before)) or len(before) < 3 or before[:2] != after[:2]:
            derivation.refuse(node, f"{tuple(before)} becomes {tuple(after)}: not channel by channel")
        kind = _operation(derivation.model, node).split()[0].lower()
        if "avg" in kind and ("adaptive" in kind or math.prod(after[2:]) == 1):
            derivation.reads_before.add(node)
        return derivation.layout(source)

    return rule


for _d in (1, 2, 3):
    _rule(
        modules=f"MaxPool{_d}d AvgPool{_d}d AdaptiveAvgPool{_d}d AdaptiveMaxPool{_d}d "
        f"ZeroPad{_d}d ConstantPad{_d}d ReflectionPad{_d}d ReplicationPad{_d}d",
        functions=f"max_pool{_d}d avg_pool{_d}d adaptive_avg_pool{_d}d adaptive_max_pool{_d}d",
    )(_spatial(_d + 2))
_rule(modules="Upsample UpsamplingNearest2d UpsamplingBilinear2d", functions="interpolate")(_spatial(0))


@_rule(modules="Conv1d Conv2d Conv3d")
def _convolution(derivation: _Derivation, node: fx.Node) -> _Layout:
    conv: nn.Conv2d = derivation.model.get_submodule(node.target)
    name = str(node.target)
    inputs = derivation.consume(node, rank=len(conv.kernel_size) + 2)
    if conv.groups == 1:
        outputs = derivation.classes.new(name, conv.out_channels)
        derivation.record(f"{name}.weight", outputs, inputs)
    elif conv.groups == conv.in_channels:
        # Depthwise: channel c makes the outputs c * m ... c * m + m - 1.
        multiplier = conv.out_channels // conv.in_channels
        outputs = tuple(_Run(run.unit_class, run.size, run.repeat * multiplier) for run in inputs)
        derivation.record(f"{name}.weight", outputs, ())
    else:
        reason = f"grouped convolution {name} ({conv.groups} groups of {conv.in_channels} channels)"
        derivation.classes.fix(inputs, reason)
        outputs = derivation.classes.new(name, conv.out_channels, reason)
        derivation.record(f"{name}.weight", outputs, ())
    if conv.bias is not None:
        derivation.record(f"{name}.bias", outputs)
    return outputs


@_rule(modules="Linear")
def _linear(derivation: _Derivation, node: fx.Node) -> _Layout:
    linear: nn.Linear = derivation.model.get_submodule(node.target)
    name = str(node.target)
    inputs = derivation.consume(node, rank=2)
    outputs = derivation.classes.new(name, linear.out_features)
    derivation.record(f"{name}.weight", outputs, inputs)
    if linear.bias is not None:
        derivation.record(f"{name}.bias", outputs)
    return outputs


@_rule(modules="BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d PReLU")
def _per_channel(derivation: _Derivation, node: fx.Node) -> _Layout:
    """Modules whose tensors hold one entry per channel (or one for all, as PReLU's default)."""
    source = derivation.only_input(node)
    layout = derivation.layout(source)
    module, name = derivation.model.get_submodule(node.target), str(node.target)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        rank = int(type(module).__name__[-2]) + 2
        derivation.require_rank(node, source, rank)  # without a batch, dimension 1 is no channel
    for key in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, key, None)
        if tensor is not None:
            derivation.record(f"{name}.{key}", layout if tensor.numel() == derivation.shapes[source][1] else ())
    if getattr(module, "num_batches_tracked", None) is not None:
        derivation.record(f"{name}.num_batches_tracked")
    return layout


_SHAPE_QUERIES = ("size", "dim", "ndimension", "numel")
_SHAPE_ATTRIBUTES = ("shape", "ndim", "device", "dtype")


def _operation(model: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"{type(model.get_submodule(node.target)).__name__} {node.target}"
    return getattr(node.target, "__name__", str(node.target))


class _Derivation:
    """One pass over the graph in execution order."""

    def __init__(self, model: nn.Module, graph: fx.Graph, shapes: dict[fx.Node, torch.Size]) -> None:
        self.model, self.graph, self.shapes = model, graph, shapes
        self.classes = _Classes()
        self.layouts: dict[fx.Node, _Layout] = {}
        self.axes: dict[str, tuple[_Layout, ...]] = {}
        self.state = model.state_dict(keep_vars=True)
        self.inputs: list[tuple[fx.Node, _Layout]] = []  # (where a layer's input is read, layout there)
        self.reads_before: set[fx.Node] = set()  # nodes such as a global pool: read what goes into them

    # What rules use

    def refuse(self, node: fx.Node, detail: str) -> None:
        kind = {"call_module": "module", "call_function": "function", "call_method": "method"}.get(node.op, node.op)
        raise UnsupportedOperation(
            f"node {node.name!r}: no permutation rule for the {kind} {_operation(self.model, node)} ({detail})"
        )

    def tensor_inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in self.shapes]

    def only_input(self, node: fx.Node) -> fx.Node:
        sources = self.tensor_inputs(node)
        if len(sources) != 1:
            self.refuse(node, f"{len(sources)} tensor inputs")
        return sources[0]

    def layout(self, node: fx.Node) -> _Layout:
        if node not in self.layouts:
            self.refuse(node, "its result is used as an activation")
        return self.layouts[node]

    def require_rank(self, node: fx.Node, source: fx.Node, rank: int) -> None:
        if len(self.shapes[source]) != rank:
            self.refuse(node, f"input of shape {tuple(self.shapes[source])}, expected {rank} dimensions")

    def consume(self, node: fx.Node, rank: int) -> _Layout:
        """The layout of a layer's input; remembers where to read its features."""
        source = self.only_input(node)
        self.require_rank(node, source, rank)
        read = node
        while self.only_input(read) in self.reads_before:
            read = self.only_input(read)
        self.inputs.append((read, self.layout(self.only_input(read))))
        return self.layout(source)

    def record(self, name: str, *layouts: _Layout) -> None:
        """State entry `name` has these layouts in its first dimensions, () for one that holds no units.

        An entry that is used again has the layouts of all its uses.
        """
        if name not in self.state:
            for layout in layouts:
                self.classes.fix(layout, f"{name} is not in the state dict")
        for old, new in zip(self.axes.get(name, ()), layouts, strict=False):
            self.classes.join(old, new, name)
        self.axes.setdefault(name, layouts)

    def record_constant(self, node: fx.Node, shape: torch.Size) -> _Layout | None:
        """A raw parameter or buffer broadcast against an activation of `shape`; None if it has no channel axis."""
        constant = self.shapes[node]
        dim = 1 - (len(shape) - len(constant))
        if len(constant) > len(shape) or (len(constant) == len(shape) and constant[0] != 1):
            self.refuse(node, f"a tensor of shape {tuple(constant)} meets an activation of shape {tuple(shape)}")
        if node.op != "get_attr":
            return None
        if dim < 0 or constant[dim] == 1:
            self.record(node.target, *[()] * len(constant))
            return None
        layout = self.classes.new(node.target, constant[dim])
        self.record(node.target, *[layout if d == dim else () for d in range(len(constant))])
        return layout

    # The pass

    def run(self) -> PermutationSpec:
        for node in self.graph.nodes:
            self._visit(node)
        self._tie()
        self._fix_unread()
        return self._spec()

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            for source in node.all_input_nodes:
                if source in self.shapes:
                    self.classes.fix(self.layout(source), "the model's output")
        elif node.op == "placeholder":
            if node in self.shapes:
                if len(self.shapes[node]) < 2:
                    self.refuse(node, f"input of shape {tuple(self.shapes[node])}, expected a batch with channels")
                self.layouts[node] = self.classes.new(f"input {node.name}", self.shapes[node][1], "the model's input")
        elif node.op == "get_attr":
            pass  # recorded where it is used
        elif node not in self.shapes:
            self._check_harmless(node)
        else:
            rules = {"call_module": _MODULES, "call_function": _FUNCTIONS, "call_method": _METHODS}[node.op]
            key = type(self.model.get_submodule(node.target)) if node.op == "call_module" else node.target
            if key not in rules:
                self.refuse(node, f"result of shape {tuple(self.shapes[node])}")
            if len(self.shapes[node]) < 2:
                self.refuse(node, f"result of shape {tuple(self.shapes[node])} has no channel axis")
            self.layouts[node] = rules[key](self, node)

    def _check_harmless(self, node: fx.Node) -> None:
        """Numbers may come from shapes, never from values: those could depend on the order of the units."""
        asks_shape = node.op == "call_method" and node.target in _SHAPE_QUERIES
        asks_attribute = node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES
        if self.tensor_inputs(node) and not asks_shape and not asks_attribute:
            self.refuse(node, "its result is not a single tensor")

    def _tie(self) -> None:
        """Entries that share one tensor share its axes."""
        first: dict[int, str] = {}
        for name in [*self.axes, *self.state]:
            tensor = self.state.get(name)
            if tensor is None:
                continue
            known = first.setdefault(id(tensor), name)
            if known != name and known in self.axes:
                self.record(name, *self.axes[known])
        unused = [name for name in self.state if name not in self.axes]
        if unused:
            raise UnsupportedOperation(
                f"{len(unused)} tensors are not used by the traced forward pass (eval mode), so how to permute them is "
                f"unknown: {', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}. Remove them from the model."
            )

    def _fix_unread(self) -> None:
        read = {run.unit_class for _, layout in self.inputs for run in self.classes.expand(layout)}
        for layouts in self.axes.values():
            for layout in layouts:
                unread = [run for run in self.classes.expand(layout) if run.unit_class not in read]
                self.classes.fix(tuple(unread), "no layer reads it")

    def _group(self, run: _Run) -> str | None:
        is_free = run.unit_class not in self.classes.reasons and run.size > 1
        return self.classes.name(run.unit_class) if is_free else None

    def _segments(self, layout: _Layout) -> tuple[Segment, ...]:
        return tuple(Segment(self._group(run), run.size, run.repeat) for run in self.classes.expand(layout))

    def _spec(self) -> PermutationSpec:
        axes = {name: tuple(map(self._segments, layouts)) for name, layouts in self.axes.items() if name in self.state}
        sizes = {s.group: s.size for dims in axes.values() for segments in dims for s in segments if s.group}
        every = [run for layouts in [*self.axes.values()] for layout in layouts for run in self.classes.expand(layout)]
        every += [run for layout in self.layouts.values() for run in self.classes.expand(layout)]
        fixed = {
            self.classes.name(run.unit_class): self.classes.reasons.get(run.unit_class, "a single unit")
            for run in every
            if self._group(run) is None
        }
        return PermutationSpec(sizes, {name: axes[name] for name in self.state}, fixed, self._reads(sizes))

    def _reads(self, groups: Iterable[str]) -> dict[str, tuple[Read, ...]]:
        reads: dict[str, dict[tuple, Read]] = {group: {} for group in groups}
        for node, layout in self.inputs:
            for offset, segment in _offsets(self._segments(layout)):
                if segment.group:
                    # Several layers may read the same tensor: once is enough, where it is read last.
                    source = self.only_input(node).name
                    key = (source, offset, segment.repeat)
                    reads[segment.group].pop(key, None)
                    reads[segment.group][key] = Read(node.name, source, offset, segment.repeat)
        return {group: tuple(found.values()) for group, found in reads.items()}


def derive_spec(model: nn.Module, example: Tensor) -> PermutationSpec:
    """Trace `model` and find which axes of its tensors can be permuted together.

    model: any network that `torch.fx` can trace in eval mode; it is not changed.
    example: an input batch (B, C, ...); only its shape and whether it holds integers count.
    The axes of the model's input and output are never permuted. What can't be permuted is listed in `spec.fixed`.

    Raises UnsupportedOperation (a ValueError) that names the node and the operation for what has no rule, when tracing
    fails, and for parameters or buffers the forward pass does not use; ValueError when the model refuses the example.
    """
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedOperation(
                f"module {name or type(model).__name__!r} has forward hooks, which a trace does not show: remove them, "
                "or put what they do into the forward pass"
            )
    model = copy.deepcopy(model).eval()
    graph = _trace(model)
    run = _Shapes(model, graph)
    like = next((p for p in model.parameters() if p.is_floating_point()), example)
    dtype = like.dtype if example.is_floating_point() else example.dtype
    with torch.no_grad():  # two samples, so that the batch doesn't pass for a dimension of length 1
        run.run(torch.zeros((2, *example.shape[1:]), dtype=dtype, device=like.device))
    return _Derivation(model, graph, run.shapes).run()


# --------------------------------------------------------------------------------------------------------------------
# Permutations


def identity(spec: PermutationSpec) -> Permutations:
    """The permutations that change nothing."""
    return {group: torch.arange(size) for group, size in spec.sizes.items()}


def random_permutations(spec: PermutationSpec, generator: torch.Generator | None = None) -> Permutations:
    """A uniformly random permutation for every group."""
    return {group: torch.randperm(size, generator=generator) for group, size in spec.sizes.items()}


def invert(permutations: Permutations) -> Permutations:
    """The permutations that undo `permutations`."""
    return {group: torch.argsort(p) for group, p in permutations.items()}


def permute(spec: PermutationSpec, permutations: Permutations, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A new state dict whose unit k of every group is unit p[k] of `state`'s. The network's function stays the same.

    Tensors without a permuted axis are shared with `state`, not copied.
    Raises ValueError when groups, sizes or state-dict names do not fit the spec.
    """
    if permutations.keys() != spec.sizes.keys():
        odd = sorted(permutations.keys() ^ spec.sizes.keys())
        raise ValueError(f"permutations and spec differ in their groups: {', '.join(odd[:5])}")
    for group, p in permutations.items():
        if not torch.equal(torch.sort(p).values.cpu(), torch.arange(spec.sizes[group])):
            raise ValueError(f"group {group!r}: not a permutation of {spec.sizes[group]} units")
    if state.keys() != spec.axes.keys():
        odd = sorted(state.keys() ^ spec.axes.keys())
        raise ValueError(f"state dict and spec differ in their tensors: {', '.join(odd[:5])}")
    return {name: permute_tensor(tensor, enumerate(spec.axes[name]), permutations) for name, tensor in state.items()}


def permute_tensor(
    tensor: Tensor, dims: Iterable[tuple[int, tuple[Segment, ...]]], permutations: Permutations
) -> Tensor:
    """`tensor` with the given (dimension, segments) reordered."""
    for dim, segments in dims:
        if any(segment.group for segment in segments):
            index = torch.cat([_index(segment, offset, permutations) for offset, segment in _offsets(segments)])
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _index(segment: Segment, offset: int, permutations: Permutations) -> Tensor:
    """Which old entries of the axis come to stand in the segment that starts at `offset`."""
    units = permutations[segment.group].cpu() if segment.group else torch.arange(segment.size)
    return offset + (units[:, None] * segment.repeat + torch.arange(segment.repeat)).flatten()


# --------------------------------------------------------------------------------------------------------------------
# Features


def read_units(x: Tensor, offset: int, units: int, repeat: int, copy: bool = True) -> Tensor:
    """Columns offset ... offset + units * repeat of dimension 1 of x as (rows, units); rows run over all the rest.

    copy: the rows never share x's memory (which a channels-last x would allow).
    """
    x = x.narrow(1, offset, units * repeat).unflatten(1, (units, repeat)).movedim(1, -1)
    rows = x.reshape(-1, units)
    return rows.clone() if copy and rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else rows


def _may_write_in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node of a derivable graph may change its input: by its name, or by an argument `inplace`."""
    if node.op == "call_module":
        return getattr(model.get_submodule(node.target), "inplace", False)
    name = getattr(node.target, "__name__", str(node.target))
    return (
        name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv")  # of operator
        or any(argument is True for argument in (*node.args, *node.kwargs.values()))  # inplace, by position or by name
    )


def feature_reader(model: nn.Module, spec: PermutationSpec, at: str = "all") -> nn.Module:
    """A module whose forward(x) gives group -> list of features (rows, units), one row per sample and position.

    at: "last" reads a group once, at the input of the last layer that consumes it (after the activation; before a
    global pool, flatten or dropout that leads there), as in the paper; "all" at every distinct consumer input.
    A copy of the model in eval mode, without what comes after the last read. Parameter names are the model's, so
    `torch.func.functional_call(reader, state, (x,))` works with every state dict of the model (of several names that
    share a tensor, keep the first).
    """
    if at not in ("last", "all"):
        raise ValueError(f"at={at!r}: choose 'last' or 'all'")
    model = copy.deepcopy(model).eval()
    graph = _trace(model)
    nodes = {node.name: node for node in graph.nodes}
    # What is read must not be changed by a later operation.
    copy_rows = any(_may_write_in_place(model, node) for node in graph.nodes)
    features: dict[str, list[fx.Node]] = {}
    for group, reads in spec.reads.items():
        features[group] = []
        for read in reads[-1:] if at == "last" else reads:
            with graph.inserting_before(nodes[read.node]):
                args = (nodes[read.source], read.offset, spec.sizes[group], read.repeat, copy_rows)
                features[group].append(graph.call_function(read_units, args))
    wanted = {node for group in features.values() for node in group}
    for node in reversed(list(graph.nodes)):
        if node in wanted or node.op == "placeholder":
            break
        graph.erase_node(node)
    graph.output(features)
    reader = fx.GraphModule(model, graph)
    # The graph keeps only what it uses; functional_call wants a place for every entry of the state dict.
    reader._modules.update(model._modules)
    reader._parameters.update(model._parameters)
    reader._buffers.update(model._buffers)
    return reader


# --------------------------------------------------------------------------------------------------------------------


def describe(spec: PermutationSpec) -> str:
    """The groups with their sizes, members and read points, then what is fixed and why."""
    lines = []
    for group, size in spec.sizes.items():
        lines.append(f"{group}: {size} units")
        for name, dim, offset, repeat in spec.members(group):
            place = f" from {offset}" if offset else ""
            runs = f" in runs of {repeat}" if repeat > 1 else ""
            lines.append(f"    {name} dim {dim}{place}{runs}")
        lines.append(f"    read at the input of {', '.join(read.node for read in spec.reads[group])}")
    lines.append(f"{len(spec.sizes)} groups, {sum(spec.sizes.values())} units")
    lines += [f"fixed: {name} ({reason})" for name, reason in spec.fixed.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    from models import build_model

    parser = argparse.ArgumentParser(
        prog="python -m merging.permutation",
        description="Print the permutation groups of a model.",
        epilog="example: python -m merging.permutation tv:densenet121 --image_size 64",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="resnet20, resnet50, vgg16 or tv:<torchvision model>")
    parser.add_argument("--num_classes", type=int, default=10)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--in_channels", type=int, default=3)
    parser.add_argument("--width_multiplier", type=int, default=8)
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


if __name__ == "__main__":
    main()
