"""COMMON's protocol: how agents come to one order of units, and stay in it whoever is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
from torch import nn

from data.batches import Batches
from merging import Matching, Pairing, matches
from merging.averaging import State
from merging.common_basis import align
from merging.permutation import Permutations, PermutationSpec, permute
from network.processes import Network
from network.turns import CommonBasis, Turns

Share = Callable[[Mapping[int, State], Sequence[int], int], dict[int, State]]
"""(models of the agents here, whose models are to travel, after how many turns) -> those that have come."""


class Alignment:
    """Agents wait for their turn, reorder their units to match those that had theirs before, and only then lend.

    basis: who aligns itself to whom, and when; states: agents here -> their models, where a reordered one takes the
    place of what it was; spec, model: of all models; matching: how models are compared.
    moved: is told of every agent whose model's units come in another order, and of the permutations.
    orders: agents here -> the common order of units they have, by the number of its root.
    """

    def __init__(self, basis: CommonBasis, network: Network, states: dict[int, State], spec: PermutationSpec,
                 model: nn.Module, matching: Matching, moved: Callable[[int, Permutations], None]) -> None:
        self.basis, self.network, self.states = basis, network, states
        self.spec, self.model, self.matching, self.moved = spec, model, matching, moved
        self.orders: dict[int, int] = {}
        self.matched: list[dict] = []

    def turns(self, iteration: int) -> Turns:
        """Whom the agents wait for and align themselves to before they lend their models in this iteration."""
        return self.basis.at(iteration)

    def take_matched(self) -> list[dict]:
        """Rows of merge_stats.csv for what was matched since this was last asked."""
        rows, self.matched = self.matched, []
        return rows

    def exchange(self, iteration: int, weights: np.ndarray, lent: Mapping[int, State], images: Mapping[int, Batches],
                 share: Share) -> dict[int, State]:
        """The models that the agents here merge in this iteration, all in one order of units.

        weights: (N, N), the iteration's; lent: what the agents here would lend if they had that order already.
        """
        turns, lent, models = self.turns(iteration), dict(lent), {}
        self.orders |= {i: int(self.basis.of[i]) for i in turns.roots if i in lent}
        for turn, wave in enumerate(turns.waves(len(weights))):
            for i in [i for i in lent if i in wave]:
                order = int(self.basis.of[i])
                references = [j for j in turns.towards.get(i, ()) if j in models
                              and (not self.network.may_miss or self.network.labels[j] == order)]
                if references:
                    lent[i] = self.aligned(i, lent[i], references, models, weights, images[i])
                    self.states[i], self.orders[i] = lent[i], order
            self.network.labels |= self.orders
            models |= share(lent, wave, turn)
        for i in images if self.network.may_miss else ():
            models = self.in_own_order(i, models, weights, images[i])
        return models

    def in_own_order(self, i: int, models: dict[int, State], weights: np.ndarray, images: Batches) -> dict[int, State]:
        """The models that have come to agent i, whatever happened to the turns: all in one order of units.

        An agent that lacks the order it should have, because it began late or nobody came when it was its turn, takes
        it from whoever has it; else the lowest there is; else the agent of the lowest number begins one. Models that
        came in another order are matched to its own, as in DIMAT.
        """
        others = sorted(models.keys() - {i})
        label = {j: self.network.labels[j] for j in others}
        own, should = self.orders.get(i, -1), int(self.basis.of[i])
        known = {order for order in (own, *label.values()) if order >= 0}
        order = should if should in known else min(known, default=-1)
        if order >= 0 and order != own:
            references = [j for j in others if label[j] == order]
            models = models | {i: self.aligned(i, models[i], references, models, weights, images)}
            self.states[i], self.orders[i] = models[i], order
        elif order < 0 and others and i < others[0]:
            self.orders[i] = i
        foreign = [j for j in others if label[j] != self.orders.get(i, -1) or label[j] < 0]
        return models | {j: self.aligned(j, models[j], [i], models, weights, images) for j in foreign}

    def aligned(self, i: int, state: State, references: list[int], models: Mapping[int, State], weights: np.ndarray,
                images: Batches) -> State:
        """Agent i's model in the order of units of `references`, among the models that have come.

        What was matched is noted down for the agent that is here, be it i or, where i's model came, the reference.
        """
        found, correlations = align(self.spec, self.model, state, [models[j] for j in references],
                                    [weights[i, j] or 1.0 for j in references], images, self.matching,
                                    names=[*references, i])
        for j, of_pair in zip(references, correlations, strict=True):
            pair = (i, j) if i in self.states else (j, i)
            self.matched += map(asdict, matches(self.spec, *pair, Pairing(found, of_pair)))
        self.moved(i, found)
        return permute(self.spec, found, state)
