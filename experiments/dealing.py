"""Who has which images, as the options of that name say it."""

from __future__ import annotations

from data.datasets import Dataset, load_dataset
from data.partition import Parts, asks_for, make_partition
from experiments.options import Settings


def seed_of_data(o: Settings) -> int:
    return o["seed"] if o["partition_seed"] is None else o["partition_seed"]


def deal(o: Settings) -> tuple[Dataset, Parts, Parts]:
    """The data set, and the indices of every agent's training and test images; o: settled options."""
    dataset = load_dataset(*(o[key] for key in ("dataset", "data_dir", "imgntdir", "train_samples", "holdout",
                                                "test_samples")), image_size=o.get("image_size") or 0)
    asked = {key: o[key] for key in asks_for(o["data_dist"]) - {"seed", "num_classes"} if o.get(key) is not None}
    return dataset, *make_partition(o["data_dist"], dataset.train.labels.numpy(), dataset.test.labels.numpy(),
                                    o["num_models"], num_classes=dataset.num_classes, seed=seed_of_data(o), **asked)
