"""Who takes over whose order of units, and when, so that all agents that merge have a common one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse.csgraph import connected_components, shortest_path


@dataclass(frozen=True)
class Turns:
    """An iteration in which some agents wait for others' models and align themselves before they lend their own.

    towards: agent -> those whose order of units it takes; roots: agents that keep theirs and hand it on.
    """

    towards: Mapping[int, Sequence[int]] = field(default_factory=dict)
    roots: Sequence[int] = ()

    def waves(self, num_agents: int) -> list[list[int]]:
        """All agents in the order in which they lend: an agent's wave is after all those that it takes the order of."""
        wave = dict.fromkeys(range(num_agents), 0)
        for i, references in self.towards.items():  # in order
            wave[i] = 1 + max(wave[j] for j in references)
        return [[i for i in range(num_agents) if wave[i] == w] for w in range(1 + max(wave.values()))]


class CommonBasis:
    """When agents align themselves to whom, so that all that merge have one order of units.

    In the first iteration the order spreads breadth first from the root: every agent takes that of its neighbours which
    have it already. Where a graph changes or is in parts, those that meet take the order of most of them (of the lowest
    root, of equally many). Everybody who knows weights(iteration) knows all of this.

    root: an agent; None: of every part the one whose farthest other is nearest.
    """

    def __init__(self, weights: Callable[[int], np.ndarray], num_agents: int, root: int | None):
        self.weights, self.root = weights, root
        self.of = np.full(num_agents, -1)  # agent -> the order it has: the number of its root; -1: none
        self.iteration, self.turns = 0, Turns()

    def at(self, iteration: int) -> Turns:
        """What happens before the merge of iteration 1, 2, ..., asked for in ascending order."""
        while self.iteration < iteration:
            self.iteration += 1
            self.turns = self._next()
        return self.turns

    def _next(self) -> Turns:
        weights = self.weights(self.iteration)
        takes = (weights != 0) & ~np.eye(len(weights), dtype=bool)
        towards: dict[int, list[int]] = {}
        roots = []
        for part in _parts(takes):
            if part.size > 1 and self.of[part].min() == self.of[part].max() >= 0:
                continue
            if part.size > 1 and self.of[part].max() < 0:
                root = self.root if self.root in part else _centre(takes, part)
                self.of[root] = root
                roots.append(int(root))
            members = Counter(self.of[part][self.of[part] >= 0].tolist())
            if not members:
                continue  # alone
            chosen = min(members, key=lambda order: (-members[order], order))
            settled = part[self.of[part] == chosen].tolist()
            for j in settled:  # grows
                for i in np.flatnonzero(takes[:, j]).tolist():
                    if self.of[i] != chosen:
                        self.of[i] = chosen
                        settled.append(i)
                        towards[i] = [k for k in settled if takes[i, k]]
        return Turns(towards, roots)


def _parts(takes: np.ndarray) -> list[np.ndarray]:
    """The agents of each connected part of a graph."""
    count, label = connected_components(takes, directed=False)
    return [np.flatnonzero(label == part) for part in range(count)]


def _centre(takes: np.ndarray, part: np.ndarray) -> int:
    """The agent from which an order reaches the part's last agent soonest; the lowest of several."""
    hops = shortest_path(takes[np.ix_(part, part)].T, method="D", unweighted=True)
    return int(part[np.argmin(hops.max(axis=1))])
