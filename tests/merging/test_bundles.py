"""Which units trade places, from ties and nests alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import merging.tracing.units as traced_units
from merging.tracing.bundles import groups
from merging.tracing.rules import RULES
from merging.tracing.trace import Trace
from merging.tracing.units import Units
from merging.tracing.watch import tensors_of


def units_read(*axes):
    units = Units()
    labels = [units.new((size,), name, (0,)) for name, size in axes]
    units.read += labels
    return units, labels


def found(units):
    return {group.name: group.bundles.tolist() for group in groups(units).groups}


def test_only_what_is_tied_alike_trades_places():
    units, (a, b) = units_read(("a", 6), ("b", 6))
    units.tie(a[:4], b[[3, 2, 1, 0]])
    units.tie(a[[1, 0]], b[[2, 3]])  # once more, in another order: now these two are tied twice
    assert found(units) == {"a[0:2]": [0, 1], "a[2:4]": [2, 3], "a[4:6]": [4, 5], "b[4:6]": [6, 7]}


def test_entries_of_a_unit_are_told_apart_by_their_ranks():
    units, (a, b) = units_read(("a", 3), ("b", 6))
    ranks = np.array([0, 1, 0, 1, 1, 0])
    units.tie((a[:, None] + [0, 1]).ravel(), b)
    assert found(units) == {"a": [0, 1, 2]}
    units, (a, b) = units_read(("a", 3), ("b", 6))
    units.tie(np.repeat(a, 2) + ranks, b)
    assert found(units) == {"a[0:2]": [0, 1]}  # the third holds its entries the other way round
    assert groups(units).fixed == {"a": "a single unit"}


def test_blocks_of_the_same_make_trade_places_and_units_within_them():
    units, (a,) = units_read(("a", 7))
    blocks = units.new((3,))
    units.nest(a, blocks[[0, 0, 1, 1, 2, 2, 2]])
    result = groups(units)
    assert [(group.name, group.bundles.tolist(), group.outer) for group in result.groups] == [
        ("blocks of a", [7, 8], None), ("a[0:4]", [0, 1, 2, 3], 0), ("a[4:7]", [4, 5, 6], None)]


def test_the_order_in_which_things_became_known_does_not_matter():
    units, (a, b, c) = units_read(("a", 2), ("b", 2), ("c", 2))
    units.tie(a[:1], c[:1])
    units.tie(a, b)
    units.tie(a[1:], c[1:])
    assert found(units) == {"a": [0, 1]}


def test_a_move_of_layers_that_are_alike_is_worked_out_once(monkeypatch):
    """Of later units what the first have, as many further on; other places, shapes or ranks are another move."""
    worked_out, moved_factor = [], traced_units._moved_factor
    monkeypatch.setattr(traced_units, "_moved_factor", lambda *args: worked_out.append(1) or moved_factor(*args))
    units = Units()
    first, *others = [units.new((4, 3)) for _ in range(3)]
    folded, = units.move(lambda tensors: [tensors[0].reshape(12).flip(0)], [((first,), (4, 3))], "a flip")
    assert len(worked_out) == 1 and np.array_equal(folded[0], first.ravel()[::-1])
    for labels in others:
        again, = units.move(lambda tensors: [tensors[0].reshape(12).flip(0)], [((labels,), (4, 3))], "a flip")
        assert len(worked_out) == 1 and np.array_equal(again[0], labels.ravel()[::-1])
    turned, = units.move(lambda tensors: [tensors[0].reshape(12)], [((first,), (4, 3))], "a view")
    assert len(worked_out) == 2 and np.array_equal(turned[0], first.ravel())
    units.move(lambda tensors: [tensors[0].reshape(12)], [((first[::-1],), (4, 3))], "a view")
    assert len(worked_out) == 3


MOVES = {
    "x.reshape(4, 2, 3, 15)": lambda x: x.reshape(4, 2, 3, 15), "x.view(24, 3, 5)": lambda x: x.view(24, 3, 5),
    "x.reshape(1, 4, 18, 5)": lambda x: x.reshape(1, 4, 18, 5), "x.view(4, 6, 3, 5)": lambda x: x.view(4, 6, 3, 5),
    "x.view(-1)": lambda x: x.view(-1), "x[1:, ..., ::2]": lambda x: x[1:, ..., ::2], "x[:, 0]": lambda x: x[:, 0],
    "x[..., None, 2, :]": lambda x: x[..., None, 2, :], "x[0, None, :, :2]": lambda x: x[0, None, :, :2],
    "x[...]": lambda x: x[...], "x[:, [0, 2]]": lambda x: x[:, [0, 2]], "x[-1, ..., -2:]": lambda x: x[-1, ..., -2:],
    "x[:, :, :, True]": lambda x: x[:, :, :, True], "x.roll(1, 2)": lambda x: x.roll(1, 2),
    "x.roll((1, 2), (0, -1))": lambda x: x.roll((1, 2), (0, -1)), "x.roll(7)": lambda x: x.roll(7),
    "pad": lambda x: F.pad(x, (0, 0, 1, 2)), "pad around": lambda x: F.pad(x, (2, 2, 1, 1), mode="circular"),
    "crop": lambda x: F.pad(x, (-1, 0, 0, 0, 0, 2)), "x.unbind(1)": lambda x: x.unbind(1),
    "x.unbind()": lambda x: x.unbind(), "x.chunk(2, 1)": lambda x: x.chunk(2, 1),
    "x.flatten(1, 2)": lambda x: x.flatten(1, 2), "view_as": lambda x: x.view_as(torch.zeros(2, 2, 6, 15)),
    "x.unflatten(1, (2, 3))": lambda x: x.unflatten(1, (2, 3)), "roll all": lambda x: torch.roll(x, 7, []),
    "roll by NumPy": lambda x: x.roll(1, np.int64(2)), "roll by name": lambda x: x.roll(dims=1, shifts=2),
    "reflect": lambda x: F.pad(input=x, pad=(1, 0, 0, 0), mode="reflect"), "unbind by name": lambda x: x.unbind(dim=-2),
    "reshape by name": lambda x: torch.reshape(input=x, shape=(4, -1, 5)),
}
AXES = [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (0, 3), (1, 2, 3)]  # along which labels vary


@pytest.mark.parametrize("function", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("also", [None, 0, 3])
def test_rules_know_what_a_move_leaves_as_it_is(function, also):
    """It makes no difference to looking where each entry went. also: other labels, along another dimension."""
    shape = (4, 6, 3, 5)
    for axes in (axes for axes in AXES if also not in axes):
        both = [Units(), Units()]
        layouts = [tuple(u.new([n if d in of else 1 for d, n in enumerate(shape)])
                         for of in ([axes] if also is None else [axes, (also,)])) for u in both]
        trace, x = Trace(both[0], {}, {}, {}, [], RULES), torch.zeros(shape)
        trace.layouts[x], trace.alive[x] = layouts[0], True
        with trace:
            results = tensors_of(function(x))
        # One after the other, as units that meet are fixed then, and tied otherwise.
        found = [both[1].move(lambda numbers: tensors_of(function(numbers[0])), [((labels,), shape)], "")
                 for labels in layouts[1]]
        for n, result in enumerate(results):
            mine, theirs = (sorted(layout, key=np.ndarray.tobytes) for layout in (
                trace.layout(result), both[1]._disjoint([labels for of in found for labels in of[n]], "")))
            assert len(mine) == len(theirs) and all(map(np.array_equal, mine, theirs))
        assert len(both[0].fixes) == len(both[1].fixes) and len(both[0].ties) == len(both[1].ties)


@pytest.mark.parametrize(("function", "kept"), [
    (lambda x: x.view(4, 2, 3, 15), [0]), (lambda x: x.reshape(24, 3, 5), [2, 3]), (lambda x: x[:, 0, ..., 1:], [0, 2]),
    (lambda x: x.roll(1, 2), [0, 1, 3]), (lambda x: F.pad(x, (0, 0, 1, 2)), [0, 1, 3])])
def test_what_a_move_leaves_as_it_is_needs_no_looking_at(function, kept, monkeypatch):
    looked = []
    monkeypatch.setattr(Units, "move", lambda *args: looked.append(1) or [()])
    for axis in range(4):
        units, x = Units(), torch.zeros(4, 6, 3, 5)
        trace = Trace(units, {}, {}, {}, [], RULES)
        trace.layouts[x] = (units.new([n if d == axis else 1 for d, n in enumerate(x.shape)]),)
        trace.alive[x] = True
        looked.clear()
        with trace:
            function(x)
        assert bool(looked) == (axis not in kept)
