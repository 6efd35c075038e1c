"""Agents in this process, made of a command line but for their data: what an iteration takes, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.local import LocalTrainer, ModelSettings, TrainSettings, new_model
from agents.merging import MergeSettings, MergingAgents
from agents.mixing import MixingAgents, MixSettings
from agents.run import FirstModels
from data.datasets import Dataset
from experiments.merges import topology_to_merge_over
from experiments.options import base_lines_parser, main_parser
from experiments.parsing import parse_once
from experiments.settle import settle_options
from experiments.steps import settle
from network.processes import OneProcess


def agents_of(script: str, argv: Sequence[str], dataset: Dataset, device: torch.device) -> MergingAgents | MixingAgents:
    """The agents of `main` or `base_lines` with these arguments, from different random models, on equal parts of the
    images."""
    o = vars(parse_once({"main": main_parser, "base_lines": base_lines_parser}[script](), list(argv)))
    agents = range(o["num_models"])
    if script == "main":
        settle_options(o, agents)
        topology = topology_to_merge_over(o)
        kind, settings = MergingAgents, MergeSettings.of(o)
    else:
        *_, topology = settle(o, agents)
        kind, settings = MixingAgents, MixSettings.of(o)
    dataset, model = dataset.to(device), ModelSettings.of(o)
    first = FirstModels(randominit=True, diffinit=True, seed=o["seed"]).make(model, dataset, agents)
    made = kind(settings, topology, OneProcess(len(agents)),
                LocalTrainer(new_model(model, dataset), dataset, TrainSettings.of(o), device),
                [part.numpy() for part in torch.arange(len(dataset.train)).chunk(len(agents))],
                [np.arange(len(dataset.test))] * len(agents),
                {i: {key: t.to(device) for key, t in state.items()} for i, state in first.items()})
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


def evaluated(agents: MergingAgents | MixingAgents, iteration: int) -> dict[int, dict[str, Any]]:
    """What each agent reports after an iteration, with its model's `evaluation`."""
    reports = agents.report(iteration)
    found = agents.evaluate({own["model"]: own["state"] for own in reports.values()})
    return {i: own | {"evaluation": found[own["model"]]} for i, own in reports.items()}
