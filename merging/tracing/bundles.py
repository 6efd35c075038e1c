"""The conclusion from what is known about units: which of them move as one, and which can trade places.

Tied units form a *bundle*. Two bundles can trade places if they look alike in every respect: the same axes, ties and
nesting. A bundle that others are nested in is a *block*.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from merging.tracing.units import MISSING, RANKS, Axis, Units, occurrence


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


@dataclass(frozen=True, eq=False)
class _Bundles:
    """of, axis: unit -> its bundle, its axis. first: bundle -> its first unit. children, parents: all pairs of a bundle
    and a block that it lies in. ties: the pairs of labels that make the bundles."""

    of: np.ndarray
    axis: np.ndarray
    first: np.ndarray
    children: np.ndarray
    parents: np.ndarray
    ties: tuple[np.ndarray, np.ndarray]

    @property
    def count(self) -> int:
        return len(self.first)

    def in_order(self, members: list[int]) -> list[int]:
        return sorted(members, key=lambda b: self.first[b])


@dataclass(frozen=True)
class _Cell:
    """Bundles that can trade places. kind: what they have in common; outer: the kind of the blocks they lie in."""

    members: list[int]
    kind: tuple[int, int] | None
    outer: tuple[int, int] | None


def groups(units: Units) -> Groups:
    """Which units can trade places, and why others can't."""
    bundles = _bundles(units)
    reasons = _reasons(units, bundles)
    cells = _cells(bundles, _signatures(units, bundles), reasons)
    number = {cell.kind: n for n, cell in enumerate(cells) if cell.kind}
    outer = [number.get(cell.outer) for cell in cells]
    names = _names(units.axes, bundles, [cell.members for cell in cells], outer)
    found = [Group(name, np.array(cell.members), block)
             for name, cell, block in zip(names, cells, outer, strict=True)]
    fixed: dict[str, str] = {}
    for b in bundles.in_order(list(reasons)):
        axis = units.axes[bundles.axis[bundles.first[b]]]
        if axis.tensor:
            fixed.setdefault(axis.name, reasons[b])
    return Groups(found, bundles.of, fixed)


def _bundles(units: Units) -> _Bundles:
    inner, outer = (np.concatenate(side) // RANKS for side in zip(*units.nests, strict=True))
    axis = np.repeat(np.arange(len(units.axes)), [axis.size for axis in units.axes])
    ties = list(units.ties)
    while True:
        left, right = (np.concatenate(side) for side in zip(*ties, strict=True))
        of = _components(left // RANKS, right // RANKS, units.count)
        first = np.unique(of, return_index=True)[1]
        children, parents = np.unique(np.stack([of[inner], of[outer]]), axis=1)
        same = _same_blocks(children, parents, of, axis)
        if not same.size:
            return _Bundles(of, axis, first, children, parents, (left, right))
        ties.append((first[same[0]] * RANKS, first[same[1]] * RANKS))


def _components(a: np.ndarray, b: np.ndarray, size: int) -> np.ndarray:
    """The number of each node's component, in a graph of `size` nodes with edges (a, b)."""
    return connected_components(coo_matrix((np.ones(len(a), bool), (a, b)), (size, size)), directed=False)[1]


def _same_blocks(children: np.ndarray, parents: np.ndarray, bundle: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """(2, n): pairs of blocks that are the same ones: they share units, seen by two operations.

    Not where that would make one of several blocks of a kind (groups of 4 channels and groups of 8), unless these have
    all of their units in common (heads of queries that share one of keys).
    """
    blocks, number = np.unique(parents, return_inverse=True)
    alike = _neighbours(blocks, _alike(number, children[None], len(blocks)))
    if alike.size:
        return alike
    size = bundle.max(initial=-1) + 1
    cluster = _components(children, parents + size, 2 * size)[size:]  # of blocks that share units
    of_block = np.isin(bundle, blocks)
    kinds = np.unique(np.stack([bundle[of_block], axis[of_block]]), axis=1)
    places, times = np.unique(np.stack([cluster[kinds[0]], kinds[1]]), axis=1, return_counts=True)
    same = _neighbours(blocks, cluster[blocks])
    return same[:, ~np.isin(cluster[same[1]], places[0][times > 1])]


def _neighbours(blocks: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """(2, n): pairs that chain the blocks of each kind together."""
    order = np.argsort(kinds, kind="stable")
    same = np.diff(kinds[order]) == 0
    return np.stack([blocks[order][:-1][same], blocks[order][1:][same]])


def _reasons(units: Units, bundles: _Bundles) -> dict[int, str]:
    """Bundle -> why it is fixed; the first of several reasons."""
    reasons: dict[int, str] = {}

    def fix(which: np.ndarray, reason: str) -> None:
        for b in which.tolist():
            reasons.setdefault(b, reason)

    for labels, reason in units.fixes:
        fix(np.unique(bundles.of[labels // RANKS]), reason)
    parents = np.bincount(bundles.children, minlength=bundles.count)
    is_block = np.isin(np.arange(bundles.count), bundles.parents)
    fix(np.flatnonzero(parents > 1), "it lies in two kinds of blocks")
    fix(np.flatnonzero(is_block & (parents > 0)), "a block within a block")
    is_read = np.zeros(bundles.count, bool)
    is_read[bundles.of[np.concatenate([np.zeros(0, np.int64), *units.read]) // RANKS]] = True
    fix(np.flatnonzero(~is_read & ~is_block), "no layer reads it")
    fix(np.unique(bundles.parents[np.isin(bundles.children, list(reasons))]), "a unit in it is fixed")
    return reasons


def _signatures(units: Units, bundles: _Bundles) -> np.ndarray:
    """Numbers, equal for two bundles that can be mapped to each other, unit by unit.

    Units are numbered within their bundle in the order of their axes, so that the map is the same for all.
    """
    place = occurrence(bundles.of)
    owners, rows = [bundles.of], [np.stack(np.broadcast_arrays(0, place, bundles.axis, 0, 0))]
    nests = (np.concatenate(side) for side in zip(*units.nests, strict=True))
    for kind, (a, b) in enumerate((bundles.ties, nests), 1):
        (u, r), (v, s) = np.divmod(a, RANKS), np.divmod(b, RANKS)
        owners.append(bundles.of[u])
        rows.append(np.stack(np.broadcast_arrays(kind, place[u], r, place[v], s)))
    return _alike(np.concatenate(owners), np.concatenate(rows, axis=1), bundles.count)


def _alike(owners: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Numbers for `count` owners, equal where they own the same rows in whatever order.

    owners: (n,), of each row. rows: (columns, n).
    """
    order = np.lexsort((*rows, owners))
    table, bounds = rows.T[order], np.searchsorted(owners[order], np.arange(count + 1))
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(table[a:b].tobytes(), len(known)) for a, b in pairwise(bounds)], np.int64)


def _cells(bundles: _Bundles, signature: np.ndarray, reasons: dict[int, str]) -> list[_Cell]:
    """The free bundles, by what they can trade places with, in execution order; blocks before what is in them.

    Adds those that are alone to `reasons`.
    """
    parent = np.full(bundles.count, MISSING)
    parent[bundles.children] = bundles.parents
    free = np.setdiff1d(np.arange(bundles.count), list(reasons))
    # A free block trades places with blocks of the same make, content included.
    make = _alike(bundles.parents, signature[bundles.children][None], bundles.count)
    flat: dict[tuple[int, int], list[int]] = {}
    for b in bundles.in_order(free[parent[free] == MISSING].tolist()):
        flat.setdefault((int(signature[b]), int(make[b])), []).append(b)
    kinds = {b: kind for kind, members in flat.items() if len(members) > 1 for b in members}
    # What lies in such a block trades places with its like in all of them, else within its own block only.
    nested: dict[tuple, list[int]] = {}
    for b in bundles.in_order(free[parent[free] != MISSING].tolist()):
        block = int(parent[b])
        nested.setdefault((int(signature[b]), kinds.get(block, block)), []).append(b)

    blocks = set(bundles.parents.tolist())
    found = [_Cell(members, kind, None) for kind, members in flat.items()]
    for (_, outer), members in nested.items():
        outer = outer if outer in flat else None
        rank = {block: n for n, block in enumerate(flat.get(outer, ()))}
        found.append(_Cell(sorted(members, key=lambda b, rank=rank: rank.get(int(parent[b]), 0)), None, outer))
    for alone in (cell.members[0] for cell in found if len(cell.members) == 1):
        if alone not in blocks:
            reasons[alone] = "a single unit"
    return _in_execution_order([cell for cell in found if len(cell.members) > 1], bundles.first)


def _in_execution_order(cells: list[_Cell], first: np.ndarray) -> list[_Cell]:
    starts: dict[tuple[int, int], int] = {}  # kind of blocks -> the first unit in them
    for cell in cells:
        if cell.outer:
            start = int(first[cell.members[0]])
            starts[cell.outer] = min(start, starts.get(cell.outer, start))
    return sorted(cells, key=lambda cell: (starts.get(cell.kind, first[cell.members[0]]), cell.outer is not None))


def _names(axes: list[Axis], bundles: _Bundles, groups: list[list[int]], outer: list[int | None]) -> list[str]:
    """A group is called after the first tensor that holds it, and its part of that."""
    held = np.array([bool(axis.tensor) for axis in axes], bool)
    first: dict[int, int] = {}
    for keep in (held[bundles.axis], np.ones(len(bundles.of), bool)):
        units = np.flatnonzero(keep)[::-1]
        first = dict(zip(bundles.of[units].tolist(), units.tolist(), strict=True)) | first
    names, seen = [], {}
    for n, members in enumerate(groups):
        where = axes[bundles.axis[first[members[0]]]]
        if where.tensor:
            places = np.flatnonzero(np.isin(bundles.of[where.first : where.first + where.size], members))
            name = where.name + (_part(places) if len(places) < where.size else "")
        else:  # blocks, named after the layer that makes what is in them
            within = next(first[inner[0]] for inner, block in zip(groups, outer, strict=True) if block == n)
            name = f"blocks of {axes[bundles.axis[within]].name}"
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def _part(places: np.ndarray) -> str:
    """[first:end:step] of the units of an axis, as far as they are so regular."""
    steps = np.unique(np.diff(places))
    if len(steps) != 1:
        return f"[{places[0]}, {places[1]}, ...]"
    return f"[{places[0]}:{places[-1] + 1}{'' if steps[0] == 1 else f':{steps[0]}'}]"
