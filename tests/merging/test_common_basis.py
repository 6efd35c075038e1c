"""A common basis: what aligning finds, what it leaves alone, and who aligns itself to whom."""

import itertools

import pytest
import torch
from torch import nn

from merging import METHODS, merge
from merging.activation_matching import (
    NOISE,
    Comparison,
    Matching,
    favour_identity,
    match_activations,
    similarities,
)
from merging.assignment import assign
from merging.averaging import weighted_average
from merging.batch_norm import reestimate
from merging.common_basis import align, between, universe
from merging.permutation import derive_spec, identity, invert, permute, random_permutations
from models import build_model

SIZE = 16


def images(seed: int = 0, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(20, 3, SIZE, SIZE, generator=generator) for _ in range(count)]


def seeded(seed: int) -> nn.Module:
    model = build_model("resnet20", 10, width_multiplier=1, image_size=SIZE, seed=seed)
    model.load_state_dict(reestimate(model, model.state_dict(), images(seed)))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return seeded(0)


@pytest.fixture(scope="module")
def spec(model):
    return derive_spec(model, images()[0])


@pytest.fixture(scope="module")
def states():
    return [seeded(seed).state_dict() for seed in range(4)]


def copies(spec, state, count: int = 4):
    """Models that compute the same, with their units in other orders; the first as it is."""
    orders = [identity(spec), *(random_permutations(spec, torch.Generator().manual_seed(k)) for k in range(1, count))]
    return orders, [permute(spec, order, state) for order in orders]


def assert_same_permutations(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[group], other[group]) for group in one)


def assert_same_states(one, other):
    assert all(torch.equal(one[key], other[key]) for key in other)


# One agent to others


def test_permuted_copies_all_return_to_one_basis(spec, model):
    _, found = copies(spec, model.state_dict())
    for own in range(1, 4):
        references = [found[0], found[0]]
        order, _ = align(spec, model, found[own], references, [0.2, 0.5], images())
        assert_same_states(permute(spec, order, found[own]), found[0])


def test_identical_models_stay_as_they_are(spec, model):
    state = model.state_dict()
    assert_same_permutations(align(spec, model, state, [state, state], [0.5, 0.5], images())[0], identity(spec))
    for found in universe(spec, model, [state] * 3, images())[0]:
        assert_same_permutations(found, identity(spec))


def test_aligning_to_one_model_is_matching_it(spec, model, states):
    expected = match_activations(spec, model, states[:2], [(0, 1)], images())[0, 1]
    found, correlations = align(spec, model, states[1], [states[0]], [0.3], images())
    assert_same_permutations(found, expected.permutations)
    assert correlations == [expected.correlations]


def test_several_references_count_by_their_weights(spec, model, states):
    """With next to all the weight on one of them, that one alone decides."""
    for heavy in (0, 1):
        weights = [1e-9, 1e-9]
        weights[heavy] = 1.0
        found, _ = align(spec, model, states[2], states[:2], weights, images())
        assert_same_permutations(found, align(spec, model, states[2], [states[heavy]], [1.0], images())[0])


@pytest.mark.parametrize("way", ["align", "universe"])
def test_what_an_agent_computes_does_not_change(spec, model, states, way):
    x = images(5)[0]
    if way == "align":
        found = [align(spec, model, state, [states[0]], [1.0], images())[0] for state in states]
    else:
        found, _ = universe(spec, model, states, images())
    assert any(not torch.equal(p, torch.arange(len(p))) for p in found[1].values())
    for state, order in zip(states, found, strict=True):
        model.load_state_dict(state)
        expected = model(x)
        model.load_state_dict(permute(spec, order, state))
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("references", "weights"), [(0, 0), (2, 1)])
def test_every_reference_needs_a_weight(spec, model, states, references, weights):
    with pytest.raises(ValueError, match=f"got {weights} and {references}"):
        align(spec, model, states[3], states[:references], [1.0] * weights, images())


def test_errors_name_the_agents(spec, model, states):
    broken = states[1] | {"conv1.weight": torch.full_like(states[1]["conv1.weight"], torch.inf)}
    with pytest.raises(ValueError, match="models 5 and 4"):
        align(spec, model, states[0], [broken], [1.0], images(), names=[5, 4])
    with pytest.raises(ValueError, match="models 3 and 7"):
        universe(spec, model, [states[0], broken], images(), names=[3, 7])


# All at once


@pytest.mark.parametrize("root", [0, 2])
def test_a_universe_brings_copies_to_the_roots_basis(spec, model, root):
    _, found = copies(spec, model.state_dict())
    for order, state in zip(universe(spec, model, found, images(), root=root)[0], found, strict=True):
        assert_same_states(permute(spec, order, state), found[root])


def pairs_total(spec, model, states, permutations) -> float:
    """Summed over all pairs: the correlation of the units that are matched."""
    total = 0.0
    for i, j in itertools.combinations(range(len(states)), 2):
        moved = [permute(spec, permutations[k], states[k]) for k in (i, j)]
        _, similarity, _ = next(similarities(spec, model, moved, [(0, 1)], images()))
        total += sum(float(value.diagonal().sum()) for value in similarity.values())
    return total


@pytest.mark.long
def test_a_universe_is_better_over_all_pairs_than_any_reference(spec, model, states):
    states = states[:3]
    together = pairs_total(spec, model, states, universe(spec, model, states, images())[0])
    for root in range(3):
        to_root = [identity(spec) if k == root else align(spec, model, states[k], [states[root]], [1.0], images())[0]
                   for k in range(3)]
        assert together > pairs_total(spec, model, states, to_root)


@pytest.mark.parametrize("root", [2, pytest.param(0, marks=pytest.mark.long)])
def test_in_a_universe_no_model_alone_can_do_better(spec, model, states, root):
    found, _ = universe(spec, model, states, images(), root=root)
    assert_same_permutations(found[root], identity(spec))
    placed = [permute(spec, order, state) for order, state in zip(found, states, strict=True)]
    for i, state in enumerate(placed):
        others = placed[:i] + placed[i + 1 :]
        assert_same_permutations(align(spec, model, state, others, [1.0] * 3, images())[0], identity(spec))


def test_a_universe_of_two_is_the_matching(spec, model, states):
    expected = match_activations(spec, model, states[:2], [(0, 1)], images())[0, 1]
    (_, found), correlations = universe(spec, model, states[:2], images())
    assert_same_permutations(found, expected.permutations)
    assert correlations == {(0, 1): expected.correlations}


def test_c2m3_matches_without_contradictions(spec, model, states):
    found = METHODS["C2M3"].match(spec, model, states, [(0, 1), (1, 2), (2, 0)], images(),
                                  matching=Comparison())
    found = {pair: one.permutations for pair, one in found.items()}
    for group in spec.sizes:
        around = found[0, 1][group][:, None]
        around = found[1, 2][group][around]
        assert torch.equal(found[2, 0][group][around].flatten(), torch.arange(spec.sizes[group]))


def test_c2m3_asks_nobody_but_the_neighbours(spec, model, states):
    """So that an agent finds the same in a process of its own, where it has no other models."""
    line = [[0.5, 0.5, 0, 0], [0.3, 0.4, 0.3, 0], [0, 0.3, 0.4, 0.3], [0, 0, 0.5, 0.5]]
    together = merge(states, line, "C2M3", images(), model=model, spec=spec, bn_reset="none")
    for i in range(4):
        near = [state if line[i][j] else None for j, state in enumerate(states)]
        alone = merge(near, line, "C2M3", images(), model=model, spec=spec, bn_reset="none", agents=[i])
        assert_same_states(alone[i], together[i])


def test_between_takes_one_models_units_to_anothers():
    a, b = {"g": torch.tensor([2, 0, 1])}, {"g": torch.tensor([1, 2, 0])}
    taking = between(a, b)["g"]
    # the unit that a places k-th is b's own k-th in the common order
    for place in range(3):
        assert taking[a["g"][place]] == b["g"][place]


@pytest.mark.parametrize("weights", [[[1 / 3] * 3] * 3, [[0.5, 0.25, 0.25], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]]])
def test_c2m3_of_permuted_copies_gives_the_model_back(spec, model, weights):
    _, found = copies(spec, model.state_dict(), 3)
    result = merge(found, weights, "C2M3", images(), model=model, spec=spec, bn_reset="none")
    for i, merged in enumerate(result):
        torch.testing.assert_close(merged, found[0 if weights[0] == weights[1] else i])


def test_a_common_basis_keeps_what_the_copies_compute(spec, model):
    """Once aligned, a plain average of permuted copies is the model."""
    _, found = copies(spec, model.state_dict())
    aligned = [found[0], *(permute(spec, align(spec, model, s, [found[0]], [1.0], images())[0], s) for s in found[1:])]
    average = weighted_average(aligned, [0.25] * 4)
    torch.testing.assert_close(average, found[0])
    plain = weighted_average(found, [0.25] * 4)
    assert not torch.allclose(plain["conv1.weight"], found[0]["conv1.weight"], atol=1e-2)


# The prior


def small_spec():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return derive_spec(net, torch.zeros(1, 3))


def test_units_leave_their_places_for_more_than_noise_only():
    spec = small_spec()
    (group,) = spec.sizes
    for images_read in (50, 5000):
        margin = NOISE * (2 / images_read) ** 0.5
        for gain, moves in ((0.9, False), (1.1, True)):
            # Units 0 and 1 are more like each other's: by `gain` margins each.
            similarity = torch.full((4, 4), -1.0, dtype=torch.float64)
            similarity.fill_diagonal_(0.1)
            similarity[0, 1] = similarity[1, 0] = 0.1 + gain * margin
            favoured = favour_identity(spec, {group: similarity}, images_read, "all")
            assert assign(spec, favoured)[group].tolist() == ([1, 0, 2, 3] if moves else [0, 1, 2, 3])


def test_the_prior_does_not_hide_a_clear_permutation(spec, model):
    order, found = copies(spec, model.state_dict(), 2)
    matched = match_activations(spec, model, found, [(0, 1)], images(), Matching(prior="identity"))
    assert_same_permutations(matched[0, 1].permutations, invert(order[1]))


def test_the_prior_keeps_more_units_of_unlike_models_in_their_places(spec, model, states):
    def stay(prior):
        found = match_activations(spec, model, states[:2], [(0, 1)], images(), Matching(prior=prior))[0, 1].permutations
        return sum(int((p == torch.arange(len(p))).sum()) for p in found.values())

    assert stay("identity") > stay("none")
