"""The baselines: agents that mix their models in every step of training. `python -m base_lines --help` explains."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from agents.lifecycle import initial_states, open_run, record, shares
from agents.local import LocalTrainer, load_agents_data, new_model
from data.batches import Batches
from data.datasets import Dataset, some_images
from experiments.checkpoints import State, check_state, digest, digest_of_all
from experiments.options import base_lines_parser
from experiments.parsing import parse_once, pick_device
from experiments.run_folder import RunFolder, circumstances
from experiments.scripts import run_script
from experiments.steps import settle, the_run
from merging.batch_norm import reestimate
from models import training
from network.processes import (
    Network,
    connect,
    is_launched,
    leave,
    local_device,
    rank,
)
from network.topology import Topology
from network.workers import follow_parent
from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step
from optimizers.registry import Baseline
from utils.memory import keep_freed_memory, memory_format
from utils.progress import progress
from utils.seeds import generator


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
        config["memory_layout"] = str(memory_format(device))  # the order of entries in an agent's memory
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


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    follow_parent()
    o = parse_once(base_lines_parser(), argv)
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
