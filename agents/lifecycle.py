"""What main.py and base_lines.py share of a run: how it starts, where it is written, and how it continues."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from agents.local import LocalTrainer, new_model
from experiments.checkpoints import State, check_state
from experiments.run_folder import METRICS, RunFolder, consensus_distance, record_agents
from experiments.settle import without_say
from merging.averaging import weighted_average
from network.processes import Network, is_launched, is_restart, launch
from storage.files import load_yaml
from utils.seeds import generator


def initial_states(o: Namespace, dataset, ckp: Path | None, loaded: dict[int, State],
                   agents: Collection[int]) -> dict[int, State]:
    """These agents' first models: the loaded checkpoints, checked, or random ones."""
    template = new_model(o, dataset, seed=0).state_dict()
    if o.randominit:
        seeds = {i: generator(o.seed, i if o.diffinit else 0, 0, "init").initial_seed() for i in agents}
        return {i: new_model(o, dataset, seed).state_dict() for i, seed in seeds.items()}
    for i, state in loaded.items():
        check_state(state, template, str(ckp / f"model_{i}.pth"))
    return {i: {key: state[key].to(tensor.dtype) for key, tensor in template.items()} for i, state in loaded.items()}


def open_run(o: Namespace, network: Network, path: Path, config: dict, matter: dict, **how: Any) -> RunFolder | None:
    """The run folder, at the writer. A group that its launcher has started again continues by itself."""
    if not network.is_writer:
        return None
    config |= {"launch": launch() if is_launched() else None}
    goes_on = is_restart() and load_yaml(path / "config.yaml").get("launch") == config["launch"]
    return RunFolder(path, config, silent=without_say(matter), resume=o.resume or goes_on,
                     overwrite=o.overwrite and not goes_on, tensorboard=o.tensorboard, **how)


def record(folder: RunFolder | None, network: Network, trainer: LocalTrainer, test_parts: list[np.ndarray],
           iteration: int, phase: str, began: float, mine: dict[int, dict]) -> dict[str, list]:
    """Gather what the agents have done and, at the writer, write it down with what concerns all of them.

    mine: for each agent of this process its `state`, `evaluation`, `stats` of its last local epoch (None: there was
    none), and columns of metrics.csv. Returns all agents' at the writer, as lists in their order; elsewhere {}.
    """
    on_cpu = {id(own["state"]): {k: t.cpu() for k, t in own["state"].items()} for own in mine.values()}
    everyone = network.collect({i: own | {"state": on_cpu[id(own["state"])]} for i, own in mine.items()})
    if not network.is_writer:
        return {}
    columns = {key: [everyone[i][key] for i in network.recorded] for key in everyone[network.recorded[0]]}
    states, evaluations, of_average, distance = columns["state"], columns["evaluation"], None, None
    if len(states) == len(test_parts):  # else of an agent on its own
        names = [name for name, _ in trainer.model.named_parameters()]
        distance, of_average = consensus_distance(states, names), evaluations[0]
        if any(state is not states[0] for state in states):
            trainer.model.load_state_dict(weighted_average(states, [1 / len(states)] * len(states)))
            of_average = trainer.evaluate(trainer.dataset.test)
    record_agents(folder, iteration, phase, network.recorded, evaluations, of_average, test_parts, began,
                  columns["stats"], consensus_distance=distance,
                  **{key: values for key, values in columns.items() if key in METRICS})
    return columns


def shares(network: Network, saved: dict | None) -> dict[int, dict | None] | None:
    """What each agent continues from, at the writer."""
    if not network.is_writer:
        return None
    if saved is None:
        return dict.fromkeys(network.recorded)
    if len(saved["states"]) != len(network.recorded):
        raise ValueError(f"the run's state.pt holds {len(saved['states'])} agents instead of {len(network.recorded)}: "
                         "restore it, or give --overwrite")
    alike = {key: saved[key] for key in ("iteration", "phase")}
    of_each = {key.removesuffix("s"): saved[key] for key in ("states", "samples", "steps", "memory", "orders")
               if key in saved}
    return {i: alike | {key: values[k] for key, values in of_each.items()} for k, i in enumerate(network.recorded)}
