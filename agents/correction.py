"""What agents that merge correct their drift by: a tensor for each parameter, in their own order of units."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.checkpoints import State
from merging import Merged
from merging.permutation import Permutations, PermutationSpec, permute_tensor
from optimizers.corrections import Correction, OfMerge

WALK = "walked."  # before the names of what travels with a model

# What an agent keeps of its y at a merge where not all are in step. Then a neighbour may have merged without its model,
# or with another of them: what the two add to their y doesn't cancel, and would lead all astray for good. STUDY.md,
# "Unlike data": 0.7 and 0.9 are alike, 1 is worse.
KEPT_OUT_OF_STEP = 0.9
# What it keeps where it merges a model of another iteration: 0.9 is worse.
KEPT_OF_ANOTHER_TIME = 0.5


class DriftCorrection:
    """The y of each agent here, what a merge makes of it, and what travels for that.

    rule: how; model: of all agents, for its parameters; spec: None for methods that never move a unit.
    since: agents here -> their parameters after their last merge; walked: of all whose models have come for a merge.
    """

    def __init__(self, rule: Correction, model: nn.Module, spec: PermutationSpec | None) -> None:
        self.rule, self.spec = rule, spec
        self.names = [name for name, _ in model.named_parameters()]
        self.y: dict[int, State] = {}
        self.since: dict[int, State] = {}
        self.walked: dict[int, State] = {}

    def with_walk(self, i: int, state: State) -> State:
        """What agent i sends: its model and, for a correction that asks for it, what it has walked."""
        if not self.rule.sends_walk:
            return state
        since = self.since.get(i, state)  # before its first merge it has walked nowhere
        return state | {WALK + name: state[name] - since[name] for name in self.names}

    def without_walks(self, arrived: Mapping[int, State]) -> dict[int, State]:
        """The models among what has come. What their agents have walked is kept for the merge."""
        if not self.rule.sends_walk:
            return dict(arrived)
        self.walked |= {j: {name: state[WALK + name] for name in self.names} for j, state in arrived.items()}
        return {j: {key: t for key, t in state.items() if not key.startswith(WALK)} for j, state in arrived.items()}

    def walk_of(self, i: int, own: State) -> float:
        """How far agent i says that it has walked, in multiples of the norm of the model `own`; 0 where nobody says."""
        if i not in self.walked:
            return 0.0
        walked, norm = (math.hypot(*(float(state[name].double().norm()) for name in self.names))
                        for state in (self.walked[i], own))
        return walked / max(norm, 1e-300)

    def reorder(self, i: int, permutations: Permutations) -> None:
        """The units of agent i's model have another order from now on."""
        for kept in (self.y, self.since, self.walked):
            if i in kept:
                kept[i] = self._permuted(kept[i], permutations)

    def update(self, agents: Iterable[int], models: Mapping[int, State], weights: np.ndarray, merged: Merged,
               in_step: bool = True, untimely: Collection[int] = ()) -> None:
        """What the merge of `models` by `weights` (N, N) makes of the y of these agents here.

        in_step: whoever merges another's model is sure to have its own merged by that one, of the same iteration.
        untimely: agents whose model is of another one. It differs from one's own by what was learnt between the two as
        well, and that is nothing to correct. So whoever merges it takes nothing into its y.
        """
        keep = 1.0 if in_step else KEPT_OUT_OF_STEP
        mixed_walks: dict[int, State] = {}
        for i in agents:
            basis = merged.basis[i]  # another agent's only where all weights are the same
            order = merged.moved(i)
            y = self._permuted(self.y.get(i) or self._nothing(models[i]), order)
            if weights[i, list(untimely)].any():
                self.y[i] = {name: KEPT_OF_ANOTHER_TIME * t for name, t in y.items()}
                continue
            own, walked = (self._permuted(kept, order) for kept in (models[i], self.walked.get(i, {})))
            if self.rule.sends_walk and basis not in mixed_walks:
                mixed_walks[basis] = self._mixed_walk(basis, weights[i], merged)
            mixed = mixed_walks.get(basis, {})
            self.y[i] = {name: self.rule.update(keep * y[name], OfMerge(
                own[name], merged.states[i][name], walked.get(name), mixed.get(name))) for name in self.names}

    def begin(self, states: Mapping[int, State]) -> None:
        """Agents here have merged, and walk from these models on."""
        for i, state in states.items():
            self.y.setdefault(i, self._nothing(state))
            if self.rule.sends_walk:
                self.since[i] = {name: state[name] for name in self.names}
        self.walked = {}

    def step(self, i: int, model: nn.Module, steps: int) -> Callable[[], None] | None:
        """What to do after every one of so many steps in which `model` is trained for agent i; None: nothing.

        An agent with so few images that none of its steps falls into this part of an epoch is corrected at once: the
        corrections of all agents add up to 0, and only together leave the mean of the models where it is.
        """
        if i not in self.y:
            return None
        parameters = list(model.parameters())
        each = [self.y[i][name] / max(steps, 1) for name in self.names]

        @torch.no_grad()
        def correct() -> None:
            torch._foreach_sub_(parameters, each)

        if steps:
            return correct
        correct()
        return None

    # In state.pt

    def saved(self, i: int) -> dict[str, State]:
        return {"correction": self.y.get(i, {}), "since": self.since.get(i, {})}

    def take_up(self, i: int, saved: Mapping[str, Any], model: State) -> None:
        """Raises ValueError for what is of another model."""
        for key, kept in (("correction", self.y), ("since", self.since)):
            if state := saved.get(key):
                if state.keys() != set(self.names) or any(state[n].shape != model[n].shape for n in self.names):
                    raise ValueError(f"agent {i}'s {key} in the run's state.pt is of another model")
                kept[i] = {name: t.to(model[name].device) for name, t in state.items()}

    def _nothing(self, model: State) -> State:
        return {name: torch.zeros_like(model[name]) for name in self.names}

    def _permuted(self, tensors: Mapping[str, Tensor], permutations: Permutations | None) -> State:
        if permutations is None:
            return dict(tensors)
        return {name: permute_tensor(t, self.spec.of_tensor[name], permutations) for name, t in tensors.items()}

    def _mixed_walk(self, basis: int, weights: np.ndarray, merged: Merged) -> State:
        """sum_j w_j d_j, in the order of units of agent `basis`."""
        mixed: State = {}
        for j in np.flatnonzero(weights).tolist():
            walked = self._permuted(self.walked[j], merged.permutations.get((basis, j)))
            mixed = {name: t * float(weights[j]) + mixed.get(name, 0) for name, t in walked.items()}
        return mixed
