"""Feature skew: noise on the agents' training images."""

import numpy as np
import pytest
import torch

from data.datasets import Dataset, ImageSet
from data.noise import with_feature_noise


@pytest.fixture
def grey() -> Dataset:
    images = ImageSet(torch.full((2400, 1, 6, 6), 128, dtype=torch.uint8), torch.zeros(2400, dtype=torch.int64))
    return Dataset("grey", images, images, 1, mean=(0.5,), std=(0.5,), flip=False, padding=0)


PARTS = {agent: np.arange(agent, 2400, 4) for agent in range(4)}


def test_each_agent_has_its_own_strength(grey):
    noisy = with_feature_noise(grey, PARTS, 4, 0.1, seed=0)
    for agent, indices in PARTS.items():
        shift = noisy.train.images[indices].double() - 128
        assert float(shift.std()) == pytest.approx(25.5 * (agent + 1) / 4, rel=0.03)
        assert abs(float(shift.mean())) < 0.5
    assert noisy.train.images.dtype == torch.uint8 and torch.equal(noisy.train.labels, grey.train.labels)
    assert (grey.train.images == 128).all() and torch.equal(noisy.test.images, grey.test.images)


def test_it_depends_on_the_seed_and_not_on_who_else_is_there(grey):
    noisy, again, other = (with_feature_noise(grey, PARTS, 4, 0.1, seed) for seed in (0, 0, 1))
    assert torch.equal(noisy.train.images, again.train.images)
    assert not torch.equal(noisy.train.images, other.train.images)
    alone = with_feature_noise(grey, {2: PARTS[2]}, 4, 0.1, seed=0)
    assert torch.equal(alone.train.images[PARTS[2]], noisy.train.images[PARTS[2]])
    assert (alone.train.images[PARTS[1]] == 128).all()


def test_values_stay_in_their_range(grey):
    loud = with_feature_noise(grey, PARTS, 4, 50.0, seed=0).train.images
    shares = [(loud == value).double().mean().item() for value in (0, 255)]
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)  # clipped, not wrapped around
