"""Local steps, faults and the methods made for unlike data: their formulas, and what theory says of them."""

import copy
import itertools
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.mixing import MixingAgents
from network.processes import OneProcess
from network.topology import DIRECTED, Topology, make_topology
from optimizers import BASELINES, Agent, FlatModel, Settings, take_step
from tests.optimizers.test_steps import D, N, Point, gradients, points

LR, MOMENTUM = 0.1, 0.7
EXACT = ["LED", "KGT", "DSGT", "D2", "RELAYSGD"]
NEW = [*EXACT, "QGDSGDM", "QGDSGDMN", "DFEDAVGM"]


@pytest.fixture
def problem():
    """Agents that want different things: starts, Hessians between 0.5 and 1.5, and centres."""
    g = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(N, D, D, generator=g, dtype=torch.float64)).Q
    hessians = axes @ torch.diag_embed(0.5 + torch.rand(N, D, generator=g, dtype=torch.float64)) @ axes.mT
    starts, centres = (torch.randn(N, D, generator=g, dtype=torch.float64) for _ in range(2))
    return starts, hessians, centres


def minimiser(hessians, centres):
    return np.linalg.solve(hessians.sum(0).numpy(), torch.einsum("nij,nj->i", hessians, centres).numpy())


class Pulled(Agent):
    """An agent of `points` whose gradient is written down: many times as fast."""

    def gradient(self):
        hessian, centre = self.batch = next(self.batches)
        self.samples += 1
        return hessian[0] @ (self.x - centre[0])


def pulled(starts, hessians, centres):
    return {i: Pulled(i, FlatModel(Point(x)), itertools.repeat((h[None], c[None])))
            for i, (x, h, c) in enumerate(zip(starts, hessians, centres, strict=True))}


class Group:
    """Agents on a topology as a run has them: who is up, who hears whom, and when they exchange."""

    def __init__(self, name, agents, topology, local_steps=1, link_failure=0.0, agent_failure=0.0, seed=0):
        o = Namespace(opt=name, num_models=len(agents), local_steps=local_steps, link_failure=link_failure,
                      agent_failure=agent_failure, seed=seed)
        topology = BASELINES[name].graph(make_topology(topology, len(agents)))
        self.mixing = MixingAgents(o, topology, OneProcess(len(agents)), None, [], [], {}, agents)
        self.name, self.agents, self.local_steps, self.step = name, agents, local_steps, 0
        self.momentum = MOMENTUM if BASELINES[name].momentum else 0.0

    def take(self, steps, lr=LR, watch=lambda: None):
        """The vectors (N, D) after each step."""
        seen = []
        for _ in range(steps):
            up = self.mixing.up(self.step)
            take_step(BASELINES[self.name], up, self.mixing.hoods(self.step, up),
                      Settings(lr, self.momentum, local_steps=self.local_steps), self.mixing.network)
            self.step += 1
            seen.append(torch.stack([agent.x.clone() for agent in self.agents.values()]).numpy())
            watch()
        return seen

    def total(self, name):
        return sum(agent.memory[name] for agent in self.agents.values()).numpy()


# Literal transcriptions of the papers: all agents' vectors are rows, and a round is K local steps and an exchange.


def led(X, W, g, T, lr, rounds):
    Y = np.zeros_like(X)
    for _ in range(rounds):
        phi = X
        for _ in range(T):
            phi = phi - lr * g(phi) - Y / T
            yield phi
        X, Y = W @ phi, Y + phi - W @ phi
        yield X


def kgt(X, W, g, T, lr, rounds):
    C = np.zeros_like(X)
    for _ in range(rounds):
        start = X
        for _ in range(T):
            X = X - lr * (g(X) + C)
            yield X
        Z = (start - X) / (T * lr)
        C, X = C + W @ Z - Z, W @ start - T * lr * W @ Z
        yield X


def dsgt(X, W, g, T, lr, rounds):
    D, last = g(X), g(X)
    for _ in range(rounds):
        for _ in range(T):
            D, last = D + g(X) - last, g(X)
            X = X - lr * D
            yield X
        X, D = W @ X, W @ D
        yield X


def d2(X, W, g, T, lr, rounds):
    before, X = X, W @ (X - lr * g(X))
    yield before - lr * g(before)
    yield X
    for _ in range(rounds - 1):
        half = 2 * X - before - lr * (g(X) - g(before))
        before, X = X, W @ half
        yield half
        yield X


def quasi_global(nesterov):
    def transcription(X, W, g, K, lr, rounds):
        M = np.zeros_like(X)
        for _ in range(rounds):
            start = X
            for _ in range(K):
                v = MOMENTUM * M + g(X)
                X = X - lr * (g(X) + MOMENTUM * v if nesterov else v)
                yield X
            X = W @ X
            M = MOMENTUM * M + (1 - MOMENTUM) * (start - X) / (K * lr)
            yield X
    return transcription


def dfedavgm(X, W, g, K, lr, rounds):
    for _ in range(rounds):
        V = np.zeros_like(X)
        for _ in range(K):
            V = MOMENTUM * V + g(X)
            X = X - lr * V
            yield X
        X = W @ X
        yield X


def relaysgd(X, W, g, K, lr, rounds):
    edges = [(i, j) for i, j in np.argwhere(W > 0).tolist() if i != j]
    sums, counts = {edge: 0.0 for edge in edges}, dict.fromkeys(edges, 0)
    for _ in range(rounds):
        for _ in range(K):
            X = X - lr * g(X)
            yield X
        others = {(i, j): [(k, m) for k, m in edges if m == i and k != j] for i, j in edges}
        sums, counts = ({(i, j): X[i] + sum(sums[e] for e in others[i, j]) for i, j in edges},
                        {(i, j): 1 + sum(counts[e] for e in others[i, j]) for i, j in edges})
        to = {i: [e for e in edges if e[1] == i] for i in range(N)}
        X = np.stack([(X[i] + sum(sums[e] for e in to[i])) / (1 + sum(counts[e] for e in to[i])) for i in range(N)])
        yield X


FORMULAS = {"LED": led, "KGT": kgt, "DSGT": dsgt, "D2": d2, "QGDSGDM": quasi_global(False),
            "QGDSGDMN": quasi_global(True), "DFEDAVGM": dfedavgm, "RELAYSGD": relaysgd}


@pytest.mark.parametrize("topology", ["ring", "star", "fully_connected"])
@pytest.mark.parametrize("name,K", [(name, K) for name in NEW for K in (1, 3) if K == 1 or name != "D2"])
def test_steps_are_their_formulas(problem, name, K, topology):
    starts, hessians, centres = problem
    group, rounds = Group(name, points(*problem), topology, local_steps=K), 5
    found = group.take(K * rounds)
    exact = list(FORMULAS[name](starts.numpy(), group.mixing.topology.pi,
                                lambda X: gradients(X, hessians.numpy(), centres.numpy()), K, LR, rounds))
    # Of the last local step of a round only what the exchange makes of it can be seen.
    expected = [x for k, x in enumerate(exact) if k % (K + 1) != K - 1]
    assert len(expected) == len(found)
    for x, X in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, X, rtol=0, atol=1e-12)


# What theory says


@pytest.mark.parametrize("name,K", [
    *((name, 1) for name in (*EXACT[:3], "D2", "RELAYSGD")), *(
        pytest.param(name, 4, marks=pytest.mark.long) for name in EXACT[:3])])
@pytest.mark.parametrize("topology", ["ring", *(
    pytest.param(topology, marks=pytest.mark.long) for topology in ("star", "bipartite"))])
def test_the_exact_methods_find_the_minimiser_with_a_constant_step(problem, name, K, topology):
    found = Group(name, pulled(*problem), topology, local_steps=K).take(1500, lr=0.03)[-1]
    np.testing.assert_allclose(found, np.tile(minimiser(*problem[1:]), (N, 1)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["CDSGD", "DPSGD", "QGDSGDM", "QGDSGDMN", "CDMSGD"])
def test_the_others_end_at_the_biased_fixed_point_that_theory_gives(problem, name):
    """CDSGD: x = W x - lr H (x - c); DPSGD: x = W (x - lr H (x - c)); momentum makes lr larger."""
    _, hessians, centres = problem
    found = Group(name, pulled(*problem), "ring").take(1000)[-1]
    W = np.kron(make_topology("ring", N).pi, np.eye(D))
    H = LR * {"CDMSGD": 1 / (1 - MOMENTUM), "QGDSGDMN": 1 + MOMENTUM}.get(name, 1) * torch.block_diag(*hessians).numpy()
    steps = H if name in ("CDSGD", "CDMSGD") else W @ H  # quasi-global momentum is 0 where nothing moves
    fixed = np.linalg.solve(np.eye(N * D) - W + steps, steps @ centres.numpy().ravel()).reshape(N, D)
    np.testing.assert_allclose(found, fixed, rtol=0, atol=1e-10)
    assert np.abs(fixed - minimiser(hessians, centres)).max() > 0.05


def test_more_local_steps_take_the_plain_methods_farther_off_but_not_led(problem):
    best = minimiser(*problem[1:])
    off = {(name, K): np.abs(Group(name, pulled(*problem), "ring", local_steps=K).take(1000)[-1].mean(0) - best).max()
           for name in ("DPSGD", "LED") for K in (1, 8)}
    assert off["DPSGD", 8] > 3 * off["DPSGD", 1] and off["LED", 8] < 1e-6


def test_led_with_one_local_step_is_d2(problem):
    one, other = (Group(name, points(*problem), "ring").take(8) for name in ("LED", "D2"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_dfedavgm_with_one_local_step_is_dpsgd(problem):
    one, other = (Group(name, points(*problem), "ring").take(5) for name in ("DFEDAVGM", "DPSGD"))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["LED", "D2", *(
    pytest.param(name, marks=pytest.mark.long) for name in ("KGT", "DSGT"))])
def test_a_decayed_learning_rate_does_not_move_who_has_arrived(problem, name):
    """D2's correction is one of models: it has to be learnt anew, and is."""
    group = Group(name, pulled(*problem), "ring")
    arrived = group.take(800)[-1]
    step = group.take(1, lr=0.3 * LR)[-1]
    if name != "D2":
        np.testing.assert_allclose(step, arrived, rtol=0, atol=1e-9)
    np.testing.assert_allclose(step.mean(0), arrived.mean(0), rtol=0, atol=1e-9)  # D2's too
    after = group.take(1500, lr=0.3 * LR)[-1]
    np.testing.assert_allclose(after, np.tile(minimiser(*problem[1:]), (N, 1)), rtol=0, atol=1e-6)


def test_relayed_sums_are_exact_after_the_trees_diameter():
    """Everyone's value put back before each step, the mechanism averages values that stay: hop by hop, then exactly."""
    starts = torch.randn(7, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    agents = points(starts, torch.zeros(7, D, D, dtype=torch.float64), torch.zeros(7, D))
    group = Group("RELAYSGD", agents, "ring")
    tree = group.mixing.topology.connectivity
    assert tree.sum() == 2 * 6
    hops = np.array([[next(k for k in range(7) if np.linalg.matrix_power(tree + np.eye(7), k)[i, j]) for j in range(7)]
                     for i in range(7)])
    assert hops.max() == 6
    for step in range(1, 9):
        for agent, start in zip(agents.values(), starts, strict=True):
            agent.x.copy_(start)
        found = group.take(1)[-1]
        near = hops <= step
        np.testing.assert_allclose(found, near @ starts.numpy() / near.sum(1, keepdims=True), rtol=0, atol=1e-12)


def test_relayed_sums_do_without_what_is_lost():
    """A lost message is missing in sum and count, so agents that agree stay as they are whatever is lost."""
    agents = points(torch.ones(6, D, dtype=torch.float64), torch.zeros(6, D, D, dtype=torch.float64), torch.zeros(6, D))
    group = Group("RELAYSGD", agents, "star", link_failure=0.3, agent_failure=0.2)
    counts = set()

    def watch():
        for agent in agents.values():
            counts.update(int(message[-1]) for message in agent.memory.values())
            for message in agent.memory.values():
                np.testing.assert_allclose(message[:-1], message[-1].expand(D), rtol=1e-12)

    for x in group.take(40, watch=watch):
        np.testing.assert_allclose(x, 1, rtol=0, atol=1e-12)
    assert {1, 2, 3, 4, 5} <= counts  # the hub has told the leaves of as many as it had heard of


def test_what_is_lost_is_not_relayed_from_memory(problem):
    """Literally: the message that comes to i at step t is the sender's, and what has come to that one at t - 1."""
    starts, hessians, centres = problem
    group = Group("RELAYSGD", points(*problem), "ring", link_failure=0.4)
    tree, X, came = group.mixing.topology.connectivity, starts.numpy(), {}
    for step, found in enumerate(group.take(12)):
        links = group.mixing.faults.links(step + 1, N) & tree
        X = X - LR * gradients(X, hessians.numpy(), centres.numpy())
        came = {(i, j): (X[i] + sum(m for (k, to), (m, _) in came.items() if to == i and k != j),
                         1 + sum(c for (k, to), (_, c) in came.items() if to == i and k != j))
                for i, j in np.argwhere(links).tolist()}
        X = np.stack([(X[i] + sum(m for (_, to), (m, _) in came.items() if to == i))
                      / (1 + sum(c for (_, to), (_, c) in came.items() if to == i)) for i in range(N)])
        np.testing.assert_allclose(found, X, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_relaysgd_takes_lost_messages(problem, loss):
    found = Group("RELAYSGD", pulled(*problem), "ring", link_failure=loss).take(1000)
    off = max(np.abs(x - minimiser(*problem[1:])).max() for x in found[-100:])
    assert off < 1e-7 if not loss else off < 1.5


# Local steps and faults


@pytest.mark.parametrize("name", [name for name, baseline in BASELINES.items() if not baseline.every_step])
def test_in_a_local_step_nothing_travels(problem, name):
    group = Group(name, points(*problem), "ring", local_steps=3)
    sent = []
    group.take(6, watch=lambda: sent.append(group.mixing.network.sent[0]))
    assert sent[0] == sent[1] == 0 < sent[2] == sent[3] == sent[4] < sent[5] == 2 * sent[2]


@pytest.mark.parametrize("name,momentum", [("CDSGD", 0), ("DPSGD", 0), ("SGP", 0), ("CDMSGD", MOMENTUM),
                                           ("CGA", MOMENTUM)])
def test_local_steps_are_plain_sgd(problem, name, momentum):
    starts, hessians, centres = problem
    found = Group(name, points(*problem), "ring", local_steps=4).take(3)
    X, V = starts.numpy(), np.zeros((N, D))
    for x in found:
        V = momentum * V + gradients(X, hessians.numpy(), centres.numpy())
        X = X - LR * V
        np.testing.assert_allclose(x, X, rtol=0, atol=1e-13)


def test_a_changing_graph_goes_on_exchange_by_exchange():
    """With step by step, as many local steps as graphs that take turns would show everybody the same one for ever."""
    group = Group("SGP", points(*[torch.zeros(4, D), torch.zeros(4, D, D), torch.zeros(4, D)]), "one_peer_exponential",
                  local_steps=2)
    peers = [group.mixing.hoods(step, [0])[0].targets for step in range(8)]
    assert peers == [(), (1,), (), (2,), (), (1,), (), (2,)]


def test_who_is_absent_stays_as_it_was(problem):
    agents = points(*problem)
    group = Group("CDMSGD", agents, "ring", agent_failure=0.4)
    absent = 0
    for step in range(20):
        before = {i: (agent.x.clone(), agent.memory.get("v", torch.zeros(D)).clone(), agent.steps)
                  for i, agent in agents.items()}
        up = group.mixing.up(step)
        group.take(1)
        for i in agents.keys() - up.keys():
            absent += 1
            x, v, steps = before[i]
            assert torch.equal(agents[i].x, x) and torch.equal(agents[i].memory.get("v", torch.zeros(D)), v)
            assert agents[i].steps == steps
        assert all(agents[i].steps == before[i][2] + 1 for i in up)
    assert 20 < absent < 60


FAULTS = {"link_failure": 0.3, "agent_failure": 0.2}


@pytest.mark.parametrize("name,K,vector", [("LED", 1, "y"), ("LED", 3, "y"), ("KGT", 1, "c"), ("KGT", 3, "c"),
                                           ("D2", 1, "ahead")])
def test_corrections_sum_to_nothing_under_faults(problem, name, K, vector):
    group, sizes = Group(name, points(*problem), "ring", local_steps=K, **FAULTS), []

    def watch():
        if len(kept := [agent.memory[vector] for agent in group.agents.values() if vector in agent.memory]):
            sizes.append(float(torch.stack(kept).abs().max()))
            assert float(sum(kept).abs().max()) < 1e-11 * max(1, sizes[-1])

    group.take(60, lr=0.02, watch=watch)
    assert max(sizes) > 1e-3


@pytest.mark.parametrize("K", [1, 3])
def test_dsgts_trackers_sum_to_the_last_gradients_under_faults(problem, K):
    group = Group("DSGT", points(*problem), "ring", local_steps=K, **FAULTS)
    for lr in (0.02, 0.01):
        group.take(30, lr=lr, watch=lambda: all("d" in agent.memory for agent in group.agents.values()) and
                   np.testing.assert_allclose(group.total("d"), group.total("g"), rtol=0, atol=1e-11))
    assert np.abs(group.total("g")).max() > 1e-3


@pytest.mark.parametrize("topology", [*DIRECTED, "ring"])
def test_push_sum_keeps_its_mass_under_faults(problem, topology):
    starts = problem[0]
    agents = pulled(starts, torch.zeros(N, D, D, dtype=torch.float64), torch.zeros(N, D))
    group, weights = Group("SGP", agents, topology, **FAULTS), []

    def watch():
        push = torch.stack([agent.memory.get("push", torch.cat([agent.x, torch.ones(1)])) for agent in agents.values()])
        np.testing.assert_allclose(push[:, :-1].sum(0), starts.sum(0), rtol=0, atol=1e-12)
        weights.append(push[:, -1].clone())
        assert float(push[:, -1].sum()) == pytest.approx(N)

    found = group.take(300, watch=watch)[-1]
    np.testing.assert_allclose(found, np.tile(starts.mean(0).numpy(), (N, 1)), rtol=0, atol=1e-8)
    assert topology == "ring" or torch.stack(weights).max() > 1.2  # faults make it uneven


@pytest.mark.parametrize("name", ["CDSGD", "DPSGD", "CDMSGD", "DSGT", "KGT", "DFEDAVGM"])
def test_without_gradients_the_mean_is_kept_under_faults(problem, name):
    starts = problem[0]
    group = Group(name, points(starts, torch.zeros(N, D, D, dtype=torch.float64), torch.zeros(N, D)), "ring",
                  local_steps=2, **FAULTS)
    for x in group.take(40):
        np.testing.assert_allclose(x.mean(0), starts.mean(0), rtol=0, atol=1e-12)


def test_agents_agree_on_who_fails_wherever_they_live(problem):
    """What a process knows is the seed and its own agents: two processes' views are those of one."""
    whole = Group("CDSGD", points(*problem), "random", **FAULTS).mixing
    parts = []
    for some in ([0, 1], [2, 3, 4]):
        part = copy.copy(whole)
        part.agents = {i: whole.agents[i] for i in some}
        parts.append(part)
    for step in range(20):
        up = whole.up(step)
        assert set(up) == {i for part in parts for i in part.up(step)}
        hoods = whole.hoods(step, up)
        assert hoods == {i: hood for part in parts for i, hood in part.hoods(step, part.up(step)).items()}
        for i, hood in hoods.items():
            assert set(hood.targets) | set(hood.sources) <= up.keys()
            assert all(i in hoods[j].targets for j in hood.sources)


# The graphs that methods make


@pytest.mark.parametrize("name", ["LED", "D2"])
@pytest.mark.parametrize("topology,n,lifted", [
    ("ring", 5, False), ("ring", 4, True), ("bipartite", 5, False), ("bipartite", 3, True),
    ("random_matching", 4, False)])
def test_small_eigenvalues_are_lifted(name, topology, n, lifted):
    plain = make_topology(topology, n)
    found = BASELINES[name].graph(plain)
    assert bool(found.note) == lifted
    np.testing.assert_array_equal(found.pi, (plain.pi + np.eye(n)) / 2 if lifted else plain.pi)
    assert found.draw is plain.draw


@pytest.mark.parametrize("name", ["LED", "D2"])
def test_without_the_lift_they_would_not_arrive(problem, name, monkeypatch):
    three = [part[:3] for part in problem]
    assert np.abs(Group(name, pulled(*three), "bipartite").take(100)[-1]).max() < 5
    monkeypatch.setitem(BASELINES, name, replace(BASELINES[name], graph=lambda topology: topology))
    assert np.abs(Group(name, pulled(*three), "bipartite").take(100)[-1]).max() > 100


def test_graphs_that_a_method_cant_do_with_are_refused():
    lopsided = Topology("mine", ~np.eye(3, dtype=bool), (np.eye(3) + 2 * np.roll(np.eye(3), 1, axis=0)) / 3)
    with pytest.raises(ValueError, match="not symmetric"):
        BASELINES["LED"].graph(lopsided)
    for name in ("random_matching", *DIRECTED):
        with pytest.raises(ValueError, match="spanning tree"):
            BASELINES["RELAYSGD"].graph(make_topology(name, 4))
