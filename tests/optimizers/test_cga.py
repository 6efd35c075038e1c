"""Cross-gradient aggregation: the projection, whose gradients on whose batch, and nobody's statistics touched."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step
from optimizers.cga import _shares, project
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


def degenerate_problem(seed):
    """Small integers, so that rows are parallel, opposite, zero or dependent, exactly."""
    draws = np.random.default_rng(seed)
    m, size = draws.integers(2, 6, 2)
    most = draws.integers(1, 4)
    G = draws.integers(-most, most + 1, (m, size))
    i, j = draws.choice(m, 2, replace=False)
    kind = seed % 6
    if kind == 1:
        G[i] = draws.integers(1, 4) * G[j]
    if kind == 2:
        G[i] = -draws.integers(1, 4) * G[j]
    if kind == 3:
        G[i] = 0
    if kind == 4:
        G = np.outer(draws.integers(-3, 4, m), draws.integers(-3, 4, size))
    if kind == 5:
        G = draws.integers(-2, 3, (m, 2)) @ draws.integers(-2, 3, (2, size))
    return torch.from_numpy(G).double(), torch.from_numpy(draws.integers(-3, 4, size)).double()


def plain_search(G, g, margin):
    """The projection by trying every set of rows whose multipliers may be above the margin."""
    G, g = G.numpy(), g.numpy()
    h = g + margin * G.sum(0)
    for count in range(len(G) + 1):
        for some in itertools.combinations(G, count):
            A = np.array(some).reshape(count, len(g))
            s = -np.linalg.pinv(A.T) @ h
            z = h + s @ A
            if (s >= -1e-9).all() and (G @ z >= -1e-9).all() and (np.abs(A @ z) <= 1e-9).all():
                return torch.from_numpy(z)
    raise AssertionError("no set fits")


def assert_solved(G, g, margin):
    """The point is unique, the multipliers need not be."""
    z = project(g, list(G), margin)
    torch.testing.assert_close(z, plain_search(G, g, margin), rtol=1e-9, atol=1e-9)
    h = g + margin * G.sum(0)
    vectors = torch.cat([G, h[None]])
    s = torch.from_numpy(_shares((vectors @ vectors.T).numpy()))  # the multipliers above the margin
    torch.testing.assert_close(h + s @ G, z)
    slope = G @ z  # of the objective in u
    assert (s >= 0).all() and (slope >= -1e-9).all() and (s * slope).abs().max() < 1e-9


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_projection_of_degenerate_gradients_is_what_a_plain_search_finds(margin):
    for seed in range(200):
        assert_solved(*degenerate_problem(seed), margin)


@pytest.mark.long
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_projection_of_many_more_degenerate_gradients(margin):
    for seed in range(10_000):
        assert_solved(*degenerate_problem(seed), margin)


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(25))
def test_the_projection_of_other_gradients_is_what_a_plain_search_finds(seed, margin):
    G, g = random_problem(seed)
    scale = 1e4 if seed % 5 == 4 else 1.0
    assert_solved(scale * G, scale * g, margin)
    torch.testing.assert_close(scale * project(g, list(G), margin), project(scale * g, list(scale * G), margin))


def test_rows_that_leave_one_way_only():
    g, rows = torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0], [-1, 0], [1, 0], [-2, 2]])
    torch.testing.assert_close(project(g, list(rows)), torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gradients_of_zeros_have_no_say(margin):
    """As of a layer that gets none, from anybody: on it the solver has nothing to do."""
    g = torch.tensor([1.0, -2.0, 3.0])
    rows = [torch.zeros(3), torch.zeros(3)]
    torch.testing.assert_close(project(g, rows, margin), g)
    torch.testing.assert_close(project(g, rows, margin, sizes=[2, 1]), g)
    torch.testing.assert_close(project(torch.zeros(3), [*rows, g]), torch.zeros(3))


@pytest.mark.parametrize("apart", [1e-3, 1e-5, 1e-7, 1e-9])
def test_nearly_opposite_and_parallel_rows_harm_nobody_by_more_than_rounding(apart):
    for seed in range(1, 60):
        G, g = degenerate_problem(seed)
        G += apart * torch.randn(G.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        z = project(g, list(G))
        assert (G @ z >= -1e-4 * G.norm(dim=1) * g.norm()).all() and z.norm() <= (1 + 1e-6) * g.norm()


def test_gradients_of_any_size_are_projected():
    """Squares of these lengths are below the smallest and near the largest number there is."""
    for *sizes, own in itertools.product((1e-170, 1e-160, 1e-20, 1.0, 1e20, 1e150), repeat=3):
        G, g = random_problem(0, rows=2, size=4)
        G *= torch.tensor(sizes, dtype=torch.float64)[:, None]
        z = project(own * g, list(G))
        assert z.isfinite().all() and z.norm() <= (1 + 1e-6) * own * g.norm()
    assert project(g, [*G, torch.full((4,), np.nan)]).isnan().all()  # the agent notices that it has diverged


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
