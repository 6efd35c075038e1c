"""What train.py is asked for: its options settled, and where its checkpoints go."""

from __future__ import annotations

import copy
from argparse import Namespace
from pathlib import Path

from data.datasets import READ_NO_FOLDER
from experiments.checkpoints import checkpoint_folder
from experiments.options import free
from storage.files import load_yaml, read_rows

TABLE = "model_accuracies.csv"
COLUMNS = ("agent", "train_accuracy", "train_loss", "own_classes_accuracy", "all_classes_accuracy")


def fill_defaults(options: Namespace) -> None:
    """Settle what may be inherited from a checkpoint and was not."""
    defaults = {"data_dist": "iid", "train_samples": 0, "holdout": 0, "width_multiplier": 8,
                "loss": "cross_entropy", "adjust_tau": 1.0}
    for key, value in defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.data_dist == "dirichlet" and options.alpha is None:
        options.alpha = 0.5
    if options.data_dist != "dirichlet" and options.alpha is not None:
        raise ValueError(f"--alpha belongs to --data_dist=dirichlet, not to {options.data_dist}")
    if options.dataset in READ_NO_FOLDER:
        options.imgntdir = None
    if options.optim == "adam" and options.momentum:
        raise ValueError(f"--momentum {options.momentum} has no effect with --optim=adam: use --optim=sgd")
    if options.overwrite and (vars(options).get("resume") or vars(options).get("merg_itr_init")):
        raise ValueError("--overwrite deletes what --resume and --merg_itr_init continue from: leave one out")


def describe_training(o: Namespace) -> dict:
    """What the config.yaml beside the checkpoints says, machine and moment aside."""
    config = {k: v for k, v in vars(o).items() if k not in free()}
    config["partition_seed"] = o.seed if o.partition_seed is None else o.partition_seed
    if o.data_dist != "non-iid-PF":
        del config["phase"]  # has no say
    return config


def rows_of_finished(folder: Path) -> list[dict]:
    """The rows of model_accuracies.csv whose models are there."""
    rows = [{key: row[key] for key in COLUMNS} for row in read_rows(folder / TABLE, COLUMNS)]
    return [row for row in rows if row["agent"].isdecimal() and (folder / f"model_{row['agent']}.pth").exists()]


def finished(o: Namespace) -> Path | None:
    """The folder, if it has all that these options would make. No image is read."""
    o = copy.copy(o)
    fill_defaults(o)
    folder = checkpoint_folder(vars(o))
    config, old = describe_training(o), load_yaml(folder / "config.yaml")
    done = not o.overwrite and old and old == old | config and len(rows_of_finished(folder)) == o.num_models
    return folder if done else None
