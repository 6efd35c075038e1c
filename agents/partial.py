"""The state of an agent whose training on its own isn't finished."""

from __future__ import annotations

from pathlib import Path
from types import NoneType

import torch
from torch import Tensor, nn

from merging.files import check_state
from models import training
from storage.files import load_state, mismatch, save_state

PARTIAL = {"epoch": int, "model": {str: Tensor}, "optimizer": {"state": dict, "param_groups": [dict]},
           "scaler": (dict, NoneType)}


def leave(file: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer,
          scaler: torch.amp.GradScaler | None) -> None:
    """Write down what was reached after so many epochs."""
    save_state(file, {"epoch": epoch, "model": training.snapshot(model), "optimizer": optimizer.state_dict(),
                      "scaler": scaler.state_dict() if scaler is not None else None})


def take_up(file: Path, epochs: int, model: nn.Module, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler | None) -> int:
    """Bring model, optimiser and scaler to where `file` was left, if it is there; the epoch (of `epochs`) it was after.

    Raises ValueError, before any of them is changed, for what isn't such a state.
    """
    if not file.exists():
        return 0
    saved = load_state(file, PARTIAL)
    check_state(saved["model"], model.state_dict(), str(file))
    wrong = training.misfit(optimizer, saved["optimizer"])
    if scaler is not None:
        wrong = wrong or mismatch(saved["scaler"], {key: type(value) for key, value in scaler.state_dict().items()},
                                  "its scaler")
    if not 0 < saved["epoch"] <= epochs:
        wrong = f"its epoch is {saved['epoch']}"
    if wrong:
        raise ValueError(f"{file} is not of this training ({wrong}): delete it to train the agent from the start")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if scaler is not None:
        scaler.load_state_dict(saved["scaler"])
    return saved["epoch"]
