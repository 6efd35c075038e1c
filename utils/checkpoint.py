"""The agents' checkpoints: where they lie, what they were made with, and whether they fit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from utils.files import SHORT, load_tensors, load_yaml, variant

State = dict[str, Tensor]
INHERITED = ("data_dist", "alpha", "partition_seed", "train_samples", "holdout", "width_multiplier")


def checkpoint_folder(o: dict[str, Any]) -> Path:
    """The documented path of train.py's checkpoints for its options `o`."""
    init = "same" if o["init_seed"] else "diff"
    halves = o["data_dist"] == "non-iid-PF" and o["phase"] != "pretrain"
    dealt_anew = None if o.get("partition_seed") == o["seed"] else o.get("partition_seed")
    unusual = variant(o | {"phase": o["phase"] if halves else None, "partition_seed": dealt_anew})
    parts = [o["dataset"], o["model"].replace(":", "_"), f"{init}_initialization", f"models_no{o['num_models']}",
             f"data_dist_{o['data_dist']}", f"num_epochs_{o['epochs']}", unusual, f"random_seed_{o['seed']}"]
    return Path(o["save_folder"]).joinpath(*filter(None, parts))


def describe(folder: Path) -> dict[str, Any]:
    """What the checkpoints in `folder` were made with: its config.yaml, else what the documented path says."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--ckp {folder} is not a folder: give the one that train.py printed")
    config = load_yaml(folder / "config.yaml")
    path = folder.resolve().as_posix()
    patterns = {"dataset": r"/([^/]+)/[^/]+/(?:same|diff)_initialization",
                "model": r"/([^/]+)/(?:same|diff)_initialization",
                "num_models": r"/models_no(\d+)", "data_dist": r"/data_dist_([^/]+)",
                "epochs": r"/num_epochs_(\d+)", "seed": r"/random_seed_(\d+)",
                "init_seed": r"/(same|diff)_initialization"}
    for key, pattern in patterns.items():
        if key not in config and (found := re.search(pattern, path)):
            text = found.group(1)
            config[key] = int(text) if text.isdigit() else text == "same" if key == "init_seed" else text
    names = {short: key for key, short in SHORT.items()}
    for setting in re.findall(r"[\w]+=[^,/]+", path.rpartition("/num_epochs_")[2]):
        key, _, text = setting.partition("=")
        config.setdefault(names.get(key, key), yaml.safe_load(text))
    return config


def inherit(options: dict[str, Any], made_with: dict[str, Any], source: str) -> None:
    """Fill `options` that were not given from what the checkpoint was made with.

    Raises ValueError when an option was given and differs: the agents would continue on other agents' data.
    """
    for key in ("dataset", "model"):
        theirs, ours = made_with.get(key), options[key]
        if theirs is not None and theirs.replace(":", "_") != ours.replace(":", "_"):
            raise ValueError(f"--{key} {ours} contradicts {source}, which was made with {key}={theirs}")
    for key in INHERITED:
        theirs = made_with.get(key)
        if theirs is not None and (type(theirs) is str) != (key == "data_dist"):
            raise ValueError(f"{source}: its config.yaml says {key}: {theirs!r}")
        if options[key] is None:
            options[key] = theirs
        elif theirs is not None and options[key] != theirs:
            raise ValueError(f"--{key} {options[key]} contradicts {source}, which was made with {key}={theirs}: "
                             "leave the option out or give other checkpoints")


def load_states(folder: Path, num_models: int, agents: Collection[int]) -> dict[int, State]:
    """The models of `agents` on the CPU, out of model_0.pth ... of exactly `num_models`.

    An agent that is here on its own may have a folder with nothing but its own model.
    """
    found = {file.name for file in folder.glob("model_*.pth")}
    if len(found) != num_models and found != {f"model_{i}.pth" for i in agents}:
        raise ValueError(f"--num_models {num_models}, but {folder} holds {len(found)} finished models (model_<i>.pth)")
    return {i: load_tensors(folder / f"model_{i}.pth") for i in agents}


def digest(state: State) -> str:
    """A short name for exactly this model."""
    content = hashlib.sha256()
    for key, value in state.items():
        content.update(key.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()[:12]


def digest_of_all(digests: Mapping[int, str]) -> str:
    """A short name for all agents' models, from those of each."""
    return hashlib.sha256(" ".join(digests[i] for i in sorted(digests)).encode()).hexdigest()[:12]


def check_state(state: State, template: State, name: str) -> None:
    """Raise ValueError, naming the file and the mismatch, unless `state` fits the model and is finite."""
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{name} is not a state dict")
    if missing := sorted(template.keys() ^ state.keys()):
        raise ValueError(f"{name} is of another architecture: {missing[0]} is in only one of the two "
                         f"({len(missing)} such keys)")
    for key, expected in template.items():
        if state[key].shape != expected.shape:
            raise ValueError(f"{name}: {key} has shape {tuple(state[key].shape)}, this model's is "
                             f"{tuple(expected.shape)} (another width, number of classes or image size?)")
        if state[key].is_floating_point() and not torch.isfinite(state[key]).all():
            raise ValueError(f"{name}: {key} holds NaN or infinite values")
