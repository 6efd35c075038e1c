"""The algebra of units: which entries of which tensors move together.

Every entry of an axis that can be reordered is a *unit*. Operations tie units to each other (they are the same channel,
seen in two tensors), nest them in others (they belong to that head) or fix them. What follows from that:
`merging.tracing.bundles`.

A tensor's *layout* says which units its entries hold: a tuple of label arrays, each as broad as the tensor in the
dimensions along which its labels vary and 1 in all the others; no two vary along the same dimension. A label is a unit
and the rank of an entry among those that move with it (a channel that was flattened over 7 x 7 positions has 49).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

Labels = np.ndarray
Layout = tuple[Labels, ...]
Shape = tuple[int, ...]

RANKS = 1 << 28  # label = unit * RANKS + rank
MISSING = -1


@dataclass(frozen=True)
class Axis:
    """Units first ... first + size of a state tensor's dimensions `dims`; tensor "": of no tensor, a bound on the rest.

    blocks: nonzero where dimension 0 of the tensor falls into as many blocks, and this dimension holds other units in
    each of them (the inputs of a grouped convolution).
    """

    tensor: str
    dims: tuple[int, ...]
    first: int
    size: int
    blocks: int = 0

    @property
    def labels(self) -> Labels:
        return np.arange(self.first, self.first + self.size) * RANKS

    @property
    def name(self) -> str:
        if self.dims == (0,):
            owner, _, kind = self.tensor.rpartition(".")
            return owner if owner and kind in ("weight", "bias") else self.tensor
        return f"{self.tensor} dim {', '.join(map(str, self.dims))}"


def varied(labels: Labels) -> frozenset[int]:
    return frozenset(d for d, length in enumerate(labels.shape) if length > 1)


class Units:
    """Collects units and what is known about them; `merging.tracing.bundles.groups` draws the conclusion."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.count = 0
        self.read: list[np.ndarray] = []
        self.ties: list[tuple[Labels, Labels]] = [(np.zeros(0, np.int64),) * 2]
        self.nests: list[tuple[Labels, Labels]] = [(np.zeros(0, np.int64),) * 2]
        self.fixes: list[tuple[Labels, str]] = []
        self.moves: dict[tuple[Shape, bytes], Labels | str] = {}

    def new(self, shape: Shape, tensor: str = "", dims: tuple[int, ...] = (), blocks: int = 0) -> Labels:
        """Fresh units."""
        size = math.prod(shape)
        self.axes.append(Axis(tensor, dims, self.count, size, blocks))
        self.count += size
        return np.arange(self.count - size, self.count).reshape(shape) * RANKS

    def tie(self, a: Labels, b: Labels) -> None:
        """The entries hold the same units."""
        if a is not b:
            a, b = np.broadcast_arrays(a, b)
            self.ties.append((a.ravel(), b.ravel()))

    def nest(self, inner: Labels, outer: Labels) -> None:
        """The units `inner` belong to the units `outer`: they move with them, and among each other within them."""
        inner, outer = np.broadcast_arrays(inner, outer)
        self.nests.append((inner.ravel(), outer.ravel()))

    def fix(self, layout: Layout, reason: str) -> None:
        self.fixes += [(labels.ravel(), reason) for labels in layout]

    # How layouts go through operations

    def join(self, operands: Sequence[tuple[Layout, Shape]], where: str) -> Layout:
        """Elementwise over operands that are broadcast like torch does it: the result's layout."""
        rank = max(len(shape) for _, shape in operands)
        layouts, shapes = [], []
        for layout, shape in operands:
            lead = (1,) * (rank - len(shape))
            layouts.append([labels.reshape(lead + labels.shape) for labels in layout])
            shapes.append(lead + tuple(shape))
        dead = set()
        factors = [(o, labels) for o, layout in enumerate(layouts) for labels in layout]
        for (o, a), (p, b) in combinations(factors, 2):
            mine, theirs = varied(a), varied(b)
            if o == p or not mine & theirs:
                continue
            if mine == theirs:
                self.tie(a, b)
            elif mine < theirs:
                self.nest(b, a)
            elif theirs < mine:
                self.nest(a, b)
            else:
                self.fix((a, b), f"axes that overlap only in part meet in {where}")
                dead |= {id(a), id(b)}
        for n, (o, labels) in enumerate(factors):
            plain = {d for p, shape in enumerate(shapes) for d in varied(labels)
                     if p != o and shape[d] > 1 and not any(d in varied(other) for other in layouts[p])}
            if plain and plain < varied(labels) and id(labels) not in dead:  # by place in each head: heads can move
                factors[n] = o, self._pinned(labels, varied(labels) - plain)
            elif plain:
                self.fix((labels,), f"meets entries that hold no units in {where}")
                dead.add(id(labels))
        result: list[Labels] = []
        for _, labels in sorted(factors, key=lambda factor: -len(varied(factor[1]))):
            if id(labels) not in dead and not any(varied(labels) & varied(other) for other in result):
                result.append(labels)
        return tuple(result)

    def reduce(self, layout: Layout, dims: Sequence[int], keepdim: bool = True) -> Layout:
        """Over whole dimensions, in an order that doesn't matter (a sum, a maximum). What is left of them."""
        result: list[Labels] = []
        for labels in layout:
            gone = varied(labels) & set(dims)
            kept = varied(labels) - gone
            if gone and kept:
                result.append(self._blocks(labels, kept))
            elif not gone:
                result.append(labels)
        if not keepdim:
            result = [labels.reshape([n for d, n in enumerate(labels.shape) if d not in dims]) for labels in result]
        return tuple(result)

    def level(self, layouts: Sequence[Layout]) -> list[Layout]:
        """Where one tensor holds heads whose places are fixed, and another next to it units in heads: heads in both."""
        everywhere = [{varied(labels) for labels in layout} for layout in layouts]
        found = []
        for layout, own in zip(layouts, everywhere, strict=True):
            others = [theirs for theirs in everywhere if theirs and theirs != own]
            found.append(tuple(next((self._pinned(labels, dims) for theirs in others for dims in theirs
                                     if dims and dims < varied(labels) and varied(labels) not in theirs), labels)
                               for labels in layout))
        return found

    def _pinned(self, labels: Labels, kept: frozenset[int]) -> Labels:
        """One new unit for each place in the dimensions `kept`, of all that lies there: its order counts."""
        gone = varied(labels) - kept
        shape = tuple(1 if d in gone else length for d, length in enumerate(labels.shape))
        place = np.arange(math.prod(labels.shape) // math.prod(shape))
        pinned = self.new(shape)
        self.tie(labels, pinned + place.reshape([n if d in gone else 1 for d, n in enumerate(labels.shape)]))
        return pinned

    def _blocks(self, labels: Labels, kept: frozenset[int]) -> Labels:
        """New units, one for each place in the dimensions `kept`: the blocks that the units there lie in."""
        gone = varied(labels) - kept
        shape = tuple(1 if d in gone else length for d, length in enumerate(labels.shape))
        rows = np.moveaxis(labels, sorted(gone), range(-len(gone), 0)).reshape(math.prod(shape), -1)
        # The same units in several places (heads in a batch): one block, whose entries are told apart like theirs.
        distinct, block = np.unique(np.sort(rows // RANKS, axis=1), axis=0, return_inverse=True)
        block = block.reshape(-1)
        _, start = np.unique(block, return_index=True)
        first = np.argsort(np.argsort(start))  # blocks in the order of their first places
        outer = (self.new((len(distinct),))[first[block]] + occurrence(block)).reshape(shape)
        self.nest(labels, outer)
        return outer

    def move(self, function: Callable[[list[Tensor]], Sequence[Tensor]], operands: Sequence[tuple[Layout, Shape]],
             where: str, within: Iterable[int] | None = None) -> list[Layout]:
        """Any operation that only moves entries: `function` is run on the entries' numbers (0: something new).

        within: the only dimensions whose lengths it minds. The others are cut short where they hold nothing, and what
        lies along different ones is looked at one after the other: it costs their sum instead of their product.
        """
        if within is not None:
            layouts = [layout for layout, _ in operands]
            if len(operands) == 1 and len(layouts[0]) > 1:
                moved = [self.move(function, [((labels,), operands[0][1])], where, within) for labels in layouts[0]]
                return [self._disjoint([labels for layout in of_result for labels in layout], where)
                        for of_result in zip(*moved, strict=True)]
            rank = len(operands[0][1])
            used = {dim % rank for dim in within}.union(*(varied(labels) for layout in layouts for labels in layout))
            operands = [(layout, tuple(n if d in used else min(n, 2) for d, n in enumerate(shape)))
                        for layout, shape in operands]
        numbers, offsets, count = [], [], 1
        for _, shape in operands:
            size = math.prod(shape)
            numbers.append(torch.arange(count, count + size, dtype=torch.float64).reshape(shape))
            offsets.append(count)
            count += size
        results = function(numbers)
        if not any(layout for layout, _ in operands):
            return [()] * len(results)
        bounds = np.array([*offsets, count])
        return [self._moved(result.numpy().astype(np.int64), bounds, operands, where) for result in results]

    def move_beside(self, function: Callable[[list[Tensor]], Sequence[Tensor]], operand: tuple[Layout, Shape],
                    where: str, kept: Mapping[int, int], ranks: Sequence[int]) -> list[Layout]:
        """A move that leaves some dimensions as they are, whatever their lengths: what lies along these alone stays.

        kept: these -> their places in each result, in the same order; ranks: how many dimensions the results have.
        """
        layout, shape = operand
        along, across = [], []
        for labels in layout:
            if varied(labels) <= kept.keys():
                along.append(({kept[d]: labels.shape[d] for d in varied(labels)}, labels))
            else:
                across.append(labels)
        minded = [d for d in range(len(shape)) if d not in kept]
        moved = self.move(function, [(tuple(across), shape)], where, minded) if across else [()] * len(ranks)
        return [(*layout, *(labels.reshape([lengths.get(d, 1) for d in range(rank)]) for lengths, labels in along))
                for layout, rank in zip(moved, ranks, strict=True)]

    def _moved(self, origin: np.ndarray, bounds: np.ndarray, operands: Sequence[tuple[Layout, Shape]],
               where: str) -> Layout:
        came_from = np.searchsorted(bounds, origin, side="right") - 1  # MISSING: from nowhere
        found: dict[frozenset[int], list[tuple[int, Labels]]] = {}
        for o, (layout, shape) in enumerate(operands):
            here = came_from == o
            if not here.any():
                continue
            entry = np.where(here, origin - bounds[o], 0)
            for labels in layout:
                moved = self._moved_factor(labels, shape, entry, here)
                if isinstance(moved, str):
                    self.fix((labels,), f"{moved} in {where}")
                else:
                    found.setdefault(varied(moved), []).append((o, moved))
        result = []
        for dims, parts in found.items():
            if not dims:
                for _, single in parts:  # one unit was picked: it is not like the others any more
                    self.tie(single, self.new(single.shape))
                continue
            labels = parts[0][1].copy()
            for _, part in parts[1:]:
                both = (labels != MISSING) & (part != MISSING)
                self.tie(labels[both], part[both])
                labels = np.where(labels == MISSING, part, labels)
            others = tuple(d for d in range(origin.ndim) if d not in dims)
            labels = _tell_apart(labels)
            labels = self._fill(labels, came_from.max(others, keepdims=True), where)
            mine = np.sort(labels, axis=None)
            whole = (np.sort(of, axis=None) for layout, _ in operands for of in layout)
            if not any(np.array_equal(mine, theirs) for theirs in whole):
                # A part may be treated in another way than the rest, a copy in another way than the original: they can
                # only be mapped to themselves.
                self.tie(labels, self.new(labels.shape))
            # An operand without units here whose entries lie beside those of the others, not in their way.
            present = {o for o, _ in parts}
            plain = [o for o in range(len(operands)) if o not in present and (came_from == o).any()]
            if any(self._spans(came_from == o, dims) and not self._apart(came_from == o, labels.shape, dims)
                   for o in plain):
                self.fix((labels,), f"meets entries that hold no units in {where}")
            else:
                result.append(labels)
        return self._disjoint(result, where)

    def _disjoint(self, result: list[Labels], where: str) -> Layout:
        """The layout of these labels, of which no two may vary along the same dimension."""
        for a, b in combinations(list(result), 2):
            if varied(a) & varied(b):
                self.fix((a, b), f"two axes are merged in {where}")
                result = [labels for labels in result if labels is not a and labels is not b]
        return tuple(result)

    @staticmethod
    def _spans(region: np.ndarray, dims: frozenset[int]) -> bool:
        """Whether the region is more than one entry long in one of these dimensions."""
        return any(region.any(tuple(e for e in range(region.ndim) if e != d)).sum() > 1 for d in dims)

    @staticmethod
    def _apart(region: np.ndarray, shape: Shape, dims: frozenset[int]) -> bool:
        """Whether the region is a whole range along `dims`, which no other operand shares."""
        others = tuple(d for d in range(region.ndim) if d not in dims)
        return bool((region.any(others) == region.all(others)).all())

    def _fill(self, labels: Labels, source: np.ndarray, where: str) -> Labels:
        """New units for entries without one: free where they are new entries, all alike, else fixed."""
        missing = labels == MISSING
        if missing.any():
            fresh = self.new((int(missing.sum()),))
            labels = labels.copy()
            labels[missing] = fresh
            self.fix((fresh[np.broadcast_to(source, labels.shape)[missing] != MISSING],),
                     f"beside entries that hold no units in {where}")
        return labels

    def _moved_factor(self, labels: Labels, shape: Shape, entry: np.ndarray, here: np.ndarray) -> Labels | str:
        """See the function; worked out once for layers that are alike, whose units are as many further on."""
        first = labels.min() // RANKS * RANKS
        digest = hashlib.blake2b()
        for array in (labels - first, entry, here):
            digest.update(repr(array.shape).encode() + array.tobytes())
        key = shape, digest.digest()
        if key not in self.moves:
            self.moves[key] = _moved_factor(labels - first, shape, entry, here)
        moved = self.moves[key]
        return moved if isinstance(moved, str) else np.where(moved == MISSING, MISSING, moved + first)


def _moved_factor(labels: Labels, shape: Shape, entry: np.ndarray, here: np.ndarray) -> Labels | str:
    """One label array behind a move, MISSING where the result's entries come from elsewhere; or why there is none."""
    coordinates = np.unravel_index(entry, shape)
    own = varied(labels)
    index = tuple(c if d in own else 0 for d, c in enumerate(coordinates))
    unit, rank = np.divmod(labels[index], RANKS)
    place = np.zeros_like(entry)  # the entry's place in the dimensions without units
    for d, c in enumerate(coordinates):
        if d not in own:
            place = place * shape[d] + c
    unit, rank, place = (np.where(here, array, MISSING) for array in (unit, rank, place))
    # Dimensions along which nothing of the labels varies hold no units.
    for d in range(entry.ndim):
        top = unit.max(d, keepdims=True)
        if not ((unit == top) | (unit == MISSING)).all():
            continue
        lowest = np.where(rank == MISSING, RANKS, rank).min(d, keepdims=True)
        step = np.where(rank == MISSING, MISSING, rank - lowest)
        others = tuple(e for e in range(entry.ndim) if e != d)
        if not ((step == step.max(others, keepdims=True)) | (step == MISSING)).all():
            continue  # other ranks in other units
        unit, rank = top, np.where(top == MISSING, MISSING, lowest)
    dims = frozenset(d for d in range(entry.ndim) if unit.shape[d] > 1)
    # Within them, what was position becomes rank: the same step for all positions that are left, or the units are
    # sheared against each other.
    outside = tuple(d for d in range(entry.ndim) if d not in dims)
    inside = tuple(d for d in range(entry.ndim) if d in dims)
    big = np.iinfo(np.int64).max
    a = np.where(place == MISSING, big, place).min(outside, keepdims=True)
    rest = np.where(place == MISSING, MISSING, place - a)
    if inside and not ((rest == rest.max(inside, keepdims=True)) | (rest == MISSING)).all():
        return "positions that differ from unit to unit"
    real = unit != MISSING
    steps, code = np.unique(a[real], return_inverse=True)
    codes = rank[real] * len(steps) + code.reshape(-1)
    if codes.max(initial=0) >= RANKS // len(steps):
        return "more entries per unit than can be told apart"
    result = np.full(unit.shape, MISSING, np.int64)
    result[real] = unit[real] * RANKS + codes
    return result


def _tell_apart(labels: Labels) -> Labels:
    """Ranks for copies of one entry (MISSING are none), by their order."""
    flat = labels.ravel()
    copy = np.where(flat == MISSING, 0, occurrence(flat))
    if not copy.any():
        return labels
    unit, rank = np.divmod(flat, RANKS)
    told = np.where(flat == MISSING, MISSING, unit * RANKS + rank * (copy.max() + 1) + copy)
    return told.reshape(labels.shape)


def occurrence(keys: np.ndarray) -> np.ndarray:
    """How many equal ones come before each of the keys (n,)."""
    order = np.argsort(keys, kind="stable")
    first = np.r_[True, np.diff(keys[order]) != 0]
    count = np.empty(len(keys), np.int64)
    count[order] = np.arange(len(keys)) - np.maximum.accumulate(np.where(first, np.arange(len(keys)), 0))
    return count
