"""DIMAT and weight matching find the way back from a permuted copy, in every architecture."""

import pytest
import torch

from merging.activation_matching import match_activations
from merging.assignment import assign, best
from merging.permutation import PermutationSpec, invert, permute, random_permutations
from merging.weight_matching import match_weights
from tests.merging.networks import HIDDEN
from tests.merging.test_permutation import SLOW, ZOO, case, inputs_of, outputs

NAMES = [*HIDDEN, *(pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ZOO)]


@pytest.mark.parametrize("name", NAMES)
def test_a_permuted_copy_is_recovered(name):
    model, spec, state, _ = case(name)
    permutations = random_permutations(spec, torch.Generator().manual_seed(5))
    moved = permute(spec, invert(permutations), state)
    found = match_weights(spec, state, moved)
    wrong = [group for group, p in permutations.items() if not torch.equal(found[group], p)]
    assert not wrong, f"weights: {len(wrong)} of {len(permutations)} groups"

    inputs = inputs_of(name, 4 if name == "inception_v3" else 24)
    if len(inputs) == 1:
        found = match_activations(spec, model, [state, moved], [(0, 1)], [inputs[0]])[0, 1]
        # Units that are dead on all images, or alike, may be confused: the outputs show whether any other was.
        expected = outputs(model, state, inputs)
        error = (outputs(model, permute(spec, found, moved), inputs) - expected).norm() / expected.norm()
        assert error < 1e-9
        if name == "transformer":
            assert all(torch.equal(found[group], p) for group, p in permutations.items())


def test_blocks_are_assigned_by_the_best_pairing_within_each_pair():
    """Against all permutations of three blocks of two units, and of the units in them."""
    from itertools import permutations as all_orders

    spec = PermutationSpec({"blocks": 3, "units": 6}, {"blocks": (), "units": ()}, {"units": "blocks"}, {}, {}, ())
    for seed in range(20):
        similarity = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        own = torch.randn(3, 3, generator=torch.Generator().manual_seed(99 + seed), dtype=torch.float64)
        for extra in ({}, {"blocks": own}):
            found = assign(spec, {"units": similarity} | extra)

            def value(outer, units, extra=extra, similarity=similarity):
                total = float(similarity[torch.arange(6), torch.tensor(units)].sum())
                return total + (float(extra["blocks"][torch.arange(3), torch.tensor(outer)].sum()) if extra else 0)

            every = [value(outer, [2 * b + k for b, order in zip(outer, orders, strict=True) for k in order])
                     for outer in all_orders(range(3))
                     for orders in ((a, b, c) for a in ((0, 1), (1, 0)) for b in ((0, 1), (1, 0))
                                    for c in ((0, 1), (1, 0)))]
            assert value(found["blocks"].tolist(), found["units"].tolist()) == pytest.approx(max(every))
            assert torch.equal(found["units"].reshape(3, 2) // 2, found["blocks"][:, None].expand(3, 2))


def test_a_group_that_nothing_reads_while_evaluating_stays_as_it_is():
    model, spec, state, inputs = case("Auxiliary")
    matched = match_activations(spec, model, [state, state], [(0, 1)], [inputs[0]])
    assert not spec.reads["aux.0"] and torch.equal(matched[0, 1]["aux.0"], torch.arange(7))


def test_best_is_the_best_assignment():
    assert best(torch.tensor([[1.0, 3.0], [2.0, 1.0]]).numpy()).tolist() == [1, 0]
