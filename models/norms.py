"""What normalises activations: BatchNorm, or what doesn't depend on the other images of a batch.

BatchNorm suffers where agents have unlike data: each one's statistics are of its own classes. The groups are two, as is
usual in decentralised learning (Hsieh et al., arXiv 1910.00189; Lin et al., arXiv 2102.04761).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NORMS = ("batch", "group", "evonorm")
GROUPS = 2


class EvoNorm(nn.Module):
    """EvoNorm-S0, norm and activation in one: (B, C, H, W) -> the same shape.

    x sigmoid(v x) / sqrt(group variance + eps) * gamma + beta, where a group's variance is over channels and positions.
    Source: Liu et al. 2020 (arXiv 2004.02967). gamma and beta are called weight and bias as in torch's norms.
    """

    def __init__(self, channels: int, groups: int = GROUPS, eps: float = 1e-5):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels don't fall into {groups} groups")
        self.groups, self.eps = groups, eps
        self.weight, self.v = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, v = (parameter.reshape(-1, 1, 1) for parameter in (self.weight, self.bias, self.v))
        grouped = (x * torch.sigmoid(v * x)).unflatten(1, (self.groups, -1))
        variance = x.unflatten(1, (self.groups, -1)).var((2, 3, 4), correction=0, keepdim=True)
        return (grouped * torch.rsqrt(variance + self.eps)).flatten(1, 2) * weight + bias


def norm(kind: str, channels: int) -> nn.Module:
    """A norm that no activation follows: EvoNorm has none without, GroupNorm stands for it there."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(GROUPS, channels)


def norm_before_relu(kind: str, channels: int) -> nn.Module:
    """A norm whose output goes through `relu_after(kind)`."""
    return EvoNorm(channels) if kind == "evonorm" else norm(kind, channels)


def relu_after(kind: str) -> nn.Module:
    """ReLU in place, or nothing where the norm has an activation of its own."""
    return nn.Identity() if kind == "evonorm" else nn.ReLU(inplace=True)
