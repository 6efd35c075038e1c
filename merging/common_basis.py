"""A common basis: agents reorder their own units once, and from then on plain averaging needs no matching.

An agent that permutes itself still computes what it did, and what it learns afterwards stays where it is: so agents
that have once agreed on an order of units keep it, while those that match anew in every merge, each in its own order,
pay for the matching and its errors every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
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
    best = match_unread(spec, references[max(range(own), key=lambda k: weights[k])], state, best)
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
