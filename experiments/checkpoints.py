"""The agents' checkpoints: where they lie, what they were made with, and whether they fit."""

from __future__ import annotations

import hashlib
import re
from argparse import ArgumentParser
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from data.datasets import DATASETS
from experiments.options import MAIN, SHORT, TRAIN, Settings, names, silent, usual, variant
from experiments.parsing import as_typed
from merging.files import state_in
from network.wire import State
from storage.files import as_level, level, load_tensors, load_yaml, while_unchanged


def checkpoint_folder(o: Settings) -> Path:
    """The documented path of train.py's checkpoints for its options `o`."""
    init = "same" if o["init_seed"] else "diff"
    unusual = variant(o | dict.fromkeys(silent(o)), TRAIN)
    parts = [as_level(o["dataset"]), as_level(o["model"]), f"{init}_initialization", f"models_no{o['num_models']}",
             f"data_dist_{o['data_dist']}", f"num_epochs_{o['epochs']}", unusual, f"random_seed_{o['seed']}"]
    return Path(o["save_folder"]).joinpath(*map(level, filter(None, parts)))


# What `checkpoint_folder` makes, and nothing else: any folder above may be called `lr=0.1,seed=3`.
LEVELS = re.compile(r"/(?P<dataset>[^/]+)/(?P<model>[^/]+)/(?P<init_seed>same|diff)_initialization/"
                    r"models_no(?P<num_models>\d+)/data_dist_(?P<data_dist>[^/]+)/num_epochs_(?P<epochs>\d+)/"
                    r"(?:(?P<unusual>[^/]*=[^/]*)/)?random_seed_(?P<seed>\d+)$")


config_in = while_unchanged(load_yaml)


def describe(folder: Path, parser: ArgumentParser) -> dict[str, Any]:
    """What the checkpoints in `folder` were made with: its config.yaml, else what the documented path says.

    parser: train.py's. Raises ValueError for what could not have been given to it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--ckp {folder} is not a folder: give the one that train.py printed")
    said = {}
    if found := LEVELS.search(folder.resolve().as_posix()):
        said = found.groupdict() | {"init_seed": found["init_seed"] == "same"}
        known, long = usual(MAIN), {short: key for key, short in SHORT.items()}
        settings = (setting.partition("=") for setting in (said.pop("unusual") or "").split(","))
        if said["dataset"] not in DATASETS:  # a folder's or a file's name, of which a level of a path doesn't tell all
            del said["dataset"]
        said |= {long.get(key, key): value for key, _, value in settings if long.get(key, key) in known}
    config = folder / "config.yaml"
    made_with = config_in(config) if config.exists() else {}
    return as_typed(parser, said, f"the path {folder}") | as_typed(parser, made_with, str(config))


def inherit(options: dict[str, Any], made_with: dict[str, Any], source: str) -> None:
    """Fill `options` that were not given from what the checkpoint was made with.

    Raises ValueError when an option was given and differs: the agents would continue on other agents' data.
    """
    for key in ("dataset", "model"):
        theirs, ours = made_with.get(key), options[key]
        if theirs is not None and as_level(theirs) != as_level(ours):
            raise ValueError(f"--{key} {ours} contradicts {source}, which was made with {key}={theirs}")
    for key in names(lambda option: option.inherited):
        theirs = made_with.get(key)
        if options[key] is None:
            options[key] = theirs
        elif theirs is not None and options[key] != theirs and key not in names(lambda option: option.may_change):
            raise ValueError(f"--{key} {options[key]} contradicts {source}, which was made with {key}={theirs}: "
                             "leave the option out or give other checkpoints")


KINDS = (".pth", ".pt", ".safetensors")


def model_files(folder: Path, num_models: int, agents: Collection[int]) -> dict[int, Path]:
    """Where the models of `agents` are: in model_0.pth ... of exactly `num_models`, or in files of other KINDS.

    An agent that is here on its own may have a folder with nothing but its own model.
    """
    found: dict[int, Path] = {}
    for file in folder.glob("model_*"):
        if file.suffix in KINDS and (number := re.fullmatch(r"model_(\d+)", file.stem)):
            if other := found.get(int(number[1])):
                raise ValueError(f"{folder} holds {other.name} and {file.name}: keep one of them")
            found[int(number[1])] = file
    if found.keys() not in (set(range(num_models)), set(agents)):
        raise ValueError(f"--num_models {num_models}, but {folder} holds {len(found)} finished models (model_<i>.pth)")
    return {i: found[i] for i in agents}


def load_model(file: Path) -> State:
    """The model in a file, on the CPU."""
    return state_in(load_tensors(file), file)


def digest(state: State) -> str:
    """A short name for exactly this model."""
    content = hashlib.sha256()
    for key, value in state.items():
        content.update(key.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()[:12]


@while_unchanged
def digest_in(file: Path) -> str:
    """`digest` of the model in a file."""
    return digest(load_model(file))


def digest_of_all(digests: Mapping[int, str]) -> str:
    """A short name for all agents' models, from those of each."""
    return hashlib.sha256(" ".join(digests[i] for i in sorted(digests)).encode()).hexdigest()[:12]
