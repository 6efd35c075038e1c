"""What train.py is asked for: its options settled, and where its checkpoints go."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data.datasets import READ_NO_FOLDER
from data.partition import PARTITIONS, asks_for
from experiments.checkpoints import checkpoint_folder
from experiments.options import OPTIONS, TRAIN, Command, Option, free, usual
from storage.files import load_yaml, open_regular, read_rows

TABLE = "model_accuracies.csv"
COLUMNS = ("agent", "train_accuracy", "train_loss", "own_classes_accuracy", "all_classes_accuracy")


def fill_defaults(options: Command) -> None:
    """Settle what may be inherited from a checkpoint and was not."""
    for option in OPTIONS:
        if option.inherited:
            _fill(options, option)
    if options["partition_file"]:  # a path says nothing of what has been changed in the file
        with open_regular(Path(options["partition_file"])) as file:
            options["partition_digest"] = hashlib.sha256(file.read()).hexdigest()[:12]
    if options["dataset"] in READ_NO_FOLDER:
        options["imgntdir"] = None
    if options["optim"] == "adam" and options["momentum"]:
        raise ValueError(f"--momentum {options['momentum']} has no effect with --optim=adam: use --optim=sgd")
    if options["overwrite"] and (options.get("resume") or options.get("merg_itr_init")):
        raise ValueError("--overwrite deletes what --resume and --merg_itr_init continue from: leave one out")


def _fill(options: Command, option: Option) -> None:
    """Give an option that has a say its value. Raises ValueError for one that the partition has no use for."""
    given, has_say = options[option.name], option.matters(options)
    askers = [name for name in PARTITIONS if option.name in asks_for(name)]
    if given is None and has_say:
        options[option.name] = option.fallback
    if given is not None and not has_say and askers:
        raise ValueError(f"--{option.name} belongs to --data_dist={', '.join(askers)}, not to {options['data_dist']}")


def describe_training(o: Command) -> dict:
    """What the config.yaml beside the checkpoints says, machine and moment aside."""
    config = {k: v for k, v in o.items() if k not in free()}
    config["partition_seed"] = o["seed"] if o["partition_seed"] is None else o["partition_seed"]
    if o["data_dist"] != "non-iid-PF":
        del config["phase"]  # has no say
    return config


def rows_of_finished(folder: Path) -> list[dict]:
    """The rows of model_accuracies.csv whose models are there."""
    rows = [{key: row[key] for key in COLUMNS} for row in read_rows(folder / TABLE, COLUMNS)]
    return [row for row in rows if row["agent"].isdecimal() and (folder / f"model_{row['agent']}.pth").exists()]


def finished(o: Command) -> Path | None:
    """The folder, if it has all that these options would make. No image is read."""
    o = dict(o)
    fill_defaults(o)
    folder = checkpoint_folder(o)
    config, old = describe_training(o), load_yaml(folder / "config.yaml")
    # What an old folder doesn't say is younger than it, and had the usual value.
    config = {key: value for key, value in config.items() if key in old or value not in (None, usual(TRAIN).get(key))}
    done = not o["overwrite"] and old and old == old | config and len(rows_of_finished(folder)) == o["num_models"]
    return folder if done else None
