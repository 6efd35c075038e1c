"""The algebra of units: which entries of which tensors move together, and which of these bundles can trade places.

Every entry of an axis that can be reordered is a *unit*. Operations tie units to each other (they are the same channel,
seen in two tensors), nest them in others (they belong to that head) or fix them. At the end, tied units form bundles,
and two bundles can trade places if they look alike in every respect: the same axes, ties and nesting.

A tensor's *layout* says which units its entries hold: a tuple of label arrays, each as broad as the tensor in the
dimensions along which its labels vary and 1 in all the others; no two vary along the same dimension. A label is a unit
and the rank of an entry among those that move with it (a channel that was flattened over 7 x 7 positions has 49).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
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


@dataclass(frozen=True)
class Group:
    """Bundles that can trade places: unit u is bundles[u]. outer: the group of the blocks that its units lie in."""

    name: str
    bundles: np.ndarray
    outer: int | None = None


@dataclass(frozen=True)
class Groups:
    """The result: groups in execution order, each unit's bundle, and why what is fixed is fixed."""

    groups: list[Group]
    bundle: np.ndarray
    fixed: dict[str, str]


def varied(labels: Labels) -> frozenset[int]:
    return frozenset(d for d, length in enumerate(labels.shape) if length > 1)


class Units:
    """Collects units and what is known about them; `groups()` draws the conclusion."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.count = 0
        self.read: list[np.ndarray] = []
        self.ties: list[tuple[Labels, Labels]] = [(np.zeros(0, np.int64),) * 2]
        self.nests: list[tuple[Labels, Labels]] = [(np.zeros(0, np.int64),) * 2]
        self.fixes: list[tuple[Labels, str]] = []

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
        for o, labels in factors:
            for p, shape in enumerate(shapes):
                covered = frozenset().union(*map(varied, layouts[p]))
                if p != o and any(shape[d] > 1 and d not in covered for d in varied(labels)):
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
        outer = (self.new((len(distinct),))[first[block]] + _occurrence(block)).reshape(shape)
        self.nest(labels, outer)
        return outer

    def move(self, function: Callable[[list[Tensor]], Sequence[Tensor]], operands: Sequence[tuple[Layout, Shape]],
             where: str) -> list[Layout]:
        """Any operation that only moves entries: `function` is run on the entries' numbers (0: something new)."""
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
                moved = self._moved_factor(labels, shape, entry, here, where)
                if moved is not None:
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

    def _moved_factor(self, labels: Labels, shape: Shape, entry: np.ndarray, here: np.ndarray,
                      where: str) -> Labels | None:
        """One label array behind the move; MISSING where the result's entries come from elsewhere."""
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
            self.fix((labels,), f"positions that differ from unit to unit in {where}")
            return None
        real = unit != MISSING
        steps, code = np.unique(a[real], return_inverse=True)
        codes = rank[real] * len(steps) + code.reshape(-1)
        if codes.max(initial=0) >= RANKS // len(steps):
            self.fix((labels,), f"more entries per unit than can be told apart in {where}")
            return None
        result = np.full(unit.shape, MISSING, np.int64)
        result[real] = unit[real] * RANKS + codes
        return result

    # The conclusion

    def groups(self) -> Groups:
        """Bundles of tied units, and which of them can trade places."""
        inner, outer = (np.concatenate(side) for side in zip(*self.nests, strict=True))
        axis = np.repeat(np.arange(len(self.axes)), [axis.size for axis in self.axes])
        while True:
            left, right = (np.concatenate(side) for side in zip(*self.ties, strict=True))
            edges = coo_matrix((np.ones(len(left), bool), (left // RANKS, right // RANKS)), (self.count, self.count))
            bundles, bundle = connected_components(edges, directed=False)
            children, parents = np.unique(np.stack([bundle[inner // RANKS], bundle[outer // RANKS]]), axis=1)
            first = np.zeros(bundles, np.int64)  # unit of each bundle
            first[bundle[::-1]] = np.arange(self.count)[::-1]
            same = _same_blocks(children, parents, bundle, axis)
            if not same.size:
                break
            self.ties.append((first[same[0]] * RANKS, first[same[1]] * RANKS))

        signature = self._signatures(bundle, axis, left, right, inner, outer)

        reasons: dict[int, str] = {}  # bundle -> why it is fixed

        def fix(which: np.ndarray, reason: str) -> None:
            for b in which.tolist():
                reasons.setdefault(b, reason)

        for labels, reason in self.fixes:
            fix(np.unique(bundle[labels // RANKS]), reason)
        is_parent = np.zeros(bundles, bool)
        is_parent[parents] = True
        parent_count = np.bincount(children, minlength=bundles)
        fix(np.flatnonzero(parent_count > 1), "it lies in two kinds of blocks")
        fix(np.flatnonzero(is_parent & (parent_count > 0)), "a block within a block")
        is_read = np.zeros(bundles, bool)
        is_read[bundle[np.concatenate([np.zeros(0, np.int64), *self.read]) // RANKS]] = True
        fix(np.flatnonzero(~is_read & ~is_parent), "no layer reads it")
        fixed = np.zeros(bundles, bool)
        fixed[list(reasons)] = True
        stuck = parents[fixed[children]]
        fix(np.unique(stuck), "a unit in it is fixed")
        fixed[stuck] = True

        parent = np.full(bundles, MISSING)
        parent[children] = parents
        # A free block trades places with blocks of the same make, content included.
        make = np.zeros(bundles, np.uint64)
        np.add.at(make, parents, _mix(signature[children]))
        cells: dict[tuple, list[int]] = {}
        free = np.flatnonzero(~fixed)
        for b in free[parent[free] == MISSING].tolist():
            cells.setdefault((int(signature[b]), int(make[b])), []).append(b)
        block_cell: dict[int, tuple] = {}
        for key, members in cells.items():
            if len(members) > 1:
                block_cell |= dict.fromkeys((b for b in members if is_parent[b]), key)
        nested: dict[tuple, list[int]] = {}
        for b in free[parent[free] != MISSING].tolist():
            block = int(parent[b])
            nested.setdefault((int(signature[b]), *(block_cell.get(block) or (block,))), []).append(b)

        def order_of(members: list[int]) -> list[int]:
            return sorted(members, key=lambda b: first[b])

        flat = {key: order_of(members) for key, members in cells.items()}
        found: list[tuple[int, tuple, tuple | None, list[int]]] = []
        for key, members in flat.items():
            if len(members) > 1:
                found.append((int(first[members[0]]), key, None, members))
            elif not is_parent[members[0]]:
                reasons[members[0]] = "a single unit"
        for (_, *where), members in nested.items():
            outer_key = tuple(where) if tuple(where) in flat else None
            blocks = {b: n for n, b in enumerate(flat[outer_key])} if outer_key else {}
            members = sorted(members, key=lambda b: (blocks.get(int(parent[b]), 0), first[b]))
            if len(members) > 1:
                found.append((int(first[members[0]]), (), outer_key, members))
            else:
                reasons[members[0]] = "a single unit"
        starts: dict[tuple, int] = {}
        for start, _, key, _ in found:
            if key:
                starts[key] = min(start, starts.get(key, start))
        # In execution order, and blocks before what is in them.
        found.sort(key=lambda item: (starts.get(item[1], item[0]), item[2] is not None))
        number = {key: n for n, (_, key, _, _) in enumerate(found) if key}
        names = self._names([(members, number.get(key)) for *_, key, members in found], bundle, axis)
        groups = [Group(name, np.array(members), None if key is None else number[key])
                  for name, (_, _, key, members) in zip(names, found, strict=True)]
        listed: dict[str, str] = {}
        for b in sorted(reasons, key=lambda b: first[b]):
            tensor_axis = self.axes[axis[first[b]]]
            if tensor_axis.tensor:
                listed.setdefault(tensor_axis.name, reasons[b])
        return Groups(groups, bundle, listed)

    def _signatures(self, bundle: np.ndarray, axis: np.ndarray, *relations: np.ndarray) -> np.ndarray:
        """A 64-bit hash of all that a bundle is: equal for two that can be mapped to each other, unit by unit.

        Units are numbered within their bundle in the order of their axes, so that the map is the same for all.
        """
        order = np.lexsort((np.arange(self.count), bundle))
        start = np.r_[0, np.flatnonzero(np.diff(bundle[order])) + 1] if self.count else np.zeros(0, np.int64)
        place = np.empty(self.count, np.int64)
        place[order] = np.arange(self.count) - np.repeat(start, np.diff(np.r_[start, self.count]))
        signature = np.zeros(bundle.max(initial=-1) + 1, np.uint64)
        np.add.at(signature, bundle, _mix(place, axis))
        for kind, (a, b) in enumerate(zip(relations[::2], relations[1::2], strict=True)):
            (u, r), (v, s) = np.divmod(a, RANKS), np.divmod(b, RANKS)
            np.add.at(signature, bundle[u], _mix(place[u], r, place[v], s, np.full_like(u, kind + 1)))
        return signature

    def _names(self, groups: list[tuple[list[int], int | None]], bundle: np.ndarray, axis: np.ndarray) -> list[str]:
        """A group (bundles, its outer group) is called after the first tensor that holds it, and its part of that."""
        held = np.array([bool(a.tensor) for a in self.axes], bool)
        first: dict[int, int] = {}
        for keep in (held[axis], np.ones(self.count, bool)):
            units = np.flatnonzero(keep)[::-1]
            first = dict(zip(bundle[units].tolist(), units.tolist(), strict=True)) | first
        names, seen = [], {}
        for n, (members, _) in enumerate(groups):
            units = np.array([first[b] for b in members])
            where = self.axes[axis[units[0]]]
            name = where.name
            if not where.tensor:  # blocks, named after the layer that makes what is in them
                within = next(first[inner[0]] for inner, outer in groups if outer == n)
                name = f"blocks of {self.axes[axis[within]].name}"
            places = np.flatnonzero(np.isin(bundle[where.first : where.first + where.size], members))
            if where.tensor and len(places) < where.size:
                steps = np.unique(np.diff(places))
                if len(steps) == 1:
                    step = "" if steps[0] == 1 else f":{steps[0]}"
                    name += f"[{places[0]}:{places[-1] + 1}{step}]"
                else:
                    name += f"[{places[0]}, {places[1]}, ...]"
            seen[name] = seen.get(name, 0) + 1
            names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
        return names


def _tell_apart(labels: Labels) -> Labels:
    """Ranks for copies of one entry (MISSING are none), by their order."""
    flat = labels.ravel()
    copy = np.where(flat == MISSING, 0, _occurrence(flat))
    if not copy.any():
        return labels
    unit, rank = np.divmod(flat, RANKS)
    told = np.where(flat == MISSING, MISSING, unit * RANKS + rank * (copy.max() + 1) + copy)
    return told.reshape(labels.shape)


def _occurrence(keys: np.ndarray) -> np.ndarray:
    """How many equal ones come before each of the keys (n,)."""
    order = np.argsort(keys, kind="stable")
    first = np.r_[True, np.diff(keys[order]) != 0]
    count = np.empty(len(keys), np.int64)
    count[order] = np.arange(len(keys)) - np.maximum.accumulate(np.where(first, np.arange(len(keys)), 0))
    return count


def _same_blocks(children: np.ndarray, parents: np.ndarray, bundle: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """(2, n): pairs of blocks that are the same ones, seen by two operations: they share units.

    Not where that would make one of several blocks of a kind (groups of 4 channels and groups of 8).
    """
    size = bundle.max(initial=-1) + 1
    edges = coo_matrix((np.ones(len(children), bool), (children, parents + size)), (2 * size, 2 * size))
    _, cluster = connected_components(edges, directed=False)
    blocks = np.unique(parents)
    of_block = cluster[blocks + size]
    kinds = np.unique(np.stack([bundle, axis]), axis=1)
    kinds = kinds[:, np.isin(kinds[0], blocks)]
    _, times = np.unique(np.stack([cluster[kinds[0] + size], kinds[1]]), axis=1, return_counts=True)
    torn = np.unique(np.unique(np.stack([cluster[kinds[0] + size], kinds[1]]), axis=1)[0][times > 1])
    order = np.argsort(of_block, kind="stable")
    blocks, of_block = blocks[order], of_block[order]
    same = (np.diff(of_block) == 0) & ~np.isin(of_block[1:], torn)
    return np.stack([blocks[:-1][same], blocks[1:][same]])


def _mix(*columns: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row (splitmix64), to be summed up: a set's hash."""
    h = np.full(columns[0].shape, 0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            h = (h ^ column.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h
