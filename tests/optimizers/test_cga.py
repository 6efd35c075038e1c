"""Cross-gradient aggregation: the projection, whose gradients on whose batch, and nobody's statistics touched."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step
from optimizers.cga import _multipliers, project
from utils.distributed import OneProcess
from utils.topology import make_topology

N, LR = 4, 0.05


def random_problem(seed, rows=4, size=30):
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(rows, size, generator=g, dtype=torch.float64)
    kind = seed % 5
    if kind == 1:
        G[1] = G[0]  # twice the same
    if kind == 2:
        G[1] = -G[0]  # no way but sideways
    if kind == 3:
        G[2] = 0
    if kind == 4:
        G *= 1e-4
    return G, torch.randn(size, generator=g, dtype=torch.float64) * (1e-4 if kind == 4 else 1.0)


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(25))
def test_the_projection_satisfies_the_kkt_conditions(seed, margin):
    G, g = random_problem(seed)
    u = torch.from_numpy(_multipliers((torch.cat([G, g[None]]) @ torch.cat([G, g[None]]).T).numpy(), margin))
    scale = float(G.norm() * g.norm()) + 1e-300
    slope = (G @ (G.T @ u + g)) / scale  # of the objective in u
    assert (u >= margin).all()
    assert (slope >= -1e-7).all()
    assert ((u - margin) * slope).abs().max() < 1e-6
    torch.testing.assert_close(project(g, list(G), margin), G.T @ u + g)


@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_the_nearest_point_of_the_cone(seed):
    G, g = random_problem(5 * seed)
    z = project(g, list(G))
    assert (G @ z >= -1e-7 * G.norm() * g.norm()).all()
    draws = torch.Generator().manual_seed(seed)
    for _ in range(200):  # no other point of the cone is nearer
        other = z + 0.3 * torch.randn(len(g), generator=draws, dtype=torch.float64)
        if (G @ other >= 0).all():
            assert (other - g).norm() >= (z - g).norm() - 1e-9


def test_a_gradient_that_harms_nobody_stays():
    g = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(project(g, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])]), g)
    torch.testing.assert_close(project(g, []), g)
    torch.testing.assert_close(project(g, [torch.tensor([-1.0, 0.0])]), torch.tensor([0.0, 2.0]))


def test_parts_are_projected_by_themselves():
    G, g = random_problem(0)
    g = g - 2 * G.sum(0)  # against all rows
    parts = torch.cat([project(g[:12], list(G[:, :12]), 0.5), project(g[12:], list(G[:, 12:]), 0.5)])
    torch.testing.assert_close(project(g, list(G), 0.5, sizes=[12, 18]), parts)
    assert not torch.allclose(parts, project(g, list(G), 0.5))


def small(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).double()


def batch_of(agent):
    g = torch.Generator().manual_seed(100 + agent)
    return torch.randn(6, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (6,), generator=g)


def literal_gradient(model, batch):
    model = copy.deepcopy(model).train()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(("form", "scope"), [("paper", "model"), ("paper", "tensor"), ("authors", "tensor")])
@pytest.mark.parametrize("topology", ["ring", "star"])
def test_a_step_is_its_formula(form, scope, topology):
    pi, beta = make_topology(topology, N).pi, 0.8
    models = [small(i) for i in range(N)]
    agents = {i: Agent(i, FlatModel(copy.deepcopy(m)), iter([batch_of(i)] * 2)) for i, m in enumerate(models)}
    hoods, network = {i: neighbourhood(pi, i) for i in range(N)}, OneProcess(N)
    sizes = [p.numel() for p in models[0].parameters()] if scope == "tensor" else None
    V = [torch.zeros_like(vector(m)) for m in models]
    for _ in range(2):
        take_step(BASELINES["CGA"], agents, hoods, Settings(LR, beta, form, scope), network)
        moved = []
        for i in range(N):
            neighbours = [j for j in range(N) if j != i and pi[i, j]]
            rows = [literal_gradient(models[i], batch_of(j)) for j in neighbours]
            own = literal_gradient(models[i], batch_of(i))
            if form == "authors":
                rows = [pi[i, j] * row for j, row in zip(neighbours, rows, strict=True)]
                own = pi[i, i] * own
            g = project(own, rows, 0.5 if form == "authors" else 0.0, sizes)
            V[i] = beta * V[i] + g
            direction = g + beta * V[i] if form == "authors" else V[i]
            mixed = sum(pi[i, j] * vector(models[j]) for j in range(N))
            moved.append(mixed - LR * direction)
        for i, model in enumerate(models):
            torch.nn.utils.vector_to_parameters(moved[i], model.parameters())
            torch.testing.assert_close(agents[i].parameters, moved[i], rtol=1e-6, atol=1e-9)


def test_cross_gradients_touch_nobodys_statistics():
    pi = make_topology("fully_connected", N).pi
    agents = {i: Agent(i, FlatModel(small(i)), iter([batch_of(i)]), mix_buffers=False) for i in range(N)}
    alone = [small(i).train() for i in range(N)]
    for i, model in enumerate(alone):
        model(batch_of(i)[0])
    take_step(BASELINES["CGA"], agents, {i: neighbourhood(pi, i) for i in range(N)}, Settings(LR), OneProcess(N))
    for i, model in enumerate(alone):
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(agents[i].flat.module[1], key), getattr(model[1], key))


@pytest.mark.parametrize("seed", range(3))
def test_a_margin_of_one_half_is_quadprogs_answer(seed):
    """A plain search over the active sets, as an answer of another kind."""
    G, g = (t.numpy() for t in random_problem(5 * seed, rows=3))
    best, value = None, np.inf
    H, c = G @ G.T, G @ g
    for free in np.ndindex(2, 2, 2):
        free = np.array(free, dtype=bool)
        u = np.full(3, 0.5)
        if free.any():
            u[free] = np.linalg.solve(H[np.ix_(free, free)], -(c + H[:, ~free] @ u[~free])[free])
        objective = 0.5 * u @ H @ u + c @ u
        if (u >= 0.5 - 1e-12).all() and objective < value:
            best, value = u, objective
    found = project(torch.from_numpy(g), list(torch.from_numpy(G)), margin=0.5).numpy()
    np.testing.assert_allclose(found, G.T @ best + g, atol=1e-6)
