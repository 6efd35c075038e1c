"""An agent's data, and how it trains and is evaluated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.batches import WHOLE, Batches
from data.datasets import Dataset, some_images
from data.images import CACHE
from data.noise import with_feature_noise
from experiments.checkpoints import State
from experiments.dealing import deal, seed_of_data
from models import build_model, training
from models.at_once import train_at_once
from utils.memory import memory_format
from utils.progress import progress
from utils.seeds import generator
from utils.settings import FromOptions

EVAL_BATCH = 500


@dataclass(frozen=True)
class ModelSettings(FromOptions):
    model: str
    width_multiplier: int
    norm: str = "batch"


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


def load_agents_data(options: Mapping[str, Any], device: torch.device,
                     only: Collection[int] | None = None) -> tuple[Dataset, list[np.ndarray], list[np.ndarray]]:
    """The data set on `device` and the indices of every agent's training and test images.

    options: those of the data; a partition may have some of its own. only: agents besides whose training images none
    is kept (the others have no indices then).
    """
    dataset, train_parts, test_parts = deal(options)
    num_agents, strength, scratch = options["num_models"], options["feature_noise"], Path(options["data_dir"]) / CACHE
    if strength:
        noisy = range(num_agents) if only is None else only
        dataset = with_feature_noise(dataset, {i: train_parts[i] for i in noisy}, num_agents, strength,
                                     seed_of_data(options), scratch)
    if only is not None and len(only) < num_agents:
        kept = np.sort(np.concatenate([train_parts[i] for i in only]))
        dataset = dataset.with_only(kept, scratch)
        train_parts = [np.searchsorted(kept, part if i in only else part[:0]) for i, part in enumerate(train_parts)]
    return dataset.to(device, room_for_images(device, options.get("data_memory"))), train_parts, test_parts


def room_for_images(device: torch.device, most: float | None) -> float:
    """Bytes that the images of one kind may take on the device; most: so many GB, None: a quarter of what is free.

    On a CPU they stay in the file that they are mapped from anyway, and what is read of it the system may drop again.
    """
    if most is not None:
        return most * 2**30
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else math.inf


def new_model(s: ModelSettings, dataset: Dataset, seed: int | None = None) -> nn.Module:
    return build_model(s.model, dataset.num_classes, in_channels=dataset.in_channels,
                       image_size=dataset.image_size, width_multiplier=s.width_multiplier, norm=s.norm, seed=seed)


def training_batches(s: TrainSettings, dataset: Dataset, indices: np.ndarray, *seed_path: Any,
                     part: tuple[int, int] = WHOLE) -> Batches:
    """A pass over an agent's training images, or a part of it, augmented, in an order that `seed_path` decides."""
    return Batches(dataset, dataset.train, indices, s.batch_size, shuffle=True, augment=True,
                   make_generator=lambda: generator(s.seed, *seed_path), part=part)


class LocalTrainer:
    """Trains one agent after the other in one working model, so that memory doesn't grow with their number."""

    def __init__(self, model: nn.Module, dataset: Dataset, settings: TrainSettings, device: torch.device):
        self.model = model.to(device, memory_format=memory_format(device))
        self.fast = torch.compile(self.model) if settings.compile else self.model
        self.dataset, self.settings, self.device = dataset, settings, device

    def models(self, states: Mapping[int, State]) -> dict[int, nn.Module]:
        """What to train for agents with these states: for one the working model, for several at once a copy each."""
        models = {i: self.model for i in states}
        if len(states) > 1:
            plain = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)  # see models.at_once
            models = {i: copy.deepcopy(plain) for i in states}
        for i, model in models.items():
            model.load_state_dict(states[i])
        return models

    def fresh_optimizer(self, *models: nn.Module) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler | None]:
        """Of the working model; of several models one that does for each what an optimiser of its own would."""
        s, several = self.settings, len(models) > 1
        scaler = torch.amp.GradScaler(self.device.type) if s.amp == "fp16" else None
        return training.make_optimizer(nn.ModuleList(models) if several else self.model, s.optim, s.lr, s.momentum,
                                       s.weight_decay, fused=several or None), scaler

    def loss(self, indices: np.ndarray) -> training.Loss:
        """The loss of an agent with these training images."""
        labels = self.dataset.train.labels[torch.as_tensor(indices, device=self.dataset.train.labels.device)]
        return training.make_loss(self.settings.loss, self.settings.adjust_tau, labels, self.dataset.num_classes)

    def sample(self, parts: list[np.ndarray], agent: int | None, count: int, iteration: int, purpose: str,
               augment: bool = False) -> Batches:
        """So many of an agent's training images, or (None) of all agents' `parts`, as they are read in an iteration."""
        s, train = self.settings, self.dataset.train
        indices = some_images(train, parts, agent, count, generator(s.seed, agent or 0, iteration, "sample"))
        return Batches(self.dataset, train, indices, s.batch_size, shuffle=True, augment=augment,
                       make_generator=lambda: generator(s.seed, agent or 0, iteration, purpose))

    def batches(self, indices: np.ndarray, seed_path: tuple, part: tuple[int, int]) -> Batches:
        """Of a local epoch whose k-th part is due in this iteration; its order was drawn in that of its first part."""
        agent, iteration, purpose = seed_path
        return training_batches(self.settings, self.dataset, indices, agent, iteration - part[0], purpose, part=part)

    def epoch(self, indices: np.ndarray, seed_path: tuple, optimizer, scaler,
              after_step: Callable[[], None] | None = None, part: tuple[int, int] = WHOLE) -> training.EpochStats:
        """A local epoch, or a part; `seed_path` = (agent, iteration, purpose) decides order, augmentation, dropout."""
        s = self.settings
        batches = self.batches(indices, seed_path, part)
        bar = progress(batches, seed_path[-1], total=len(batches), unit="step")
        torch.manual_seed(generator(s.seed, *seed_path[:-1], f"{seed_path[-1]}, dropout").initial_seed())
        try:
            return training.train_epoch(self.fast, bar, optimizer, s.amp, scaler, self.loss(indices), after_step)
        except ValueError as error:  # BatchNorm can't be trained on one value per channel
            raise ValueError(f"agent {seed_path[0]} ({len(indices)} training images, --batch_size "
                             f"{s.batch_size}): {error}") from error

    def epoch_of(self, models: Mapping[int, nn.Module], parts: Sequence[np.ndarray], seed_path: tuple, optimizer,
                 scaler, after_step: Mapping[int, Callable[[], None] | None],
                 part: tuple[int, int] = WHOLE) -> dict[int, training.EpochStats]:
        """The same of each of these agents in its model (see `models`); parts: all agents' images; seed_path: without
        the agent."""
        if len(models) > 1:
            return self._epoch_at_once(models, parts, seed_path, optimizer, after_step, part)
        i, = models
        try:
            return {i: self.epoch(parts[i], (i, *seed_path), optimizer, scaler, after_step[i], part)}
        except training.Diverged as error:
            raise training.Diverged(f"agent {i}: {error}") from None

    def _epoch_at_once(self, models: Mapping[int, nn.Module], parts: Sequence[np.ndarray], seed_path: tuple, optimizer,
                       after_step: Mapping[int, Callable[[], None] | None],
                       part: tuple[int, int]) -> dict[int, training.EpochStats]:
        s = self.settings
        batches = {i: self.batches(parts[i], (i, *seed_path), part) for i in models}
        most = max(batches, key=lambda i: len(batches[i]))
        bar = {most: progress(batches[most], seed_path[-1], total=len(batches[most]), unit="step")}
        torch.manual_seed(generator(s.seed, min(models), *seed_path[:-1], f"{seed_path[-1]}, dropout").initial_seed())
        try:
            losses = {i: self.loss(parts[i]) for i in models}
            return train_at_once(models, batches | bar, optimizer, losses, s.amp, after_step)
        except ValueError as error:
            few = min(models, key=lambda i: len(parts[i]))
            raise ValueError(f"agents {', '.join(map(str, models))} (agent {few} has {len(parts[few])} "
                             f"training images; --batch_size {s.batch_size}, --train_at_once): {error}") from error

    def evaluate(self, images, indices=None) -> training.Evaluation:
        batches = Batches(self.dataset, images, indices, EVAL_BATCH)
        return training.evaluate(self.fast, progress(batches, "evaluation", total=len(batches)))
