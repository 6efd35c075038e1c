"""Every baseline against a literal transcription of its formula, and what theory says of it."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from network.processes import OneProcess
from network.topology import DIRECTED, Topology, make_topology, push_weights
from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step

N, D, LR, MOMENTUM = 5, 3, 0.1, 0.7


class Point(nn.Module):
    """A model that is nothing but a vector."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(torch.as_tensor(x, dtype=torch.float64).clone())

    def forward(self):
        return self.x


def quadratic(forward, batch):
    """1/2 (x - c)' H (x - c): its gradient is H (x - c)."""
    hessian, centre = batch
    x = forward() - centre[0]
    return 0.5 * x @ hessian[0] @ x, 0


def points(starts, hessians, centres):
    """An agent for every row of `starts`, whose batches are always its own quadratic."""
    return {i: Agent(i, FlatModel(Point(x)), itertools.repeat((h[None], c[None])), loss=quadratic)
            for i, (x, h, c) in enumerate(zip(starts, hessians, centres, strict=True))}


def run(name, agents, topology, steps, lr=LR, **settings):
    """`steps` steps; the vectors (N, D) after each."""
    network, seen = OneProcess(len(agents)), []
    for step in range(steps):
        pi = topology.weights(step)
        hoods = {i: neighbourhood(pi, i) for i in agents}
        take_step(BASELINES[name], agents, hoods, Settings(lr, **settings), network)
        seen.append(torch.stack([agent.x.clone() for agent in agents.values()]).numpy())
    return seen


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(0)
    roots = torch.randn(N, D, D, generator=g, dtype=torch.float64)
    centres = torch.randn(N, D, generator=g, dtype=torch.float64)
    starts = torch.randn(N, D, generator=g, dtype=torch.float64)
    return starts, roots @ roots.transpose(1, 2) + torch.eye(D), centres


def gradients(X, hessians, centres):
    return np.stack([h @ (x - c) for x, h, c in zip(X, hessians, centres, strict=True)])


def cdsgd(X, V, pi, g):
    return pi @ X - LR * g(X), V


def cdmsgd(X, V, pi, g):
    V = MOMENTUM * V + g(X)
    return pi @ X - LR * V, V


def dpsgd(X, V, pi, g):
    return pi @ (X - LR * g(X)), V


@pytest.mark.parametrize("topology", ["ring", "star", "fully_connected", "disconnected"])
@pytest.mark.parametrize("step", [cdsgd, cdmsgd, dpsgd])
def test_steps_are_their_formulas(problem, step, topology):
    starts, hessians, centres = problem
    topology, name = make_topology(topology, N), step.__name__.upper()
    settings = {"momentum": MOMENTUM} if BASELINES[name].momentum else {}
    found = run(name, points(*problem), topology, 4, **settings)
    X, V = starts.numpy(), np.zeros((N, D))
    for x in found:
        X, V = step(X, V, topology.pi, lambda X: gradients(X, hessians.numpy(), centres.numpy()))
        np.testing.assert_allclose(x, X, rtol=0, atol=1e-13)


def lopsided() -> Topology:
    """Strongly connected, one-way, and with rows that do not sum to 1."""
    hears = np.zeros((N, N), dtype=bool)
    for sender, receivers in enumerate([[1, 2, 3], [2], [3, 4], [4], [0]]):
        hears[receivers, sender] = True
    return Topology("lopsided", hears, push_weights(hears), directed=True)


@pytest.mark.parametrize("topology", [*DIRECTED, "ring", "lopsided"])
def test_sgp_is_its_formula(problem, topology):
    starts, hessians, centres = problem
    topology = lopsided() if topology == "lopsided" else make_topology(topology, N)
    X = Z = starts.numpy()
    w = np.ones((N, 1))
    for step, found in enumerate(run("SGP", points(*problem), topology, 5)):
        P = topology.weights(step)
        X, w = P @ (X - LR * gradients(Z, hessians.numpy(), centres.numpy())), P @ w
        Z = X / w
        np.testing.assert_allclose(found, Z, rtol=0, atol=1e-12)


def test_sgp_on_a_doubly_stochastic_graph_is_dpsgd(problem):
    ring = make_topology("ring", N)
    for a, b in zip(run("SGP", points(*problem), ring, 5), run("DPSGD", points(*problem), ring, 5), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def no_gradient(starts):
    return points(starts, torch.zeros(len(starts), D, D, dtype=torch.float64), torch.zeros(len(starts), D))


def test_push_sum_finds_the_true_average_where_plain_averaging_is_biased(problem):
    starts, topology = problem[0], lopsided()
    average = starts.mean(0).numpy()
    pushed = run("SGP", no_gradient(starts), topology, 200)[-1]
    np.testing.assert_allclose(pushed, np.tile(average, (N, 1)), atol=1e-10)
    rows = topology.pi / topology.pi.sum(1, keepdims=True)  # what each can do without push-sum weights
    plain = np.linalg.matrix_power(rows, 200) @ starts.numpy()
    assert np.ptp(plain, axis=0).max() < 1e-10  # they agree
    assert np.abs(plain[0] - average).max() > 0.05  # on something else


@pytest.mark.parametrize("name", ["CDSGD", "CDMSGD", "DPSGD", "CGA"])
@pytest.mark.parametrize("topology", ["ring", "bipartite", "star"])
def test_without_gradients_disagreement_shrinks_by_the_second_eigenvalue(name, topology):
    topology = make_topology(topology, N)
    values, vectors = np.linalg.eigh(topology.pi)
    second = np.argsort(np.abs(values))[-2]
    starts = torch.from_numpy(np.outer(vectors[:, second], np.ones(D)))
    for step, x in enumerate(run(name, no_gradient(starts), topology, 6), start=1):
        np.testing.assert_allclose(x, values[second] ** step * starts.numpy(), atol=1e-13)
    assert abs(values[second]) == pytest.approx(topology.second_eigenvalue)


def test_sgp_shrinks_disagreement_by_the_second_eigenvalue_in_the_long_run(problem):
    topology = lopsided()
    seen = run("SGP", no_gradient(problem[0]), topology, 60)
    errors = [np.abs(x - problem[0].mean(0).numpy()).max() for x in seen]
    rate = (errors[50] / errors[20]) ** (1 / 30)
    assert rate == pytest.approx(topology.second_eigenvalue, rel=0.02)


@pytest.mark.long
def test_cdsgd_with_a_common_hessian_ends_in_its_neighbourhood(problem):
    """The mean finds the optimum; the agents stay apart, at the fixed point of the update."""
    starts, hessians, centres = problem
    hessian, ring, lr = hessians[0], make_topology("ring", N), 0.08
    agents = points(starts, hessian.expand(N, D, D), centres)
    found = run("CDSGD", agents, ring, 1000, lr=lr)[-1]
    system = np.kron(np.eye(N) - ring.pi, np.eye(D)) + lr * np.kron(np.eye(N), hessian.numpy())
    fixed = np.linalg.solve(system, lr * np.kron(np.eye(N), hessian.numpy()) @ centres.numpy().ravel())
    np.testing.assert_allclose(found, fixed.reshape(N, D), atol=1e-9)
    np.testing.assert_allclose(found.mean(0), centres.mean(0).numpy(), atol=1e-9)
    assert 1e-3 < np.abs(found - found.mean(0)).max() < 1


def network_without_batch_norm(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).double()


def batches_of(agent, steps, size=6):
    g = torch.Generator().manual_seed(agent)
    return [(torch.randn(size, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (size,), generator=g))
            for _ in range(steps)]


def test_dpsgd_fully_connected_from_one_start_is_large_batch_sgd():
    steps = 5
    agents = {i: Agent(i, FlatModel(network_without_batch_norm(0)), iter(batches_of(i, steps))) for i in range(N)}
    run("DPSGD", agents, make_topology("fully_connected", N), steps)
    central = network_without_batch_norm(0)
    sgd = torch.optim.SGD(central.parameters(), lr=LR)
    for parts in zip(*(batches_of(i, steps) for i in range(N)), strict=True):
        x, y = (torch.cat(some) for some in zip(*parts, strict=True))
        sgd.zero_grad()
        nn.functional.cross_entropy(central(x), y).backward()
        sgd.step()
    for agent in agents.values():
        for mine, expected in zip(agent.flat.module.parameters(), central.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)


def test_a_method_is_one_function_with_one_decorator(monkeypatch, problem):
    from optimizers import register_baseline

    monkeypatch.setattr("optimizers.registry.BASELINES", BASELINES.copy())

    @register_baseline("LAZY")
    def lazy(agent, hood, s):
        arriving = yield hood.send(agent.shared)
        arriving.wait()

    from optimizers.registry import BASELINES as registered
    assert "LAZY" in registered and "LAZY" not in BASELINES
