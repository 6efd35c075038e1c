"""Simulated faults: links and agents that fail at random, and how the others mix without them.

They fail for an iteration of main.py, and for a step of base_lines.py, which is what `iteration` means there.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from network.topology import TOLERANCE, metropolis_hastings
from utils.seeds import generator


@dataclass(frozen=True)
class Faults:
    """In an iteration each pair's link fails with probability `link_failure`, each agent with `agent_failure`.

    Independently of one another and of other iterations, and the same whenever asked again; which links fail does not
    depend on `agent_failure`. Raises ValueError for a probability outside 0 to 1.
    """

    link_failure: float
    agent_failure: float
    seed: int

    def __post_init__(self) -> None:
        for what in ("link_failure", "agent_failure"):
            if not 0 <= getattr(self, what) <= 1:
                raise ValueError(f"{what} is a probability, not {getattr(self, what)}")

    def agents(self, iteration: int, num_agents: int) -> np.ndarray:
        """(N,) bool: who is up."""
        return self._spared(self.agent_failure, iteration, "agent failure", num_agents)

    def links(self, iteration: int, num_agents: int) -> np.ndarray:
        """(N, N) bool, symmetric: who can talk with whom, because their link and both of them are up; diagonal True."""
        up = self.agents(iteration, num_agents)
        links = np.triu(self._spared(self.link_failure, iteration, "link failure", num_agents, num_agents), k=1)
        return (links | links.T) & np.outer(up, up) | np.eye(num_agents, dtype=bool)

    def _spared(self, rate: float, iteration: int, purpose: str, *shape: int) -> np.ndarray:
        """Bool array of `shape`, each entry False with probability `rate`; nothing is drawn for a rate of 0."""
        if not rate:
            return np.ones(shape, dtype=bool)
        draws = generator(self.seed, 0, iteration, purpose)
        return torch.rand(shape, generator=draws, dtype=torch.float64).numpy() >= rate


def surviving(pi: np.ndarray, links: np.ndarray) -> np.ndarray:
    """The mixing matrix over the edges that are left of a doubly stochastic one: a new (N, N), doubly stochastic too.

    pi: (N, N); links: (N, N) bool, symmetric: which pairs can talk (the diagonal is ignored). Of a symmetric pi both
    ends of a dropped edge add its weight to their own, and the result is symmetric. The rows and columns of another
    one lose different sums, so it gets Metropolis-Hastings weights on what is left of its edges, taken as undirected.
    pi's own values where no edge is dropped. Raises ValueError if links is not symmetric and of pi's shape.
    """
    if links.shape != pi.shape or not np.array_equal(links, links.T):
        raise ValueError(f"links of shape {links.shape} is not a symmetric matrix for pi of shape {pi.shape}")
    edges = ((pi > 0) | (pi.T > 0)) & ~np.eye(len(pi), dtype=bool)
    left = edges & links
    if np.array_equal(left, edges):
        return pi.copy()
    if not np.allclose(pi, pi.T, rtol=0, atol=TOLERANCE):  # a file's digits may round differently
        return metropolis_hastings(left)
    mixed = np.where(left, pi, 0.0)
    own = pi.diagonal() + np.where(edges & ~left, pi, 0.0).sum(axis=1)
    own[~left.any(axis=1)] = 1.0  # rather than what a sum rounds to: who hears of nobody keeps its model as it is
    np.fill_diagonal(mixed, own)
    return mixed


def kept_by_senders(pi: np.ndarray, links: np.ndarray) -> np.ndarray:
    """(N, N): pi over the links that are left. What a sender can't pass on it keeps, so that columns still sum to 1.

    links: (N, N) bool, `links[i, j]`: i can hear from j (the diagonal is ignored).
    """
    lost = np.where(links | np.eye(len(pi), dtype=bool), 0.0, pi)
    return pi - lost + np.diag(lost.sum(axis=0))


def without(pi: np.ndarray, lost: Collection[int]) -> np.ndarray:
    """(N, N): pi where the models of the agents `lost` did not come: what each other agent would have taken of them it
    keeps of its own. Rows still sum to 1; columns do only if what others took of them is given back as well.
    """
    away = np.isin(np.arange(len(pi)), list(lost))
    kept = np.where(away & ~np.eye(len(pi), dtype=bool), 0.0, pi)
    np.fill_diagonal(kept, pi.diagonal() + (pi - kept).sum(axis=1))
    return kept
