"""The baselines: agents that mix their models in every step of training. `python -m base_lines --help` explains."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batches import Batches
from data.datasets import DATASETS, Dataset
from data.partition import PARTITIONS
from main import initial_states, settle_options, start_that_matters
from merging.averaging import weighted_average
from models import MODELS
from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step
from optimizers.cga import CGA_FORMS, CGA_SCOPES
from optimizers.registry import Baseline
from train import LocalTrainer, load_agents_data, new_model
from utils import training
from utils.checkpoint import digest
from utils.distributed import (
    BACKENDS,
    Network,
    connect,
    is_launched,
    is_restart,
    launch,
    leave,
    local_device,
    rank,
)
from utils.files import BASELINE_REFERENCE, circumstances, load_yaml
from utils.memory import keep_freed_memory
from utils.options import base_lines_parser, parse, pick_device
from utils.progress import progress
from utils.results import RunFolder, consensus_distance, record_agents, run_folder
from utils.scripts import run_script
from utils.seeds import generator
from utils.topology import DIRECTED, EXPS, TOPOLOGIES, Topology, make_topology

State = dict[str, Tensor]


@dataclass
class Fleet:
    """The agents of this process, the network that ties them to all the others, and how far they are."""

    o: Namespace
    baseline: Baseline
    topology: Topology
    network: Network
    trainer: LocalTrainer  # evaluates
    test_parts: list[np.ndarray]
    agents: dict[int, Agent]
    steps_per_epoch: int
    step: int = 0

    def train_epoch(self, epoch: int) -> dict[int, training.EpochStats]:
        """One epoch, 1 the first: as many steps for each agent."""
        o = self.o
        settings = Settings(o.lr * o.lr_decay ** (epoch - 1), o.momentum or 0.0, o.cga_form, o.cga_scope)
        for agent in self.agents.values():
            agent.forget_stats()
        for _ in progress(range(self.steps_per_epoch), f"epoch {epoch}", total=self.steps_per_epoch, unit="step"):
            pi = self.topology.weights(self.step)
            hoods = {i: neighbourhood(pi, i) for i in self.agents}
            take_step(self.baseline, self.agents, hoods, settings, self.network)
            self.step += 1
        try:
            return {i: agent.stats() for i, agent in self.agents.items()}
        except training.Diverged as error:
            raise training.Diverged(f"epoch {epoch}, {error}; the run folder keeps what was finished "
                                    "before") from None


def batch_stream(o: Namespace, dataset: Dataset, indices: np.ndarray, agent: int, start: int) -> Iterator:
    """An agent's batches from its step `start` on, pass after pass over its images, each in an order of its own."""

    def whole_pass(number: int) -> Batches:
        return Batches(dataset, dataset.train, indices, o.batch_size, shuffle=True, augment=True,
                       make_generator=lambda: generator(o.seed, agent, number, "pass"))

    done, skipped = divmod(start, len(whole_pass(1)))
    yield from itertools.islice(whole_pass(done + 1), skipped, None)
    for number in itertools.count(done + 2):
        yield from whole_pass(number)


def steps_of_an_epoch(train_parts: list[np.ndarray], batch_size: int) -> int:
    """The same for everybody: as many full batches as it takes for as many images as all agents have together.

    Agents with fewer images than the mean see them more often than once in an epoch, those with more not all of them.
    """
    return math.ceil(sum(map(len, train_parts)) / (len(train_parts) * batch_size))


def record(fleet: Fleet, folder: RunFolder | None, iteration: int, phase: str, began: float,
           stats: dict[int, training.EpochStats] | None, bytes_before: tuple[dict[int, int], dict[int, int]]) -> None:
    """Every process evaluates its agents; the writer evaluates their average, writes down and commits."""
    trainer, network = fleet.trainer, fleet.network
    mine = {}
    for i, agent in fleet.agents.items():
        state = training.snapshot(agent.flat.module)
        trainer.model.load_state_dict(state)
        evaluation = trainer.evaluate(trainer.dataset.test)
        mine[i] = {
            "state": {k: t.cpu() for k, t in state.items()}, "memory": {k: t.cpu() for k, t in agent.memory.items()},
            "evaluation": evaluation, "samples": agent.samples, "steps": agent.steps, "stats": stats and stats[i],
            "sent": network.sent[i] - bytes_before[0][i], "received": network.received[i] - bytes_before[1][i],
        }
    everyone = network.collect(mine)
    if not network.is_writer:
        return

    def column(key: str) -> list:
        return [everyone[i][key] for i in sorted(everyone)]

    states = column("state")
    trainer.model.load_state_dict(weighted_average(states, [1 / len(states)] * len(states)))
    of_average = trainer.evaluate(trainer.dataset.test)
    names = [name for name, _ in trainer.model.named_parameters()]
    record_agents(folder, iteration, phase, column("evaluation"), of_average, fleet.test_parts, began,
                  column("stats") if stats else None, consensus_distance=consensus_distance(states, names),
                  samples=column("samples"), steps=column("steps"), bytes_sent=column("sent"),
                  bytes_received=column("received"))
    if phase == "trained":
        folder.save_models("trained", states)
        folder.commit({"iteration": iteration, "phase": phase, "samples": column("samples"), "steps": column("steps"),
                       "states": states, "memory": column("memory")}, keep=False)


def train(fleet: Fleet, folder: RunFolder | None, finished: int) -> None:
    """Epochs, and after every --num_epochs of them an evaluation of all agents."""
    o, network = fleet.o, fleet.network
    for iteration in progress(range(finished + 1, o.merg_itr + 1), "iterations"):
        began, before = time.perf_counter(), (dict(network.sent), dict(network.received))
        for epoch in range((iteration - 1) * o.num_epochs + 1, iteration * o.num_epochs + 1):
            stats = fleet.train_epoch(epoch)
        record(fleet, folder, iteration, "trained", began, stats, before)


def settle(o: Namespace) -> tuple[Path | None, dict, list[State], Topology]:
    """Fill in what follows from other options, and check what contradicts."""
    baseline = BASELINES[o.opt]
    if o.epochs % o.num_epochs:
        raise ValueError(f"--epochs {o.epochs} is no multiple of --num_epochs {o.num_epochs}, the epochs between two "
                         f"evaluations: give --epochs {math.ceil(o.epochs / o.num_epochs) * o.num_epochs}, say")
    if o.momentum and not baseline.momentum:
        have = ", ".join(name for name, other in BASELINES.items() if other.momentum)
        raise ValueError(f"--momentum {o.momentum}: {o.opt} has none (these have: {have})")
    if o.amp == "fp16":
        raise ValueError("--amp fp16 needs its loss scaled, which the baselines don't do: use bf16")
    o.momentum = (0.9 if o.momentum is None else o.momentum) if baseline.momentum else None
    if o.opt == "CGA":
        o.cga_form = o.cga_form or "paper"
        o.cga_scope = o.cga_scope or ("tensor" if o.cga_form == "authors" else "model")
    elif o.cga_form or o.cga_scope:
        raise ValueError(f"--cga_form and --cga_scope belong to --opt=CGA, not to {o.opt}")
    o.merg_itr, o.merg_itr_init, o.training, o.optim = o.epochs // o.num_epochs, 0, True, "sgd"
    ckp, made_with, loaded = settle_options(o)
    topology = make_topology(o.topology, o.num_models, seed=o.seed)
    if topology.directed and not baseline.directed:
        able = ", ".join(name for name, other in BASELINES.items() if other.directed)
        raise ValueError(f"--topology {o.topology} has one-way edges, over which {o.opt} is not made to average: "
                         f"use {able}, or another topology")
    if topology.directed and not (topology.is_connected and all(topology.pi.diagonal() > 0)):
        raise ValueError(f"--topology {o.topology}: on one-way edges every agent must reach every other and keep a "
                         "share of its own (pi[i][i] > 0), or push-sum divides by nothing")
    return ckp, made_with, loaded, topology


def run(o: Namespace, network: Network, device: torch.device, command: str) -> Path:
    """All of it, in every process alike; the first one writes."""

    def prepare():
        ckp, made_with, loaded, topology = settle(o)
        dataset, train_parts, test_parts = load_agents_data(o, device)
        states = initial_states(o, dataset, ckp, loaded)
        trainer = LocalTrainer(new_model(o, dataset), dataset, o, device)
        return made_with, states, topology, train_parts, test_parts, trainer

    def open_folder():
        if not network.is_writer:
            return None
        config = {k: v for k, v in vars(o).items() if k != "optim"} | circumstances(command)
        config |= {"initial_models": digest(states), "processes": o.num_models if is_launched() else 1,
                   "launch": launch() if is_launched() else None,
                   "memory_layout": str(training.memory_format(device))}  # the order of entries in an agent's memory
        matter = {**config, **start_that_matters(o, made_with)}
        if Path(o.topology).suffix.lower() == ".json":
            config["pi"] = topology.pi.tolist()  # the file may change
        free = {"epochs", *(key for key, value in matter.items() if value is None)}
        path = run_folder(vars(o) | {"epochs": o.num_epochs}, matter, BASELINE_REFERENCE)
        goes_on = is_restart() and load_yaml(path / "config.yaml").get("launch") == config["launch"]
        return RunFolder(path, config, free=free, resume=o.resume or goes_on, start=0,
                         overwrite=o.overwrite and not goes_on, tensorboard=o.tensorboard)

    made_with, states, topology, train_parts, test_parts, trainer = network.together(prepare)
    folder = network.together(open_folder)
    with folder or contextlib.nullcontext():
        if network.is_writer and not topology.is_connected and o.topology != "disconnected":
            print(f"note: --topology {o.topology} is not connected: its parts never hear of each other")
        saved = network.together(folder.load if folder else lambda: None)
        last = network.deal(_shares(saved, folder, states))
        fleet = Fleet(o, BASELINES[o.opt], topology, network, trainer, test_parts, {},
                      steps_of_an_epoch(train_parts, o.batch_size))
        finished = _wake(fleet, last, train_parts)
        if finished >= o.merg_itr:
            if network.is_writer:
                print(f"finished before: {finished * o.num_epochs} epochs are done (--overwrite starts afresh)")
        else:
            if finished and network.is_writer:
                print(f"continuing after epoch {finished * o.num_epochs} of {o.epochs}")
            if not finished:
                nothing = dict.fromkeys(network.agents, 0)
                record(fleet, folder, 0, "initial", time.perf_counter(), None, (nothing, nothing))
            train(fleet, folder, finished)
    return folder.path if folder else Path()


def _shares(saved: dict | None, folder: RunFolder | None, states: list[State]) -> dict[int, dict] | None:
    """What each agent begins with, at the writer."""
    if folder is None:
        return None
    if saved is None:
        return {i: {"iteration": 0, "state": state, "memory": {}, "samples": 0, "steps": 0}
                for i, state in enumerate(states)}
    return {i: {"iteration": saved["iteration"], "state": state, "memory": saved["memory"][i],
                "samples": saved["samples"][i], "steps": saved["steps"][i]} for i, state in enumerate(saved["states"])}


def _wake(fleet: Fleet, last: dict[int, dict], train_parts: list[np.ndarray]) -> int:
    """Make this process's agents from where each was last; returns the iteration they have finished."""
    o, trainer = fleet.o, fleet.trainer

    def flat_model() -> FlatModel:
        return FlatModel(copy.deepcopy(trainer.model), torch.compile if o.compile else lambda module: module)

    scratch = flat_model() if o.opt == "CGA" else None
    for i, share in last.items():
        flat = flat_model()
        flat.module.load_state_dict(share["state"])
        agent = Agent(i, flat, batch_stream(o, trainer.dataset, train_parts[i], i, share["steps"]), amp=o.amp,
                      mix_buffers=o.mix_buffers, weight_decay=o.weight_decay, seed=o.seed, scratch=scratch)
        agent.memory = {k: t.to(trainer.device) for k, t in share["memory"].items()}
        agent.samples, agent.steps = share["samples"], share["steps"]
        fleet.agents[i], fleet.step = agent, share["steps"]
        finished = share["iteration"]
    return finished


def make_parser() -> ArgumentParser:
    return base_lines_parser(DATASETS, MODELS, PARTITIONS, BASELINES, [*TOPOLOGIES, *DIRECTED], EXPS, CGA_FORMS,
                             CGA_SCOPES, BACKENDS)


def parse_options(argv: list[str] | None) -> Namespace:
    """Under a launcher only the first process says what is wrong with the command line."""
    parser = make_parser()
    if rank() == 0:
        return parse(parser, argv)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return parse(parser, argv)
    except SystemExit:
        time.sleep(2)  # the launcher ends all when one ends: let the first one speak
        raise


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    o = parse_options(argv)
    command = shlex.join(sys.argv if argv is None else ["base_lines.py", *argv])

    def work() -> Path:
        device = pick_device(local_device(o.device))
        with connect(o.num_models, device, o.backend, o.timeout) as network:
            return run(o, network, device, command)

    code = run_script(work, "results", "give the same command with --resume (without --overwrite)", rank())
    if code:
        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
