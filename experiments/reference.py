"""What a path says of a run's options, and what a config.yaml says of the machine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Options that change results, with the paper's values. A path names those that differ from this table; it is frozen,
# so that a later change of a default never makes an old folder mean something else.
REFERENCE = {
    "width_multiplier": 8, "train_samples": 0, "test_samples": 0, "holdout": 0, "alpha": None, "partition_seed": None,
    "phase": None, "imgntdir": "tiny-imagenet-200",
    "batch_size": 100, "optim": "adam", "lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "amp": "none",
    "match_data": "all", "match_samples": 0, "match_augment": True, "match_at": "last", "bn_reset": "both",
    "pretrain_epochs": 100, "pretrain_seed": None, "pretrain_init": "diff",
    "wire": "fp32", "link_failure": 0.0, "agent_failure": 0.0, "exchanged_by": None, "staleness": 0,
    "match_prior": "none", "root": None, "robust": "none", "max_distance": 10.0,
}
OF_MERGES = ("optim", "match_data", "match_samples", "match_augment", "match_at", "bn_reset", "wire", "link_failure",
             "agent_failure", "exchanged_by", "staleness", "match_prior", "root", "robust",
             "max_distance")
BASELINE_REFERENCE = {key: value for key, value in REFERENCE.items() if key not in OF_MERGES} | {
    "lr": 0.01, "lr_decay": 0.981, "momentum": 0.9, "mix_buffers": True, "cga_form": "paper",
    "cga_scope": "model", "eval_bn": "running", "bn_samples": 0,
}
# Options that are gone, with the value that all runs have now: older run folders name them.
RETIRED = {"align": "in_turn", "align_every": 0}
ALONE = "NONE"  # instead of a merge method: agents train and never merge
LOCAL_TRAINING = ("epochs", "optim", "lr", "momentum", "weight_decay", "amp")
SHORT = {"width_multiplier": "width"}


def circumstances(command: str) -> dict[str, Any]:
    """What config.yaml says of the machine: command line, versions and threads."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    return {"command": command, "versions": versions, "num_threads": torch.get_num_threads()}


def variant(options: dict[str, Any], reference: dict[str, Any] = REFERENCE) -> str:
    """'width=1,alpha=0.5' for the options that differ from the reference table; '' if none does."""
    if options.get("imgntdir"):  # the folder's name says which data set it is, not where it lies
        options = options | {"imgntdir": Path(options["imgntdir"]).resolve().name}
    return ",".join(
        f"{SHORT.get(key, key)}={options[key]}"
        for key, usual in reference.items() if key in options and options[key] not in (None, usual)
    )
