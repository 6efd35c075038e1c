"""The weighted sum of state dicts: the last line of a merge, x_i <- sum_j w_ij P_ij(x_j)."""

from collections.abc import Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


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
