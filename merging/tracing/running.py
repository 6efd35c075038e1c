"""Running somebody's network: on a copy of one's own, with other tensors in it, in a higher precision than it asks for.

What the network's code raises becomes a ValueError here, with one sentence.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from merging.tracing.watch import PLAIN, UnsupportedOperation

_EXTRA_STATE = "_extra_state"
PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before the names of what is within


class DoesNotRun(ValueError):
    """The network's own code fails, on these inputs, in this precision or on this device."""


class _Detaching(TorchFunctionMode):
    """`copy.deepcopy` refuses tensors with a history of gradients; within it, it copies their values."""

    def __torch_function__(self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return copy.deepcopy(tensor.detach(), memo)
        return func(*args, **(kwargs or {}))


def own_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares no tensor with `model`, which may come right from a training step.

    It may hold tensors with a history of gradients: features that it keeps, weights that weight_norm or prune computed.
    What it throws away for training (a cache of what evaluation computes from its parameters) isn't in the copy.
    Raises ValueError where it holds something that can't be copied (a lock, an open file).
    """
    try:
        with _Detaching():
            twin = copy.deepcopy(model)
        with suppress(Exception):  # of what can only be evaluated
            twin.train()
        twin.eval()
        return twin
    except Exception as error:  # __deepcopy__ of whatever the model holds
        raise ValueError(f"{type(model).__name__} can't be copied: {_reason(error)}; keep in it only what "
                         "copy.deepcopy can copy") from error


def run(model: nn.Module, *inputs: Any, keywords: Mapping[str, Any] | None = None,
        within: AbstractContextManager | None = None, what: str = "images") -> Any:
    """The model's outputs, computed `within` a context, from floating inputs in a precision of its own.

    Its attributes are as before then: what it kept belongs to its present tensors. Compiled parts run uncompiled.
    Raises DoesNotRun where the model's code raises anything but UnsupportedOperation; `what` the inputs are, for that.
    """
    inputs, keywords = tree_map(lambda x: x.to(dtype_of(model, x)) if isinstance(x, Tensor) else x,
                                (inputs, dict(keywords or {})))
    try:
        with _forgetting(model), _uncompiled(), within or nullcontext():
            return model(*inputs, **keywords)
    except UnsupportedOperation:
        raise
    except Exception as error:
        shapes = ", ".join([*map(_shape, inputs), *(f"{name}={_shape(x)}" for name, x in keywords.items())])
        raise DoesNotRun(f"{type(model).__name__} fails on {what} of shape {shapes}: {_reason(error)}") from error


# What torch itself keeps in a module: no network's own values, and most of what there would be to look through.
_OF_TORCH = vars(nn.Module()).keys() - {"training"}


@contextmanager
def _forgetting(model: nn.Module) -> Iterator[None]:
    """After it, the model's attributes, and the dicts and lists in them, hold what they held before."""
    kept: dict[int, tuple[Any, Any]] = {}

    def look(value: Any) -> None:
        if isinstance(value, (dict, list)) and id(value) not in kept:
            kept[id(value)] = value, copy.copy(value)
            for inner in value.values() if isinstance(value, dict) else value:
                look(inner)

    attributes = []
    for module in model.modules():
        holder = vars(module)
        own = {name: holder[name] for name in holder.keys() - _OF_TORCH}
        attributes.append((holder, own))
        for value in own.values():
            look(value)
    try:
        yield
    finally:
        for holder, own in attributes:
            for name in holder.keys() - own.keys() - _OF_TORCH:
                del holder[name]
            holder.update(own)
        for value, content in kept.values():
            if isinstance(value, dict):
                value.clear()
                value.update(content)
            else:
                value[:] = content


def _uncompiled() -> AbstractContextManager:
    """Within it, what was compiled runs as it was written."""
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):  # else nothing was, or it can't be
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def prefix_of(state: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What such wrappers put before the `expected` names of a state dict's entries."""
    first, prefix = next(iter(state), ""), ""
    while state.keys() != {prefix + name for name in expected}:
        more = next((wrapper for wrapper in PREFIXES if first.startswith(prefix + wrapper)), None)
        if more is None:
            return ""
        prefix += more
    return prefix


def converted(model: nn.Module) -> str:
    """What a network, or a part of it, was turned into whose tensors can't be watched at work; "" if into nothing."""
    for name, module in model.named_modules():
        what = ("scripted or traced by torch.jit" if isinstance(module, torch.jit.ScriptModule) else
                "quantised" if type(module).__module__.startswith("torch.ao.nn.") and "quantized" in
                type(module).__module__ else "")
        if what:
            return f"{type(model).__name__}{f', in {name},' if name else ''} is {what}"
    return ""


def _shape(x: Any) -> str:
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_shape, x))}]"
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def dtype_of(model: nn.Module, x: Tensor) -> torch.dtype:
    """What to hand x to the model in: floating numbers in a precision that the model has, others as they are."""
    own = (t.dtype for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point())
    first = next(own, x.dtype)
    return first if x.is_floating_point() and x.dtype != first and x.dtype not in own else x.dtype


def is_mixed(name: str, value: Any) -> bool:
    """Whether a state dict's entry is a tensor that agents may mix, and not a module's extra state of any kind."""
    return isinstance(value, Tensor) and name.rpartition(".")[2] != _EXTRA_STATE


class Slots:
    """A model's places for tensors, which those of a state dict can be put in: parameters uncopied where the precision
    is right, buffers as copies, since a forward pass may write to them.

    However many modules share them (functional_call leaves a module that has two names with tensors of the last call).
    """

    def __init__(self, model: nn.Module):
        own = model.state_dict(keep_vars=True)
        self.tensors = [(name, slot, isinstance(slot, nn.Parameter)) for name, slot in own.items()
                        if is_mixed(name, slot)]
        self.extra = {name: model.get_submodule(module) for name in own
                      for module, _, last in [name.rpartition(".")] if last == _EXTRA_STATE}

    def put(self, state: Mapping[str, Any]) -> None:
        for name, slot, lent in self.tensors:
            value = state[name]
            slot.data = value if lent and value.dtype == slot.dtype else value.detach().to(slot.dtype, copy=True)
        for name, module in self.extra.items():
            module.set_extra_state(copy.deepcopy(state[name]))


_WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
         torch.complex32: torch.complex128, torch.complex64: torch.complex128}
_NARROWING = ("float", "half", "bfloat16")


def _wide(tree: Any) -> Any:
    if type(tree) in (tuple, list):  # as arguments mostly are: much faster than torch's walk, which takes any container
        return type(tree)(map(_wide, tree))
    if type(tree) in PLAIN:
        return tree
    return _wide_leaf(tree) if isinstance(tree, Tensor) else tree_map(_wide_leaf, tree)


def _wide_leaf(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return _WIDE.get(leaf, leaf)
    return leaf.to(_WIDE[leaf.dtype]) if isinstance(leaf, Tensor) and leaf.dtype in _WIDE else leaf


class DoublePrecision(TorchFunctionMode):
    """Within it a network in float64 stays there, whatever precision it asks for: constants that its forward pass makes
    in float32, norms that are computed in float32 and cast back."""

    def __torch_function__(self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict | None = None):
        name = getattr(func, "__name__", "")
        if name in _NARROWING and isinstance(args[0], Tensor):
            func = Tensor.double
        in_place = name == "__setitem__" or (name.endswith("_") and not name.startswith("_"))
        first = args[:1] if in_place else _wide(args[:1])
        return _wide(func(*first, *_wide(args[1:]), **_wide(kwargs or {})))
