"""Assignments of units that lie in blocks."""

import numpy as np
import pytest
import torch

from merging.activation_matching import match_activations
from merging.assignment import assign, best
from merging.permutation import PermutationSpec
from tests.merging.test_permutation import assert_recovered, case, inputs_of


def test_a_permuted_transformer_is_recovered_head_by_head():
    """Every architecture is, in test_permutation; here DIMAT finds each single unit."""
    model, spec, state, _ = case("transformer")
    permutations, found = assert_recovered(model, spec, state, inputs_of("transformer", 24))
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
    assert not spec.reads["aux.0"] and torch.equal(matched[0, 1].permutations["aux.0"], torch.arange(7))


def test_best_is_the_best_assignment():
    assert best(torch.tensor([[1.0, 3.0], [2.0, 1.0]]).numpy()).tolist() == [1, 0]


def test_units_that_nothing_tells_apart_stay_where_they_are():
    """Dead ones, and those that are active for the same images; elsewhere they would be averaged with other weights."""
    draws = np.random.default_rng(0)
    for _ in range(40):
        x = np.maximum(draws.normal(size=(200, 40)) @ draws.normal(size=(40, 40)) - draws.normal() * 8, 0)
        x[:, draws.random(40) < 0.3] = 0
        deviation = x.std(0)
        products = np.outer(deviation, deviation)
        correlation = np.where(products > 0, np.cov(x.T) / np.maximum(products, 1e-30), 0)
        assert best(correlation).tolist() == list(range(40))
