"""The merge methods, by name: how each matches units, how it averages, and what can be set of it.

A new one is a function with a decorator, `register_method`; its module has to be imported by somebody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from merging.activation_matching import Comparison, Edge, Matching, Pairing, match_activations
from merging.averaging import State, weighted_average
from merging.batch_norm import Batches
from merging.common_basis import between, universe
from merging.permutation import Permutations, PermutationSpec, invert
from merging.weight_matching import match_unread, match_weights

Matched = Mapping[Edge, Permutations | Pairing]
Average = Callable[[Sequence[State], Sequence[float], int], State]


@dataclass(frozen=True)
class Method:
    """A way to merge.

    match(spec, model, states, pairs, batches, matching=) returns, for the pairs (i, j), the permutations that take
        model j's units to model i's order, or a `Pairing` where it knows their correlations too. A pair it leaves out
        is averaged as it is.
    average(states, weights, own): the merged model, from the models in the order of units of states[own], the agent's;
        what can't be averaged is that one's.
    options: a frozen dataclass of what can be set of it, all with defaults: `match` gets one as `matching`. None: there
        is nothing to set.
    permutes: it needs the model's spec; reads_images: it needs the batches; jointly: what it finds for a pair depends
        on the other pairs, so every agent's are asked for separately; aligned: models must have been brought into one
        basis before (`merging.common_basis`).
    """

    match: Callable[..., Matched]
    permutes: bool = True
    reads_images: bool = False
    jointly: bool = False
    aligned: bool = False
    options: type | None = None
    average: Average = weighted_average

    @property
    def option_names(self) -> tuple[str, ...]:
        """The names of what can be set of it."""
        return tuple(field.name for field in dataclasses.fields(self.options)) if self.options else ()


METHODS: dict[str, Method] = {}


def register_method(name: str, **properties: Any) -> Callable[[Callable], Callable]:
    """Adds a matching function to METHODS, with these properties of `Method`, which see."""

    def register(match: Callable[..., Matched]) -> Callable[..., Matched]:
        METHODS[name] = Method(match, **properties)
        return match

    return register


@register_method("DIMAT", reads_images=True, options=Matching)
def match_by_activations(spec: PermutationSpec, model: nn.Module, states: Sequence[State], pairs: Sequence[Edge],
                         batches: Batches, *, matching: Matching) -> Matched:
    """Activation matching (DIMAT, the paper's method); by weights where no layer reads activations."""
    matched = match_activations(spec, model, states, pairs, batches, matching)
    for i, j in [edge for edge in matched if edge[0] < edge[1]]:
        found = match_unread(spec, states[i], states[j], matched[i, j].permutations)
        matched[i, j] = Pairing(found, matched[i, j].correlations)
        matched[j, i] = Pairing(invert(found), matched[i, j].correlations)
    return matched


@register_method("WM")
def match_by_weights(spec: PermutationSpec, model: nn.Module, states: Sequence[State], pairs: Sequence[Edge],
                     batches: Batches | None, **unused: Any) -> Matched:
    """Weight matching (Git Re-Basin): no images; computed for i < j, (j, i) is the inverse."""
    matched = {}
    for i, j in sorted({(min(pair), max(pair)) for pair in pairs}):
        matched[i, j] = match_weights(spec, states[i], states[j])
        matched[j, i] = invert(matched[i, j])
    return matched


@register_method("C2M3", reads_images=True, jointly=True, options=Comparison)
def match_all_at_once(spec: PermutationSpec, model: nn.Module, states: Sequence[State], pairs: Sequence[Edge],
                      batches: Batches, *, matching: Comparison) -> Matched:
    """Cycle-consistent matching of all models that one agent merges (C2M3)."""
    agents = sorted({agent for pair in pairs for agent in pair})
    place = {agent: k for k, agent in enumerate(agents)}
    orders, correlations = universe(spec, model, [states[i] for i in agents], batches, matching, names=agents)
    orders = [match_unread(spec, states[agents[0]], states[i], order)  # the first one's order is that of all
              for i, order in zip(agents, orders, strict=True)]
    return {(i, j): Pairing(between(orders[place[i]], orders[place[j]]),
                            correlations[min(place[i], place[j]), max(place[i], place[j])]) for i, j in pairs}


@register_method("COMMON", permutes=False, aligned=True, options=Matching)
@register_method("WA", permutes=False)
def match_nothing(spec: PermutationSpec | None, model: nn.Module, states: Sequence[State], pairs: Sequence[Edge],
                  batches: Batches | None, **unused: Any) -> Matched:
    """Weight averaging: every unit stays where it is."""
    return {}
