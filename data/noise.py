"""Feature skew: the same classes for all agents, seen through lenses of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data.datasets import Dataset
from data.images import room
from utils.seeds import generator


def with_feature_noise(dataset: Dataset, parts: Mapping[int, np.ndarray], num_agents: int, strength: float,
                       seed: int, scratch: Path) -> Dataset:
    """The data set with Gaussian noise on the agents' training images: agent i's has the deviation strength (i+1) / N.

    parts: agent -> the indices of its training images; those of others stay as they are. strength: of images scaled to
    0..1; what leaves that range is clipped. An agent's noise depends on the seed and on its number, not on who else is
    there. After NIID-Bench (Li et al. 2022, arXiv 2102.02079); here an image keeps its noise from epoch to epoch.
    scratch: see `room`.
    """
    images = torch.from_numpy(room(tuple(dataset.train.images.shape), scratch)).copy_(dataset.train.images)
    for agent, indices in parts.items():
        draws = generator(seed, agent, purpose="feature noise")
        for some in torch.from_numpy(indices).split(1000):  # as floats, they take four times the memory
            noise = torch.randn(images[some].shape, generator=draws) * (255 * strength * (agent + 1) / num_agents)
            images[some] = noise.add_(images[some]).round_().clamp_(0, 255).to(torch.uint8)
    return replace(dataset, train=replace(dataset.train, images=images))
