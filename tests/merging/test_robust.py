"""Averages that hostile models can't move far, and the bound on how far away a model may be."""

import math

import pytest
import torch
from torch import nn

from merging import merge
from merging.averaging import least_distance, robust_average, weighted_average
from merging.permutation import derive_spec, permute, random_permutations

AGENTS, HOSTILE = 5, 4
ALL = [[1 / AGENTS] * AGENTS] * AGENTS
RING = [[1 / 3 if (i - j) % AGENTS in (0, 1, AGENTS - 1) else 0.0 for j in range(AGENTS)] for i in range(AGENTS)]
ATTACKS = {
    "huge": lambda x: 1e3 * x,
    "beyond": lambda x: 1e20 * x,
    "flipped": lambda x: -x,
    "noise": lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(9)),
}


def network():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


SPEC = derive_spec(network(), torch.zeros(1, 6))


def flat(state):
    return torch.cat([value.flatten().double() for value in state.values()])


def apart(one, other):
    """In multiples of the norm."""
    return float((flat(one) - flat(other)).norm() / flat(other).norm())


def agents(shuffled):
    """Five models near one another: each that of the first and something of its own, in another order of units."""
    torch.manual_seed(0)
    first = network().state_dict()
    near = [{key: value + 0.02 * torch.randn(value.shape) for key, value in first.items()} for _ in range(AGENTS)]
    return [permute(SPEC, random_permutations(SPEC, torch.Generator().manual_seed(i)), state) if shuffled else state
            for i, state in enumerate(near)]


@pytest.mark.parametrize("robust", ["none", "clip", "trimmed", "median"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(("method", "weights"), [("WA", ALL), ("WA", RING), ("WM", ALL)])
def test_one_hostile_agent_of_five(robust, attack, method, weights):
    states = agents(shuffled=method == "WM")
    attacked = states[:HOSTILE] + [{key: ATTACKS[attack](value) for key, value in states[HOSTILE].items()}]
    clean, found = (merge(given, weights, method, model=network(), spec=SPEC, bn_reset="none", robust=robust)
                    for given in (states, attacked))
    victims = range(HOSTILE) if weights is ALL else (0, 3)  # its neighbours on the ring
    away = [apart(found[i], clean[i]) for i in victims]
    honest = agents(shuffled=False)[:HOSTILE]
    spread = max(apart(one, other) for one in honest for other in honest)
    if robust == "none":
        assert min(away) > spread
    else:
        assert max(away) < spread, away


@pytest.mark.parametrize("robust", ["clip", "trimmed", "median"])
def test_every_agent_merges_for_itself(robust):
    merged = merge(agents(shuffled=True), ALL, "WM", model=network(), spec=SPEC, bn_reset="none", robust=robust)
    assert len({id(state) for state in merged}) == AGENTS
    for i, state in enumerate(merged):
        assert apart(state, agents(shuffled=True)[i]) < 0.2  # in its own order; others' are 1 away and more


def vectors(*values):
    return [{"x": torch.tensor(value, dtype=torch.float32), "n": torch.tensor(k)} for k, value in enumerate(values)]


def test_the_formulas():
    own, *others = vectors([0.0, 0.0], [3.0, 4.0], [0.0, 10.0], [100.0, 0.0])
    clipped = robust_average(own, others, [0.25, 0.25, 0.25], "clip")  # the median distance is 10
    assert clipped["x"].tolist() == [0.25 * 3 + 0.25 * 10, 0.25 * 4 + 0.25 * 10] and clipped["n"].item() == 0
    two = robust_average(own, others[1:], [0.3, 0.3], "clip")  # the lower of two
    torch.testing.assert_close(two["x"], torch.tensor([3.0, 3.0]))
    assert robust_average(own, others, [0.1] * 3, "median")["x"].tolist() == [1.5, 2.0]
    five = vectors([0.0], [9.0], [2.0], [4.0], [-50.0])
    assert robust_average(five[0], five[1:], [0.2] * 4, "trimmed")["x"].tolist() == [2.0]
    assert robust_average(five[0], five[1:], [0.2] * 4, "median")["x"].tolist() == [2.0]
    ten = vectors(*[[float(k**2)] for k in range(10)])
    trimmed = robust_average(ten[0], ten[1:], [0.1] * 9, "trimmed")["x"]
    torch.testing.assert_close(trimmed, torch.tensor([sum(k**2 for k in range(2, 8)) / 6]))
    with pytest.raises(ValueError, match="'mean': choose from none, clip"):
        robust_average(own, others, [0.1] * 3, "mean")


@pytest.mark.parametrize("robust", ["clip", "trimmed", "median"])
def test_a_single_neighbour_is_averaged_and_equal_models_stay(robust):
    own, other = vectors([1.0, 5.0], [3.0, -5.0])
    plain = weighted_average([own, other], [0.5, 0.5])
    torch.testing.assert_close(robust_average(own, [other], [0.5], robust)["x"], plain["x"])
    torch.testing.assert_close(robust_average(own, [own] * 3, [0.25] * 3, robust)["x"], own["x"])


def test_what_does_not_go_together_is_said():
    with pytest.raises(ValueError, match="bn_reset='repair' takes statistics of every model"):
        merge(agents(False), ALL, "WA", model=network(), bn_reset="repair", robust="clip")
    with pytest.raises(ValueError, match="unknown robust 'mean'"):
        merge(agents(False), ALL, "WA", model=network(), bn_reset="none", robust="mean")


def test_the_least_distance_is_a_bound_whatever_the_order():
    names = [name for name, _ in network().named_parameters()]
    states = agents(shuffled=False)
    shuffled = agents(shuffled=True)
    assert least_distance(states[0], shuffled[0], names) == 0
    for other in range(1, AGENTS):
        assert 0 < least_distance(states[0], shuffled[other], names) <= apart(states[other], states[0]) + 1e-9
    assert least_distance(states[0], {key: 3 * value for key, value in states[0].items()}, names) == pytest.approx(2)
    assert least_distance(states[0], {key: 1e20 * value for key, value in states[0].items()}, names) > 1e19
    zero = {"x": torch.zeros(3)}
    assert least_distance(zero, zero, ["x"]) == 0 and least_distance(zero, {"x": torch.ones(3)}, ["x"]) == math.inf
