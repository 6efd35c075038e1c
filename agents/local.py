"""An agent's data, and how it trains and is evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from data.batches import Batches
from data.datasets import Dataset, load_dataset
from data.partition import make_partition
from models import build_model, training
from utils.memory import memory_format
from utils.progress import progress
from utils.seeds import generator
from utils.settings import FromOptions

EVAL_BATCH = 500


@dataclass(frozen=True)
class DataSettings(FromOptions):
    """Which images there are, and how they are dealt to the agents."""

    dataset: str
    data_dir: str
    imgntdir: str | None
    train_samples: int
    test_samples: int
    holdout: int
    data_dist: str
    num_models: int
    alpha: float | None
    phase: str
    partition_seed: int | None
    seed: int


@dataclass(frozen=True)
class ModelSettings(FromOptions):
    model: str
    width_multiplier: int


@dataclass(frozen=True)
class TrainSettings(FromOptions):
    """How agents train on their own."""

    optim: str
    lr: float
    momentum: float | None
    weight_decay: float
    batch_size: int
    amp: str
    loss: str
    adjust_tau: float
    compile: bool
    seed: int


def load_agents_data(s: DataSettings, device: torch.device,
                     only: Collection[int] | None = None) -> tuple[Dataset, list[np.ndarray], list[np.ndarray]]:
    """The data set on `device` and the indices of every agent's training and test images.

    only: agents besides whose training images none is kept (the others have no indices then).
    """
    dataset = load_dataset(s.dataset, s.data_dir, s.imgntdir, s.train_samples, s.holdout, s.test_samples)
    seed = s.seed if s.partition_seed is None else s.partition_seed
    train_parts, test_parts = make_partition(
        s.data_dist, dataset.train.labels.numpy(), dataset.test.labels.numpy(), s.num_models,
        num_classes=dataset.num_classes, alpha=s.alpha or 0.5, seed=seed, phase=s.phase)
    if only is not None and len(only) < s.num_models:
        kept = np.sort(np.concatenate([train_parts[i] for i in only]))
        dataset = dataset.with_only(kept)
        train_parts = [np.searchsorted(kept, part if i in only else part[:0]) for i, part in enumerate(train_parts)]
    return dataset.to(device), train_parts, test_parts


def new_model(s: ModelSettings, dataset: Dataset, seed: int | None = None) -> nn.Module:
    return build_model(s.model, dataset.num_classes, in_channels=dataset.in_channels,
                       image_size=dataset.image_size, width_multiplier=s.width_multiplier, seed=seed)


class LocalTrainer:
    """Trains one agent after the other in one working model, so that memory doesn't grow with their number."""

    def __init__(self, model: nn.Module, dataset: Dataset, settings: TrainSettings, device: torch.device):
        self.model = model.to(device, memory_format=memory_format(device))
        self.fast = torch.compile(self.model) if settings.compile else self.model
        self.dataset, self.settings, self.device = dataset, settings, device

    def fresh_optimizer(self) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler | None]:
        s = self.settings
        scaler = torch.amp.GradScaler(self.device.type) if s.amp == "fp16" else None
        return training.make_optimizer(self.model, s.optim, s.lr, s.momentum, s.weight_decay), scaler

    def loss(self, indices: np.ndarray) -> training.Loss:
        """The loss of an agent with these training images."""
        labels = self.dataset.train.labels[torch.as_tensor(indices, device=self.dataset.train.labels.device)]
        return training.make_loss(self.settings.loss, self.settings.adjust_tau, labels, self.dataset.num_classes)

    def steps_of_epoch(self, indices: np.ndarray) -> int:
        return math.ceil(len(indices) / self.settings.batch_size)

    def epoch(self, indices: np.ndarray, seed_path: tuple, optimizer, scaler,
              after_step: Callable[[], None] | None = None) -> training.EpochStats:
        """One local epoch; `seed_path` = (agent, iteration, purpose) decides order, augmentation and dropout."""
        s = self.settings
        batches = Batches(self.dataset, self.dataset.train, indices, s.batch_size, shuffle=True, augment=True,
                          make_generator=lambda: generator(s.seed, *seed_path))
        bar = progress(batches, seed_path[-1], total=len(batches), unit="step")
        torch.manual_seed(generator(s.seed, *seed_path[:-1], f"{seed_path[-1]}, dropout").initial_seed())
        try:
            return training.train_epoch(self.fast, bar, optimizer, s.amp, scaler, self.loss(indices), after_step)
        except ValueError as error:  # BatchNorm can't be trained on one value per channel
            raise ValueError(f"agent {seed_path[0]} ({len(indices)} training images, --batch_size "
                             f"{s.batch_size}): {error}") from error

    def evaluate(self, images, indices=None) -> training.Evaluation:
        batches = Batches(self.dataset, images, indices, EVAL_BATCH)
        return training.evaluate(self.fast, progress(batches, "evaluation", total=len(batches)))
