"""What main.py and base_lines.py share of a run: how it starts, where it is written, and how it continues."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from merging.averaging import weighted_average
from models import infer_width
from train import LocalTrainer, fill_defaults, new_model
from train import make_parser as train_parser
from utils.checkpoint import State, check_state, describe, digest, digest_of_all, inherit, load_states
from utils.distributed import Network, is_launched, is_restart, launch
from utils.files import circumstances, load_yaml
from utils.results import METRICS, RunFolder, committed, consensus_distance, contradictions, record_agents
from utils.seeds import generator
from utils.topology import DIRECTED, EXPS, TOPOLOGIES, Topology


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


def settle_options(o: Namespace, agents: Collection[int]) -> tuple[Path | None, dict, dict[int, State]]:
    """Fill in what follows from the checkpoint, and check what contradicts.

    Returns its folder, its description and the models of `agents`.
    """
    if o.exp is not None and o.topology is not None:
        raise ValueError(f"--exp {o.exp} and --topology {o.topology} both name the topology: give one")
    o.topology = o.topology or EXPS[o.exp or 1]
    made_with, loaded, ckp = {}, {}, Path(o.ckp) if o.ckp is not None else None
    if o.merg_itr_init >= o.merg_itr:
        raise ValueError(f"--merg_itr_init {o.merg_itr_init} leaves nothing to do of --merg_itr {o.merg_itr}")
    if o.diffinit and not o.randominit:
        raise ValueError("--diffinit belongs to --randominit: the models come from --ckp here")
    if ckp is None and not o.randominit:
        raise ValueError("--ckp is missing: give the folder that train.py printed, or --randominit")
    if ckp is not None:  # random models too learn on the data that the checkpoint's would
        made_with = describe(ckp, train_parser())
        inherit(vars(o), made_with, f"--ckp {ckp}")
        if o.randominit and made_with.get("num_models", o.num_models) != o.num_models:
            raise ValueError(f"--num_models {o.num_models}: {ckp} deals its data to {made_with['num_models']} agents")
        if o.partition_seed is None:
            o.partition_seed = made_with.get("seed")
        if not o.randominit:
            loaded = load_states(ckp, o.num_models, agents)
            if o.width_multiplier is None:
                o.width_multiplier = infer_width(o.model, next(iter(loaded.values())))
    fill_defaults(o)
    return ckp, made_with, loaded


def start_that_matters(o: Namespace, made_with: dict) -> dict:
    """What of the data and of the first models changes a run's results and is not a level of its path already."""
    return {
        "partition_seed": o.partition_seed if o.partition_seed != o.seed else None,
        "phase": o.phase if o.data_dist == "non-iid-PF" and o.phase != "finetune" else None,
    } | ({} if o.randominit else {
        "pretrain_epochs": made_with.get("epochs"),
        "pretrain_seed": made_with["seed"] if made_with.get("seed") not in (None, o.seed) else None,
        "pretrain_init": "same" if made_with.get("init_seed") else None,
    })


def free_options(matter: dict) -> set[str]:
    """Those that have no say in this run."""
    return {key for key, value in matter.items() if value is None}


def is_complete(path: Path, config: dict, matter: dict, loaded: dict[int, State]) -> bool:
    """Whether a folder holds just this run, from the `loaded` models on, with nothing left to do."""
    if loaded:
        config = config | {"first_models": digest_of_all({i: digest(state) for i, state in loaded.items()})}
    old, state, metrics = load_yaml(path / "config.yaml"), committed(path), path / "metrics.csv"
    if not (old and state and metrics.exists()) or contradictions(old, config, free_options(matter)):
        return False
    # Random models are the same as then if torch is.
    return (state["iteration"] >= config["merg_itr"] and state["metrics_bytes"] == metrics.stat().st_size
            and bool(loaded or old.get("versions") == circumstances("")["versions"]))


def open_run(o: Namespace, network: Network, path: Path, config: dict, matter: dict, **how: Any) -> RunFolder | None:
    """The run folder, at the writer. A group that its launcher has started again continues by itself."""
    if not network.is_writer:
        return None
    config |= {"launch": launch() if is_launched() else None}
    goes_on = is_restart() and load_yaml(path / "config.yaml").get("launch") == config["launch"]
    return RunFolder(path, config, free=free_options(matter), resume=o.resume or goes_on,
                     overwrite=o.overwrite and not goes_on, tensorboard=o.tensorboard, **how)


def matrices(name: str, topology: Topology) -> dict[str, list]:
    """For config.yaml, the mixing matrices of a topology that was read from files, as these may change."""
    if name in TOPOLOGIES | DIRECTED:
        return {}
    return {"pi": [pi.tolist() for pi in topology.schedule] or topology.pi.tolist()}


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
