"""Images that several processes go through together, each a part of them, where only sums over all of them count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from merging.batch_norm import Batches


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
