"""Simulated faults: who is up, which links hold, and the mixing matrix that is left."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from network.faults import Faults, kept_by_senders, surviving, without
from network.topology import DIRECTED, TOPOLOGIES, make_topology, metropolis_hastings
from utils.seeds import generator

few = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 9)


def matrix(num_agents: int, seed: int, symmetric: bool) -> np.ndarray:
    """(N, N) doubly stochastic: a mean of permutations with random weights, some of its diagonal 0 perhaps."""
    draws = np.random.default_rng(seed)
    pi = np.zeros((num_agents, num_agents))
    for weight in draws.dirichlet(np.ones(draws.integers(1, 5))):
        pi += weight * np.eye(num_agents)[draws.permutation(num_agents)]
    return (pi + pi.T) / 2 if symmetric else pi


def some_links(num_agents: int, seed: int, failure: float = 0.4) -> np.ndarray:
    """(N, N) bool, symmetric; what the diagonal says must not matter."""
    draws = np.random.default_rng(seed)
    links = np.triu(draws.random((num_agents, num_agents)) >= failure, k=1)
    return links | links.T | np.diag(draws.random(num_agents) < 0.5)


def assert_sound(pi: np.ndarray, links: np.ndarray, symmetric: bool) -> None:
    assert (pi >= 0).all() and pi.dtype == np.float64
    np.testing.assert_allclose(pi.sum(axis=0), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(pi.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert links[(pi > 0) & ~np.eye(len(pi), dtype=bool)].all()
    if symmetric:
        np.testing.assert_array_equal(pi, pi.T)


@few
@given(sizes, seeds, seeds)
def test_senders_keep_what_they_cannot_pass_on(num_agents, seed, other):
    draws, links = np.random.default_rng(seed), some_links(num_agents, other)
    hears = (draws.random((num_agents, num_agents)) < 0.5) | np.eye(num_agents, dtype=bool)
    pi = hears / hears.sum(axis=0)
    found, away = kept_by_senders(pi, links), ~np.eye(num_agents, dtype=bool)
    np.testing.assert_allclose(found.sum(axis=0), 1, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found[away & links], pi[away & links])
    assert not found[away & ~links].any()
    np.testing.assert_array_equal(kept_by_senders(pi, np.ones_like(links)), pi)


@few
@given(sizes, seeds, seeds, st.booleans())
def test_what_survives_is_doubly_stochastic_and_keeps_to_the_links(num_agents, seed, other, symmetric):
    pi, links = matrix(num_agents, seed, symmetric), some_links(num_agents, other)
    before = pi.copy(), links.copy()
    found = surviving(pi, links)
    np.testing.assert_array_equal(pi, before[0])
    np.testing.assert_array_equal(links, before[1])
    hears, away = (pi > 0) | (pi.T > 0), ~np.eye(num_agents, dtype=bool)
    if links[hears & away].all():
        np.testing.assert_array_equal(found, pi)
    else:
        assert_sound(found, links, True)
        np.testing.assert_array_equal((found > 0) & away, hears & links & away)


@few
@given(sizes, seeds, seeds)
def test_a_dropped_edge_of_a_symmetric_matrix_gives_its_weight_to_its_ends(num_agents, seed, other):
    pi, links = matrix(num_agents, seed, True), some_links(num_agents, other)
    expected = pi.copy()
    for i in range(num_agents):
        for j in range(num_agents):
            if i != j and not links[i, j]:
                expected[i, j] -= pi[i, j]
                expected[i, i] += pi[i, j]
    np.testing.assert_allclose(surviving(pi, links), expected, rtol=0, atol=1e-12)


@few
@given(sizes, seeds, st.booleans())
def test_nothing_dropped_is_nothing_changed(num_agents, seed, symmetric):
    pi = matrix(num_agents, seed, symmetric)
    for links in ((pi > 0) | (pi.T > 0), ~np.eye(num_agents, dtype=bool)):
        found = surviving(pi, links)
        assert found.tobytes() == pi.tobytes() and found is not pi


@pytest.mark.parametrize("name", [*TOPOLOGIES, *DIRECTED])
def test_every_topology_survives(name):
    for num_agents in (1, 2, 3, 6, 9):
        topology = make_topology(name, num_agents)
        for step in range(4):
            pi, links = topology.weights(step), some_links(num_agents, step)
            found = surviving(pi, links)
            if not np.array_equal(found, pi):
                assert_sound(found, links, symmetric=name in DIRECTED)
                np.testing.assert_allclose(found, found.T, rtol=0, atol=1e-15)


def test_one_way_weights_become_metropolis_hastings_ones_on_what_is_left():
    pi = make_topology("directed_ring", 5).pi
    links = ~np.zeros((5, 5), dtype=bool)
    links[1, 0] = links[0, 1] = False
    line = np.diag(np.ones(4), 1) + np.diag(np.ones(4), -1) > 0  # 1 2 3 4 0
    order = [1, 2, 3, 4, 0]
    np.testing.assert_array_equal(surviving(pi, links)[np.ix_(order, order)], metropolis_hastings(line))
    unused = ~np.zeros((5, 5), dtype=bool)
    unused[0, 2] = unused[2, 0] = False
    np.testing.assert_array_equal(surviving(pi, unused), pi)


def test_digits_that_a_file_rounds_are_no_one_way_weights():
    pi = (make_topology("ring", 5).pi + np.eye(5)) / 2  # no Metropolis-Hastings weights
    rounded, links = pi.copy(), make_topology("star", 5).connectivity
    rounded[0, 1] += 1e-9
    np.testing.assert_allclose(surviving(rounded, links), surviving(pi, links), rtol=0, atol=1e-8)


def test_links_one_way_or_of_another_size_are_an_error():
    pi = make_topology("ring", 3).pi
    one_way = np.triu(np.ones((3, 3), dtype=bool))
    for links in (one_way, np.ones((2, 2), dtype=bool), np.ones(3, dtype=bool)):
        with pytest.raises(ValueError, match="not a symmetric matrix for pi"):
            surviving(pi, links)


@few
@given(sizes, seeds, st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000), st.booleans())
def test_an_agent_that_is_down_keeps_its_model_and_nobody_hears_of_it(num_agents, seed, link, agent, step, symmetric):
    faults = Faults(link, agent, seed)
    up, links = faults.agents(step, num_agents), faults.links(step, num_agents)
    assert up.shape == (num_agents,) and links.shape == (num_agents, num_agents) and up.dtype == links.dtype == bool
    assert links.diagonal().all()
    np.testing.assert_array_equal(links, links.T)
    np.testing.assert_array_equal(links[~up], np.eye(num_agents, dtype=bool)[~up])
    pi = matrix(num_agents, seed, symmetric)
    pi = surviving(pi, links)
    alone = np.eye(num_agents)[~up]
    # An agent that nothing used to reach has the row that it had, unit up to rounding
    np.testing.assert_allclose(pi[~up], alone, rtol=0, atol=1e-15)
    np.testing.assert_allclose(pi[:, ~up], alone.T, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["fully_connected", "bipartite", "star", "random", "directed_exponential"])
def test_who_hears_of_nobody_has_exactly_a_unit_row(name):
    """Of any number of agents: weights such as 1/3 and 1/7 need not add up to 1."""
    for num_agents in range(2, 30):
        links = ~np.zeros((num_agents, num_agents), dtype=bool)
        links[0, 1:] = links[1:, 0] = False
        np.testing.assert_array_equal(surviving(make_topology(name, num_agents).pi, links)[0], np.eye(num_agents)[0])


def test_faults_happen_as_often_as_they_should():
    n, iterations, pairs = 10, range(1000), np.triu_indices(10, k=1)
    faults, links_only = Faults(0.3, 0.2, seed=1), Faults(0.3, 0.0, seed=1)
    agents = np.array([faults.agents(k, n) for k in iterations])
    links, both = (np.array([each.links(k, n)[pairs] for k in iterations]) for each in (links_only, faults))
    # 4.5 standard deviations, of one agent or pair in 1000 iterations and of all of them together
    np.testing.assert_allclose(1 - agents.mean(axis=0), 0.2, rtol=0, atol=0.057)
    np.testing.assert_allclose(1 - links.mean(axis=0), 0.3, rtol=0, atol=0.066)
    assert 1 - agents.mean() == pytest.approx(0.2, abs=0.018)
    assert 1 - links.mean() == pytest.approx(0.3, abs=0.01)
    assert both.mean() == pytest.approx(0.7 * 0.8**2, abs=0.02)
    # Independent from agent to agent, pair to pair, iteration to iteration, and the one from the other
    for sample in (agents, links, np.hstack([agents, links])):
        correlation = np.corrcoef(sample.T)
        assert np.abs(correlation[~np.eye(len(correlation), dtype=bool)]).max() < 0.15
        assert np.abs([np.corrcoef(column[1:], column[:-1])[0, 1] for column in sample.T]).max() < 0.15


def test_faults_are_the_same_whenever_asked_and_others_for_another_seed():
    def drawn(faults, iterations=range(8)):
        return [(faults.agents(k, 9).tolist(), faults.links(k, 9).tolist()) for k in iterations]

    faults = Faults(0.5, 0.5, seed=3)
    assert drawn(faults) == drawn(Faults(0.5, 0.5, seed=3)) == drawn(faults, reversed(range(8)))[::-1]
    for other in (drawn(dataclasses.replace(faults, seed=4)), drawn(faults, range(1, 9))):
        for (up, links), (others_up, others_links) in zip(drawn(faults), other, strict=True):
            assert up != others_up and links != others_links


@pytest.mark.parametrize("agent_failure", [0.0, 0.2, 0.6, 1.0])
def test_which_links_fail_does_not_depend_on_the_agents(agent_failure):
    for k in range(20):
        faults = Faults(0.4, agent_failure, seed=5)
        up = faults.agents(k, 8)
        among = np.ix_(up, up)
        np.testing.assert_array_equal(faults.links(k, 8)[among], Faults(0.4, 0.0, seed=5).links(k, 8)[among])


def test_rates_of_0_draw_nothing_and_rates_of_1_leave_nothing(monkeypatch):
    assert not Faults(0.0, 1.0, seed=0).agents(0, 50).any()
    for rates in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        np.testing.assert_array_equal(Faults(*rates, seed=0).links(0, 50), np.eye(50, dtype=bool))
    purposes = []
    monkeypatch.setattr("network.faults.generator", lambda *key: purposes.append(key[-1]) or generator(*key))
    assert Faults(0.0, 0.0, seed=0).agents(3, 5).tolist() == [True] * 5
    assert Faults(0.0, 0.0, seed=0).links(3, 5).all()
    assert purposes == []
    Faults(0.5, 0.0, seed=0).links(3, 5)
    assert purposes == ["link failure"]
    purposes.clear()
    Faults(0.0, 0.5, seed=0).links(3, 5)
    assert purposes == ["agent failure"]


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_is_a_probability(rate):
    for name in ("link_failure", "agent_failure"):
        with pytest.raises(ValueError, match=f"{name} is a probability, not {rate}"):
            Faults(**{"link_failure": 0.1, "agent_failure": 0.1, "seed": 0, name: rate})


@given(num_agents=st.integers(1, 9), data=st.data())
@settings(max_examples=50, deadline=None)
def test_who_did_not_come_leaves_the_rest_of_a_row_as_it_is(num_agents, data):
    pi = make_topology(data.draw(st.sampled_from(["ring", "star", "fully_connected", "bipartite"])), num_agents).pi
    lost = data.draw(st.sets(st.integers(0, num_agents - 1)))
    kept = without(pi, lost)
    np.testing.assert_allclose(kept.sum(axis=1), 1)
    for i in range(num_agents):
        for j in range(num_agents):
            if i != j:
                assert kept[i, j] == (0 if j in lost else pi[i, j])
    if not lost:
        np.testing.assert_array_equal(kept, pi)
