"""Agents in this process, made of a command line but for their data: what an iteration takes, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agents.local import LocalTrainer, ModelSettings, TrainSettings, new_model
from agents.merging import MergeSettings, MergingAgents
from agents.mixing import MixingAgents, MixSettings
from data.datasets import Dataset
from experiments.options import base_lines_parser, main_parser
from experiments.parsing import parse_once
from network.processes import OneProcess
from network.topology import make_topology

UNSAID = {"optim": "adam", "lr": 1e-3, "momentum": None, "weight_decay": 0.0, "model": "resnet20",
          "width_multiplier": 1, "norm": "batch", "loss": "cross_entropy", "adjust_tau": 1.0}


def agents_of(script: str, argv: Sequence[str], dataset: Dataset, device: torch.device) -> MergingAgents | MixingAgents:
    """The agents of `main` or `base_lines` with these arguments, from random models, on equal parts of the images."""
    o = vars(parse_once({"main": main_parser, "base_lines": base_lines_parser}[script](), list(argv)))
    o |= {key: value for key, value in UNSAID.items() if o.get(key) is None}
    dataset, agents = dataset.to(device), range(o["num_models"])
    parts = [part.numpy() for part in torch.arange(len(dataset.train)).chunk(len(agents))]
    model = ModelSettings.of(o)
    states = {i: {key: t.to(device) for key, t in new_model(model, dataset, seed=i).state_dict().items()}
              for i in agents}
    trainer = LocalTrainer(new_model(model, dataset, seed=0), dataset, TrainSettings.of(o), device)
    kind, settings = (MergingAgents, MergeSettings) if script == "main" else (MixingAgents, MixSettings)
    made = kind(settings.of(o), make_topology(o["topology"], len(agents)), OneProcess(len(agents)), trainer, parts,
                [np.arange(len(dataset.test))] * len(agents), states)
    if script == "base_lines":
        made.take_up(dict.fromkeys(agents))
    return made


def iterate(agents: MergingAgents | MixingAgents, iteration: int) -> None:
    """A merge and a training after it, or an epoch of steps."""
    if isinstance(agents, MergingAgents):
        agents.merge(iteration)
    agents.train(iteration)


def models_of(agents: MergingAgents | MixingAgents) -> dict[int, dict[str, Tensor]]:
    """Each agent's, on the CPU."""
    return {i: {key: t.cpu() for key, t in own["state"].items()} for i, own in agents.report(1).items()}
