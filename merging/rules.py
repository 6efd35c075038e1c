"""What torch's functions do to units: a rule for each, (trace, call) -> the layouts of the results.

A rule joins, moves or reduces the layouts of its operands, notes what is read, and raises NoRule where it doesn't cover
a case. Adding a function is adding a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from merging.functions import ELEMENTWISE, MOVE_SEVERAL, MOVES, REDUCE
from merging.trace import NoRule, Rule, Trace, along, here
from merging.units import RANKS, Layout, Shape, varied
from merging.watch import Call, function_name, tensors_of

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(" ".join(names).split(), rule))
        return rule

    return register


@rule(*ELEMENTWISE)
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


@rule(*REDUCE)
def _reduce(trace: Trace, call: Call) -> list[Layout]:
    x = call.args[0]
    if len(call.tensors) > 1:
        if call.name in ("max", "min"):
            return _elementwise(trace, call)
        raise NoRule
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


@rule("softmax log_softmax softmin normalize")
def _normalise(trace: Trace, call: Call) -> list[Layout]:
    """What is said of an entry depends on all entries along a dimension, in whatever order."""
    x = call.args[0]
    given = call.argument(2, "dim", 1) if call.name == "normalize" else call.argument(1, "dim")
    trace.units.reduce(trace.layout(x), _dims(given, x.ndim))
    return [trace.layout(x)]


@rule("argmax argmin cumsum cumprod cummax cummin sort argsort topk kthvalue mode logcumsumexp")
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


@rule(*MOVES)
def _move(trace: Trace, call: Call) -> list[Layout]:
    leaves, structure = tree_flatten((call.args, call.kwargs))
    data = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
            and (leaf.is_floating_point() or leaf in trace.layouts)]
    if call.name not in MOVE_SEVERAL:
        data = [n for n in data if leaves[n] is call.tensors[0]][:1]
    if call.name == "view" and any(isinstance(leaf, torch.dtype) for leaf in leaves):
        raise NoRule
    indices = [leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and n not in data
               and trace.is_activation(leaf)]
    if any(map(trace.layout, indices)) or not data:
        raise NoRule
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


@rule("pad")
def _pad(trace: Trace, call: Call) -> list[Layout]:
    x, mode = call.args[0], call.argument(2, "mode", "constant")
    padding = call.argument(1, "pad")

    def function(numbers: list[Tensor]) -> list[Tensor]:
        return [F.pad(numbers[0], padding, mode) if mode == "constant" else F.pad(numbers[0], padding, mode=mode)]

    return trace.units.move(function, [trace.operand(x)], call.name + here())


def _each_channel(trace: Trace, x: Tensor, rank: int | None, where: str) -> Layout:
    """The layout of what is treated channel by channel: units in dimension 1 (and 0) only."""
    if x.ndim < 3 or (rank and x.ndim != rank):
        raise NoRule
    return trace.plain(x, range(2, x.ndim), where)


_POOLS = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool"


@rule(*(f"{pool}{d}d" for pool in _POOLS.split() for d in (1, 2, 3)), "interpolate upsample grid_sample")
def _spatial(trace: Trace, call: Call) -> list[Layout]:
    """Pooling, resizing: each channel by itself."""
    rank = int(call.name[-2]) + 2 if call.name[-1] == "d" else None
    x = call.argument(0, "input")
    if call.name == "grid_sample" and any(trace.layout(t) for t in call.tensors if t is not x):
        raise NoRule
    return [_each_channel(trace, x, rank, call.name + here())] * len(call.results)


def _channels(tensor: Tensor, x: Tensor) -> Shape:
    return (1, tensor.numel(), *(1,) * (x.ndim - 2))


@rule("batch_norm instance_norm")
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


@rule("prelu")
def _prelu(trace: Trace, call: Call) -> list[Layout]:
    x, weight = call.args[0], call.argument(1, "weight")
    if x.ndim > 1:
        trace.adopt(weight, _channels(weight, x), trace.layout(x), call.name + here())
    return [trace.layout(x)]


@rule("layer_norm rms_norm")
def _layer_norm(trace: Trace, call: Call) -> list[Layout]:
    x, over = call.argument(0, "input"), call.argument(1, "normalized_shape")
    over = (over,) if isinstance(over, int) else tuple(over)
    layout = trace.layout(x)
    trace.units.reduce(layout, range(x.ndim - len(over), x.ndim))
    for n, name in enumerate(("weight", "bias"), 2):
        trace.adopt(call.argument(n, name), (1,) * (x.ndim - len(over)) + over, layout, call.name + here())
    return [layout]


@rule("group_norm")
def _group_norm(trace: Trace, call: Call) -> list[Layout]:
    x, groups = call.argument(0, "input"), call.argument(1, "num_groups")
    layout = trace.layout(x)
    for labels in layout:
        if varied(labels) != {1}:
            raise NoRule
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


@rule("matmul mm bmm")
def _matmul(trace: Trace, call: Call) -> list[Layout]:
    a, b = call.tensors[:2]
    if function_name(call.func) == "matmul" and getattr(call.func, "__name__", "") == "__rmatmul__":
        a, b = b, a
    left, right, result = _matmul_letters(a, b)
    return [_product(trace, call, [(a, left), (b, right)], result)]


@rule("addmm baddbmm")
def _addmm(trace: Trace, call: Call) -> list[Layout]:
    c, a, b = call.tensors[:3]
    left, right, result = _matmul_letters(a, b)
    layout = _product(trace, call, [(a, left), (b, right)], result)
    trace.adopt(c, (1,) * (len(result) - c.ndim) + tuple(c.shape), layout, call.name + here())
    return [layout]


@rule("einsum")
def _einsum(trace: Trace, call: Call) -> list[Layout]:
    equation, *operands = call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    equation = equation.replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    inputs = inputs.split(",")
    if "..." in equation or not arrow or any(len(set(letters)) < len(letters) for letters in inputs):
        raise NoRule
    return [_product(trace, call, list(zip(operands, inputs, strict=True)), result)]


@rule("linear")
def _linear(trace: Trace, call: Call) -> list[Layout]:
    x, weight, bias = call.argument(0, "input"), call.argument(1, "weight"), call.argument(2, "bias")
    batch = _LETTERS[: x.ndim - 1]
    layout = _product(trace, call, [(x, batch + "i"), (weight, "oi")], batch + "o")
    if bias is not None:
        trace.adopt(bias, (1,) * (x.ndim - 1) + tuple(bias.shape), layout, call.name + here())
    return [layout]


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
def _convolution(trace: Trace, call: Call) -> list[Layout]:
    x, weight, bias = call.argument(0, "input"), call.argument(1, "weight"), call.argument(2, "bias")
    transposed = "transpose" in call.name
    groups = call.argument(6, "groups", 1)
    if x.ndim != weight.ndim:
        raise NoRule
    inputs = _each_channel(trace, x, None, call.name + here())
    positions = _LETTERS[: x.ndim - 2]
    if groups == 1:
        letters = "io" if transposed else "oi"
        named = trace.name(weight) or call.name
        if trace.name(weight) and trace.name(weight) not in trace.state:
            trace.state[trace.name(weight)] = tuple(
                trace.units.new(along(weight.shape, {d}), trace.name(weight), (d,))
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
        raise NoRule
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    rest = (1,) * (x.ndim - 2)
    if name not in trace.grouped:
        if name in trace.state:  # as something else
            raise NoRule
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


@rule("embedding")
def _embedding(trace: Trace, call: Call) -> list[Layout]:
    index, weight = call.argument(0, "input"), call.argument(1, "weight")
    if trace.layout(index):
        raise NoRule
    result = []
    for labels in trace.layout(weight):
        if 0 in varied(labels):
            trace.units.fix((labels,), "picked by number")
        else:
            result.append(labels.reshape((1,) * index.ndim + labels.shape[1:]))
    return [tuple(result)]


@rule("scaled_dot_product_attention")
def _attention(trace: Trace, call: Call) -> list[Layout]:
    q, k, v = call.args[:3] if len(call.args) >= 3 else call.tensors[:3]
    mask = call.argument(3, "attn_mask")
    if call.kwargs.get("enable_gqa") or not q.ndim == k.ndim == v.ndim >= 2:
        raise NoRule
    in_order = call.argument(5, "is_causal", False) and any(
        q.ndim - 2 in varied(labels) for t in (q, k, v) for labels in trace.layout(t))
    if in_order:
        raise NoRule
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
