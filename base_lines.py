"""The baselines: agents that mix their models in every step of training. `python -m base_lines --help` explains."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.batches import Batches
from data.datasets import DATASETS, Dataset, some_images
from data.partition import PARTITIONS
from lifecycle import (
    initial_states,
    is_complete,
    matrices,
    open_run,
    record,
    settle_options,
    shares,
    start_that_matters,
)
from merging.batch_norm import reestimate
from models import MODELS
from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step
from optimizers.cga import CGA_FORMS, CGA_SCOPES
from optimizers.registry import Baseline
from train import LocalTrainer, load_agents_data, new_model
from utils import training
from utils.checkpoint import State, check_state, digest, digest_of_all
from utils.distributed import (
    BACKENDS,
    Network,
    connect,
    is_launched,
    leave,
    local_device,
    rank,
)
from utils.files import BASELINE_REFERENCE, circumstances
from utils.memory import keep_freed_memory
from utils.options import base_lines_parser, parse_once, pick_device
from utils.progress import progress
from utils.results import RunFolder, run_folder
from utils.scripts import run_script
from utils.seeds import generator
from utils.siblings import follow_parent
from utils.topology import DIRECTED, EXPS, TOPOLOGIES, Topology, make_topology


@dataclass
class Fleet:
    """The agents of this process, the network that ties them to all the others, and how far they are."""

    o: Namespace
    baseline: Baseline
    topology: Topology
    network: Network
    trainer: LocalTrainer  # evaluates
    train_parts: list[np.ndarray]
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

    def as_evaluated(self, i: int, state: State, iteration: int) -> State:
        """Agent i's model with the BatchNorm statistics of --eval_bn; all other tensors are those of `state`."""
        o, dataset = self.o, self.trainer.dataset
        if o.eval_bn == "running":
            return state
        agent = i if o.eval_bn == "local" else None
        indices = some_images(dataset.train, self.train_parts, agent, o.bn_samples,
                              generator(o.seed, agent or 0, iteration, "sample"))
        return reestimate(self.trainer.model, state, Batches(
            dataset, dataset.train, indices, o.batch_size, shuffle=True,
            make_generator=lambda: generator(o.seed, agent or 0, iteration, "BatchNorm")))


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


def record_and_commit(fleet: Fleet, folder: RunFolder | None, iteration: int, phase: str, began: float,
                      stats: dict[int, training.EpochStats], sent: dict[int, int], received: dict[int, int]) -> None:
    """Every process evaluates its agents; the writer writes down and commits. sent, received: bytes until `began`."""
    trainer, network = fleet.trainer, fleet.network
    mine = {}
    for i, agent in fleet.agents.items():
        running = training.snapshot(agent.flat.module)
        state = fleet.as_evaluated(i, running, iteration)
        trainer.model.load_state_dict(state)
        mine[i] = {
            "state": state, "running": {k: t.cpu() for k, t in running.items() if t is not state[k]},
            "memory": {k: t.cpu() for k, t in agent.memory.items()},
            "evaluation": trainer.evaluate(trainer.dataset.test), "samples": agent.samples, "steps": agent.steps,
            "stats": stats.get(i), "bytes_sent": network.sent[i] - sent[i],
            "bytes_received": network.received[i] - received[i],
        }
    last = record(folder, network, trainer, fleet.test_parts, iteration, phase, began, mine)
    if folder and phase == "trained":
        folder.save_models("trained", dict(enumerate(last["state"])))
        folder.commit({"iteration": iteration, "phase": phase, "samples": last["samples"], "steps": last["steps"],
                       "states": [state | own for state, own in zip(last["state"], last["running"], strict=True)],
                       "memory": last["memory"]}, keep=False)


def train(fleet: Fleet, folder: RunFolder | None, finished: int) -> None:
    """Epochs, and after every --num_epochs of them an evaluation of all agents."""
    o, network = fleet.o, fleet.network
    for iteration in progress(range(finished + 1, o.merg_itr + 1), "iterations"):
        began, sent, received = time.perf_counter(), dict(network.sent), dict(network.received)
        for epoch in range((iteration - 1) * o.num_epochs + 1, iteration * o.num_epochs + 1):
            stats = fleet.train_epoch(epoch)
        record_and_commit(fleet, folder, iteration, "trained", began, stats, sent, received)


def settle(o: Namespace, agents: Collection[int]) -> tuple[Path | None, dict, dict[int, State], Topology]:
    """Fill in what follows from other options, and check what contradicts."""
    baseline = BASELINES[o.opt]
    if o.epochs % o.num_epochs:
        raise ValueError(f"--epochs {o.epochs} is no multiple of --num_epochs {o.num_epochs}, the epochs between two "
                         f"evaluations: give --epochs {math.ceil(o.epochs / o.num_epochs) * o.num_epochs}, say")
    try:
        last_lr = o.lr * o.lr_decay ** (o.epochs - 1)
    except OverflowError:
        last_lr = math.inf
    if not math.isfinite(last_lr):
        raise ValueError(f"--lr_decay {o.lr_decay}: the learning rate is beyond all numbers within {o.epochs} epochs")
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
    ckp, made_with, loaded = settle_options(o, agents)
    topology = make_topology(o.topology, o.num_models, seed=o.seed)
    if topology.directed and not baseline.directed:
        able = ", ".join(name for name, other in BASELINES.items() if other.directed)
        raise ValueError(f"--topology {o.topology} has one-way edges, over which {o.opt} is not made to average: "
                         f"use {able}, or another topology")
    every_step = topology.schedule or (topology.pi,)
    if topology.directed and not (topology.is_connected and all((pi.diagonal() > 0).all() for pi in every_step)):
        raise ValueError(f"--topology {o.topology}: on one-way edges every agent must reach every other and keep a "
                         "share of its own (pi[i][i] > 0), or push-sum divides by nothing")
    return ckp, made_with, loaded, topology


def the_run(o: Namespace, made_with: dict, topology: Topology) -> tuple[Path, dict, dict]:
    """Where this run is written, what its config.yaml says, and which of it matters."""
    config = {k: v for k, v in vars(o).items() if k != "optim"}
    matter = {**config, **start_that_matters(o, made_with), "epochs": None,  # a run may be made longer
              "bn_samples": None if o.eval_bn == "running" else o.bn_samples}
    path = run_folder(vars(o) | {"epochs": o.num_epochs}, matter, BASELINE_REFERENCE)
    return path, config | matrices(o.topology, topology), matter


def is_finished(o: Namespace) -> bool:
    """Whether a run of these options has nothing left to do, so that a sweep needn't start it."""
    if o.overwrite:
        return False
    _, made_with, loaded, topology = settle(o, range(o.num_models))
    return is_complete(*the_run(o, made_with, topology), loaded)


def run(o: Namespace, network: Network, device: torch.device, command: str) -> Path:
    """All of it, in every process alike; the first one writes."""

    def prepare():
        ckp, made_with, loaded, topology = settle(o, network.agents)
        dataset, train_parts, test_parts = load_agents_data(o, device)
        states = initial_states(o, dataset, ckp, loaded, network.agents)
        trainer = LocalTrainer(new_model(o, dataset), dataset, o, device)
        return made_with, states, topology, train_parts, test_parts, trainer

    def open_folder():
        path, config, matter = the_run(o, made_with, topology)
        config |= circumstances(command) | {
            "processes": o.num_models if is_launched() else 1, "first_models": digest_of_all(digests)}
        config["memory_layout"] = str(training.memory_format(device))  # the order of entries in an agent's memory
        return open_run(o, network, path, config, matter, start=0)

    made_with, states, topology, train_parts, test_parts, trainer = network.together(prepare)
    digests = network.collect({i: digest(state) for i, state in states.items()})
    folder = network.together(open_folder)
    with folder or contextlib.nullcontext():
        if folder and not topology.is_connected and o.topology != "disconnected":
            print(f"note: --topology {o.topology} is not connected: its parts never hear of each other")
        saved = network.together(lambda: shares(network, folder.load() if folder else None))
        last = network.deal(saved)
        fleet = Fleet(o, BASELINES[o.opt], topology, network, trainer, train_parts, test_parts, {},
                      steps_of_an_epoch(train_parts, o.batch_size))
        finished = network.together(lambda: _wake(fleet, states, last))
        if finished < o.merg_itr:
            if finished and folder:
                print(f"continuing after epoch {finished * o.num_epochs} of {o.epochs}")
            if not finished:
                nothing = dict.fromkeys(network.agents, 0)
                record_and_commit(fleet, folder, 0, "initial", time.perf_counter(), {}, nothing, nothing)
            train(fleet, folder, finished)
        elif folder:
            print(f"finished before: {finished * o.num_epochs} epochs are done (--overwrite starts afresh)")
    return folder.path if folder else Path()


def _wake(fleet: Fleet, states: dict[int, State], last: dict[int, dict | None]) -> int:
    """Make this process's agents from their first `states` or where each was last; the iteration they have finished."""
    o, trainer, finished = fleet.o, fleet.trainer, 0

    def flat_model() -> FlatModel:
        return FlatModel(copy.deepcopy(trainer.model), torch.compile if o.compile else lambda module: module)

    scratch = flat_model() if o.opt == "CGA" else None
    for i, share in last.items():
        flat = flat_model()
        if share:
            check_state(share["state"], flat.module.state_dict(), f"agent {i}'s model in the run's state.pt")
        flat.module.load_state_dict(share["state"] if share else states[i])
        batches = batch_stream(o, trainer.dataset, fleet.train_parts[i], i, share["step"] if share else 0)
        agent = Agent(i, flat, batches, amp=o.amp, mix_buffers=o.mix_buffers, weight_decay=o.weight_decay, seed=o.seed,
                      scratch=scratch)
        if share:
            agent.memory = {k: t.to(trainer.device) for k, t in share.get("memory", {}).items()}
            if any(t.shape not in ((len(flat.gradient),), (len(agent.shared) + 1,)) for t in agent.memory.values()):
                raise ValueError(f"what agent {i} keeps from step to step in the run's state.pt is of another model")
            agent.samples, agent.steps = share["sample"], share["step"]
            fleet.step, finished = share["step"], share["iteration"]
        fleet.agents[i] = agent
    return finished


def make_parser() -> ArgumentParser:
    return base_lines_parser(DATASETS, MODELS, PARTITIONS, BASELINES, [*TOPOLOGIES, *DIRECTED], EXPS, CGA_FORMS,
                             CGA_SCOPES, BACKENDS)


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    follow_parent()
    o = parse_once(make_parser(), argv)
    command = shlex.join(sys.argv if argv is None else ["base_lines.py", *argv])

    def work() -> Path:
        device = pick_device(local_device(o.device))
        with connect(o.num_models, device, o.backend, o.timeout, one_each=True) as network:
            return run(o, network, device, command)

    code = run_script(work, "results", "give the same command with --resume (without --overwrite)", rank())
    if code:
        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
