"""Watching a forward pass: each call of a torch function, numbered, while the model runs as it is.

So nothing needs to be symbolically traceable. `trace` watches what calls mean for units; `Recorder` watches later
passes in the same way, to fetch features where layers read them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from merging.tracing.functions import VALUES
from merging.tracing.steps import COMPOUND


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
    def base(self) -> str:
        """The name without the underscore of functions that work in place."""
        return self.name[:-1] if self.name.endswith("_") and not self.name.startswith("_") else self.name

    @cached_property
    def tensors(self) -> list[Tensor]:
        return tensors_of((self.args, self.kwargs))

    @property
    def results(self) -> list[Tensor]:
        return tensors_of(self.result)

    @property
    def keywords(self) -> dict[str, Any]:
        """`kwargs` under torch's own names, where it takes NumPy's too."""
        return {_ALIASES.get(name, name): value for name, value in self.kwargs.items()}


_ALIASES = {"axis": "dim", "keepdims": "keepdim", "a": "input", "x": "input", "x1": "input", "x2": "other"}


PLAIN = (int, float, bool, str, NoneType)  # in which no tensor is


def tensors_of(tree: Any) -> list[Tensor]:
    if type(tree) in (tuple, list):  # as arguments mostly are: much faster than torch's walk, which takes any container
        return [tensor for part in tree for tensor in tensors_of(part)]
    if type(tree) is dict:
        return tensors_of([*tree.values()])
    if isinstance(tree, Tensor):
        return [tree]
    if type(tree) in PLAIN:
        return []
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
    if name.startswith("__") and name.endswith("__") and name not in VALUES:
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
        steps = COMPOUND.get(name)
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
