"""Tail averaging: the mean of the models that an agent had after its last merges, in its own order of units."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from experiments.checkpoints import State
from merging.averaging import weighted_average
from merging.files import check_state
from merging.permutation import Permutations, PermutationSpec, permute


class TailAverage:
    """The mean of each agent here over the iterations `first` to `last`, to go on from after them.

    Where data differ, models swing about what they come to, from merge to merge; their mean is nearer to it. It sends
    nothing. Sources: Polyak and Juditsky 1992; Jain et al. 2018 (arXiv 1610.03774); of weights of networks Izmailov et
    al. 2018 (arXiv 1803.05407).
    spec: None for methods that never move a unit.
    """

    def __init__(self, first: int, last: int, spec: PermutationSpec | None) -> None:
        self.first, self.last, self.spec = first, last, spec
        self.means: dict[int, State] = {}
        self.counts: dict[int, int] = {}

    def add(self, iteration: int, i: int, merged: State) -> None:
        """What agent i has merged in an iteration; outside of first to last it doesn't count."""
        if self.first <= iteration <= self.last:
            k = self.counts[i] = self.counts.get(i, 0) + 1
            self.means[i] = weighted_average([merged, self.means.get(i, merged)], [1 / k, 1 - 1 / k])

    def take(self, iteration: int, agents: Collection[int]) -> dict[int, State]:
        """The means of those of these agents that have one: after `last`, and once."""
        return {i: self.means.pop(i) for i in agents if i in self.means} if iteration > self.last else {}

    def reorder(self, i: int, permutations: Permutations) -> None:
        """The units of agent i's model have another order from now on."""
        if i in self.means:
            self.means[i] = permute(self.spec, permutations, self.means[i])

    # In state.pt

    def saved(self, i: int) -> dict[str, Any]:
        return {"tail": self.means.get(i, {}), "tail_count": self.counts.get(i, 0)}

    def take_up(self, i: int, saved: Mapping[str, Any], model: State) -> None:
        """Raises ValueError for what is of another model."""
        if state := saved.get("tail"):
            check_state(state, model, f"agent {i}'s tail average in the run's state.pt")
            self.means[i] = {name: t.to(model[name].device) for name, t in state.items()}
            self.counts[i] = saved.get("tail_count", 0)
            if not self.counts[i]:
                raise ValueError(f"agent {i}'s tail average in the run's state.pt is of no model (tail_count)")
