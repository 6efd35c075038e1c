"""Feature skew: noise on the agents' training images."""

import numpy as np
import pytest
import torch

from agents.local import load_agents_data
from data.datasets import Dataset, ImageSet
from data.noise import with_feature_noise
from experiments.options import train_parser
from experiments.trainings import fill_defaults


@pytest.fixture
def grey() -> Dataset:
    images = ImageSet(torch.full((2400, 1, 6, 6), 128, dtype=torch.uint8), torch.zeros(2400, dtype=torch.int64))
    return Dataset("grey", images, images, 1, mean=(0.5,), std=(0.5,), flip=False, padding=0)


PARTS = {agent: np.arange(agent, 2400, 4) for agent in range(4)}


def test_each_agent_has_its_own_strength(grey, tmp_path):
    noisy = with_feature_noise(grey, PARTS, 4, 0.1, 0, tmp_path)
    for agent, indices in PARTS.items():
        shift = noisy.train.images[indices].double() - 128
        assert float(shift.std()) == pytest.approx(25.5 * (agent + 1) / 4, rel=0.03)
        assert abs(float(shift.mean())) < 0.5
    assert noisy.train.images.dtype == torch.uint8 and torch.equal(noisy.train.labels, grey.train.labels)
    assert (grey.train.images == 128).all() and torch.equal(noisy.test.images, grey.test.images)


def test_it_depends_on_the_seed_and_not_on_who_else_is_there(grey, tmp_path):
    noisy, again, other = (with_feature_noise(grey, PARTS, 4, 0.1, seed, tmp_path) for seed in (0, 0, 1))
    assert torch.equal(noisy.train.images, again.train.images)
    assert not torch.equal(noisy.train.images, other.train.images)
    alone = with_feature_noise(grey, {2: PARTS[2]}, 4, 0.1, 0, tmp_path)
    assert torch.equal(alone.train.images[PARTS[2]], noisy.train.images[PARTS[2]])
    assert (alone.train.images[PARTS[1]] == 128).all()


def test_values_stay_in_their_range(grey, tmp_path):
    loud = with_feature_noise(grey, PARTS, 4, 50.0, 0, tmp_path).train.images
    shares = [(loud == value).double().mean().item() for value in (0, 255)]
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)  # clipped, not wrapped around


@pytest.mark.parametrize("seeds", [["--seed=3"], ["--seed=8", "--partition_seed=3"]])
def test_agents_train_on_their_noise_whoever_else_is_here(seeds):
    def data(*flags: str, only=None):
        o = vars(train_parser().parse_args(["--num_models=4", "--train_samples=200", *flags]))
        fill_defaults(o)
        return load_agents_data(o, torch.device("cpu"), only)

    (clean, parts, _), (noisy, same_parts, _) = data("--seed=3"), data("--feature_noise=0.2", *seeds)
    (alone, own, _) = data("--feature_noise=0.2", *seeds, only=[1])
    for agent, (indices, same) in enumerate(zip(parts, same_parts, strict=True)):
        assert np.array_equal(indices, same)
        apart = (noisy.train.images[indices].double() - clean.train.images[indices]).abs().mean()
        assert 255 * 0.2 * (agent + 1) / 4 * 0.2 < apart < 255 * 0.2 * (agent + 1) / 4
    assert torch.equal(alone.train.images[own[1]], noisy.train.images[parts[1]])
    assert torch.equal(noisy.test.images, clean.test.images)
    again, _, _ = data("--feature_noise=0.2", "--seed=3")
    assert torch.equal(again.train.images, noisy.train.images)
