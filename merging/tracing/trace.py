"""Following units through a forward pass: what every operation means for the units that its tensors hold.

The model runs on a small batch, and each call passes through `Trace`. A *rule* (`rules`) says what a function does
to layouts; one without a rule fixes all it touches.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from merging.tracing.functions import CONSTANTS, FILLED, MOVES, READ_BEFORE, REDUCE, UNARY_VIEWS, VALUES
from merging.tracing.units import Labels, Layout, Shape, Units, varied
from merging.tracing.watch import Call, UnsupportedOperation, Watch


@dataclass(frozen=True)
class Source:
    """Where a tensor can be fetched: the slot-th tensor among the arguments of the number-th call of `name`."""

    name: str
    number: int
    slot: int
    layout: Layout
    content: int  # serial number: the same tensor, not changed in place
    storage: StorageWeakRef


@dataclass(frozen=True)
class Reading:
    """A layer (`by`) takes the sum over the units that `labels` tells: this is where their features are read."""

    source: Source
    labels: Labels
    by: str


class NoRule(Exception):
    """The rule doesn't cover this case."""


Rule = Callable[..., list[Layout]]
"""(trace, call that is done, *its arguments) -> the layouts of its results."""


class Trace(Watch):
    """One forward pass, watched. Several may share `units` and `state`: what they find adds up.

    names: id -> name of the model's parameters and buffers. state: the layouts found so far of these.
    grouped: a grouped convolution's weight -> the units along its dimension 1. attributes: tensors of the model
        that are in no state dict. rules: function -> its rule.
    readings: where layers read units. decided: where values of inputs may have decided what is done.
    written: memory that was written to in place -> when last, on the scale of `Source.content`; infinity where it may
        be written to in every pass anew. made: memory that this pass has made. copies: memory of what may be a view of
        another tensor, if the strides are others -> that one's memory.
    """

    def __init__(self, units: Units, names: dict[int, str], state: dict[str, Layout], grouped: dict[str, Labels],
                 attributes: Sequence[Tensor], rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.units, self.names, self.state, self.grouped, self.rules = units, names, state, grouped, rules
        self.layouts: Any = WeakTensorKeyDictionary()  # of what was computed
        self.alive: Any = WeakTensorKeyDictionary()  # what depends on the inputs
        self.sources: Any = WeakTensorKeyDictionary()
        self.even: Any = WeakTensorKeyDictionary()  # of one value throughout, so that nothing has a place in it
        self.given: Any = WeakTensorKeyDictionary()  # inputs of whole numbers, and what is made of these alone
        self.serials: Any = WeakTensorKeyDictionary()
        self.serial = 0
        self.constants: Any = WeakTensorKeyDictionary()  # made in the forward pass, of no tensor that counts
        self.readings: list[Reading] = []
        self.decided: list[str] = []  # where values of whole numbers that are put in may decide what is done
        self.written: dict[StorageWeakRef, float] = {}  # an address may be given to other memory later
        self.made: set[StorageWeakRef] = set()
        self.copies: dict[StorageWeakRef, StorageWeakRef] = {}
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
                    self.units.new(along(tensor.shape, {d}), name, (d,)) for d, n in enumerate(tensor.shape) if n > 1
                )
        return self.state[name]

    def operand(self, tensor: Tensor) -> tuple[Layout, Shape]:
        return self.layout(tensor), tuple(tensor.shape)

    def term(self, tensor: Tensor) -> tuple[Layout, Shape]:
        """An operand of arithmetic: one of a single value (a recurrent network's first state) is like a number."""
        return self.layout(tensor), (1,) * tensor.ndim if self.untouched(self.even, tensor) else tuple(tensor.shape)

    def untouched(self, kind: Any, tensor: Tensor) -> bool:
        """Whether a tensor was of this kind (`even`, `given`) and nothing was written to it since."""
        return tensor in kind and self.memory(tensor) not in self.written

    def memory(self, tensor: Tensor) -> StorageWeakRef:
        """What tensors share that are, or with other strides may be, views of each other."""
        own = StorageWeakRef(tensor.untyped_storage())
        return self.copies.get(own, own)

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
                adopted.append(own.reshape(along(tensor.shape, set(dims))))
        self.state[name] = tuple(adopted)

    def source(self, call: Call, tensor: Tensor) -> Source:
        """Where to fetch the tensor: before pooling, flattening and dropout that led to it, if there were any."""
        if tensor in self.sources:
            return self.sources[tensor]
        slot = next(n for n, other in enumerate(call.tensors) if other is tensor)
        if tensor not in self.serials:
            self.serials[tensor] = self._next_serial()
        return Source(call.name, call.number, slot, self.layout(tensor), self.serials[tensor], self.memory(tensor))

    def refuse_unseen(self, tensor: Tensor, where: str, place: Callable[[], str] = str) -> None:
        """Raises UnsupportedOperation for a tensor that something made which isn't seen here."""
        if tensor.is_floating_point() and not (tensor in self.layouts or tensor in self.constants
                                               or self.name(tensor) is not None):
            raise UnsupportedOperation(
                f"{where}{place()} meets a tensor of shape {tuple(tensor.shape)} that was made where it can't be seen, "
                "as in torch.jit.script or vmap: write that in plain PyTorch, or make a constant a buffer")

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
        """Carry it out, and note what its results hold."""
        known = [tensor for tensor in call.tensors if tensor in self.layouts or self.name(tensor) is not None]
        tables = [tensor for tensor in known if not (tensor.is_floating_point() or tensor in self.layouts)]
        for table in tables:
            self.layout(table)  # of positions, or a mask: it holds no units, and what is made of it neither
        for tensor in call.tensors:
            self.refuse_unseen(tensor, call.name, here)
        if len(known) == len(tables) or call.name in CONSTANTS:
            call.result = super().watch(call)
            self._note_constant(call)
            return call.result
        if call.name in VALUES:
            own = [tensor for tensor in known if not self.untouched(self.given, tensor)]
            if len(own) < len(known):
                self.decided.append(f"{call.name}(){here()}")
            if any(self.is_activation(tensor) or tensor.numel() > 1 for tensor in own):
                raise UnsupportedOperation(f"{call.name}(){here()} takes the values of a tensor out of the network, "
                                           "which may depend on the order of its units: keep them in tensors")
        call.result = super().watch(call)
        if call.name == "setitem":
            self._set(call)
        if call.results:
            self._note(call)
        return call.result

    def _note_constant(self, call: Call) -> None:
        """What comes from no tensor that counts, and whether it is of one value."""
        moved = call.tensors if call.base in MOVES else []
        even = call.name in FILLED or (moved and all(self.untouched(self.even, tensor) for tensor in moved))
        for tensor in call.results:
            self.constants[tensor] = True
            if even:
                self.even[tensor] = True
        if call.name.endswith("_") or call.name == "setitem":
            for tensor in call.tensors[:1]:
                self._write(tensor)

    def _note(self, call: Call) -> None:
        """The layouts of a call's results, and where these can be fetched."""
        results = call.results
        # A view may be the tensor itself, where there is nothing to do.
        in_place = any(result is tensor for result in results for tensor in call.tensors) and not (
            call.name in UNARY_VIEWS or call.name in MOVES)
        for result in results:
            if in_place:
                self._write(result)
            else:
                self._note_memory(call, result)
        depends = any(map(self.is_activation, call.tensors))
        given = all(self.untouched(self.given, tensor) or tensor in self.constants for tensor in call.tensors)
        for result, layout in zip(results, self._layouts(call, in_place), strict=True):
            if self.name(result) is None:
                self.layouts[result] = layout
                if depends:
                    self.alive[result] = True
                if given:
                    self.given[result] = True
            if in_place or result not in self.serials:
                self.serials[result] = self._next_serial()
        if len(results) == 1 and call.base in READ_BEFORE and not in_place:
            self._read_before(call, results[0])

    def _layouts(self, call: Call, in_place: bool) -> list[Layout]:
        """Of a call's results, by the function's rule; nothing where there is none."""
        rule = self.rules.get(call.base)
        if rule and not (in_place and call.base in MOVES):  # there the tensor's shape has changed already
            try:
                return rule(self, call, *call.args, **call.keywords)
            except Exception as error:  # arguments it doesn't know: what it fixed and tied so far does no harm
                if os.environ.get("DIMAT_DEBUG") and not isinstance(error, NoRule):
                    raise
        self.give_up(call)
        return [()] * len(call.results)

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
            self.units.join([(view, shape), self.term(value)], "an assignment" + here())
            if self.is_activation(value):
                self.layouts.setdefault(x, ())
                self.alive[x] = True

    def _write(self, result: Tensor) -> None:
        """Other views of the memory hold the same units: what is written was joined with what was there."""
        if result in self.sources:
            del self.sources[result]
        memory = self.memory(result)
        self.written[memory] = self._next_serial() if memory in self.made else math.inf

    def _note_memory(self, call: Call, result: Tensor) -> None:
        """A result lies in an argument's memory, would with other strides, or has memory of its own."""
        own = StorageWeakRef(result.untyped_storage())
        if any(own == StorageWeakRef(tensor.untyped_storage()) for tensor in call.tensors):
            return
        if call.base in MOVES or call.base in UNARY_VIEWS:
            self.copies[own] = self.memory(call.tensors[0])
        else:
            self.made.add(own)

    def _read_before(self, call: Call, result: Tensor) -> None:
        """Features are fetched before what doesn't change them, but for their place or number of positions."""
        name = call.base
        source = next((tensor for tensor in call.tensors if self.is_activation(tensor)), None)
        if source is None or (name in MOVES and source.numel() != result.numel()):
            return
        if source not in self.sources and any(0 in varied(labels) for labels in self.layout(source)):
            return  # its place would depend on the size of the batch
        if name.endswith(("pool1d", "pool2d", "pool3d")):
            if "avg" not in name or ("adaptive" not in name and math.prod(result.shape[2:]) > 1):
                return
        elif name in REDUCE and len(self.layout(source)) != len(self.layout(result)):
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


def along(shape: Sequence[int], dims: set[int]) -> Shape:
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
