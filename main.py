"""Agents merge over a topology and train again, iteration by iteration. `python -m main --help` explains."""

from __future__ import annotations

import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data.batches import Batches
from data.datasets import DATASETS, class_balanced
from data.partition import PARTITIONS
from merging import METHODS, merge
from merging.averaging import weighted_average
from merging.permutation import PermutationSpec, derive_spec
from models import MODELS, infer_width
from train import LocalTrainer, fill_defaults, load_agents_data, new_model
from utils import training
from utils.checkpoint import check_state, describe, digest, inherit, load_states
from utils.files import circumstances
from utils.memory import keep_freed_memory
from utils.options import main_parser, parse, pick_device
from utils.progress import progress
from utils.results import RunFolder, consensus_distance, record_agents, run_folder
from utils.scripts import run_script
from utils.seeds import generator
from utils.topology import EXPS, TOPOLOGIES, Topology, make_topology

State = dict[str, torch.Tensor]
ALONE = "NONE"  # the reference line: agents train and never merge


@dataclass
class Fleet:
    """All agents of a run in one process: their data, their models and what they have done so far."""

    o: Namespace
    topology: Topology
    trainer: LocalTrainer
    train_parts: list[np.ndarray]
    test_parts: list[np.ndarray]
    states: list[State]
    samples: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    @property
    def weights(self) -> np.ndarray:
        return np.eye(self.o.num_models) if self.o.opt == ALONE else self.topology.pi

    def matching_batches(self, indices: np.ndarray, agent: int, iteration: int) -> Batches:
        """The images that matching and BatchNorm re-estimation read in this iteration, the same for all models."""
        o, dataset = self.o, self.trainer.dataset
        if 0 < o.match_samples < len(indices):
            labels = dataset.train.labels.cpu().numpy()[indices]
            indices = indices[class_balanced(labels, o.match_samples, generator(o.seed, agent, iteration, "sample"))]
        return Batches(dataset, dataset.train, indices, o.batch_size, shuffle=True, augment=o.match_augment,
                       make_generator=lambda: generator(o.seed, agent, iteration, "match"))

    def merge(self, iteration: int, stats: list[dict]) -> list[State]:
        """x_i <- sum_j w_ij P_ij(x_j) for every agent i. `stats` gets a row for all that was matched."""
        o = self.o
        if o.match_data == "all":
            data = {"batches": self.matching_batches(np.sort(np.concatenate(self.train_parts)), 0, iteration)}
        else:
            data = {"local_batches": [self.matching_batches(part, i, iteration)
                                      for i, part in enumerate(self.train_parts)]}
        try:
            return merge(self.states, self.weights, method="WA" if o.opt == ALONE else o.opt, model=self.trainer.model,
                         spec=self.spec, bn_reset=o.bn_reset, match_at=o.match_at,
                         match_memory=int(o.match_memory * 2**30), stats=stats, **data)
        except ValueError as error:
            raise ValueError(f"iteration {iteration}: {error}") from error

    @cached_property
    def spec(self) -> PermutationSpec | None:
        """The permutation groups, for the methods that permute."""
        if self.o.opt in (ALONE, "WA"):
            return None
        dataset = self.trainer.dataset
        example = torch.zeros(2, dataset.in_channels, dataset.image_size, dataset.image_size)
        return derive_spec(new_model(self.o, dataset), example)

    def train(self, iteration: int) -> list[training.EpochStats]:
        """E local epochs of every agent with a fresh optimiser; the figures are the last epoch's."""
        stats = []
        for i in progress(range(self.o.num_models), f"iteration {iteration}: training", unit="agent"):
            self.trainer.model.load_state_dict(self.states[i])
            optimizer, scaler = self.trainer.fresh_optimizer()
            last = training.EpochStats(math.nan, math.nan, 0, 0)
            for epoch in range(1, self.o.epochs + 1):
                try:
                    last = self.trainer.epoch(self.train_parts[i], (i, iteration, f"local epoch {epoch}"),
                                              optimizer, scaler)
                except training.Diverged as error:
                    raise training.Diverged(f"agent {i}, iteration {iteration}: {error}; the run folder keeps what was "
                                            "finished before") from None
                self.samples[i] += last.samples
                self.steps[i] += last.steps
            self.states[i] = training.snapshot(self.trainer.model)
            stats.append(last)
        return stats

    def evaluate(self, states: list[State]) -> list[training.Evaluation]:
        """Each distinct model once over the test set."""
        seen: dict[int, training.Evaluation] = {}
        for state in progress(states, "evaluation", unit="agent"):
            if id(state) not in seen:
                self.trainer.model.load_state_dict(state)
                seen[id(state)] = self.trainer.evaluate(self.trainer.dataset.test)
        return [seen[id(state)] for state in states]

    def bytes_exchanged(self) -> list[int]:
        """What each agent sends in a merge, and as the graph is undirected receives: its model to each neighbour."""
        size = sum(t.numel() * t.element_size() for t in self.states[0].values())
        return [size * int(np.count_nonzero(np.delete(row, i))) for i, row in enumerate(self.weights)]


def record(folder: RunFolder, fleet: Fleet, iteration: int, phase: str, states: list[State], began: float,
           stats: list[training.EpochStats] | None = None) -> None:
    """Evaluate all models and their average, and write the figures down."""
    n = fleet.o.num_models
    average = states[0] if all(s is states[0] for s in states) else weighted_average(states, [1 / n] * n)
    *evaluations, of_average = fleet.evaluate([*states, average])
    names = [name for name, _ in fleet.trainer.model.named_parameters()]
    sent = fleet.bytes_exchanged() if phase == "merged" else [0] * n
    record_agents(folder, iteration, phase, evaluations, of_average, fleet.test_parts, began, stats,
                  consensus_distance=consensus_distance(states, names), samples=fleet.samples, steps=fleet.steps,
                  bytes_sent=sent, bytes_received=sent)


def merge_and_train(fleet: Fleet, folder: RunFolder, finished: int, phase: str) -> None:
    """Algorithm 1 of the paper: merge, train, merge, train ..., and merge. Commits after every iteration.

    `finished`, `phase`: the last iteration done and whether it ended `merged` or `trained`.
    """
    o = fleet.o

    def merge_phase(iteration: int) -> None:
        began, stats = time.perf_counter(), []
        fleet.states = fleet.merge(iteration, stats)
        folder.record_merge(iteration, stats)
        record(folder, fleet, iteration, "merged", fleet.states, began)
        folder.save_models("merged", fleet.states)

    def train_phase(iteration: int) -> None:
        began = time.perf_counter()
        fleet.states = list(fleet.states)
        stats = fleet.train(iteration)
        record(folder, fleet, iteration, "trained", fleet.states, began, stats)
        folder.save_models("trained", fleet.states)

    def commit(iteration: int, phase: str) -> None:
        folder.commit({"iteration": iteration, "phase": phase, "samples": fleet.samples, "steps": fleet.steps,
                       "states": [{k: t.cpu() for k, t in s.items()} for s in fleet.states]}, keep=o.keep == "all")

    if o.training and finished and phase == "merged" and finished < o.merg_itr:  # a finished run that goes on
        train_phase(finished)
        commit(finished, "trained")
    for iteration in progress(range(finished + 1, o.merg_itr + 1), "iterations"):
        merge_phase(iteration)
        if train := o.training and iteration < o.merg_itr:
            train_phase(iteration)
        commit(iteration, "trained" if train else "merged")


def initial_states(o: Namespace, dataset, ckp: Path | None, loaded: list[State]) -> list[State]:
    """The agents' first models: the loaded checkpoints, checked, or random ones."""
    template = new_model(o, dataset, seed=0).state_dict()
    if o.randominit:
        seeds = [generator(o.seed, i if o.diffinit else 0, 0, "init").initial_seed() for i in range(o.num_models)]
        return [new_model(o, dataset, seed).state_dict() for seed in seeds]
    for i, state in enumerate(loaded):
        check_state(state, template, str(ckp / f"model_{i}.pth"))
    return [{key: state[key].to(tensor.dtype) for key, tensor in template.items()} for state in loaded]


def settle_options(o: Namespace) -> tuple[Path | None, dict, list[State]]:
    """Fill in what follows from the checkpoint, and check what contradicts. Returns (folder, description, models)."""
    if o.exp is not None and o.topology is not None:
        raise ValueError(f"--exp {o.exp} and --topology {o.topology} both name the topology: give one")
    o.topology = o.topology or EXPS[o.exp or 1]
    made_with, loaded, ckp = {}, [], Path(o.ckp) if o.ckp is not None else None
    if o.merg_itr_init >= o.merg_itr:
        raise ValueError(f"--merg_itr_init {o.merg_itr_init} leaves nothing to do of --merg_itr {o.merg_itr}")
    if o.diffinit and not o.randominit:
        raise ValueError("--diffinit belongs to --randominit: the models come from --ckp here")
    if ckp is None and not o.randominit:
        raise ValueError("--ckp is missing: give the folder that train.py printed, or --randominit")
    if ckp is not None:  # random models too learn on the data that the checkpoint's would
        made_with = describe(ckp)
        inherit(vars(o), made_with, f"--ckp {ckp}")
        if o.randominit and made_with.get("num_models", o.num_models) != o.num_models:
            raise ValueError(f"--num_models {o.num_models}: {ckp} deals its data to {made_with['num_models']} agents")
        if o.partition_seed is None:
            o.partition_seed = made_with.get("seed")
        if not o.randominit:
            loaded = load_states(ckp, o.num_models)
            if o.width_multiplier is None and loaded:
                o.width_multiplier = infer_width(o.model, loaded[0])
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


def options_that_matter(o: Namespace, made_with: dict) -> dict:
    """What changes this run's results and is not a level of its path already; None where it has no say."""
    matches, merges = o.opt == "DIMAT", o.opt != ALONE
    trains = {} if o.training else dict.fromkeys(("epochs", "optim", "lr", "momentum", "weight_decay", "amp"))
    return vars(o) | trains | {
        "match_data": o.match_data if merges and (matches or o.bn_reset != "none") else None,
        "match_samples": o.match_samples if merges and (matches or o.bn_reset != "none") else None,
        "match_augment": o.match_augment if merges and (matches or o.bn_reset != "none") else None,
        "match_at": o.match_at if matches else None,
        "bn_reset": o.bn_reset if merges else None,
    } | start_that_matters(o, made_with)


def run(o: Namespace, command: str) -> Path:
    ckp, made_with, loaded = settle_options(o)
    topology = make_topology(o.topology, o.num_models, seed=o.seed)
    if topology.directed:
        raise ValueError(f"--topology {o.topology} has one-way edges: agents that merge need them both ways")
    if not topology.is_connected and o.topology != "disconnected":
        print(f"note: --topology {o.topology} is not connected: its parts never hear of each other")
    device = pick_device(o.device)
    dataset, train_parts, test_parts = load_agents_data(o, device)
    states = [{k: t.to(device) for k, t in s.items()} for s in initial_states(o, dataset, ckp, loaded)]
    fleet = Fleet(o, topology, LocalTrainer(new_model(o, dataset), dataset, o, device), train_parts, test_parts,
                  states, samples=[0] * o.num_models, steps=[0] * o.num_models)
    if fleet.spec and fleet.spec.stuck:  # a model that can't be permuted at all is an error now, not after hours
        name, reason = next(iter(fleet.spec.stuck.items()))
        print(f"note: {o.opt} averages the units of {len(fleet.spec.stuck)} layers as they are, because they can't be "
              f"permuted: {name} ({reason}){', ...' if len(fleet.spec.stuck) > 1 else ''}")
    config = vars(o) | circumstances(command) | {"initial_models": digest(states)}
    if Path(o.topology).suffix.lower() == ".json":
        config["pi"] = topology.pi.tolist()  # the file may change
    matter = options_that_matter(o, made_with)
    with RunFolder(run_folder(vars(o), matter), config, free={key for key, value in matter.items() if value is None},
                   resume=o.resume, start=o.merg_itr_init, overwrite=o.overwrite, tensorboard=o.tensorboard) as folder:
        if folder.finished >= o.merg_itr and not folder.start:
            folder.load()  # drops what a longer run had begun
            print(f"finished before: {folder.finished} iterations are done (--overwrite starts afresh)")
        else:
            start_or_continue(fleet, folder)
    return folder.path


def start_or_continue(fleet: Fleet, folder: RunFolder) -> None:
    """From the first iteration, or from where the folder's state leaves off."""
    saved = folder.load()
    if saved is None:
        record(folder, fleet, 0, "initial", fleet.states, time.perf_counter())
        finished, phase = 0, "trained"
    else:
        fleet.states = [{k: t.to(fleet.trainer.device) for k, t in s.items()} for s in saved["states"]]
        fleet.samples, fleet.steps = saved["samples"], saved["steps"]
        finished, phase = saved["iteration"], saved["phase"]
        print(f"continuing after iteration {finished} of {fleet.o.merg_itr}")
    merge_and_train(fleet, folder, finished, phase)


def make_parser() -> ArgumentParser:
    return main_parser(DATASETS, MODELS, PARTITIONS, [*METHODS, ALONE], TOPOLOGIES, EXPS)


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    o = parse(make_parser(), argv)
    command = shlex.join(sys.argv if argv is None else ["main.py", *argv])
    return run_script(lambda: run(o, command), "results",
                      "give the same command with --resume (without --overwrite)")


if __name__ == "__main__":
    sys.exit(main())
