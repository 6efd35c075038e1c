"""Images that several processes go through together, each a part of them, where only sums over all of them count."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from merging.averaging import State
from merging.batch_norm import Batches, Estimate, NormReader, device_of, images_of, telling, tracked_norms


class Team(Protocol):
    """Processes that compute the same at the same time. Every one of them makes these calls, in the same order."""

    place: int  # of this process, 0, 1, ... below `size`
    size: int

    def everybody(self, thing: Any) -> list[Any]:
        """What the processes hand in, by their places."""

    def first(self, tensor: Tensor) -> Tensor:
        """What the process at place 0 hands in."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of what they hand in, the same in all of them."""


@dataclass(frozen=True)
class Divided:
    """Batches of which each process of a team may read a part: the same batches in all of them.

    Whoever iterates over it reads all images. Matching by activations reads this process's `part` of each batch, for
    the pairs of models of all processes, and adds the sums up: so all processes must hold the models of all of them.
    BatchNorm's statistics, which are means over whole batches, are estimated batch by batch in turns.
    """

    batches: Batches
    team: Team

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def part(self, images: Tensor) -> Tensor:
        """This process's of a batch: as near to equally many for all as can be, none for the last where few are."""
        return images.tensor_split(self.team.size)[self.team.place]

    def all_of(self, edges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The edges that the processes want, sorted, each once."""
        return sorted({edge for wanted in self.team.everybody(list(edges)) for edge in wanted})


def reestimate_all(model: nn.Module, states: Mapping[int, State], images: Mapping[int, Batches]) -> dict[int, State]:
    """BatchNorm's statistics of several models, each on its own images: see `reestimate`.

    Images that several models have in common are read once for all of them. Where they are `Divided`, a team's
    processes share the passes of all their models evenly. What comes out is what one process finds.
    """
    divided = next((batches for batches in images.values() if isinstance(batches, Divided)), None)
    if not tracked_norms(model) or not (states or divided):
        return dict(states)
    device = device_of(next(iter(states.values())))
    reader = NormReader(model, device)
    if divided is None:
        estimates = {i: Estimate(reader, state) for i, state in states.items()}
        for batches in {id(images[i]): images[i] for i in states}.values():
            readers = [estimate for i, estimate in estimates.items() if images[i] is batches]
            for x in telling(images_of(batches, device, "BatchNorm")):
                for estimate in readers:
                    estimate.see(x)
        return {i: estimate.state(estimate.sums()) for i, estimate in estimates.items()}
    team = divided.team
    theirs = team.everybody({i: _on("cpu", state) for i, state in states.items()})
    everybodys = {i: _on(device, state) for one in theirs for i, state in one.items()}
    estimates = {i: Estimate(reader, states.get(i, everybodys[i])) for i in sorted(everybodys)}
    turns = itertools.cycle(range(team.size))
    for x in telling(images_of(divided, device, "BatchNorm")):
        for estimate in estimates.values():
            if next(turns) == team.place:
                estimate.see(x)
    sums = [estimate.sums() for estimate in estimates.values()]
    of_all = team.total(torch.cat(sums)).split([*map(len, sums)])
    return {i: estimate.state(total) for (i, estimate), total in zip(estimates.items(), of_all, strict=True)
            if i in states}


def _on(device: torch.device | str, state: State) -> State:
    """What is no tensor in it (a module's extra state) stays as it is."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()}
