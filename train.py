"""Local training of every agent -> checkpoints. `python -m train --help` explains."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from agents import partial
from agents.local import LocalTrainer, ModelSettings, TrainSettings, load_agents_data, new_model
from experiments.checkpoints import checkpoint_folder
from experiments.options import Command, train_parser
from experiments.parsing import parse, pick_device
from experiments.run_folder import circumstances
from experiments.scripts import run_script
from experiments.trainings import COLUMNS, TABLE, describe_training, fill_defaults, finished, rows_of_finished
from merging.files import check_state
from models import training
from network.workers import follow_parent
from storage.files import claim, clear, load_tensors, load_yaml, save_rows, save_tensors, save_yaml
from utils.memory import keep_freed_memory
from utils.seeds import generator


def train_agent(o: Command, trainer: LocalTrainer, agent: int, indices: np.ndarray, folder: Path) -> None:
    """All epochs of one agent, from its last finished one on; leaves it in the trainer's model."""
    file = folder / f"partial_{agent}.pt"
    seed = generator(o["seed"], 0 if o["init_seed"] else agent, 0, "init").initial_seed()
    initial = new_model(ModelSettings.of(o), trainer.dataset, seed)
    trainer.model.load_state_dict(initial.state_dict())
    optimizer, scaler = trainer.fresh_optimizer()
    if done := partial.take_up(file, o["epochs"], trainer.model, optimizer, scaler):
        print(f"agent {agent}: continuing after epoch {done}", flush=True)
    for epoch in range(done + 1, o["epochs"] + 1):
        try:
            stats = trainer.epoch(indices, (agent, epoch, f"agent {agent} epoch {epoch}"), optimizer, scaler)
        except training.Diverged as error:
            raise training.Diverged(f"agent {agent}, epoch {epoch}: {error}; {file} holds the last good state"
                                    if epoch > 1 else f"agent {agent}, epoch {epoch}: {error}") from None
        print(f"agent {agent} epoch {epoch}/{o['epochs']}: train accuracy {stats.accuracy:.2f} %, "
              f"loss {stats.loss:.4f}", flush=True)
        if epoch < o["epochs"]:
            partial.leave(file, epoch, trainer.model, optimizer, scaler)


def accuracies(trainer: LocalTrainer, agent: int, indices: np.ndarray) -> dict[str, float]:
    """A row of model_accuracies.csv: the agent's training images, the test images of its classes, all of them."""
    train = trainer.evaluate(trainer.dataset.train, indices)
    test = trainer.evaluate(trainer.dataset.test)
    labels = trainer.dataset.test.labels.cpu()
    own = torch.isin(labels, trainer.dataset.train.labels[torch.as_tensor(indices)].cpu().unique()).nonzero()[:, 0]
    return dict(zip(COLUMNS, (agent, train.accuracy(), train.loss, test.accuracy(own), test.accuracy()), strict=True))


def prepare_folder(o: Command, folder: Path, command: str) -> None:
    """Give the claimed checkpoint folder its config.yaml; refuse one that was made with other options."""
    if o["overwrite"]:
        clear(folder)
    config = describe_training(o)
    old = load_yaml(folder / "config.yaml")
    for key, value in config.items():
        if key in old and old[key] != value:
            raise ValueError(f"{folder} was made with --{key} {old[key]}, not {value}: "
                             "choose another --save_folder or give --overwrite")
    if not old:
        save_yaml(folder / "config.yaml", config | circumstances(command))


def run(o: Command, command: str) -> Path:
    if done := finished(o):
        print(f"finished before: all {o['num_models']} agents are trained (--overwrite starts afresh)")
        return done
    fill_defaults(o)
    device = pick_device(o["device"])
    dataset, parts, _ = load_agents_data(o, device)
    template = new_model(ModelSettings.of(o), dataset, seed=0)
    folder = checkpoint_folder(o)
    with claim(folder):
        prepare_folder(o, folder, command)
        train_agents(o, LocalTrainer(template, dataset, TrainSettings.of(o), device), parts, folder)
    return folder


def train_agents(o: Command, trainer: LocalTrainer, parts: list[np.ndarray], folder: Path) -> None:
    """Train and measure the agents that `folder` lacks."""
    rows = rows_of_finished(folder)
    missing = [a for a in range(o["num_models"]) if not any(int(row["agent"]) == a for row in rows)]
    for agent in missing:
        file = folder / f"model_{agent}.pth"
        if file.exists():
            state = load_tensors(file)
            check_state(state, trainer.model.state_dict(), str(file))
            trainer.model.load_state_dict(state)
        else:
            train_agent(o, trainer, agent, parts[agent], folder)
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


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    follow_parent()
    o = vars(parse(train_parser(), argv))
    command = shlex.join(sys.argv if argv is None else ["train.py", *argv])
    return run_script(lambda: run(o, command), "checkpoints",
                      "give the same command again (without --overwrite)")


if __name__ == "__main__":
    sys.exit(main())
