"""The documentation's own example of a baseline does what the documentation says."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from network.processes import OneProcess
from network.topology import make_topology
from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, register_baseline, take_step

ROOT = Path(__file__).parent.parent.parent
STEPS = 20


def examples() -> list[str]:
    """The functions under @register_baseline in the documentation."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [text for page in pages
            for text in re.findall(r"^(@register_baseline\(.*?)(?:\n\n|^~~~)", page.read_text(), re.M | re.S)]


def test_there_is_an_example():
    assert examples()


@pytest.fixture(params=examples())
def documented(request, monkeypatch) -> str:
    """An example's name, registered for the duration of a test."""
    monkeypatch.setattr("optimizers.registry.BASELINES", baselines := BASELINES.copy())
    exec(request.param, {"register_baseline": register_baseline})
    name, = baselines.keys() - BASELINES.keys()
    monkeypatch.setitem(BASELINES, name, baselines[name])
    return name


def agents_of(n: int) -> dict[int, Agent]:
    def batches(i):
        g = torch.Generator().manual_seed(i)
        while True:  # every agent sees images of another brightness
            yield i + torch.randn(6, 2, 8, 8, generator=g), torch.randint(5, (6,), generator=g)

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

    return {i: Agent(i, FlatModel(model()), batches(i)) for i in range(n)}


def after(name: str, lr: float, steps: int = STEPS) -> torch.Tensor:
    """(agents, P + B): the models after some steps on a ring."""
    agents, pi = agents_of(3), make_topology("ring", 3).pi
    for _ in range(steps):
        hoods = {i: neighbourhood(pi, i) for i in agents}
        take_step(BASELINES[name], agents, hoods, Settings(lr), OneProcess(3))
    return torch.stack([agent.x.clone() for agent in agents.values()])


def test_batch_norm_learns_its_statistics_as_fast_as_in_cdsgd(documented):
    """With no learning rate nothing else differs."""
    found, expected = after(documented, lr=0.0), after("CDSGD", lr=0.0)
    assert torch.equal(found, expected)
    # It has learnt them: of the true mean, 1 - 0.9^20 on average over the agents.
    agents, means = agents_of(3), slice(-8, -4)
    truth = []
    for agent in agents.values():
        seen = torch.cat([agent.flat.module[0](next(agent.batches)[0]) for _ in range(STEPS)])
        truth.append(seen.mean((0, 2, 3)))
    torch.testing.assert_close(found[:, means].mean(0), (1 - 0.9**STEPS) * torch.stack(truth).mean(0).detach(),
                               rtol=0.05, atol=0.02)


def test_it_steps_by_the_sign_of_the_gradient(documented):
    lr, agents = 0.01, agents_of(3)
    start, num_parameters = agents[0].parameters.clone(), agents[0].flat.num_parameters
    signs = [agent.gradient().sign().clone() for agent in agents.values()]
    expected = torch.stack([start - lr * sign for sign in signs])  # all start alike, which mixing leaves as it is
    torch.testing.assert_close(after(documented, lr, steps=1)[:, :num_parameters], expected, rtol=0, atol=1e-6)


def test_several_gradients_in_a_step_all_count(monkeypatch):
    monkeypatch.setattr("optimizers.registry.BASELINES", BASELINES.copy())

    @register_baseline("TWICE")
    def twice(agent, hood, s):
        arriving = yield hood.send(agent.shared)
        agent.gradient()
        agent.gradient()
        hood.mix(agent.shared, arriving.wait())

    from optimizers.registry import BASELINES as registered
    (agent, *_), (plain, *_) = agents_of(1).values(), agents_of(1).values()
    hood = neighbourhood(make_topology("disconnected", 1).pi, 0)
    take_step(registered["TWICE"], {0: agent}, {0: hood}, Settings(0.1), OneProcess(1))
    plain.gradient()
    plain.gradient()
    torch.testing.assert_close(agent.buffers, plain.buffers)
