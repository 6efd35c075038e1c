"""The weighted sum of state dicts: the last line of a merge, x_i <- sum_j w_ij P_ij(x_j)."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]
ROBUST = ("none", "clip", "trimmed", "median")


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype sums are kept in on `device`: float64, or float32 where the device (mps) has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def weighted_average(states: Sequence[State], weights: Sequence[float], own: int = 0) -> State:
    """The sum of `weights[k] * states[k]`, tensor by tensor; the inputs are left alone.

    Floating tensors are summed in float64 and come back in their own dtype. What can't be averaged (integer and boolean
    buffers such as BatchNorm's `num_batches_tracked`) is a copy of `states[own]`'s. States of weight 0 are not read.
    Linear in the states; the weights need not sum to 1.

    Raises ValueError when there is no state, or not one weight for each.
    """
    if not states or len(states) != len(weights):
        raise ValueError(f"weighted_average needs one weight for each state: got {len(states)} and {len(weights)}")
    average = {}
    for name, mine in states[own].items():
        mine = mine.detach()
        if not (mine.dtype.is_floating_point or mine.dtype.is_complex):
            average[name] = mine.clone()
            continue
        total = torch.zeros_like(mine, dtype=torch.promote_types(mine.dtype, wide_dtype(mine.device)))
        for state, weight in zip(states, weights, strict=True):
            if weight != 0:
                total.add_(state[name].detach(), alpha=float(weight))
        average[name] = total.to(mine.dtype)
    return average


def robust_average(own: State, others: Sequence[State], weights: Sequence[float], robust: str) -> State:
    """An average that some hostile ones of the `others` can't move far: a new state dict like `own`.

    others: the neighbours' models in `own`'s order of units, weighed by `weights` (the rest to 1 is `own`'s).

    - "clip": x_i + sum_j w_ij clip(x_j - x_i, tau_i), clip(z, t) = min(1, t / |z|) z: self-centred clipping (He,
      Karimireddy and Jaggi 2022, arXiv 2202.01545). Their radius depends on who is hostile; here tau_i is the (lower)
      median of the neighbours' distances, so that it is no larger than an honest one's while less than half lie.
    - "trimmed": the mean of each coordinate without its largest and smallest values, a fifth of the models on each side
      and at least one (Yin et al. 2018, arXiv 1803.01498). "median": each coordinate's median (of an even number the
      mean of the middle two), there too. Both take `own` and the others alike, whatever their weights.

    A single neighbour is not outvoted by anybody: then all of these are plain averages.
    Raises ValueError for an unknown `robust`.
    """
    if robust == "clip":
        apart = [_distance(own, other) for other in others]
        radius = sorted(apart)[(len(apart) - 1) // 2]
        clipped = [w * (1.0 if d <= radius else radius / d) for w, d in zip(weights, apart, strict=True)]
        return weighted_average([own, *others], [1 - sum(clipped), *clipped])
    models = [own, *others]
    if robust not in ("trimmed", "median"):
        raise ValueError(f"unknown robust {robust!r}: choose from {', '.join(ROBUST)}")
    most = (len(models) - 1) // 2  # more can't be dropped on each side
    dropped = most if robust == "median" else min(most, max(1, len(models) // 5))
    average = {}
    for name, mine in own.items():
        if not mine.dtype.is_floating_point:
            average[name] = mine.detach().clone()
            continue
        values = torch.stack([model[name].detach() for model in models]).sort(dim=0).values
        kept = values[dropped : len(models) - dropped].to(wide_dtype(mine.device))
        average[name] = kept.mean(dim=0).to(mine.dtype)
    return average


def _distance(one: State, other: State) -> float:
    """The Euclidean distance of all floating tensors, as one vector."""
    return math.sqrt(sum(float((other[name].to(wide) - value.to(wide)).square().sum())
                         for name, value in one.items() if value.dtype.is_floating_point
                         for wide in [wide_dtype(value.device)]))


def least_distance(own: State, other: State, names: Collection[str]) -> float:
    """How far apart two models are at least, whatever order of units the other is in, in multiples of `own`'s norm.

    The tensors called `names` (parameters) are compared as sorted vectors: no order of the entries brings two vectors
    nearer to each other than that (rearrangement inequality). 0: their entries are the same.
    """
    apart = size = 0.0
    for name in names:
        mine, theirs = (state[name].detach().flatten().sort().values.to(wide_dtype(state[name].device))
                        for state in (own, other))
        apart, size = apart + float((theirs - mine).square().sum()), size + float(mine.square().sum())
    return math.sqrt(apart / size) if size else math.inf if apart else 0.0
