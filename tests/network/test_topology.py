"""Topologies: mixing matrices, the paper's eigenvalues, graphs that change, JSON files."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components, shortest_path

from network.topology import (
    DIRECTED,
    EXPS,
    TOPOLOGIES,
    Topology,
    lazy_where_needed,
    make_topology,
    metropolis_hastings,
    push_weights,
    register_topology,
    spanning_tree,
)

# Second-largest |eigenvalue| at these numbers of agents
PAPER_AGENTS = (2, 3, 5, 10, 20)
PAPER_EIGENVALUES = {
    "ring": (0, 0, 0.539, 0.873, 0.967),
    "bipartite": (1, 0.5, 0.500, 0.780, 0.900),
    "fully_connected": (0, 0, 0, 0, 0),
}


def assert_sound(topology: Topology, num_agents: int) -> None:
    pi, edges = topology.pi, topology.connectivity
    assert topology.num_agents == num_agents
    assert edges.shape == pi.shape == (num_agents, num_agents)
    assert edges.dtype == bool and pi.dtype == np.float64
    assert not edges.diagonal().any()
    np.testing.assert_array_equal(edges, edges.T)
    np.testing.assert_allclose(pi, pi.T, rtol=0, atol=1e-15)
    np.testing.assert_allclose(pi.sum(axis=0), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(pi.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert (pi >= 0).all()
    off_diagonal = ~np.eye(num_agents, dtype=bool)
    np.testing.assert_array_equal((pi > 0) & off_diagonal, edges)


@pytest.mark.parametrize("name", PAPER_EIGENVALUES)
def test_the_papers_eigenvalues(name):
    for num_agents, expected in zip(PAPER_AGENTS, PAPER_EIGENVALUES[name], strict=True):
        topology = make_topology(name, num_agents)
        assert_sound(topology, num_agents)
        assert topology.second_eigenvalue == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("name", ["one_peer_exponential", "random_matching"])
def test_a_graph_that_changes_brings_agents_together_by_its_eigenvalue(name):
    topology = make_topology(name, 10, 3)
    x, apart = np.random.default_rng(0).normal(size=10), []
    for step in range(49):
        apart.append(np.linalg.norm(x - x.mean()))
        x = topology.weights(step) @ x
    assert (apart[48] / apart[8]) ** (1 / 40) == pytest.approx(topology.second_eigenvalue, rel=0.15)
    assert make_topology("one_peer_exponential", 8).second_eigenvalue < 1e-3  # all agree after a round
    assert make_topology("random_matching", 8).second_eigenvalue == pytest.approx((3 / 7) ** 0.5)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_topology_is_sound_for_every_number_of_agents(name):
    for num_agents in range(1, 26):
        topology = make_topology(name, num_agents)
        assert_sound(topology, num_agents)
        alone = name == "disconnected" or (name == "bipartite" and num_agents == 2)
        assert topology.is_connected == (num_agents == 1 or not alone)
        assert (topology.second_eigenvalue > 1 - 1e-9) == (not topology.is_connected)
    assert make_topology(name, 1).pi.tolist() == [[1.0]]


@pytest.mark.parametrize("num_agents", [100, 101, 102, 150])
def test_bipartite_around_the_end_of_the_floor_rule(num_agents):
    topology = make_topology("bipartite", num_agents)
    assert_sound(topology, num_agents)
    weight = 0.01 if num_agents <= 101 else 1 / (num_agents - 1)
    assert topology.pi[0, -1] == pytest.approx(weight)
    assert topology.second_eigenvalue == pytest.approx(1 - 2 * weight)  # two spokes that differ, all others alike


def test_edges_that_weigh_nothing_are_refused(tmp_path):
    """As floor(100 / (N - 1)) / 100 gives them to 102 agents."""
    content = json.loads(make_topology("bipartite", 102).to_json()) | {"pi": np.eye(102).tolist()}
    (tmp_path / "bipartite.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"pi\[0\]\[100\] is 0, but connectivity has this edge"):
        make_topology(tmp_path / "bipartite.json", 102)


def test_bipartite_weights_are_the_papers():
    np.testing.assert_allclose(
        make_topology("bipartite", 4).pi,
        [[0.34, 0, 0.33, 0.33], [0, 0.34, 0.33, 0.33], [0.33, 0.33, 0.34, 0], [0.33, 0.33, 0, 0.34]],
    )
    np.testing.assert_array_equal(make_topology("bipartite", 3).pi, [[0, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    np.testing.assert_array_equal(make_topology("bipartite", 2).pi, np.eye(2))


def test_ring_and_fully_connected_weights_are_exact():
    assert set(make_topology("ring", 5).pi[make_topology("ring", 5).pi > 0]) == {1 / 3}
    np.testing.assert_array_equal(make_topology("ring", 2).pi, np.full((2, 2), 0.5))
    for num_agents in PAPER_AGENTS:
        # bitwise: equal rows mean that one merge serves all agents
        np.testing.assert_array_equal(make_topology("fully_connected", num_agents).pi, 1 / num_agents)


def test_neighbours():
    assert make_topology("ring", 5).neighbours(0) == [1, 4]
    assert make_topology("star", 4).neighbours(0) == [1, 2, 3]
    assert make_topology("star", 4).neighbours(3) == [0]
    assert make_topology("bipartite", 5).neighbours(4) == [0, 1, 2]
    assert make_topology("exponential", 8).neighbours(0) == [1, 2, 4, 6, 7]
    assert make_topology("torus", 12).neighbours(0) == [1, 3, 4, 8]  # 3 rows of 4
    assert make_topology("disconnected", 3).neighbours(1) == []
    np.testing.assert_array_equal(make_topology("torus", 7).connectivity, make_topology("ring", 7).connectivity)


def test_random_depends_on_its_seed_only():
    one, same, other = (make_topology("random", 12, seed=seed).connectivity for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not one.all(where=~np.eye(12, dtype=bool))


@pytest.mark.parametrize("num_agents", range(1, 12))
def test_random_matching_is_a_matching_in_every_step(num_agents):
    topology = make_topology("random_matching", num_agents, seed=1)
    assert not topology.directed and topology.is_doubly_stochastic
    np.testing.assert_array_equal(topology.connectivity, ~np.eye(num_agents, dtype=bool))
    for step in range(20):
        pi = topology.weights(step)
        np.testing.assert_array_equal(pi, pi.T)
        np.testing.assert_array_equal(pi.sum(axis=1), 1)
        partners = ((pi > 0) & topology.connectivity).sum(axis=1)
        assert partners.max(initial=0) <= 1 and (partners == 0).sum() == num_agents % 2
        assert set(pi.ravel()) <= {0.0, 0.5, 1.0}  # so that the paired weigh 1/2 and who sits out 1


@pytest.mark.parametrize("num_agents", [2, 3, 4, 5, 10, 101])
def test_the_eigenvalue_of_random_matchings_is_known_exactly(num_agents):
    exact = np.sqrt(1 - (num_agents / 2) / (num_agents - 1 + num_agents % 2))
    topology = make_topology("random_matching", num_agents, seed=1)
    assert topology.second_eigenvalue == pytest.approx(exact, abs=1e-7)
    if 2 < num_agents < 101:  # for those whose mean square isn't known it is estimated, somewhat high
        estimate = dataclasses.replace(topology, groups=False).second_eigenvalue
        assert exact < estimate < 1.1 * exact


@pytest.mark.parametrize("num_agents", [1, 2, 3, 4, 5, 8])
def test_the_mean_of_many_random_matchings_is_pi(num_agents):
    topology = make_topology("random_matching", num_agents)
    mean = np.mean([topology.weights(step) for step in range(1500)], axis=0)
    np.testing.assert_allclose(mean, topology.pi, rtol=0, atol=0.025)  # 4 standard deviations of the likeliest pairs


def test_random_matchings_depend_on_seed_and_step_only():
    def matrices(seed, steps=range(6)):
        topology = make_topology("random_matching", 9, seed)
        return [topology.weights(step).tolist() for step in steps]

    assert matrices(3) == matrices(3) == matrices(3, reversed(range(6)))[::-1]
    assert all(a != b for a, b in zip(matrices(3), matrices(4), strict=True))
    assert all(a != b for a, b in itertools.combinations(matrices(3), 2))


def test_a_draw_comes_before_a_schedule_and_that_before_pi():
    matrices = np.eye(2), np.full((2, 2), 0.5)
    fixed = Topology("mine", ~np.eye(2, dtype=bool), np.mean(matrices, axis=0))
    in_turn = dataclasses.replace(fixed, schedule=matrices)
    drawn = dataclasses.replace(in_turn, draw=lambda step: np.full((2, 2), step))
    assert [fixed.weights(step)[0, 1] for step in range(4)] == [0.25] * 4
    assert [in_turn.weights(step)[0, 1] for step in range(4)] == [0, 0.5, 0, 0.5]
    assert [drawn.weights(step)[0, 1] for step in range(4)] == [0, 1, 2, 3]


def test_a_registered_graph_may_be_drawn_step_by_step(monkeypatch):
    monkeypatch.setattr("network.topology.TOPOLOGIES", {})

    @register_topology("mine", draw=lambda num_agents, seed, step: np.full((num_agents, num_agents), 10 * seed + step))
    def mine(num_agents, seed):
        return ~np.eye(num_agents, dtype=bool)

    topology = make_topology("mine", 3, seed=2)
    np.testing.assert_array_equal(topology.weights(4), np.full((3, 3), 24))
    np.testing.assert_array_equal(topology.pi, 1 / 3)


def test_what_is_doubly_stochastic():
    for name in ("ring", "bipartite", "directed_ring", "directed_exponential", "one_peer_exponential"):
        assert make_topology(name, 5).is_doubly_stochastic is True
    star = make_topology("star", 4)
    columns = push_weights(star.connectivity)
    for pi in (columns, columns.T):
        assert dataclasses.replace(star, pi=pi).is_doubly_stochastic is False
    # Each half of it sends one way, the mean both
    one_way = np.array([[0.5, 0], [0.5, 1]]), np.array([[1, 0.5], [0, 0.5]])
    pair = Topology("pair", ~np.eye(2, dtype=bool), np.mean(one_way, axis=0), directed=True, schedule=one_way)
    assert not pair.is_doubly_stochastic
    assert dataclasses.replace(pair, schedule=()).is_doubly_stochastic
    ring = make_topology("ring", 5)
    assert dataclasses.replace(ring, pi=ring.pi.round(7)).is_doubly_stochastic  # as a file may have it


def test_metropolis_hastings_on_a_star_and_on_what_is_no_graph():
    pi = metropolis_hastings(make_topology("star", 4).connectivity)
    np.testing.assert_allclose(pi[0], 0.25)
    np.testing.assert_allclose(pi[1], [0.25, 0.75, 0, 0])
    with pytest.raises(ValueError, match="square symmetric"):
        metropolis_hastings(np.array([[0, 1], [0, 0]]))
    with pytest.raises(ValueError, match="square symmetric"):
        metropolis_hastings(np.zeros((2, 3)))


@pytest.mark.parametrize("name", DIRECTED)
def test_one_way_graphs_are_column_stochastic_and_strongly_connected(name):
    for n in (1, 2, 3, 5, 8, 20):
        topology = make_topology(name, n)
        assert topology.directed and topology.is_connected
        for step in range(7):
            pi = topology.weights(step)
            assert (pi >= 0).all() and (np.diag(pi) > 0).all()
            np.testing.assert_allclose(pi.sum(axis=0), 1)
            assert not (pi > 0)[~(topology.connectivity | np.eye(n, dtype=bool))].any()
    receivers = (make_topology(name, 8).weights(0) > 0).sum(axis=0) - 1
    assert set(receivers) == {3 if name == "directed_exponential" else 1}


def test_one_peer_after_the_other_is_an_exact_average_on_a_power_of_two():
    topology = make_topology("one_peer_exponential", 8)
    product = np.linalg.multi_dot([topology.weights(step) for step in range(3)])
    np.testing.assert_allclose(product, np.full((8, 8), 1 / 8))
    np.testing.assert_allclose(topology.weights(3), topology.weights(0))
    assert topology.weights(0)[1, 0] == topology.weights(1)[2, 0] == topology.weights(2)[4, 0] == 0.5


def test_a_one_way_graph_that_cannot_be_walked_back_is_not_connected():
    hears = np.zeros((3, 3), dtype=bool)
    hears[1, 0] = hears[2, 1] = True
    assert not Topology("line", hears, push_weights(hears), directed=True).is_connected
    hears[0, 2] = True
    assert Topology("circle", hears, push_weights(hears), directed=True).is_connected


@pytest.mark.parametrize("with_pi", [True, False])
def test_a_file_of_a_one_way_graph(with_pi, tmp_path):
    hears = np.array([[0, 1, 1], [1, 0, 0], [0, 1, 0]], dtype=bool)
    content = json.loads(Topology("own", hears, push_weights(hears), directed=True).to_json())
    if not with_pi:
        del content["pi"]
    (tmp_path / "own.json").write_text(json.dumps(content))
    found = make_topology(tmp_path / "own.json", 3)
    assert found.directed and np.array_equal(found.connectivity, hears)
    np.testing.assert_allclose(found.pi, push_weights(hears))
    content |= {"pi": (push_weights(hears).T).tolist()}
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"own\.json"):
        make_topology(tmp_path / "own.json", 3)


@pytest.mark.parametrize("name", sorted(TOPOLOGIES.keys() - {"random_matching"}))
@pytest.mark.parametrize("num_agents", [1, 2, 5, 8, 13])
def test_a_spanning_tree_has_the_fewest_edges_that_keep_all_in_touch(name, num_agents):
    graph = make_topology(name, num_agents, seed=1)
    tree = spanning_tree(graph)
    assert_sound(tree, num_agents)
    assert not (tree.connectivity & ~graph.connectivity).any() and tree.name == graph.name
    parts, of_graph = (connected_components(edges, directed=False) for edges in (tree.connectivity, graph.connectivity))
    assert parts[0] == of_graph[0] and parts[1].tolist() == of_graph[1].tolist()
    assert tree.connectivity.sum() == 2 * (num_agents - parts[0])
    np.testing.assert_array_equal(tree.connectivity, spanning_tree(graph).connectivity)
    hops, short = (shortest_path(edges, unweighted=True) for edges in (tree.connectivity, graph.connectivity))
    assert min(hops.max(axis=1)) == min(short.max(axis=1))  # from the centre all are as near as in the graph


def test_graphs_that_take_turns_are_made_lazy_together():
    halves = [np.kron(np.eye(2), np.array([[0.0, 1.0], [1.0, 0.0]])), np.full((4, 4), 0.25)]
    turning = Topology("mine", ~np.eye(4, dtype=bool), np.mean(halves, axis=0), schedule=tuple(halves))
    lazy = lazy_where_needed(turning)
    for step, pi in enumerate(halves):
        np.testing.assert_array_equal(lazy.weights(step), (pi + np.eye(4)) / 2)
    assert "-1" in lazy.note and lazy_where_needed(lazy) is lazy


def test_exps_are_topologies():
    assert [EXPS[number] for number in (1, 2, 3, 4)] == ["fully_connected", "ring", "bipartite", "disconnected"]
    assert set(EXPS.values()) <= set(TOPOLOGIES)


def test_unknown_names_and_no_agents():
    with pytest.raises(ValueError, match=r"unknown topology 'rign'.* ring, .*a \.json file or a folder"):
        make_topology("rign", 5)
    with pytest.raises(ValueError, match="at least 1 agent, not 0"):
        make_topology("ring", 0)


@pytest.mark.parametrize("name", ["ring", "bipartite", "star", "disconnected"])
def test_a_file_comes_back_as_it_was(name, tmp_path):
    topology = make_topology(name, 5)
    path = tmp_path / "graph.json"
    path.write_text(topology.to_json())
    loaded = make_topology(str(path), 5)
    assert loaded.name == name
    np.testing.assert_array_equal(loaded.connectivity, topology.connectivity)
    np.testing.assert_array_equal(loaded.pi, topology.pi)
    assert loaded.is_connected == topology.is_connected


def test_a_file_without_pi_gets_metropolis_hastings_weights(tmp_path):
    path = tmp_path / "path.json"
    path.write_text(json.dumps({"num_agents": 3, "connectivity": [[1, 1, 0], [1, 1, 1], [0, 1, 1]]}))
    topology = make_topology(path, 3)  # self loops are ignored
    assert_sound(topology, 3)
    assert topology.name == "path"
    assert topology.pi[0, 1] == pytest.approx(1 / 3)


def test_a_file_may_weigh_the_two_ways_of_an_edge_differently(tmp_path):
    path = tmp_path / "circulant.json"
    pi = [[0.5, 0.2, 0.3], [0.3, 0.5, 0.2], [0.2, 0.3, 0.5]]
    path.write_text(json.dumps({"connectivity": [[0, 1, 1], [1, 0, 1], [1, 1, 0]], "pi": pi}))
    topology = make_topology(path, 3)
    np.testing.assert_array_equal(topology.pi, pi)
    root = np.exp(2j * np.pi / 3)
    assert topology.second_eigenvalue == pytest.approx(abs(0.5 + 0.2 * root + 0.3 * root**2))


LINE = [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
HALF = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
FAULTS = {
    "not json": ("{", "Expecting property name"),
    "a list": ([], "no 'connectivity'"),
    "no connectivity": ({"pi": HALF}, "no 'connectivity'"),
    "another number of agents": ({"num_agents": 5, "connectivity": LINE}, "num_agents is 5, but there are 3 agents"),
    "another size": ({"connectivity": [[0, 1], [1, 0]]}, r"shape \(2, 2\), but 3 agents need \(3, 3\)"),
    "not square": ({"connectivity": LINE, "pi": HALF[:2]}, r"pi has shape \(2, 3\)"),
    "ragged": ({"connectivity": LINE[:2] + [[1]]}, "connectivity is not a matrix of numbers"),
    "words": ({"connectivity": LINE, "pi": [["a"] * 3] * 3}, "pi is not a matrix of numbers"),
    "weights as edges": ({"connectivity": HALF}, "other than 0 and 1"),
    "one-way edge": ({"connectivity": [[0, 1, 0], [0, 0, 0], [0, 0, 0]]}, r"not symmetric.* \(0, 1\) one way"),
    "negative": ({"connectivity": LINE, "pi": [[1.5, -0.5, 0], HALF[1], HALF[2]]}, r"pi\[0\]\[1\] is negative"),
    "not finite": ({"connectivity": LINE, "pi": [[float("nan")] * 3] * 3}, "pi has entries that are not finite"),
    "one-way weight": ({"connectivity": LINE, "pi": [[1, 0, 0], HALF[1], HALF[2]]}, "no symmetric support"),
    "weight beside the edges": ({"connectivity": LINE, "pi": [[1 / 3] * 3] * 3}, r"pi\[0\]\[2\] is positive, but"),
    "edge without weight": ({"connectivity": LINE, "pi": np.eye(3).tolist()}, r"pi\[0\]\[1\] is 0, but"),
    "row sum": ({"connectivity": LINE, "pi": [[0.4, 0.5, 0], HALF[1], HALF[2]]}, "row 0 sums to 0.9, not to 1"),
    "column sum": (
        {"connectivity": LINE, "pi": [[0.5, 0.5, 0], [0.4, 0.2, 0.4], [0, 0.5, 0.5]]},
        "column 1 sums to 1.2, not to 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_named_with_its_fault(fault, tmp_path):
    content, message = FAULTS[fault]
    path = tmp_path / "faulty.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"faulty\.json: .*{message}") as caught:
        make_topology(path, 3)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        make_topology(tmp_path / "none.json", 3)


def folder_of(path, **contents):
    path.mkdir()
    for name, content in contents.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_files_of_a_folder_take_turns_by_name(tmp_path):
    ring, star = make_topology("ring", 4), make_topology("star", 4)
    alone = {"num_agents": 4, "connectivity": np.zeros((4, 4)).tolist()}
    folder = folder_of(tmp_path / "graphs", b=star.to_json(), c=alone, a=ring.to_json())
    (folder / "README").write_text("no graph")
    topology = make_topology(folder, 4)
    matrices = [ring.pi, star.pi, np.eye(4)]
    for step in range(7):
        np.testing.assert_array_equal(topology.weights(step), matrices[step % 3])
    assert_sound(topology, 4)
    assert topology.name == "graphs" and topology.is_doubly_stochastic and not topology.directed
    np.testing.assert_allclose(topology.pi, np.mean(matrices, axis=0))
    np.testing.assert_array_equal(topology.connectivity, ring.connectivity | star.connectivity)
    np.testing.assert_array_equal(make_topology(f"{folder}/", 4).pi, topology.pi)


def test_a_folder_of_one_file_is_that_file(tmp_path):
    bipartite = make_topology("bipartite", 5)
    topology = make_topology(folder_of(tmp_path / "one.json", only=bipartite.to_json()), 5)
    for pi in (topology.pi, topology.weights(0), topology.weights(1)):
        np.testing.assert_array_equal(pi, bipartite.pi)


def test_a_folder_is_directed_if_any_of_its_files_is(tmp_path):
    ring, one_way = make_topology("ring", 5), make_topology("directed_ring", 5)
    folder = folder_of(tmp_path / "mixed", a=ring.to_json(), b=one_way.to_json())
    topology = make_topology(folder, 5)
    assert topology.directed and topology.is_doubly_stochastic
    np.testing.assert_array_equal(topology.weights(3), one_way.pi)


def test_a_known_name_is_no_folder(tmp_path, monkeypatch):
    folder_of(tmp_path / "ring")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(make_topology("ring", 3).pi, 1 / 3)


def test_a_faulty_file_of_a_folder_is_named_and_a_folder_without_any(tmp_path):
    ring = make_topology("ring", 3).to_json()
    for name, (content, message) in FAULTS.items():
        folder = folder_of(tmp_path / name, fine=ring, other=content)
        with pytest.raises(ValueError, match=rf"topology file .*other\.json: .*{message}"):
            make_topology(folder, 3)
    folder = folder_of(tmp_path / "empty")
    (folder / "graph.txt").write_text(ring)
    with pytest.raises(ValueError, match=r"topology folder .*empty has no \.json files"):
        make_topology(folder, 3)
    with pytest.raises(ValueError, match=r"unknown topology '.*gone'.* or a folder of \.json files"):
        make_topology(tmp_path / "gone", 3)
