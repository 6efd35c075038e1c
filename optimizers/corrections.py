"""Local corrections: what keeps agents from drifting towards their own data between two merges.

Between merges each agent i takes T steps  x <- x - (its optimiser's step) - y_i / T.  A correction says what a merge
makes of y_i, which is 0 at first:

    @register_correction("LED")
    def led(y, merge):
        return y + merge.own - merge.merged

Where the mixing matrix is doubly stochastic the y_i sum to 0, so that the mean of the models moves as it would without.
The term enters after the optimiser's step, with Adam as with SGD: y is a distance, as the models' differences are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OfMerge:
    """A parameter in a merge of agent i, any shape, in the order of units of its merged model.

    own: x_i before; merged: sum_j w_ij x_j; of what the agents have `walked` since the merge before (x_i - x_i then):
    i's own, and mixed_walk: sum_j w_ij of everybody's. Both are None for corrections that don't ask for them.
    """

    own: Tensor
    merged: Tensor
    walked: Tensor | None = None
    mixed_walk: Tensor | None = None


@dataclass(frozen=True)
class Correction:
    """update: (y, OfMerge) -> y; sends_walk: agents send what they have walked besides their models."""

    update: Callable[[Tensor, OfMerge], Tensor]
    sends_walk: bool


CORRECTIONS: dict[str, Correction] = {}


def register_correction(name: str, *, sends_walk: bool = False) -> Callable[[Callable], Callable]:
    """Decorator that makes an update of y available as `name`."""

    def register(update: Callable[[Tensor, OfMerge], Tensor]) -> Callable[[Tensor, OfMerge], Tensor]:
        CORRECTIONS[name] = Correction(update, sends_walk)
        return update

    return register


@register_correction("LED")
def led(y: Tensor, merge: OfMerge) -> Tensor:
    """y_i <- y_i + x_i - sum_j w_ij x_j: local exact diffusion. It sends nothing but the models.

    Source: Alghunaim 2023 (arXiv 2302.00620).
    """
    return y + merge.own - merge.merged


@register_correction("KGT", sends_walk=True)
def kgt(y: Tensor, merge: OfMerge) -> Tensor:
    """y_i <- y_i + d_i - sum_j w_ij d_j, d_i what agent i has walked: local gradient tracking (K-GT).

    With c_i = y_i / (T lr) and z_i = -d_i / (T lr) that is  c_i <- c_i + sum_j w_ij z_j - z_i,  K-GT with a step size
    of 1 at the merge. What the models differed by before they walked counts as no drift, unlike in LED.
    Source: Liu et al. 2023 (arXiv 2301.01313), Algorithm 1.
    """
    return y + merge.walked - merge.mixed_walk
