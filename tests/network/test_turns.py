"""Who takes over whose order of units, and when."""

import numpy as np
import pytest

from network.topology import make_topology
from network.turns import CommonBasis


def basis(name: str, agents: int, root=None) -> CommonBasis:
    topology = make_topology(name, agents)
    return CommonBasis(lambda iteration: topology.weights(iteration - 1), agents, root)


def test_the_order_spreads_from_the_centre_and_only_once():
    line = basis("ring", 7, root=3)
    turns = line.at(1)
    assert turns.roots == [3]
    assert dict(turns.towards) == {2: [3], 4: [3], 1: [2], 5: [4], 0: [1], 6: [5, 0]}
    assert turns.waves(7) == [[3], [2, 4], [1, 5], [0], [6]]
    assert line.at(2).towards == {} and line.at(2).waves(7) == [list(range(7))]


def test_the_root_is_the_graphs_centre():
    assert basis("star", 6).at(1).roots == [0]
    edges = np.eye(5, k=1) + np.eye(5, k=-1)
    assert CommonBasis(lambda _: edges, 5, None).at(1).roots == [2]


@pytest.mark.parametrize("name", ["ring", "fully_connected", "bipartite", "torus", "star", "exponential", "random",
                                  "random_matching", "one_peer_exponential", "disconnected"])
@pytest.mark.parametrize("agents", [2, 3, 5, 8])
def test_all_connected_agents_get_one_order_and_nobody_waits_for_itself(name, agents):
    plan = basis(name, agents)
    topology = make_topology(name, agents)
    for iteration in range(1, 12):
        turns = plan.at(iteration)
        waves = turns.waves(agents)
        assert sorted(i for wave in waves for i in wave) == list(range(agents))
        position = {i: w for w, wave in enumerate(waves) for i in wave}
        for i, references in turns.towards.items():
            assert references and all(topology.weights(iteration - 1)[i, j] and position[j] < position[i]
                                      for j in references)
    if topology.is_connected:
        assert len(set(plan.of)) == 1 and plan.of[0] >= 0
    else:
        assert all(plan.of[i] == plan.of[j] for i, j in np.argwhere(topology.connectivity))


def test_parts_that_meet_take_the_order_of_most():
    def weights(iteration):
        edges = np.zeros((5, 5))
        pairs = [(0, 1), (2, 3), (3, 4)] if iteration == 1 else [(1, 2), (0, 1), (2, 3), (3, 4)]
        for i, j in pairs:
            edges[i, j] = edges[j, i] = 1
        return edges

    plan = CommonBasis(weights, 5, None)
    assert plan.at(1).roots == [0, 3]
    assert dict(plan.at(2).towards) == {1: [2], 0: [1]}
    assert plan.of.tolist() == [3] * 5


def test_who_joins_later_takes_the_others_order():
    def weights(iteration):
        edges = 1 - np.eye(4)
        if iteration == 1:
            edges[3] = edges[:, 3] = 0
        return edges

    plan = CommonBasis(weights, 4, None)
    assert 3 not in plan.at(1).towards
    assert dict(plan.at(2).towards) == {3: [0, 1, 2]} and plan.at(2).roots == []
