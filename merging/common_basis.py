"""A common basis: agents reorder their own units once, and from then on plain averaging needs no matching.

An agent that permutes itself still computes what it did, and what it learns afterwards stays where it is: so agents
that have once agreed on an order of units keep it, while those that match anew in every merge, each in its own order,
pay for the matching and its errors every time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components, shortest_path
from torch import Tensor, nn

from merging.activation_matching import (
    PRIORS,
    USUAL,
    Comparison,
    Edge,
    Matching,
    Similarity,
    mean_correlations,
    similarities,
)
from merging.assignment import assign
from merging.averaging import State
from merging.batch_norm import Batches
from merging.permutation import Permutations, PermutationSpec, identity
from merging.weight_matching import match_unread

# --------------------------------------------------------------------------------------------------------------------
# Permutations


def align(
    spec: PermutationSpec,
    model: nn.Module,
    state: State,
    references: Sequence[State],
    weights: Sequence[float],
    batches: Batches,
    matching: Matching = USUAL,
    names: Sequence[int] | None = None,
) -> tuple[Permutations, list[dict[str, float]]]:
    """The permutations that take a model's units to the order of `references`, which agree on one.

    They maximise the correlation with the references' units, summed over these with `weights`.
    names: of the references and of the model, for errors; the rest as in `similarities`.

    Returns the permutations and, for each reference, group -> mean correlation of the matched units.
    Raises ValueError as `similarities` does, and when there is no reference or not one weight for each.
    """
    if not references or len(references) != len(weights):
        raise ValueError(f"align needs one weight for each reference: got {len(weights)} and {len(references)}")
    own = len(references)
    found = {edge[0]: (similarity, images) for edge, similarity, images in similarities(
        spec, model, [*references, state], [(k, own) for k in range(own)], batches, matching, names)}
    each = [found[k][0] for k in range(own)]
    favour, images, at = PRIORS[matching.prior], found[0][1], matching.at
    best = assign(spec, favour(spec, _weighted_sum(each, weights), images, at, sum(weights)))
    best = match_unread(spec, references[int(np.argmax(weights))], state, best)
    return best, [mean_correlations(spec, similarity, best, at) for similarity in each]


def universe(
    spec: PermutationSpec,
    model: nn.Module,
    states: Sequence[State],
    batches: Batches,
    comparison: Comparison = USUAL,
    *,
    root: int = 0,
    names: Sequence[int] | None = None,
) -> tuple[list[Permutations], dict[Edge, dict[str, float]]]:
    """For each model the permutations to one order of units, that of model `root`: cycle-consistent by construction.

    They (locally) maximise the correlation of matched units summed over all pairs of models: one model after the other
    is assigned to all the others as they stand, from a start where each is assigned to those before it, until a whole
    sweep improves none. The cycle-consistent matching of C2M3 (Crisostomi et al. 2024, arXiv 2405.17897), for
    activations, where the objective falls apart into groups, by alternating assignment instead of Frank-Wolfe.
    The arguments are those of `similarities`, but that the similarities of all pairs are kept, whatever the memory.

    Returns the permutations and, for the pairs i < j, group -> mean correlation of the matched units.
    """
    pairs = list(itertools.combinations(range(len(states)), 2))
    found: dict[Edge, Similarity] = {}
    for (i, j), similarity, _ in similarities(spec, model, states, pairs, batches, comparison, names):
        found[i, j] = similarity
        found[j, i] = {group: value.T for group, value in similarity.items()}
    placed = {root: identity(spec)}

    def towards_the_others(i: int) -> Similarity:
        """(units of the universe, units of i), summed over the models placed so far."""
        others = [{group: value[p[group]] for group, value in found[j, i].items()}
                  for j, p in placed.items() if j != i]
        return _weighted_sum(others, [1.0] * len(others))

    def total(similarity: Similarity, permutations: Permutations) -> float:
        return sum(float(value.gather(1, permutations[group][:, None]).sum()) for group, value in similarity.items())

    for i in range(len(states)):
        if i not in placed:
            placed[i] = assign(spec, towards_the_others(i))
    improved = len(states) > 2
    while improved:
        improved = False
        for i in range(len(states)):
            similarity = towards_the_others(i)
            better = assign(spec, similarity)
            scale = sum(float(value.abs().sum()) for value in similarity.values())
            if total(similarity, better) - total(similarity, placed[i]) > 1e-12 * scale:  # more than rounding
                placed[i], improved = better, True
    order = {group: torch.argsort(p) for group, p in placed[root].items()}
    result = [{group: p[order[group]] for group, p in placed[i].items()} for i in range(len(states))]
    return result, {(i, j): mean_correlations(spec, found[i, j], between(result[i], result[j]), comparison.at)
                    for i, j in pairs}


def between(mine: Permutations, theirs: Permutations) -> Permutations:
    """The permutations that take another model's units to the own order, from both models' to a common one."""
    return {group: theirs[group][torch.argsort(p)] for group, p in mine.items()}


def _weighted_sum(similarities: Sequence[Similarity], weights: Sequence[float]) -> dict[str, Tensor]:
    return {group: sum(weight * similarity[group] for similarity, weight in zip(similarities, weights, strict=True))
            for group in similarities[0]}


# --------------------------------------------------------------------------------------------------------------------
# Who aligns itself to whom


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
