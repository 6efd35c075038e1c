"""The table of baselines, and what their steps have in common: settings, neighbours and the exchange of messages."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from network.processes import Arriving, Mail, Network

if TYPE_CHECKING:
    from optimizers.agent import Agent


@dataclass(frozen=True)
class Settings:
    """What a step may be told. form, scope: of CGA only."""

    lr: float
    momentum: float = 0.0
    cga_form: str = "paper"
    cga_scope: str = "model"


@dataclass(frozen=True)
class Neighbourhood:
    """An agent's part of the mixing matrix P in one step.

    own: p_ii; sources: j -> p_ij for every j that it hears from, ascending; targets: who hears from it.
    """

    own: float
    sources: dict[int, float]
    targets: tuple[int, ...]

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


Step = Generator[Mail, Arriving, None]


@dataclass(frozen=True)
class Baseline:
    """A method: its step (agent, hood, settings) -> generator, and what it can be told."""

    step: Callable[[Agent, Neighbourhood, Settings], Step]
    momentum: bool
    directed: bool


BASELINES: dict[str, Baseline] = {}


def register_baseline(name: str, *, momentum: bool = False, directed: bool = False) -> Callable[[Callable], Callable]:
    """Decorator that makes a step available as `name`.

    momentum: it has one. directed: it needs only columns that sum to 1, so that one-way graphs are allowed.
    """

    def register(step: Callable[..., Step]) -> Callable[..., Step]:
        BASELINES[name] = Baseline(step, momentum, directed)
        return step

    return register


def take_step(baseline: Baseline, agents: Mapping[int, Agent], hoods: Mapping[int, Neighbourhood], settings: Settings,
              network: Network) -> None:
    """One step of all agents that live here, side by side from exchange to exchange."""
    steps = {i: baseline.step(agent, hoods[i], settings) for i, agent in agents.items()}
    mails = {i: next(step) for i, step in steps.items()}
    while mails:
        arriving, mails = network.exchange(mails), {}
        for i, step in steps.items():
            agents[i].has_sent = True
            try:
                mails[i] = step.send(arriving[i])
            except StopIteration:
                agents[i].end_step()
