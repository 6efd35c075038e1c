"""Watching a forward pass: what every operation means for the units that its tensors hold.

The model runs as it is, on a small batch, and each call of a torch function passes through `Trace` (so nothing needs to
be symbolically traceable). A *rule* says what a function does to layouts; one without a rule fixes all it touches.
`Recorder` watches later passes in the same way to fetch the features where layers read them.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from merging.units import RANKS, Labels, Layout, Shape, Units, varied


class UnsupportedOperation(ValueError):
    """The forward pass does something that no permutation of units can be carried through."""


@dataclass
class Call:
    """One call of a torch function, done."""

    name: str
    number: int  # among the calls of this name
    func: Callable
    args: tuple
    kwargs: dict[str, Any]
    result: Any

    @property
    def tensors(self) -> list[Tensor]:
        return tensors_of((self.args, self.kwargs))

    @property
    def results(self) -> list[Tensor]:
        return tensors_of(self.result)

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


@dataclass(frozen=True)
class Source:
    """Where a tensor can be fetched: the slot-th tensor among the arguments of the number-th call of `name`."""

    name: str
    number: int
    slot: int
    layout: Layout
    content: int  # serial number: the same tensor, not changed in place
    storage: int


@dataclass(frozen=True)
class Reading:
    """A layer (`by`) takes the sum over the units that `labels` tells: this is where their features are read."""

    source: Source
    labels: Labels
    by: str


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def tensors_within(tree: Any, seen: frozenset[int] = frozenset()) -> list[Tensor]:
    """Those in the fields of objects too (but not of objects that these lie in)."""
    found = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif id(leaf) not in seen and not isinstance(leaf, (type, Callable)):
            fields = [*getattr(leaf, "__dict__", ()), *getattr(type(leaf), "__slots__", ())]
            found += tensors_within([getattr(leaf, name, None) for name in fields], seen | {id(leaf)})
    return found


def function_name(func: Callable) -> str:
    """`__getitem__` -> getitem, `__rsub__` -> sub, the property T -> T; in-place functions keep their underscore."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        return getattr(func.__self__, "__name__", name)
    if name.startswith("__") and name.endswith("__") and name not in _VALUES:
        name = name[2:-2]
        name = _DUNDERS.get(name, name)
    return name


_DUNDERS = {"rsub": "sub", "rdiv": "div", "truediv": "div", "rtruediv": "div", "radd": "add", "rmul": "mul",
            "rpow": "pow", "rmatmul": "matmul", "iadd": "add_", "isub": "sub_", "imul": "mul_", "itruediv": "div_"}


class Watch(TorchFunctionMode):
    """Numbers the calls of each function, the same way in every pass; compound ones are done step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        name = function_name(func)
        steps = _COMPOUND.get(name)
        if steps and (done := self._in_steps(steps, args, kwargs)) is not NotImplemented:
            return done
        self.calls[name] += 1
        return self.watch(Call(name, self.calls[name], func, args, kwargs, None))

    def _in_steps(self, steps: Callable, args: tuple, kwargs: dict) -> Any:
        with self:
            return steps(*args, **kwargs)

    def watch(self, call: Call) -> Any:
        """Carry it out; subclasses look at it, too."""
        return call.func(*call.args, **call.kwargs)


class Recorder(Watch):
    """Hands tensors to `take` just before calls that are wanted: (name, number) -> slots."""

    def __init__(self, wanted: dict[tuple[str, int], list[int]], take: Callable[[tuple[str, int], int, Tensor], None]):
        super().__init__()
        self.wanted, self.take = wanted, take

    def watch(self, call: Call) -> Any:
        key = (call.name, call.number)
        if key in self.wanted:
            tensors = call.tensors
            for slot in self.wanted[key]:
                self.take(key, slot, tensors[slot])
        return super().watch(call)


# --------------------------------------------------------------------------------------------------------------------
# The trace


class Trace(Watch):
    """One forward pass, watched. Several may share `units` and `state`: what they find adds up.

    state: the layouts found so far of the model's parameters and buffers.
    grouped: the same for all, of grouped convolutions. attributes: tensors of the model that are in no state dict.
    readings: where layers read units. written: the memory that some operation has written to in place.
    """

    def __init__(self, units: Units, names: dict[int, str], state: dict[str, Layout], grouped: dict[str, Labels],
                 attributes: Sequence[Tensor]) -> None:
        super().__init__()
        self.units, self.names, self.state = units, names, state
        self.layouts: Any = WeakTensorKeyDictionary()  # of what was computed
        self.alive: Any = WeakTensorKeyDictionary()  # what depends on the inputs
        self.sources: Any = WeakTensorKeyDictionary()
        self.serials: Any = WeakTensorKeyDictionary()
        self.serial = 0
        self.constants: Any = WeakTensorKeyDictionary()  # made in the forward pass, of no tensor that counts
        self.grouped: dict[str, Labels] = grouped  # a grouped convolution's weight -> the units along its dimension 1
        self.readings: list[Reading] = []
        self.written: set[int] = set()
        for tensor in attributes:
            self.constants[tensor] = True

    # What rules use

    def name(self, tensor: Tensor) -> str | None:
        return self.names.get(id(tensor))

    def is_activation(self, tensor: Tensor) -> bool:
        return tensor in self.alive

    def layout(self, tensor: Tensor) -> Layout:
        """Of any tensor; a parameter or buffer that is met for the first time gets units in each of its dimensions."""
        if tensor in self.layouts:
            return self.layouts[tensor]
        name = self.name(tensor)
        if name is None:
            return ()
        if name in self.grouped:  # and something else
            self.units.fix((self.grouped[name],), f"{name} is used in two ways{here()}")
        if name not in self.state:
            self.state[name] = ()
            if tensor.is_floating_point():
                self.state[name] = tuple(
                    self.units.new(_along(tensor.shape, {d}), name, (d,)) for d, n in enumerate(tensor.shape) if n > 1
                )
        return self.state[name]

    def operand(self, tensor: Tensor) -> tuple[Layout, Shape]:
        return self.layout(tensor), tuple(tensor.shape)

    def adopt(self, tensor: Tensor | None, shape: Shape, layout: Layout, where: str) -> None:
        """A tensor, seen as `shape`, takes part elementwise in something with this layout (of the same rank)."""
        if tensor is None:
            return
        name = self.name(tensor)
        if name is None or name in self.state or not tensor.is_floating_point():
            mine = tuple(labels.reshape(_narrow(labels, tensor, shape)) for labels in self.layout(tensor))
            self.units.join([(layout, _full(layout, shape)), (mine, shape)], where)
            return
        adopted = []
        for labels in layout:
            absent = [d for d in varied(labels) if shape[d] == 1]
            for part in self.units.reduce((labels,), absent) if absent else (labels,):
                if not varied(part):
                    continue
                dims = tuple(_own_dims(tensor, shape)[d] for d in sorted(varied(part)))
                own = self.units.new(part.shape, name, dims)
                self.units.tie(part, own)
                adopted.append(own.reshape(_along(tensor.shape, set(dims))))
        self.state[name] = tuple(adopted)

    def source(self, call: Call, tensor: Tensor) -> Source:
        """Where to fetch the tensor: before pooling, flattening and dropout that led to it, if there were any."""
        if tensor in self.sources:
            return self.sources[tensor]
        slot = next(n for n, other in enumerate(call.tensors) if other is tensor)
        if tensor not in self.serials:
            self.serials[tensor] = self._next_serial()
        return Source(call.name, call.number, slot, self.layout(tensor), self.serials[tensor],
                      tensor.untyped_storage().data_ptr())

    def plain(self, tensor: Tensor, dims: Iterable[int], where: str) -> Layout:
        """The tensor's layout once units along `dims` are fixed, because order counts there."""
        dims, layout = set(dims), self.layout(tensor)
        self.units.fix(tuple(labels for labels in layout if varied(labels) & dims), f"their order counts in {where}")
        return tuple(labels for labels in layout if not varied(labels) & dims)

    def read(self, call: Call, tensor: Tensor, labels: Labels, by: str) -> None:
        self.units.read.append(labels.ravel())
        if self.is_activation(tensor):
            source = self.source(call, tensor)
            if not any(0 in varied(theirs) for theirs in source.layout):  # else its place depends on the batch's size
                self.readings.append(Reading(source, labels, by))

    def _next_serial(self) -> int:
        self.serial += 1
        return self.serial

    def give_up(self, call: Call) -> None:
        """No rule: all that goes in is fixed, so that what comes out holds no units."""
        for tensor in call.tensors:
            self.units.fix(self.layout(tensor), f"no rule for {call.name}{here()}")

    # One call

    def watch(self, call: Call) -> Any:
        tensors = call.tensors
        known = [tensor for tensor in tensors if tensor in self.layouts or self.name(tensor) is not None]
        tables = [tensor for tensor in known if not (tensor.is_floating_point() or tensor in self.layouts)]
        for table in tables:
            self.layout(table)  # of positions, or a mask: it holds no units, and what is made of it neither
        for tensor in tensors:
            if tensor.is_floating_point() and not (tensor in self.layouts or tensor in self.constants
                                                   or self.name(tensor) is not None):
                raise UnsupportedOperation(
                    f"{call.name}{here()} meets a tensor of shape {tuple(tensor.shape)} that was made where it can't "
                    "be seen, as in torch.jit.script or vmap: write that in plain PyTorch, or make a constant a buffer"
                )
        if len(known) == len(tables) or call.name in _CONSTANTS:
            result = call.func(*call.args, **call.kwargs)
            for tensor in tensors_of(result):
                self.constants[tensor] = True
            return result
        if call.name in _VALUES and any(self.is_activation(t) or t.numel() > 1 for t in known):
            raise UnsupportedOperation(f"{call.name}(){here()} takes the values of a tensor out of the network, which "
                                       "may depend on the order of its units: keep them in tensors")
        call.result = call.func(*call.args, **call.kwargs)
        if call.name == "setitem":
            self._set(call)
        results = call.results
        if not results:
            return call.result
        name = call.name[:-1] if call.name.endswith("_") and not call.name.startswith("_") else call.name
        # A view may be the tensor itself, where there is nothing to do.
        in_place = any(result is tensor for result in results for tensor in tensors) and not (
            call.name in _UNARY_VIEWS or call.name in _MOVES)
        rule = _RULES.get(name)
        if in_place and name in _MOVES:
            rule = None  # the tensor's shape has changed already
        try:
            found = rule(self, call) if rule else None
        except Exception as error:  # arguments that the rule doesn't know: what it fixed and tied so far does no harm
            if os.environ.get("DIMAT_DEBUG") and not isinstance(error, _NoRule):
                raise
            found = None
        if found is None:
            self.give_up(call)
            found = [()] * len(results)
        for result, layout in zip(results, found, strict=True):
            if in_place:
                self._write(result)
            if self.name(result) is None:
                self.layouts[result] = layout
                if any(map(self.is_activation, tensors)):
                    self.alive[result] = True
            if in_place or result not in self.serials:
                self.serials[result] = self._next_serial()
        if len(results) == 1 and name in _READ_BEFORE and not in_place:
            self._read_before(call, name, results[0])
        return call.result

    def _set(self, call: Call) -> None:
        """x[index] = value: the entries that are written over hold the value's units."""
        x, index, value = call.args
        self._write(x)
        self.serials[x] = self._next_serial()
        try:
            (view,) = self.units.move(lambda numbers: [numbers[0][index]], [self.operand(x)], "setitem")
        except Exception:
            view = None
        if view is None or any(isinstance(leaf, Tensor) and self.is_activation(leaf) for leaf in tree_leaves(index)):
            self.give_up(call)
        elif isinstance(value, Tensor):
            shape = tuple(x[index].shape)
            self.units.join([(view, shape), self.operand(value)], "an assignment" + here())
            if self.is_activation(value):
                self.layouts.setdefault(x, ())
                self.alive[x] = True

    def _write(self, result: Tensor) -> None:
        """Other views of the memory hold the same units: what is written was joined with what was there."""
        if result in self.sources:
            del self.sources[result]
        self.written.add(result.untyped_storage().data_ptr())

    def _read_before(self, call: Call, name: str, result: Tensor) -> None:
        source = next((tensor for tensor in call.tensors if self.is_activation(tensor)), None)
        if source is None or (name in _MOVES and source.numel() != result.numel()):
            return
        if source not in self.sources and any(0 in varied(labels) for labels in self.layout(source)):
            return  # its place would depend on the size of the batch
        if name.endswith("pool1d") or name.endswith("pool2d") or name.endswith("pool3d"):
            if "avg" not in name or ("adaptive" not in name and math.prod(result.shape[2:]) > 1):
                return
        elif name in _REDUCE and len(self.layout(source)) != len(self.layout(result)):
            return
        self.sources[result] = self.source(call, source)


def here() -> str:
    """' (file:line)' of the user's line that is running."""
    frame = sys._getframe(1)
    ours = str(Path(__file__).parent)
    while frame:
        path = frame.f_code.co_filename
        if "/torch/" not in path and not path.startswith(ours) and not path.startswith("<"):
            return f" ({Path(path).name}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


def _along(shape: Sequence[int], dims: set[int]) -> Shape:
    return tuple(n if d in dims else 1 for d, n in enumerate(shape))


def _own_dims(tensor: Tensor, shape: Shape) -> dict[int, int]:
    """Dimension of `shape`, which has ones besides the tensor's dimensions -> dimension of the tensor."""
    theirs = [d for d, n in enumerate(tensor.shape) if n > 1]
    return dict(zip([d for d, n in enumerate(shape) if n > 1], theirs, strict=True))


def _narrow(labels: Labels, tensor: Tensor, shape: Shape) -> Shape:
    """The shape of a state tensor's labels when the tensor is seen as `shape`."""
    back = _own_dims(tensor, shape)
    return tuple(labels.shape[back[d]] if d in back else 1 for d in range(len(shape)))


def _full(layout: Layout, shape: Shape) -> Shape:
    """The shape of what `layout` belongs to, as far as it matters beside an operand of `shape`."""
    return tuple(max([n, *(labels.shape[d] for labels in layout)]) for d, n in enumerate(shape))


# --------------------------------------------------------------------------------------------------------------------
# Rules: (trace, call, done) -> the layouts of the results, or None if the case has no rule

_Rule = Callable[[Trace, Call], "list[Layout] | None"]
_RULES: dict[str, _Rule] = {}
_COMPOUND: dict[str, Callable] = {}


class _NoRule(Exception):
    """The rule doesn't cover this case."""


def _rule(names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return register


_ELEMENTWISE = (
    "relu relu6 threshold hardtanh leaky_relu elu selu celu gelu silu mish softplus softsign logsigmoid sigmoid "
    "hardsigmoid hardswish hardshrink softshrink tanhshrink tanh rrelu clamp clamp_min clamp_max clip abs exp expm1 "
    "log log1p log2 sqrt rsqrt square neg positive reciprocal sin cos erf sign round floor ceil nan_to_num "
    "add sub mul div multiply divide subtract true_divide floor_divide rsub maximum minimum fmax fmin pow float_power "
    "fmod remainder atan2 lerp addcmul addcdiv where masked_fill eq ne gt ge lt le and or xor invert logical_and "
    "logical_or logical_not isfinite isnan isinf "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "clone contiguous detach to type float double half bfloat16 cpu cuda type_as requires_grad data real alias "
    "zeros_like ones_like full_like copy zero fill"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONSTANTS = _words("new_zeros new_ones new_full new_empty new_tensor empty_like rand_like randn_like")
_UNARY_VIEWS = _words("contiguous to type float double half bfloat16 cpu cuda type_as requires_grad_")
_REDUCE = _words("mean sum amax amin prod var std norm logsumexp max min median nanmean var_mean std_mean all any "
                 "count_nonzero")
_MOVE_SEVERAL = _words("cat concat concatenate stack hstack vstack dstack meshgrid")
_MOVES = _MOVE_SEVERAL | _words(
    "view reshape flatten unflatten transpose permute movedim moveaxis swapaxes swapdims t T mT H mH squeeze unsqueeze "
    "expand expand_as broadcast_to repeat tile repeat_interleave chunk split split_with_sizes tensor_split unbind "
    "getitem select narrow index_select flip fliplr flipud roll rot90 hsplit vsplit dsplit pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle unfold diagonal ravel view_as reshape_as as_strided "
    "take_along_dim gather atleast_1d atleast_2d"
)
_READ_BEFORE = _words(
    "dropout dropout1d dropout2d dropout3d alpha_dropout view reshape flatten unflatten squeeze unsqueeze transpose "
    "permute contiguous mean sum amax amin avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d"
)
_VALUES = _words(
    "item tolist __bool__ __float__ __int__ __index__ __complex__ __array__ __contains__ numpy equal allclose "
    "is_nonzero nonzero argwhere unique unique_consecutive masked_select"
)


@_rule(_ELEMENTWISE)
def _elementwise(trace: Trace, call: Call) -> list[Layout]:
    shape = tuple(call.results[0].shape)
    first = [t for t in call.tensors if trace.name(t) is None or trace.name(t) in trace.state]
    fresh = [t for t in call.tensors if not any(t is other for other in first)]
    if not first:  # parameters among themselves
        first, fresh = fresh, []
    where = call.name + here()
    layout = trace.units.join([trace.operand(t) for t in first], where)
    rank = len(shape)
    layout = tuple(labels.reshape((1,) * (rank - labels.ndim) + labels.shape) for labels in layout)
    # What none of the labelled operands has, and a fresh one does, holds no units.
    for tensor in fresh:
        trace.adopt(tensor, (1,) * (rank - tensor.ndim) + tuple(tensor.shape), layout, where)
    return [layout] * len(call.results)


def _dims(given: Any, rank: int) -> list[int]:
    if given is None or given == ():
        return list(range(rank))
    return [d % max(rank, 1) for d in (given if isinstance(given, (tuple, list)) else [given])]


@_rule(" ".join(_REDUCE))
def _reduce(trace: Trace, call: Call) -> list[Layout]:
    x = call.args[0]
    if len(call.tensors) > 1:
        if call.name in ("max", "min"):
            return _elementwise(trace, call)
        raise _NoRule
    given = call.argument(2 if call.name == "norm" else 1, "dim", call.kwargs.get("axis"))
    if isinstance(given, bool):  # std(unbiased)
        given = None
    dims = _dims(given, x.ndim)
    keep = all(result.ndim == x.ndim for result in call.results)
    if call.name in ("max", "min", "median") and len(call.results) > 1:  # and where they were found
        trace.plain(x, dims, call.name + here())
    for labels in trace.layout(x):
        if varied(labels) & set(dims) and varied(labels) - set(dims):
            trace.read(call, x, labels, call.name)  # maxout: only a part of the units in a block may count
    layout = trace.units.reduce(trace.layout(x), dims, keepdim=True)
    if not keep:
        layout = tuple(labels.reshape([n for d, n in enumerate(labels.shape) if d not in dims]) for labels in layout)
    return [layout] * len(call.results)


@_rule("softmax log_softmax softmin normalize")
def _normalise(trace: Trace, call: Call) -> list[Layout]:
    """What is said of an entry depends on all entries along a dimension, in whatever order."""
    x = call.args[0]
    given = call.argument(2, "dim", 1) if call.name == "normalize" else call.argument(1, "dim")
    trace.units.reduce(trace.layout(x), _dims(given, x.ndim))
    return [trace.layout(x)]


@_rule("argmax argmin cumsum cumprod cummax cummin sort argsort topk kthvalue mode logcumsumexp")
def _along_a_dimension(trace: Trace, call: Call) -> list[Layout]:
    """The order of the entries along the dimension counts: it must hold no units."""
    x = call.args[0]
    default = None if call.name in ("argmax", "argmin") else -1
    at = 2 if call.name in ("topk", "kthvalue") else 1
    dims = _dims(call.argument(at, "dim", call.kwargs.get("axis", default)), x.ndim)
    layout = trace.plain(x, dims, call.name + here())
    keep = call.results[0].ndim == x.ndim
    if not keep:
        layout = tuple(labels.reshape([n for d, n in enumerate(labels.shape) if d not in dims]) for labels in layout)
    return [layout] * len(call.results)


@_rule(" ".join(_MOVES))
def _move(trace: Trace, call: Call) -> list[Layout]:
    leaves, structure = tree_flatten((call.args, call.kwargs))
    data = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
            and (leaf.is_floating_point() or leaf in trace.layouts)]
    if call.name not in _MOVE_SEVERAL:
        data = [n for n in data if leaves[n] is call.tensors[0]][:1]
    if call.name == "view" and any(isinstance(leaf, torch.dtype) for leaf in leaves):
        raise _NoRule
    indices = [leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and n not in data
               and trace.is_activation(leaf)]
    if any(map(trace.layout, indices)) or not data:
        raise _NoRule
    def function(numbers: list[Tensor]) -> list[Tensor]:
        replaced = list(leaves)
        for n, number in zip(data, numbers, strict=True):
            replaced[n] = number
        args, kwargs = tree_unflatten(replaced, structure)
        return tensors_of(call.func(*args, **kwargs))

    operands = [trace.operand(leaves[n]) for n in data]
    if call.name in ("cat", "concat", "concatenate", "chunk"):
        # Long dimensions that nothing happens to need not be looked at entry by entry.
        dim = call.argument(2 if call.name == "chunk" else 1, "dim", 0) % len(operands[0][1])
        used = {dim}.union(*(varied(labels) for layout, _ in operands for labels in layout))
        operands = [(layout, tuple(n if d in used else min(n, 2) for d, n in enumerate(shape)))
                    for layout, shape in operands]
    if not indices:
        return trace.units.move(function, operands, call.name + here())
    # Picked by numbers that other inputs change: units that are not all taken, and in their order, can't move.
    ((layout, shape),) = operands
    survivors = []
    for labels in layout:
        (moved,) = trace.units.move(function, [((labels,), shape)], call.name + here())
        whole = len(moved) == 1 and np.array_equal(moved[0].ravel(), labels.ravel())
        survivors += moved if whole else []
        trace.units.fix(() if whole else (labels,), f"picked by number in {call.name}{here()}")
    return [tuple(survivors)]


@_rule("pad")
def _pad(trace: Trace, call: Call) -> list[Layout]:
    x, mode = call.args[0], call.argument(2, "mode", "constant")
    padding = call.argument(1, "pad")

    def function(numbers: list[Tensor]) -> list[Tensor]:
        return [F.pad(numbers[0], padding, mode) if mode == "constant" else F.pad(numbers[0], padding, mode=mode)]

    return trace.units.move(function, [trace.operand(x)], call.name + here())


def _each_channel(trace: Trace, x: Tensor, rank: int | None, where: str) -> Layout:
    """The layout of what is treated channel by channel: units in dimension 1 (and 0) only."""
    if x.ndim < 3 or (rank and x.ndim != rank):
        raise _NoRule
    return trace.plain(x, range(2, x.ndim), where)


_POOLS = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool"


@_rule(" ".join(f"{pool}{d}d" for pool in _POOLS.split() for d in (1, 2, 3)) + " interpolate upsample grid_sample")
def _spatial(trace: Trace, call: Call) -> list[Layout]:
    """Pooling, resizing: each channel by itself."""
    rank = int(call.name[-2]) + 2 if call.name[-1] == "d" else None
    x = call.argument(0, "input")
    if call.name == "grid_sample" and any(trace.layout(t) for t in call.tensors if t is not x):
        raise _NoRule
    return [_each_channel(trace, x, rank, call.name + here())] * len(call.results)


def _channels(tensor: Tensor, x: Tensor) -> Shape:
    return (1, tensor.numel(), *(1,) * (x.ndim - 2))


@_rule("batch_norm instance_norm")
def _batch_norm(trace: Trace, call: Call) -> list[Layout]:
    x = call.argument(0, "input")
    layout = trace.layout(x)
    if call.name == "instance_norm":
        layout = _each_channel(trace, x, None, call.name + here())
    for n, name in enumerate(("running_mean", "running_var", "weight", "bias"), 1):
        tensor = call.argument(n, name)
        if tensor is not None:
            trace.adopt(tensor, _channels(tensor, x), layout, call.name + here())
    return [layout]


@_rule("prelu")
def _prelu(trace: Trace, call: Call) -> list[Layout]:
    x, weight = call.args[0], call.argument(1, "weight")
    if x.ndim > 1:
        trace.adopt(weight, _channels(weight, x), trace.layout(x), call.name + here())
    return [trace.layout(x)]


@_rule("layer_norm rms_norm")
def _layer_norm(trace: Trace, call: Call) -> list[Layout]:
    x, over = call.argument(0, "input"), call.argument(1, "normalized_shape")
    over = (over,) if isinstance(over, int) else tuple(over)
    layout = trace.layout(x)
    trace.units.reduce(layout, range(x.ndim - len(over), x.ndim))
    for n, name in enumerate(("weight", "bias"), 2):
        trace.adopt(call.argument(n, name), (1,) * (x.ndim - len(over)) + over, layout, call.name + here())
    return [layout]


@_rule("group_norm")
def _group_norm(trace: Trace, call: Call) -> list[Layout]:
    x, groups = call.argument(0, "input"), call.argument(1, "num_groups")
    layout = trace.layout(x)
    for labels in layout:
        if varied(labels) != {1}:
            raise _NoRule
        trace.units.reduce((labels.reshape(groups, -1),), [1])
    for n, name in enumerate(("weight", "bias"), 2):
        trace.adopt(call.argument(n, name), (1, x.shape[1], *(1,) * (x.ndim - 2)), layout, call.name + here())
    return [layout]


# Sums of products

def _contract(trace: Trace, operands: Sequence[tuple[Layout, Shape, str]], result: str, where: str) -> Layout:
    """einsum: operands (layout, shape, one letter per dimension), the result's letters."""
    summed = "".join(dict.fromkeys(letter for *_, letters in operands for letter in letters if letter not in result))
    space = result + summed
    aligned = []
    for layout, shape, letters in operands:
        order = sorted(range(len(letters)), key=lambda d, letters=letters: space.index(letters[d]))

        def spread(shape: Shape, letters: str = letters) -> Shape:
            return tuple(shape[letters.index(letter)] if letter in letters else 1 for letter in space)

        aligned.append((tuple(labels.transpose(order).reshape(spread(labels.shape)) for labels in layout),
                        spread(shape)))
    layout = trace.units.join(aligned, where)
    return trace.units.reduce(layout, range(len(result), len(space)), keepdim=False)


def _product(trace: Trace, call: Call, operands: Sequence[tuple[Tensor, str]], result: str) -> Layout:
    """A contraction of tensors, which reads the units that are summed over."""
    named = next((trace.name(t) for t, _ in operands if trace.name(t) is not None), call.name)
    for tensor, letters in operands:
        for labels in trace.layout(tensor):
            if any(letters[d] not in result for d in varied(labels)):
                trace.read(call, tensor, labels, named)
    return _contract(trace, [(*trace.operand(t), letters) for t, letters in operands], result, named + here())


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _matmul_letters(a: Tensor, b: Tensor) -> tuple[str, str, str]:
    batch = _LETTERS[: max(a.ndim, b.ndim, 2) - 2]
    left = batch[len(batch) - max(a.ndim - 2, 0):] + ("nk" if a.ndim > 1 else "k")
    right = batch[len(batch) - max(b.ndim - 2, 0):] + ("km" if b.ndim > 1 else "k")
    return left, right, batch + ("n" if a.ndim > 1 else "") + ("m" if b.ndim > 1 else "")


@_rule("matmul mm bmm")
def _matmul(trace: Trace, call: Call) -> list[Layout]:
    a, b = call.tensors[:2]
    if function_name(call.func) == "matmul" and getattr(call.func, "__name__", "") == "__rmatmul__":
        a, b = b, a
    left, right, result = _matmul_letters(a, b)
    return [_product(trace, call, [(a, left), (b, right)], result)]


@_rule("addmm baddbmm")
def _addmm(trace: Trace, call: Call) -> list[Layout]:
    c, a, b = call.tensors[:3]
    left, right, result = _matmul_letters(a, b)
    layout = _product(trace, call, [(a, left), (b, right)], result)
    trace.adopt(c, (1,) * (len(result) - c.ndim) + tuple(c.shape), layout, call.name + here())
    return [layout]


@_rule("einsum")
def _einsum(trace: Trace, call: Call) -> list[Layout]:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    equation = equation.replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    inputs = inputs.split(",")
    if "..." in equation or not arrow or any(len(set(letters)) < len(letters) for letters in inputs):
        raise _NoRule
    return [_product(trace, call, list(zip(operands, inputs, strict=True)), result)]


@_rule("linear")
def _linear(trace: Trace, call: Call) -> list[Layout]:
    x, weight, bias = call.argument(0, "input"), call.argument(1, "weight"), call.argument(2, "bias")
    batch = _LETTERS[: x.ndim - 1]
    layout = _product(trace, call, [(x, batch + "i"), (weight, "oi")], batch + "o")
    if bias is not None:
        trace.adopt(bias, (1,) * (x.ndim - 1) + tuple(bias.shape), layout, call.name + here())
    return [layout]


@_rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
def _convolution(trace: Trace, call: Call) -> list[Layout]:
    x, weight, bias = call.argument(0, "input"), call.argument(1, "weight"), call.argument(2, "bias")
    transposed = "transpose" in call.name
    groups = call.argument(6, "groups", 1)
    if x.ndim != weight.ndim:
        raise _NoRule
    inputs = _each_channel(trace, x, None, call.name + here())
    positions = _LETTERS[: x.ndim - 2]
    if groups == 1:
        letters = "io" if transposed else "oi"
        named = trace.name(weight) or call.name
        if trace.name(weight) and trace.name(weight) not in trace.state:
            trace.state[trace.name(weight)] = tuple(
                trace.units.new(_along(weight.shape, {d}), trace.name(weight), (d,))
                for d in (0, 1) if weight.shape[d] > 1)
        for labels in inputs:
            if 1 in varied(labels):
                trace.read(call, x, labels, named)
        w_layout = trace.plain(weight, range(2, weight.ndim), call.name + here())
        w_layout = tuple(labels.reshape(labels.shape[:2]) for labels in w_layout)
        operands = [(inputs, tuple(x.shape), "bi" + positions), (w_layout, tuple(weight.shape[:2]), letters)]
        layout = _contract(trace, operands, "bo" + positions, named + here())
    else:
        layout = _grouped(trace, call, x, inputs, weight, groups, transposed)
    if bias is not None:
        trace.adopt(bias, _channels(bias, x), layout, call.name + here())
    return [layout]


def _grouped(trace: Trace, call: Call, x: Tensor, layout: Layout, weight: Tensor, groups: int,
             transposed: bool) -> Layout:
    """Blocks of channels that are convolved by themselves: they can trade places, and units within them."""
    units, name = trace.units, trace.name(weight)
    if transposed or name is None or len(layout) > 1 or (layout and varied(layout[0]) != {1}):
        raise _NoRule
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    rest = (1,) * (x.ndim - 2)
    if name not in trace.grouped:
        if name in trace.state:  # as something else
            raise _NoRule
        trace.state[name] = (units.new((groups * outputs, *(1,) * (weight.ndim - 1)), name, (0,)),)
        trace.grouped[name] = units.new((groups, inputs), name, (1,), groups) if inputs > 1 else units.new((0,))
    (rows,), columns = trace.state[name], trace.grouped[name]
    own = rows.reshape(groups, outputs)
    if not layout:
        units.fix((rows, columns), f"meets entries that hold no units in {name}")
        return ()
    labels = layout[0].reshape(groups, inputs)
    if inputs == 1:
        # Depthwise: channel c makes the outputs c * m ... c * m + m - 1, which move with it.
        if outputs == 1:
            units.tie(labels, own)
            return layout
        unit, rank = np.divmod(labels, RANKS)
        follow = unit * RANKS + rank * outputs + np.arange(outputs)
        units.tie(follow, own)
        return (follow.reshape(1, -1, *rest),)
    trace.read(call, x, layout[0], name)
    units.tie(labels, columns)
    blocks = units.new((groups, 1))
    units.nest(labels, blocks)
    units.nest(own, blocks)
    return (rows.reshape(1, -1, *rest),)


@_rule("embedding")
def _embedding(trace: Trace, call: Call) -> list[Layout]:
    index, weight = call.argument(0, "input"), call.argument(1, "weight")
    if trace.layout(index):
        raise _NoRule
    result = []
    for labels in trace.layout(weight):
        if 0 in varied(labels):
            trace.units.fix((labels,), "picked by number")
        else:
            result.append(labels.reshape((1,) * index.ndim + labels.shape[1:]))
    return [tuple(result)]


@_rule("scaled_dot_product_attention")
def _attention(trace: Trace, call: Call) -> list[Layout]:
    q, k, v = call.args[:3] if len(call.args) >= 3 else call.tensors[:3]
    mask = call.argument(3, "attn_mask")
    if call.kwargs.get("enable_gqa") or not q.ndim == k.ndim == v.ndim >= 2:
        raise _NoRule
    in_order = call.argument(5, "is_causal", False) and any(
        q.ndim - 2 in varied(labels) for t in (q, k, v) for labels in trace.layout(t))
    if in_order:
        raise _NoRule
    batch = _LETTERS[: q.ndim - 2]
    scores = _product(trace, call, [(q, batch + "nd"), (k, batch + "md")], batch + "nm")
    shape = (*q.shape[:-1], k.shape[-2])
    if mask is not None:
        if trace.name(mask) is None or trace.name(mask) in trace.state:
            scores = trace.units.join([(scores, shape), trace.operand(mask)], call.name + here())
        else:
            trace.adopt(mask, (1,) * (len(shape) - mask.ndim) + tuple(mask.shape), scores, call.name + here())
    trace.units.reduce(scores, [len(shape) - 1])
    return [_contract(trace, [(scores, shape, batch + "nm"), (*trace.operand(v), batch + "me")], batch + "ne",
                      call.name + here())]


# Compound functions, done in steps that have rules


def _compound(name: str) -> Callable[[Callable], Callable]:
    def register(steps: Callable) -> Callable:
        _COMPOUND[name] = steps
        return steps

    return register


@_compound("glu")
def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


@_compound("multi_head_attention_forward")
def _multi_head_attention(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k,
                          bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True,
                          key_padding_mask=None, need_weights=True, attn_mask=None, use_separate_proj_weight=False,
                          q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None, static_v=None,
                          average_attn_weights=True, is_causal=False):
    """Attention is All You Need, section 3.2.2, on (tokens, batch, channels) as torch has it."""
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        return NotImplemented
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    batched = query.dim() == 3
    projected = []
    for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
        x = F.linear(x if batched else x.unsqueeze(1), weight, bias)
        projected.append(x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3))  # (batch, heads, tokens, channels)
    q, k, v = projected
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, num_heads)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(-1, 1, 1, key_padding_mask.shape[-1]))
    mask = None
    for m in masks:
        m = torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m
        mask = m if mask is None else mask + m
    if need_weights:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = (scores if mask is None else scores + mask).softmax(-1)
        out = F.dropout(scores, dropout_p, training) @ v
    else:
        scores, out = None, F.scaled_dot_product_attention(q, k, v, mask, dropout_p if training else 0.0)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if need_weights and average_attn_weights:
        scores = scores.mean(1)
    if not batched:
        out, scores = out.squeeze(1), scores.squeeze(0) if need_weights else None
    return out, scores
