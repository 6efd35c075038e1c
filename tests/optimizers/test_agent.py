"""A model as a vector, and an agent's gradients, figures and mixing of buffers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import build_model
from models.training import Diverged
from network.processes import OneProcess
from network.topology import make_topology
from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def batch(seed=0, size=6):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, 8, 8, generator=g), torch.randint(5, (size,), generator=g)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_vector_and_its_model_are_one(layout):
    model = net().to(memory_format=layout)
    before = copy.deepcopy(model)
    flat = FlatModel(model)
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert model[0].weight.is_contiguous(memory_format=layout)
    assert len(flat.vector) == sum(t.numel() for t in model.state_dict().values()) - 1  # num_batches_tracked
    assert flat.num_parameters == sum(p.numel() for p in model.parameters()) == sum(flat.sizes)

    flat.vector.mul_(2)
    torch.testing.assert_close(model[0].weight, 2 * before[0].weight)
    torch.testing.assert_close(model[1].running_var, 2 * before[1].running_var)
    model.load_state_dict(before.state_dict())
    torch.testing.assert_close(flat.vector[flat.num_parameters :], torch.cat([torch.zeros(4), torch.ones(4)]))

    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(before(x), y).backward()
    for mine, expected in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)
        assert mine.grad.untyped_storage().data_ptr() == flat.gradient.untyped_storage().data_ptr()


def test_tied_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    flat = FlatModel(model)
    assert flat.num_parameters == 9 + 3 + 3
    assert model[0].weight is model[1].weight
    model(torch.ones(2, 3)).sum().backward()
    assert flat.gradient[:12].abs().min() > 0 and not flat.gradient[12:].any()


def test_several_floating_types_have_no_vector():
    with pytest.raises(ValueError, match=r"float64"):
        FlatModel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))


def test_a_large_model_can_be_flattened():
    model = build_model("tv:mobilenet_v3_small", 10, image_size=32)
    before = copy.deepcopy(model).eval()
    flat = FlatModel(model)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), before(x))
    assert len(flat.vector) > flat.num_parameters


def test_gradients_weight_decay_and_figures():
    x, y = batch()
    agent = Agent(0, FlatModel(net()), iter([(x, y), batch(1, size=3)]), weight_decay=0.1)
    reference = net().train()
    scores = reference(x)
    F.cross_entropy(scores, y).backward()
    expected = torch.cat([(p.grad + 0.1 * p.detach()).flatten() for p in reference.parameters()])
    torch.testing.assert_close(agent.gradient(), expected)
    stats = agent.stats()
    assert stats.loss == pytest.approx(F.cross_entropy(scores, y).item(), rel=1e-5)
    assert stats.accuracy == pytest.approx(100 * (scores.argmax(1) == y).double().mean().item())
    agent.gradient()
    assert (agent.samples, agent.stats().samples, agent.stats().steps) == (9, 9, 2)
    agent.forget_stats()
    agent.x[0] = float("nan")
    agent.tally.add(torch.zeros(()), torch.zeros(()), 1)
    with pytest.raises(Diverged, match="agent 0"):
        agent.stats()


def test_agents_train_in_training_mode():
    agent = Agent(0, FlatModel(net().eval()), iter([batch()]))
    agent.gradient()
    assert agent.flat.module.training and agent.flat.module[1].num_batches_tracked == 1


def agents_of(n, **options):
    return {i: Agent(i, FlatModel(net(i)), iter([batch(i)] * 3), **options) for i in range(n)}


def step_of(name, agents, pi):
    hoods = {i: neighbourhood(pi, i) for i in agents}
    take_step(BASELINES[name], agents, hoods, Settings(0.1), OneProcess(len(agents)))


@pytest.mark.parametrize("name", BASELINES)
def test_buffers_are_mixed_or_left_alone(name):
    pi, after = make_topology("ring", 3).pi, []
    for i in range(3):
        model = net(i).train()
        model(batch(i)[0])
        after.append(torch.cat([model[1].running_mean, model[1].running_var]))
    start = torch.cat([torch.zeros(4), torch.ones(4)])
    for mixed in (True, False):
        agents = agents_of(3, mix_buffers=mixed)
        step_of(name, agents, pi)
        for i, agent in agents.items():
            found = agent.x[agent.flat.num_parameters :]
            # Combine-then-adapt methods send their models before the batch is seen: what it changes comes on top.
            sent, change = ([start] * 3, after[i] - start) if name in ("CDSGD", "CDMSGD", "CGA") else (after, 0)
            expected = sum(pi[i, j] * sent[j] for j in range(3)) + change if mixed else after[i]
            torch.testing.assert_close(found, expected.float())


def test_push_sum_weighs_buffers_by_the_senders_weights():
    """b_i <- sum_j p_ij w_j b_j / sum_k p_ik w_k."""
    P = torch.tensor([[0.5, 0.0, 0.5], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], dtype=torch.float64)
    P = P * torch.tensor([[1.0], [1.5], [0.5]]).double()
    P = (P / P.sum(0)).numpy()
    agents, w = agents_of(3), torch.ones(3, dtype=torch.float64)
    means = []
    for _ in range(3):
        agents_before = [copy.deepcopy(agent.flat.module) for agent in agents.values()]
        step_of("SGP", agents, P)
        b = []
        for i, model in enumerate(agents_before):
            model.train()(batch(i)[0])
            b.append(model[1].running_mean.double())
        weights = torch.from_numpy(P) * w
        w = weights.sum(1)
        expected = (weights / w[:, None]) @ torch.stack(b)
        means = torch.stack([agent.flat.module[1].running_mean for agent in agents.values()])
        torch.testing.assert_close(means, expected.float(), rtol=1e-5, atol=1e-6)
    assert (w - 1).abs().max() > 0.05


def test_dropout_depends_on_seed_agent_and_step_alone():
    def gradient(noise, **options):
        torch.manual_seed(noise)
        module = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(128, 5, bias=False))
        nn.init.ones_(module[2].weight)
        return Agent(0, FlatModel(module), iter([batch()]), **options).gradient().clone()

    assert torch.equal(gradient(0), gradient(1))
    assert not torch.equal(gradient(0), gradient(0, seed=1))
