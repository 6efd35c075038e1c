"""Local training of every agent -> checkpoints. `python -m train --help` explains."""

from __future__ import annotations

import math
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Collection
from pathlib import Path
from types import NoneType

import numpy as np
import torch
from torch import Tensor, nn

from data.batches import Batches
from data.datasets import DATASETS, Dataset, load_dataset
from data.partition import PARTITIONS, make_partition
from models import MODELS, build_model
from utils import training
from utils.checkpoint import check_state, checkpoint_folder
from utils.files import (
    circumstances,
    claim,
    clear,
    load_state,
    load_tensors,
    load_yaml,
    mismatch,
    read_rows,
    save_rows,
    save_state,
    save_tensors,
    save_yaml,
)
from utils.memory import keep_freed_memory
from utils.options import parse, pick_device, train_parser
from utils.progress import progress
from utils.scripts import run_script
from utils.seeds import generator
from utils.siblings import follow_parent

EVAL_BATCH = 500
TABLE = "model_accuracies.csv"
PARTIAL = {"epoch": int, "model": {str: Tensor}, "optimizer": {"state": dict, "param_groups": [dict]},
           "scaler": (dict, NoneType)}
COLUMNS = ("agent", "train_accuracy", "train_loss", "own_classes_accuracy", "all_classes_accuracy")
MACHINE = ("device", "compile", "config", "overwrite", "data_dir", "imgntdir", "save_folder")  # change no result


def fill_defaults(options: Namespace) -> None:
    """Settle what may be inherited from a checkpoint and was not."""
    defaults = {"data_dist": "iid", "train_samples": 0, "holdout": 0, "width_multiplier": 8}
    for key, value in defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.data_dist == "dirichlet" and options.alpha is None:
        options.alpha = 0.5
    if options.data_dist != "dirichlet" and options.alpha is not None:
        raise ValueError(f"--alpha belongs to --data_dist=dirichlet, not to {options.data_dist}")
    if options.dataset != "tinyimgnt":
        options.imgntdir = None
    if options.optim == "adam" and options.momentum:
        raise ValueError(f"--momentum {options.momentum} has no effect with --optim=adam: use --optim=sgd")
    if options.overwrite and (vars(options).get("resume") or vars(options).get("merg_itr_init")):
        raise ValueError("--overwrite deletes what --resume and --merg_itr_init continue from: leave one out")


def load_agents_data(o: Namespace, device: torch.device,
                     only: Collection[int] | None = None) -> tuple[Dataset, list[np.ndarray], list[np.ndarray]]:
    """The data set on `device` and the indices of every agent's training and test images.

    only: agents besides whose training images none is kept (the others have no indices then).
    """
    dataset = load_dataset(o.dataset, o.data_dir, o.imgntdir, o.train_samples, o.holdout, o.test_samples)
    seed = o.seed if o.partition_seed is None else o.partition_seed
    train_parts, test_parts = make_partition(
        o.data_dist, dataset.train.labels.numpy(), dataset.test.labels.numpy(), o.num_models,
        num_classes=dataset.num_classes, alpha=o.alpha or 0.5, seed=seed, phase=o.phase)
    if only is not None and len(only) < o.num_models:
        kept = np.sort(np.concatenate([train_parts[i] for i in only]))
        dataset = dataset.with_only(kept)
        train_parts = [np.searchsorted(kept, part if i in only else part[:0]) for i, part in enumerate(train_parts)]
    return dataset.to(device), train_parts, test_parts


def new_model(o: Namespace, dataset: Dataset, seed: int | None = None) -> nn.Module:
    return build_model(o.model, dataset.num_classes, in_channels=dataset.in_channels,
                       image_size=dataset.image_size, width_multiplier=o.width_multiplier, seed=seed)


class LocalTrainer:
    """Trains one agent after the other in one working model, so that memory doesn't grow with their number."""

    def __init__(self, model: nn.Module, dataset: Dataset, o: Namespace, device: torch.device):
        self.model = model.to(device, memory_format=training.memory_format(device))
        self.fast = torch.compile(self.model) if o.compile else self.model
        self.dataset, self.o, self.device = dataset, o, device

    def fresh_optimizer(self) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler | None]:
        o = self.o
        scaler = torch.amp.GradScaler(self.device.type) if o.amp == "fp16" else None
        return training.make_optimizer(self.model, o.optim, o.lr, o.momentum, o.weight_decay), scaler

    def epoch(self, indices: np.ndarray, seed_path: tuple, optimizer, scaler) -> training.EpochStats:
        """One local epoch; `seed_path` = (agent, iteration, purpose) decides order, augmentation and dropout."""
        batches = Batches(self.dataset, self.dataset.train, indices, self.o.batch_size, shuffle=True, augment=True,
                          make_generator=lambda: generator(self.o.seed, *seed_path))
        bar = progress(batches, seed_path[-1], total=len(batches), unit="step")
        torch.manual_seed(generator(self.o.seed, *seed_path[:-1], f"{seed_path[-1]}, dropout").initial_seed())
        try:
            return training.train_epoch(self.fast, bar, optimizer, self.o.amp, scaler)
        except ValueError as error:  # BatchNorm can't be trained on one value per channel
            raise ValueError(f"agent {seed_path[0]} ({len(indices)} training images, --batch_size "
                             f"{self.o.batch_size}): {error}") from error

    def evaluate(self, images, indices=None) -> training.Evaluation:
        batches = Batches(self.dataset, images, indices, EVAL_BATCH)
        return training.evaluate(self.fast, progress(batches, "evaluation", total=len(batches)))


def train_agent(trainer: LocalTrainer, agent: int, indices: np.ndarray, folder: Path) -> None:
    """All epochs of one agent, from its last finished one on; leaves it in the trainer's model."""
    o, partial = trainer.o, folder / f"partial_{agent}.pt"
    initial = new_model(o, trainer.dataset, generator(o.seed, 0 if o.init_seed else agent, 0, "init").initial_seed())
    trainer.model.load_state_dict(initial.state_dict())
    optimizer, scaler = trainer.fresh_optimizer()
    done = 0
    if partial.exists():
        done = take_up(trainer, partial, optimizer, scaler)
        print(f"agent {agent}: continuing after epoch {done}", flush=True)
    for epoch in range(done + 1, o.epochs + 1):
        try:
            stats = trainer.epoch(indices, (agent, epoch, f"agent {agent} epoch {epoch}"), optimizer, scaler)
        except training.Diverged as error:
            raise training.Diverged(f"agent {agent}, epoch {epoch}: {error}; {partial} holds the last good state"
                                    if epoch > 1 else f"agent {agent}, epoch {epoch}: {error}") from None
        print(f"agent {agent} epoch {epoch}/{o.epochs}: train accuracy {stats.accuracy:.2f} %, "
              f"loss {stats.loss:.4f}", flush=True)
        if epoch < o.epochs:
            save_state(partial, {"epoch": epoch, "model": training.snapshot(trainer.model),
                                 "optimizer": optimizer.state_dict(),
                                 "scaler": scaler.state_dict() if scaler is not None else None})


def take_up(trainer: LocalTrainer, partial: Path, optimizer, scaler) -> int:
    """Bring the trainer's model, the optimiser and the scaler to where `partial` was left; the epoch it has finished.

    Raises ValueError, before any of them is changed, for what isn't such a state.
    """
    saved = load_state(partial, PARTIAL)
    check_state(saved["model"], trainer.model.state_dict(), str(partial))
    wrong = training.misfit(optimizer, saved["optimizer"])
    if scaler is not None:
        wrong = wrong or mismatch(saved["scaler"], {key: type(value) for key, value in scaler.state_dict().items()},
                                  "its scaler")
    if not 0 < saved["epoch"] <= trainer.o.epochs:
        wrong = f"its epoch is {saved['epoch']}"
    if wrong:
        raise ValueError(f"{partial} is not of this training ({wrong}): delete it to train the agent from the start")
    trainer.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if scaler is not None:
        scaler.load_state_dict(saved["scaler"])
    return saved["epoch"]


def accuracies(trainer: LocalTrainer, agent: int, indices: np.ndarray) -> dict[str, float]:
    """A row of model_accuracies.csv: the agent's training images, the test images of its classes, all of them."""
    train = trainer.evaluate(trainer.dataset.train, indices)
    test = trainer.evaluate(trainer.dataset.test)
    labels = trainer.dataset.test.labels.cpu()
    own = torch.isin(labels, trainer.dataset.train.labels[torch.as_tensor(indices)].cpu().unique()).nonzero()[:, 0]
    return dict(zip(COLUMNS, (agent, train.accuracy(), train.loss, test.accuracy(own), test.accuracy()), strict=True))


def describe_training(o: Namespace) -> dict:
    """What the config.yaml beside the checkpoints says, machine and moment aside."""
    config = {k: v for k, v in vars(o).items() if k not in MACHINE}
    config["partition_seed"] = o.seed if o.partition_seed is None else o.partition_seed
    if o.data_dist != "non-iid-PF":
        del config["phase"]  # has no say
    return config


def prepare_folder(o: Namespace, folder: Path, command: str) -> None:
    """Give the claimed checkpoint folder its config.yaml; refuse one that was made with other options."""
    if o.overwrite:
        clear(folder)
    config = describe_training(o)
    old = load_yaml(folder / "config.yaml")
    for key, value in config.items():
        if key in old and old[key] != value:
            raise ValueError(f"{folder} was made with --{key} {old[key]}, not {value}: "
                             "choose another --save_folder or give --overwrite")
    if not old:
        save_yaml(folder / "config.yaml", config | circumstances(command))


def run(o: Namespace, command: str) -> Path:
    fill_defaults(o)
    device = pick_device(o.device)
    dataset, parts, _ = load_agents_data(o, device)
    template = new_model(o, dataset, seed=0)
    folder = checkpoint_folder(vars(o))
    with claim(folder):
        prepare_folder(o, folder, command)
        train_agents(o, LocalTrainer(template, dataset, o, device), parts, folder)
    return folder


def rows_of_finished(folder: Path) -> list[dict]:
    """The rows of model_accuracies.csv whose models are there."""
    rows = [{key: row[key] for key in COLUMNS} for row in read_rows(folder / TABLE, COLUMNS)]
    return [row for row in rows if row["agent"].isdecimal() and (folder / f"model_{row['agent']}.pth").exists()]


def is_finished(o: Namespace) -> bool:
    """Whether `folder` has all that these options would make, so that a sweep needn't start it."""
    fill_defaults(o)
    folder = checkpoint_folder(vars(o))
    config, old = describe_training(o), load_yaml(folder / "config.yaml")
    return not o.overwrite and old == old | config and len(rows_of_finished(folder)) == o.num_models


def train_agents(o: Namespace, trainer: LocalTrainer, parts: list[np.ndarray], folder: Path) -> None:
    """Train and measure the agents that `folder` lacks."""
    rows = rows_of_finished(folder)
    missing = [a for a in range(o.num_models) if not any(int(row["agent"]) == a for row in rows)]
    if not missing:
        print(f"finished before: all {o.num_models} agents are trained (--overwrite starts afresh)")
    for agent in missing:
        file = folder / f"model_{agent}.pth"
        if file.exists():
            state = load_tensors(file)
            check_state(state, trainer.model.state_dict(), str(file))
            trainer.model.load_state_dict(state)
        else:
            train_agent(trainer, agent, parts[agent], folder)
        row = accuracies(trainer, agent, parts[agent])
        if not math.isfinite(row["train_loss"]):
            raise training.Diverged(f"agent {agent}: the trained model's loss is {row['train_loss']}: not kept")
        if not file.exists():
            save_tensors(file, {k: t.cpu() for k, t in training.snapshot(trainer.model).items()})
        (folder / f"partial_{agent}.pt").unlink(missing_ok=True)
        rows.append(row)
        save_rows(folder / TABLE, COLUMNS, sorted(rows, key=lambda row: int(row["agent"])))
        print(f"agent {agent}: {len(parts[agent])} images, train {row['train_accuracy']:.2f} %, "
              f"test: own classes {row['own_classes_accuracy']:.2f} %, all {row['all_classes_accuracy']:.2f} %")


def make_parser() -> ArgumentParser:
    return train_parser(DATASETS, MODELS, PARTITIONS)


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    follow_parent()
    options = parse(make_parser(), argv)
    command = shlex.join(sys.argv if argv is None else ["train.py", *argv])
    return run_script(lambda: run(options, command), "checkpoints",
                      "give the same command again (without --overwrite)")


if __name__ == "__main__":
    sys.exit(main())
