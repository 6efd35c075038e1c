"""What torch's functions do to units: a rule for each, (trace, call, its arguments) -> the layouts of the results.

A rule names the arguments it needs as torch does, in torch's order, so that Python binds them however they were passed.
It joins, moves or reduces the layouts of its operands, notes what is read, and raises NoRule where it doesn't cover
a case. Adding a function is adding a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from merging.tracing.functions import ELEMENTWISE, MOVE_SEVERAL, MOVES, REDUCE, WHOLE_AXES
from merging.tracing.trace import NoRule, Rule, Trace, along, here
from merging.tracing.units import RANKS, Layout, Shape, varied
from merging.tracing.watch import Call, tensors_of

RULES: dict[str, Rule] = {}
STATISTICS = {"var", "std", "var_mean", "std_mean"}  # norms take them: they are no reason to look at the units there


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(" ".join(names).split(), rule))
        return rule

    return register


@rule(*ELEMENTWISE)
def _elementwise(trace: Trace, call: Call, *_: Any, **__: Any) -> list[Layout]:
    shape = tuple(call.results[0].shape)
    first = [t for t in call.tensors if trace.name(t) is None or trace.name(t) in trace.state]
    fresh = [t for t in call.tensors if not any(t is other for other in first)]
    if not first:  # parameters among themselves
        first, fresh = fresh, []
    where = call.name + here()
    layout = trace.units.join([trace.term(t) for t in first], where)
    rank = len(shape)
    layout = tuple(labels.reshape((1,) * (rank - labels.ndim) + labels.shape) for labels in layout)
    # What none of the labelled operands has, and a fresh one does, holds no units.
    for tensor in fresh:
        trace.adopt(tensor, (1,) * (rank - tensor.ndim) + tuple(tensor.shape), layout, where)
    return [layout] * len(call.results)


def _dims(given: Any, rank: int) -> list[int]:
    if given is None or (isinstance(given, (tuple, list)) and not given):
        return list(range(rank))
    return [d % max(rank, 1) for d in (given if isinstance(given, (tuple, list)) else [given])]


@rule(*REDUCE - {"norm"})
def _reduce(trace: Trace, call: Call, input: Tensor, dim: Any = None, *_: Any, **__: Any) -> list[Layout]:
    if len(call.tensors) > 1:
        if call.name in ("max", "min"):
            return _elementwise(trace, call)
        raise NoRule
    dims = _dims(None if isinstance(dim, bool) else dim, input.ndim)  # std(unbiased)
    if call.name in ("max", "min", "median") and len(call.results) > 1:  # and where they were found
        trace.plain(input, dims, call.name + here())
    for labels in () if call.name in STATISTICS else trace.layout(input):
        if varied(labels) & set(dims) and varied(labels) - set(dims):
            trace.read(call, input, labels, call.name)  # maxout: only a part of the units in a block may count
    keepdim = call.results[0].ndim == input.ndim
    return [trace.units.reduce(trace.layout(input), dims, keepdim)] * len(call.results)


@rule("norm")
def _norm(trace: Trace, call: Call, input: Tensor, p: Any = "fro", dim: Any = None, *_: Any, **__: Any) -> list[Layout]:
    return _reduce(trace, call, input, dim)


@rule("softmax log_softmax softmin")
def _softmax(trace: Trace, call: Call, input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> list[Layout]:
    """What is said of an entry depends on all entries along a dimension, in whatever order."""
    trace.units.reduce(trace.layout(input), _dims(dim, input.ndim))
    return [trace.layout(input)]


@rule("normalize")
def _normalize(trace: Trace, call: Call, input: Tensor, p: float = 2, dim: Any = 1, *_: Any, **__: Any) -> list[Layout]:
    return _softmax(trace, call, input, dim)


@rule("cumsum cumprod cummax cummin logcumsumexp sort argsort mode")
def _in_order(trace: Trace, call: Call, input: Tensor, dim: int | None = -1, *_: Any, **__: Any) -> list[Layout]:
    """The order of the entries along the dimension counts: it must hold no units."""
    dims = _dims(dim, input.ndim)
    layout = trace.plain(input, dims, call.name + here())
    keepdim = call.results[0].ndim == input.ndim
    return [trace.units.reduce(layout, dims, keepdim)] * len(call.results)


@rule("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft")
def _fourier(trace: Trace, call: Call, input: Tensor, n: int | None = None, dim: Any = -1, *_: Any,
             **__: Any) -> list[Layout]:
    return [trace.plain(input, _dims(dim, input.ndim), call.name + here())]


@rule("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2")
def _fourier2(trace: Trace, call: Call, input: Tensor, s: Any = None, dim: Any = (-2, -1), *_: Any,
              **__: Any) -> list[Layout]:
    return _fourier(trace, call, input, dim=dim)


@rule("fft_fftn fft_ifftn fft_rfftn fft_irfftn")
def _fourier_n(trace: Trace, call: Call, input: Tensor, s: Any = None, dim: Any = None, *_: Any,
               **__: Any) -> list[Layout]:
    return _fourier(trace, call, input, dim=(*range(-len(s), 0),) if s and dim is None else dim)


@rule("argmax argmin")
def _argmax(trace: Trace, call: Call, input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> list[Layout]:
    return _in_order(trace, call, input, dim)


@rule("topk kthvalue")
def _topk(trace: Trace, call: Call, input: Tensor, k: int, dim: int = -1, *_: Any, **__: Any) -> list[Layout]:
    return _in_order(trace, call, input, dim)


@rule("cat concat concatenate")
def _cat(trace: Trace, call: Call, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> list[Layout]:
    level = trace.units.level([trace.layout(tensor) for tensor in tensors])
    for tensor, layout in zip(tensors, level, strict=True):
        if tensor in trace.layouts:
            trace.layouts[tensor] = layout
    return _move(trace, call, within=[dim])


@rule("chunk split tensor_split")
def _chunk(trace: Trace, call: Call, *args: Any, dim: int = 0, **_: Any) -> list[Layout]:
    """(tensor, parts, dim), of which only the last has one name in all of them."""
    if not args or any(map(trace.is_activation, call.tensors[1:])):  # where it cuts may be an input's to say
        return _move(trace, call, within=args[2:] or [dim])
    dims = _dims(*args[2:] or [dim], args[0].ndim)
    return _beside(trace, call, args[0], _kept_but(dims, args[0]),
                   lambda x: call.func(x, *call.args[1:], **call.kwargs))


@rule("select narrow index_select unbind")
def _at(trace: Trace, call: Call, input: Tensor, dim: int = 0, *_: Any, **__: Any) -> list[Layout]:
    return _move(trace, call, within=[dim])


@rule("view reshape view_as reshape_as flatten unflatten ravel")
def _reshape(trace: Trace, call: Call, input: Tensor, *shape: Any, **other: Any) -> list[Layout]:
    if any(isinstance(one, torch.dtype) for one in (*shape, *other.values())):
        raise NoRule
    after = tuple(call.results[0].shape)
    kept = _kept_by_reshape(tuple(input.shape), after)
    back = {new: old for old, new in kept.items()}
    return _beside(trace, call, input, kept, lambda x: x.reshape([x.shape[back[d]] if d in back else n
                                                                  for d, n in enumerate(after)]))


def _kept_by_reshape(before: Shape, after: Shape) -> dict[int, int]:
    """The dimensions that it leaves as they are -> their places: as many entries before them and as many in them."""
    def spans(shape: Shape) -> dict[tuple[int, int], int]:
        return {(math.prod(shape[:d]), n): d for d, n in enumerate(shape) if n > 1}

    theirs = spans(after)
    return {d: theirs[span] for span, d in spans(before).items() if span in theirs}


@rule("roll")
def _roll(trace: Trace, call: Call, input: Tensor, shifts: Any, dims: Any = None) -> list[Layout]:
    return _beside(trace, call, input, _kept_but(_dims(dims, input.ndim), input),
                   lambda x: torch.roll(x, shifts, dims))


@rule("getitem")
def _getitem(trace: Trace, call: Call, input: Tensor, index: Any) -> list[Layout]:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is ... or type(part) in (int, slice) for part in parts):
        return _move(trace, call)
    kept, old, new = {}, 0, 0
    rest = input.ndim - sum(part is not None and part is not ... for part in parts)  # of an ellipsis, or at the end
    for part in parts if ... in parts else (*parts, ...):
        if part is ... or part == slice(None):
            for _ in range(rest if part is ... else 1):
                kept[old] = new
                old, new = old + 1, new + 1
        else:
            old, new = old + (part is not None), new + (type(part) is not int)
    return _beside(trace, call, input, kept, lambda x: x[index])


def _kept_but(dims: Iterable[int], input: Tensor) -> dict[int, int]:
    return {d: d for d in range(input.ndim) if d not in dims}


def _beside(trace: Trace, call: Call, input: Tensor, kept: Mapping[int, int],
            function: Callable[[Tensor], Any]) -> list[Layout]:
    """Entries go elsewhere, but not along the dimensions `kept` (-> their places in each result)."""
    return trace.units.move_beside(lambda numbers: tensors_of(function(numbers[0])), trace.operand(input),
                                   call.name + here(), kept, [result.ndim for result in call.results])


@rule(*WHOLE_AXES)
def _turn(trace: Trace, call: Call, *_: Any, **__: Any) -> list[Layout]:
    return _move(trace, call, within=[])


@rule(*MOVES - RULES.keys())
def _move(trace: Trace, call: Call, *_: Any, within: Iterable[int] | None = None, **__: Any) -> list[Layout]:
    """Entries go elsewhere; if `within` is given, whatever the length of all other dimensions."""
    leaves, structure = tree_flatten((call.args, call.kwargs))
    data = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
            and (leaf.is_floating_point() or leaf in trace.layouts)]
    if call.name not in MOVE_SEVERAL:
        moved = call.keywords.get("input", call.tensors[0])
        data = [n for n in data if leaves[n] is moved][:1]
    if call.name == "view" and any(isinstance(leaf, torch.dtype) for leaf in leaves):
        raise NoRule
    indices = [leaf for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and n not in data
               and trace.is_activation(leaf) and not call.name.endswith("_as")]  # these give a shape
    if any(map(trace.layout, indices)) or not data:
        raise NoRule

    def function(numbers: list[Tensor]) -> list[Tensor]:
        replaced = list(leaves)
        for n, number in zip(data, numbers, strict=True):
            replaced[n] = number
        args, kwargs = tree_unflatten(replaced, structure)
        return tensors_of(call.func(*args, **kwargs))

    operands = [trace.operand(leaves[n]) for n in data]
    if not indices:
        return trace.units.move(function, operands, call.name + here(), within)
    # Picked by numbers that other inputs change: units that are not all taken, and in their order, can't move.
    ((layout, shape),) = operands
    survivors = []
    for labels in layout:
        (moved,) = trace.units.move(function, [((labels,), shape)], call.name + here(), within)
        whole = len(moved) == 1 and np.array_equal(moved[0].ravel(), labels.ravel())
        survivors += moved if whole else []
        trace.units.fix(() if whole else (labels,), f"picked by number in {call.name}{here()}")
    return [tuple(survivors)]


@rule("pad")
def _pad(trace: Trace, call: Call, input: Tensor, pad: Sequence[int], mode: str = "constant",
         value: float | None = None) -> list[Layout]:
    padded = {input.ndim - 1 - n // 2 for n, amount in enumerate(pad) if amount}
    return _beside(trace, call, input, _kept_but(padded, input), lambda x: F.pad(x, pad, mode))


def _each_channel(trace: Trace, x: Tensor, rank: int | None, where: str) -> Layout:
    """The layout of what is treated channel by channel: units in dimension 1 (and 0) only."""
    if x.ndim < 3 or (rank and x.ndim != rank):
        raise NoRule
    return trace.plain(x, range(2, x.ndim), where)


_POOLS = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool"


@rule(*(f"{pool}{d}d" for pool in _POOLS.split() for d in (1, 2, 3)), "interpolate upsample")
def _spatial(trace: Trace, call: Call, input: Tensor, *_: Any, **__: Any) -> list[Layout]:
    """Pooling, resizing: each channel by itself."""
    rank = int(call.name[-2]) + 2 if call.name[-1] == "d" else None
    return [_each_channel(trace, input, rank, call.name + here())] * len(call.results)


@rule("grid_sample")
def _grid_sample(trace: Trace, call: Call, input: Tensor, grid: Tensor, *_: Any, **__: Any) -> list[Layout]:
    if trace.layout(grid):
        raise NoRule
    return _spatial(trace, call, input)


def _channels(tensor: Tensor, x: Tensor) -> Shape:
    return (1, tensor.numel(), *(1,) * (x.ndim - 2))


@rule("batch_norm instance_norm")
def _batch_norm(trace: Trace, call: Call, input: Tensor, running_mean: Tensor | None = None,
                running_var: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None,
                *_: Any, **__: Any) -> list[Layout]:
    layout = trace.layout(input)
    if call.name == "instance_norm":
        layout = _each_channel(trace, input, None, call.name + here())
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None:
            trace.adopt(tensor, _channels(tensor, input), layout, call.name + here())
    return [layout]


@rule("prelu")
def _prelu(trace: Trace, call: Call, input: Tensor, weight: Tensor) -> list[Layout]:
    if input.ndim > 1:
        trace.adopt(weight, _channels(weight, input), trace.layout(input), call.name + here())
    return [trace.layout(input)]


@rule("layer_norm")
def _layer_norm(trace: Trace, call: Call, input: Tensor, normalized_shape: int | Sequence[int],
                weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any) -> list[Layout]:
    over = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    layout = trace.layout(input)
    trace.units.reduce(layout, range(input.ndim - len(over), input.ndim))
    for tensor in (weight, bias):
        trace.adopt(tensor, (1,) * (input.ndim - len(over)) + over, layout, call.name + here())
    return [layout]


@rule("rms_norm")
def _rms_norm(trace: Trace, call: Call, input: Tensor, normalized_shape: int | Sequence[int],
              weight: Tensor | None = None, eps: float | None = None) -> list[Layout]:
    return _layer_norm(trace, call, input, normalized_shape, weight)


@rule("group_norm")
def _group_norm(trace: Trace, call: Call, input: Tensor, num_groups: int, weight: Tensor | None = None,
                bias: Tensor | None = None, *_: Any, **__: Any) -> list[Layout]:
    layout = trace.layout(input)
    for labels in layout:
        if varied(labels) != {1}:
            raise NoRule
        trace.units.reduce((labels.reshape(num_groups, -1),), [1])
    for tensor in (weight, bias):
        trace.adopt(tensor, (1, input.shape[1], *(1,) * (input.ndim - 2)), layout, call.name + here())
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
    return _contract(trace, [(*trace.term(t), letters) for t, letters in operands], result, named + here())


@rule("cosine_similarity")
def _cosine_similarity(trace: Trace, call: Call, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 0) -> list[Layout]:
    rank = max(x1.ndim, x2.ndim)
    dim = dim % rank
    for x in (x1, x2):
        for labels in trace.layout(x):
            if dim - rank + x.ndim in varied(labels):
                trace.read(call, x, labels, call.name)
    layout = trace.units.join([trace.term(x1), trace.term(x2)], call.name + here())
    return [trace.units.reduce(layout, [dim], keepdim=False)]


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _matmul_letters(a: Tensor, b: Tensor) -> tuple[str, str, str]:
    batch = _LETTERS[: max(a.ndim, b.ndim, 2) - 2]
    left = batch[len(batch) - max(a.ndim - 2, 0):] + ("nk" if a.ndim > 1 else "k")
    right = batch[len(batch) - max(b.ndim - 2, 0):] + ("km" if b.ndim > 1 else "k")
    return left, right, batch + ("n" if a.ndim > 1 else "") + ("m" if b.ndim > 1 else "")


@rule("matmul")
def _matmul(trace: Trace, call: Call, input: Tensor, other: Tensor) -> list[Layout]:
    if getattr(call.func, "__name__", "") == "__rmatmul__":
        input, other = other, input
    left, right, result = _matmul_letters(input, other)
    return [_product(trace, call, [(input, left), (other, right)], result)]


@rule("mm bmm")
def _mm(trace: Trace, call: Call, input: Tensor, mat2: Tensor) -> list[Layout]:
    return _matmul(trace, call, input, mat2)


@rule("mv dot vdot")
def _with_vector(trace: Trace, call: Call, *factors: Tensor) -> list[Layout]:
    return _matmul(trace, call, *factors)


@rule("cdist")
def _distances(trace: Trace, call: Call, x1: Tensor, x2: Tensor, *_: Any, **__: Any) -> list[Layout]:
    """Summed over the last dimension of both, as a product is."""
    batch = _LETTERS[: max(x1.ndim, x2.ndim) - 2]
    left, right = (batch[len(batch) - x.ndim + 2:] for x in (x1, x2))
    return [_product(trace, call, [(x1, left + "nk"), (x2, right + "mk")], batch + "nm")]


@rule("bilinear")
def _bilinear(trace: Trace, call: Call, input1: Tensor, input2: Tensor, weight: Tensor,
              bias: Tensor | None = None) -> list[Layout]:
    batch = _LETTERS[: input1.ndim - 1]
    layout = _product(trace, call, [(input1, batch + "i"), (input2, batch + "j"), (weight, "oij")], batch + "o")
    trace.adopt(bias, (1,) * (input1.ndim - 1) + tuple(weight.shape[:1]), layout, call.name + here())
    return [layout]


@rule("addmm")
def _addmm(trace: Trace, call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> list[Layout]:
    (layout,) = _matmul(trace, call, mat1, mat2)
    trace.adopt(input, (1,) * (mat1.ndim - input.ndim) + tuple(input.shape), layout, call.name + here())
    return [layout]


@rule("baddbmm")
def _baddbmm(trace: Trace, call: Call, input: Tensor, batch1: Tensor, batch2: Tensor, **_: Any) -> list[Layout]:
    return _addmm(trace, call, input, batch1, batch2)


@rule("einsum")
def _einsum(trace: Trace, call: Call, equation: str, *operands: Any) -> list[Layout]:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    inputs = inputs.split(",")
    more = [x.ndim - len(letters) + 3 if "..." in letters else 0 for x, letters in zip(operands, inputs, strict=True)]
    free = "".join(letter for letter in _LETTERS if letter not in equation)[: max(more)]
    inputs = [letters.replace("...", free[len(free) - n:]) for letters, n in zip(inputs, more, strict=True)]
    result = result.replace("...", free)
    if not arrow or any(len(set(letters)) < len(letters) for letters in inputs):
        raise NoRule
    return [_product(trace, call, list(zip(operands, inputs, strict=True)), result)]


@rule("linear")
def _linear(trace: Trace, call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Layout]:
    batch = _LETTERS[: input.ndim - 1]
    layout = _product(trace, call, [(input, batch + "i"), (weight, "oi")], batch + "o")
    if bias is not None:
        trace.adopt(bias, (1,) * (input.ndim - 1) + tuple(bias.shape), layout, call.name + here())
    return [layout]


@rule("conv1d conv2d conv3d")
def _convolution(trace: Trace, call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
                 padding: Any = 0, dilation: Any = 1, groups: int = 1) -> list[Layout]:
    return [_convolve(trace, call, input, weight, bias, groups)]


@rule("conv_transpose1d conv_transpose2d conv_transpose3d")
def _transposed(trace: Trace, call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
                padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1) -> list[Layout]:
    return [_convolve(trace, call, input, weight, bias, groups, transposed=True)]


def _convolve(trace: Trace, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int,
              transposed: bool = False) -> Layout:
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
        if transposed:
            raise NoRule
        layout = _grouped(trace, call, x, inputs, weight, groups)
    if bias is not None:
        trace.adopt(bias, _channels(bias, x), layout, call.name + here())
    return layout


def _grouped(trace: Trace, call: Call, x: Tensor, layout: Layout, weight: Tensor, groups: int) -> Layout:
    """Blocks of channels that are convolved by themselves: they can trade places, and units within them."""
    units, name = trace.units, trace.name(weight)
    if name is None and weight.shape[:2] == (groups, 1):  # channel by channel, with weights that were made from others
        own = trace.plain(weight, range(1, weight.ndim), call.name + here())
        one_each = (1, groups, *(1,) * (x.ndim - 2))
        return units.join([(layout, one_each), (tuple(labels.reshape(one_each) for labels in own), one_each)],
                          call.name + here())
    if name is None or len(layout) > 1 or (layout and varied(layout[0]) != {1}):
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


@rule("deform_conv2d")
def _deformed(trace: Trace, call: Call, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor,
              *settings: int) -> list[Layout]:
    """As torchvision's own function calls it in the end. There is one group of channels, and one of offsets."""
    if settings[-3:-1] != (1, 1):
        raise NoRule
    bias = None if trace.untouched(trace.even, bias) else bias  # zeros, where there is none
    for places in (offset, mask):
        trace.plain(places, range(places.ndim), call.name + here())
    return [_convolve(trace, call, input, weight, bias, 1)]


@rule("roi_align roi_pool")
def _regions(trace: Trace, call: Call, input: Tensor, rois: Tensor, *_: Any, **__: Any) -> list[Layout]:
    """Each channel by itself, at places that are given."""
    if trace.layout(rois):
        raise NoRule
    return [trace.plain(input, (0, *range(2, input.ndim)), call.name + here())] * len(call.results)


@rule("index_add index_copy")
def _into_rows(trace: Trace, call: Call, input: Tensor, dim: int, index: Tensor, source: Tensor,
               **_: Any) -> list[Layout]:
    if trace.layout(index):
        raise NoRule
    where = call.name + here()
    return [trace.units.join([(trace.plain(x, [dim % x.ndim], where), along(x.shape, {*range(x.ndim)} - {dim % x.ndim}))
                              for x in (input, source)], where)]


@rule("embedding_bag")
def _bag(trace: Trace, call: Call, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Layout]:
    """F's (numbers, table) or, within it, torch's (table, numbers): a sum, mean or maximum of rows."""
    numbers, table = (weight, input) if input.is_floating_point() else (input, weight)
    if any(trace.layout(x) for x in call.tensors if x is not table):
        raise NoRule
    return [_embedding(trace, call, numbers.flatten(), table)[0]] * len(call.results)


@rule("embedding")
def _embedding(trace: Trace, call: Call, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Layout]:
    if trace.layout(input):
        raise NoRule
    result = []
    for labels in trace.layout(weight):
        if 0 in varied(labels):
            trace.units.fix((labels,), "picked by number")
        else:
            result.append(labels.reshape((1,) * input.ndim + labels.shape[1:]))
    return [tuple(result)]


@rule("scaled_dot_product_attention")
def _attention(trace: Trace, call: Call, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
               enable_gqa: bool = False) -> list[Layout]:
    q, k, v, mask = query, key, value, attn_mask
    if not q.ndim == k.ndim == v.ndim >= 2:
        raise NoRule
    in_order = is_causal and any(
        q.ndim - 2 in varied(labels) for t in (q, k, v) for labels in trace.layout(t))
    if in_order:
        raise NoRule
    batch = _LETTERS[: q.ndim - 2]
    scores = _product(trace, call, [(q, batch + "nd"), (k, batch + "md")], batch + "nm")
    shape = (*q.shape[:-1], k.shape[-2])
    if mask is not None:
        if trace.name(mask) is None or trace.name(mask) in trace.state:
            scores = trace.units.join([(scores, shape), trace.term(mask)], call.name + here())
        else:
            trace.adopt(mask, (1,) * (len(shape) - mask.ndim) + tuple(mask.shape), scores, call.name + here())
    trace.units.reduce(scores, [len(shape) - 1])
    return [_contract(trace, [(scores, shape, batch + "nm"), (*trace.term(v), batch + "me")], batch + "ne",
                      call.name + here())]
