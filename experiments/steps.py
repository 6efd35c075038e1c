"""A run of base_lines.py: its options settled, where it is written, and whether it is finished."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

from experiments.options import BASE, Command, silent
from experiments.run_folder import run_folder
from experiments.settle import completed, matrices, pretraining, settle_options
from network.topology import Topology, make_topology
from optimizers import BASELINES


def settle(o: Command, agents: Collection[int]) -> tuple[dict, dict[int, Path], Topology]:
    """Fill in what follows from other options, and check what contradicts."""
    baseline = BASELINES[o["opt"]]
    if o["epochs"] % o["num_epochs"]:
        enough = math.ceil(o["epochs"] / o["num_epochs"]) * o["num_epochs"]
        raise ValueError(f"--epochs {o['epochs']} is no multiple of --num_epochs {o['num_epochs']}, the epochs between "
                         f"two evaluations: give --epochs {enough}, say")
    try:
        last_lr = o["lr"] * o["lr_decay"] ** (o["epochs"] - 1)
    except OverflowError:
        last_lr = math.inf
    if not math.isfinite(last_lr):
        raise ValueError(f"--lr_decay {o['lr_decay']}: the learning rate is beyond all numbers within {o['epochs']} "
                         "epochs")
    if o["momentum"] and not baseline.momentum:
        have = ", ".join(name for name, other in BASELINES.items() if other.momentum)
        raise ValueError(f"--momentum {o['momentum']}: {o['opt']} has none (these have: {have})")
    if o["amp"] == "fp16":
        raise ValueError("--amp fp16 needs its loss scaled, which the baselines don't do: use bf16")
    o["momentum"] = (0.9 if o["momentum"] is None else o["momentum"]) if baseline.momentum else None
    for other, one in BASELINES.items():
        for name in one.options.keys() - baseline.options.keys():
            if o[name] is not None:
                raise ValueError(f"--{name} {o[name]} belongs to --opt={other}, not to {o['opt']}")
    for name, default in baseline.options.items():
        o[name] = o[name] or default(o)
    o["merg_itr"], o["merg_itr_init"], o["training"], o["optim"] = o["epochs"] // o["num_epochs"], 0, True, "sgd"
    made_with, files = settle_options(o, agents)
    topology = make_topology(o["topology"], o["num_models"], seed=o["seed"])
    if topology.directed and not baseline.directed:
        able = ", ".join(name for name, other in BASELINES.items() if other.directed)
        raise ValueError(f"--topology {o['topology']} has one-way edges, over which {o['opt']} is not made to average: "
                         f"use {able}, or another topology")
    every_step = topology.schedule or (topology.pi,)
    if topology.directed and not (topology.is_connected and all((pi.diagonal() > 0).all() for pi in every_step)):
        raise ValueError(f"--topology {o['topology']}: on one-way edges every agent must reach every other and keep a "
                         "share of its own (pi[i][i] > 0), or push-sum divides by nothing")
    if o["local_steps"] > 1 and baseline.every_step:
        raise ValueError(f"--local_steps {o['local_steps']}: {o['opt']} has to exchange in every step")
    try:
        topology = baseline.graph(topology)
    except ValueError as error:
        raise ValueError(f"--opt {o['opt']}, --topology {o['topology']}: {error}") from None
    return made_with, files, topology


def the_run(o: Command, made_with: dict, topology: Topology) -> tuple[Path, dict, dict]:
    """Where this run is written, what its config.yaml says, and which of it matters."""
    config = {k: v for k, v in o.items() if k != "optim"}
    matter = config | dict.fromkeys(silent(config)) | pretraining(o, made_with)
    path = run_folder(o | {"epochs": o["num_epochs"]}, matter, BASE)
    return path, config | matrices(o["topology"], topology), matter


def finished(o: Command) -> tuple[Path, int] | None:
    """The folder and the last iteration of a run of these options that has nothing left to do. No image is read."""
    o = dict(o)  # what is settled here is settled once more where the run begins
    if o["overwrite"]:
        return None
    made_with, files, topology = settle(o, range(o["num_models"]))
    return completed(*the_run(o, made_with, topology), files)
