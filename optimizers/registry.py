"""The table of baselines, and what their steps have in common: settings, neighbours and the exchange of messages."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from network.processes import Arriving, Mail, Network
from network.topology import Topology

if TYPE_CHECKING:
    from optimizers.agent import Agent


@dataclass(frozen=True)
class Settings:
    """What a step may be told. form, scope: of CGA only; local_steps: how many there are from exchange to exchange."""

    lr: float
    momentum: float = 0.0
    cga_form: str = "paper"
    cga_scope: str = "model"
    local_steps: int = 1


@dataclass(frozen=True)
class Neighbourhood:
    """An agent's part of the mixing matrix P in one step.

    own: p_ii; sources: j -> p_ij for every j that it hears from, ascending; targets: who hears from it.
    exchange: whether this is a step in which agents exchange at all; in another one each is alone.
    """

    own: float
    sources: dict[int, float]
    targets: tuple[int, ...]
    exchange: bool = True

    def send(self, vector: Tensor) -> Mail:
        """The same vector to everyone who hears from this agent; as long a one comes from every source."""
        return Mail(dict.fromkeys(self.targets, vector), tuple(self.sources), vector)

    def mix(self, mine: Tensor, received: Mapping[int, Tensor]) -> Tensor:
        """mine <- p_ii mine + sum_j p_ij received_j, in place."""
        mine.mul_(self.own)
        for j, weight in self.sources.items():
            mine.add_(received[j], alpha=weight)
        return mine


def neighbourhood(pi: np.ndarray, agent: int) -> Neighbourhood:
    """Agent's part of a mixing matrix (N, N) whose entry (i, j) is the weight of j's vector in i's."""
    sources = {j: float(pi[agent, j]) for j in np.flatnonzero(pi[agent]).tolist() if j != agent}
    targets = tuple(j for j in np.flatnonzero(pi[:, agent]).tolist() if j != agent)
    return Neighbourhood(float(pi[agent, agent]), sources, targets)


LOCAL = Neighbourhood(1.0, {}, (), exchange=False)  # everybody's in a local step


Step = Generator[Mail, Arriving, None]


@dataclass(frozen=True)
class Baseline:
    """A method: its step (agent, hood, settings) -> generator, and what else `register_baseline` says of it."""

    step: Callable[[Agent, Neighbourhood, Settings], Step]
    momentum: bool
    directed: bool
    every_step: bool
    graph: Callable[[Topology], Topology]
    options: Mapping[str, Callable[[Mapping[str, Any]], Any]]


BASELINES: dict[str, Baseline] = {}


def register_baseline(name: str, *, momentum: bool = False, directed: bool = False, every_step: bool = False,
                      graph: Callable[[Topology], Topology] = lambda topology: topology,
                      options: Mapping[str, Callable[[Mapping[str, Any]], Any]] = MappingProxyType({})) -> Callable:
    """Decorator that makes a step available as `name`.

    momentum: it has one. directed: it needs only columns that sum to 1, so that one-way graphs are allowed.
    every_step: it has to exchange in every step. graph: what it makes of a topology before it begins, ValueError if it
    can't do with it. options: those that nobody else has -> their default, by the other options.
    """

    def register(step: Callable[..., Step]) -> Callable[..., Step]:
        BASELINES[name] = Baseline(step, momentum, directed, every_step, graph, options)
        return step

    return register


def take_step(baseline: Baseline, agents: Mapping[int, Agent], hoods: Mapping[int, Neighbourhood], settings: Settings,
              network: Network) -> None:
    """One step of these agents, side by side from exchange to exchange; there may be none."""
    steps = {i: baseline.step(agent, hoods[i], settings) for i, agent in agents.items()}
    arriving: dict[int, Arriving | None] = dict.fromkeys(steps)
    while arriving:
        mails = {}
        for i, arrives in arriving.items():
            try:
                mails[i] = steps[i].send(arrives)
                agents[i].has_sent = True
            except StopIteration:
                agents[i].end_step()
        arriving = network.exchange(mails) if mails else {}
