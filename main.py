"""Agents merge over a topology and train again, iteration by iteration. `python -m main --help` explains."""

from __future__ import annotations

import contextlib
import copy
import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batches import Batches
from data.datasets import DATASETS, class_balanced
from data.partition import PARTITIONS
from merging import METHODS, match_stats, merge, outgoing
from merging.activation_matching import PRIORS
from merging.averaging import weighted_average
from merging.common_basis import CommonBasis, Turns, align, universe
from merging.permutation import PermutationSpec, derive_spec, permute
from models import MODELS, infer_width
from train import LocalTrainer, fill_defaults, load_agents_data, new_model
from utils import training
from utils.checkpoint import check_state, describe, digest, digest_of_all, inherit, load_states
from utils.collect import collect
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
    taken,
)
from utils.exchange import SharedFolder, forget
from utils.faults import Faults, surviving, without
from utils.files import circumstances, claim, clear, load_yaml
from utils.memory import keep_freed_memory
from utils.options import main_parser, parse_once, pick_device
from utils.progress import progress
from utils.results import METRICS, RunFolder, consensus_distance, record_agents, run_folder
from utils.scripts import run_script
from utils.seeds import generator
from utils.siblings import end, follow_parent, is_sibling, start, threads_each, wait_for_all, with_workers
from utils.topology import DIRECTED, EXPS, TOPOLOGIES, Topology, make_topology
from utils.wire import WIRES

State = dict[str, torch.Tensor]
ALONE = "NONE"  # the reference line: agents train and never merge


@dataclass
class Fleet:
    """The agents of this process, their models, what they have done so far, and the network that ties them to the rest.

    train_parts, test_parts: of all agents, but train_parts may be empty for those that live elsewhere.
    """

    o: Namespace
    topology: Topology
    network: Network
    trainer: LocalTrainer
    train_parts: list[np.ndarray]
    test_parts: list[np.ndarray]
    states: dict[int, State]
    samples: dict[int, int]
    steps: dict[int, int]
    orders: dict[int, int] = field(default_factory=dict)  # agents here -> the common order of units they have

    @cached_property
    def faults(self) -> Faults:
        return Faults(self.o.link_failure, self.o.agent_failure, self.o.seed)

    def up(self, iteration: int) -> list[int]:
        """The agents of this process that take part in an iteration."""
        up = self.faults.agents(iteration, self.o.num_models)
        return [i for i in self.states if up[i]]

    def weights(self, iteration: int) -> np.ndarray:
        """(N, N): the mixing matrix of iteration 1, 2, ..., without what fails in it."""
        if self.o.opt == ALONE:
            return np.eye(self.o.num_models)
        return surviving(self.topology.weights(iteration - 1), self.faults.links(iteration, self.o.num_models))

    def matching_batches(self, indices: np.ndarray, agent: int, iteration: int) -> Batches:
        """The images that matching and BatchNorm re-estimation read in this iteration, the same for all models."""
        o, dataset = self.o, self.trainer.dataset
        if 0 < o.match_samples < len(indices):
            labels = dataset.train.labels.cpu().numpy()[indices]
            indices = indices[class_balanced(labels, o.match_samples, generator(o.seed, agent, iteration, "sample"))]
        return Batches(dataset, dataset.train, indices, o.batch_size, shuffle=True, augment=o.match_augment,
                       make_generator=lambda: generator(o.seed, agent, iteration, "match"))

    @cached_property
    def basis(self) -> CommonBasis:
        return CommonBasis(self.weights, self.o.num_models, self.o.root, self.o.align_every)

    def turns(self, iteration: int) -> Turns:
        """Whom the agents wait for and align themselves to before they lend their models in this iteration."""
        return self.basis.at(iteration) if METHODS[self.method].aligned else Turns()

    def merge(self, iteration: int, stats: list[dict]) -> dict[int, str]:
        """x_i <- sum_j w_ij P_ij(x_j) for every agent i here; `stats` gets a row for all that was matched.

        Returns whose models each one merged with its own: "0 3", or "0 3@7" where the last that was to be had of 3 was
        of iteration 7.
        """
        o, network = self.o, self.network
        weights = self.weights(iteration)
        takes = taken(weights)
        merging = [i for i in self.states if (takes[i] | takes[:, i]).any()]
        if o.match_data == "all":
            shared = self.matching_batches(np.sort(np.concatenate(self.train_parts)), 0, iteration)
            images, data = dict.fromkeys(merging, shared), {"batches": shared}
        else:
            images = {i: self.matching_batches(self.train_parts[i], i, iteration) for i in merging}
            data = {"local_batches": [images.get(i) for i in range(o.num_models)]}
        resets = "none" if o.bn_reset == "none" else "after"  # before is done
        try:
            models = self.exchange(iteration, weights, images, stats)
            weights = without(weights, [j for j in range(o.num_models) if j not in models])
            merging = [i for i in merging if weights[i, i] != 1]  # nobody may have come
            merged = merge([models.get(i) for i in range(o.num_models)], weights, method=self.method,
                           model=self.trainer.model, spec=self.spec, bn_reset=resets, rescale=o.bn_reset == "repair",
                           match_at=o.match_at, match_prior=o.match_prior, match_memory=self.match_memory, stats=stats,
                           agents=merging, **data)
        except ValueError as error:
            raise ValueError(f"iteration {iteration}: {error}") from error
        self.states |= {i: merged[i] for i in merging}
        names = {j: f"{j}@{network.old[j]}" if j in network.old else str(j) for j in models}
        return {i: " ".join(names[j] for j in np.flatnonzero(taken(weights)[i]).tolist()) for i in self.states}

    def exchange(self, iteration: int, weights: np.ndarray, images: dict[int, Batches],
                 stats: list[dict]) -> dict[int, State]:
        """The models that the agents here merge in this iteration, their own too, in the order in which they lend."""
        o, network, everybody = self.o, self.network, range(self.o.num_models)
        turns = self.turns(iteration)
        aligns = bool(turns.towards)
        at_once = aligns and o.align == "at_once"
        bn_reset = "both" if o.bn_reset == "repair" else o.bn_reset
        lent = {i: outgoing(self.trainer.model, self.states[i], images[i], bn_reset,
                            compared=aligns or METHODS[self.method].reads_images) for i in images}
        self.orders |= {i: int(self.basis.of[i]) for i in turns.roots if i in self.states}
        models: dict[int, State] = {}
        for turn, wave in enumerate([list(everybody)] if at_once else turns.waves(o.num_models)):
            for i in [] if at_once else [i for i in lent if i in wave]:
                order = int(self.basis.of[i]) if aligns else -1
                references = [j for j in turns.towards.get(i, ()) if j in models
                              and (not network.may_miss or network.labels[j] == order)]
                if references:
                    lent[i] = self.align(i, lent[i], references, models, weights, images[i], stats)
                    self.states[i], self.orders[i] = lent[i], order
            network.labels |= self.orders
            models |= network.share(iteration, {i: lent[i] for i in lent if i in wave},
                                    np.where(np.isin(everybody, wave), weights, 0), o.wire,
                                    like=self.trainer.model.state_dict(), turn=turn)
        if at_once:
            return self.align_at_once(models, turns.roots[0], images, stats)
        if network.may_miss and METHODS[self.method].aligned:
            for i in images:
                models = self.in_own_order(i, models, weights, images[i], stats)
        return models

    def in_own_order(self, i: int, models: dict[int, State], weights: np.ndarray, images: Batches,
                     stats: list[dict]) -> dict[int, State]:
        """The models that have come to agent i, whatever happened to the turns: all in one order of units.

        An agent that lacks the order it should have, because it began late or nobody came when it was its turn, takes
        it from whoever has it; else the lowest there is; else the agent of the lowest number begins one. Models that
        came in another order are matched to its own, as in DIMAT.
        """
        others = sorted(models.keys() - {i})
        label = {j: self.network.labels[j] for j in others}
        own, should = self.orders.get(i, -1), int(self.basis.of[i])
        known = {order for order in (own, *label.values()) if order >= 0}
        order = should if should in known else min(known, default=-1)
        if order >= 0 and order != own:
            references = [j for j in others if label[j] == order]
            models = models | {i: self.align(i, models[i], references, models, weights, images, stats)}
            self.states[i], self.orders[i] = models[i], order
        elif order < 0 and others and i < others[0]:
            self.orders[i] = self.basis.again + i
        foreign = [j for j in others if label[j] != self.orders.get(i, -1) or label[j] < 0]
        return models | {j: self.align(j, models[j], [i], models, weights, images, stats) for j in foreign}

    def align(self, i: int, state: State, references: list[int], models: dict[int, State], weights: np.ndarray,
              images: Batches, stats: list[dict]) -> State:
        """Agent i's model in the order of units of `references`, among the models that have come."""
        correlations: list[dict[str, float]] = []
        found = align(self.spec, self.trainer.model, state, [models[j] for j in references],
                      [weights[i, j] or 1.0 for j in references], images, correlations=correlations,
                      at=self.o.match_at, prior=self.o.match_prior, match_memory=self.match_memory,
                      names=[*references, i])
        for j, of_pair in zip(references, correlations, strict=True):
            stats += match_stats(self.spec, i, j, found, of_pair)
        return permute(self.spec, found, state)

    def align_at_once(self, models: dict[int, State], root: int, images: dict[int, Batches],
                      stats: list[dict]) -> dict[int, State]:
        """Everybody's models in one order of units, that of `root`; the same in every process."""
        shared = next(iter(images.values()))
        correlations: dict[tuple[int, int], dict[str, float]] = {}
        found = universe(self.spec, self.trainer.model, [models[j] for j in sorted(models)], shared, root=root,
                         correlations=correlations, at=self.o.match_at, match_memory=self.match_memory)
        for (i, j), of_pair in correlations.items():
            stats += [row for a, b in ((i, j), (j, i)) for row in match_stats(self.spec, a, b, found[a], of_pair)]
        return {j: permute(self.spec, found[j], models[j]) for j in sorted(models)}

    @property
    def match_memory(self) -> int:
        return int(self.o.match_memory * 2**30)

    @property
    def method(self) -> str:
        """Agents alone merge nothing, in whatever way."""
        return "WA" if self.o.opt == ALONE else self.o.opt

    @cached_property
    def spec(self) -> PermutationSpec | None:
        """The permutation groups, for the methods that permute."""
        if not (METHODS[self.method].permutes or METHODS[self.method].aligned):
            return None
        dataset = self.trainer.dataset
        example = torch.zeros(2, dataset.in_channels, dataset.image_size, dataset.image_size)
        return derive_spec(new_model(self.o, dataset), example)

    def train(self, iteration: int) -> dict[int, training.EpochStats]:
        """E local epochs of every agent with a fresh optimiser; the figures are the last epoch's."""
        stats = {}
        for i in progress(self.up(iteration), f"iteration {iteration}: training", unit="agent"):
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
            stats[i] = last
        return stats

    def evaluate(self) -> dict[int, training.Evaluation]:
        """Each distinct model once over the test set."""
        seen: dict[int, training.Evaluation] = {}
        for state in progress(self.states.values(), "evaluation", unit="agent"):
            if id(state) not in seen:
                self.trainer.model.load_state_dict(state)
                seen[id(state)] = self.trainer.evaluate(self.trainer.dataset.test)
        return {i: seen[id(state)] for i, state in self.states.items()}


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


def merge_and_train(fleet: Fleet, folder: RunFolder | None, finished: int, phase: str) -> None:
    """Algorithm 1 of the paper: merge, train, merge, train ..., and merge. Commits after every iteration.

    `finished`, `phase`: the last iteration done (0: none) and whether it ended `merged` or `trained`.
    """
    o, network = fleet.o, fleet.network

    def write(iteration: int, phase: str, began: float, stats: dict[int, training.EpochStats],
              **figures: dict[int, Any]) -> None:
        nonlocal last
        evaluations, up = fleet.evaluate(), fleet.up(iteration) if iteration else fleet.states
        last = record(folder, network, fleet.trainer, fleet.test_parts, iteration, phase, began, {
            i: {"state": state, "evaluation": evaluations[i], "stats": stats.get(i), "samples": fleet.samples[i],
                "steps": fleet.steps[i], "bytes_sent": 0, "bytes_received": 0, "took_part": int(i in up),
                "order": fleet.orders.get(i, -1)}
            | {key: values[i] for key, values in figures.items()} for i, state in fleet.states.items()})
        if folder and iteration:
            folder.record_merge(iteration, [row for rows in last.get("matched", ()) for row in rows])
            folder.save_models(phase, dict(zip(network.recorded, last["state"], strict=True)))

    def merge_phase(iteration: int) -> None:
        began, matched, sent, received = time.perf_counter(), [], dict(network.sent), dict(network.received)
        merged_with = fleet.merge(iteration, matched)
        write(iteration, "merged", began, {}, merged_with=merged_with,
              bytes_sent={i: network.sent[i] - sent[i] for i in fleet.states},
              bytes_received={i: network.received[i] - received[i] for i in fleet.states},
              matched={i: [row for row in matched if row["agent"] == i] for i in fleet.states})

    def train_phase(iteration: int) -> None:
        began = time.perf_counter()
        write(iteration, "trained", began, fleet.train(iteration))

    def commit(iteration: int, phase: str) -> None:
        if folder:
            folder.commit({"iteration": iteration, "phase": phase, "agents": list(network.recorded),
                           "samples": last["samples"], "steps": last["steps"], "orders": last["order"],
                           "states": last["state"]},
                          keep=o.keep == "all")

    last: dict[str, list] = {}
    turn = finished + 1
    if not finished:
        write(0, "initial", time.perf_counter(), {})
    elif o.training and phase == "merged" and finished < o.merg_itr:  # a finished run that goes on
        train_phase(finished)
        commit(finished, "trained")
    for iteration in progress(range(finished + 1, o.merg_itr + 1), "iterations"):
        if iteration >= turn:
            turn = network.turn(iteration, fleet.weights)
        if iteration < turn:
            continue  # the others have merged without this agent
        merge_phase(iteration)
        if train := o.training and iteration < o.merg_itr:
            train_phase(iteration)
        commit(iteration, "trained" if train else "merged")


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
        made_with = describe(ckp)
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


def options_that_matter(o: Namespace, made_with: dict) -> dict:
    """What changes this run's results and is not a level of its path already; None where it has no say."""
    merges = o.opt != ALONE
    aligns = merges and METHODS[o.opt].aligned
    matches = aligns or (merges and METHODS[o.opt].reads_images)
    trains = {} if o.training else dict.fromkeys(("epochs", "optim", "lr", "momentum", "weight_decay", "amp"))
    return vars(o) | trains | {
        "match_data": o.match_data if merges and (matches or o.bn_reset != "none") else None,
        "match_samples": o.match_samples if merges and (matches or o.bn_reset != "none") else None,
        "match_augment": o.match_augment if merges and (matches or o.bn_reset != "none") else None,
        "match_at": o.match_at if matches else None,
        "match_prior": o.match_prior if o.opt == "DIMAT" or aligns else None,
        "bn_reset": o.bn_reset if merges else None,
        "wire": o.wire if merges else None,
        "link_failure": o.link_failure if merges else None,
        "exchanged_by": None if o.agent is None and not o.processes else "folder",
    } | start_that_matters(o, made_with)


def open_run(o: Namespace, network: Network, path: Path, config: dict, matter: dict, **how: Any) -> RunFolder | None:
    """The run folder, at the writer. A group that its launcher has started again continues by itself."""
    if not network.is_writer:
        return None
    config |= {"launch": launch() if is_launched() else None}
    goes_on = is_restart() and load_yaml(path / "config.yaml").get("launch") == config["launch"]
    free = {key for key, value in matter.items() if value is None} | how.pop("free", set())
    return RunFolder(path, config, free=free, resume=o.resume or goes_on, overwrite=o.overwrite and not goes_on,
                     tensorboard=o.tensorboard, **how)


def topology_to_merge_over(o: Namespace) -> Topology:
    topology = make_topology(o.topology, o.num_models, seed=o.seed)
    settle_alignment(o, topology)
    if not topology.is_doubly_stochastic:
        raise ValueError(f"--topology {o.topology} has one-way edges whose rows don't sum to 1: agents that merge need "
                         "what they take to add up to one model")
    return topology


def settle_alignment(o: Namespace, topology: Topology) -> None:
    """What --root and --align ask for must be there; methods that don't align themselves have neither."""
    if o.opt == ALONE or not METHODS[o.opt].aligned:
        o.align = o.align_every = o.root = None
        return
    if o.root is not None and o.root >= o.num_models:
        raise ValueError(f"--root {o.root}: the {o.num_models} agents (--num_models) are 0 to {o.num_models - 1}")
    if o.align == "at_once":
        together = topology.connectivity.sum() == o.num_models * (o.num_models - 1) and topology.draw is None
        if not together or topology.schedule or o.match_data != "all":
            raise ValueError("--align at_once compares all models in every agent, on the same images: it needs "
                             "--topology fully_connected and --match_data all (--align in_turn does without)")
        if o.match_prior != "none":
            raise ValueError(f"--align at_once knows no --match_prior {o.match_prior}: --align in_turn does")
        if o.agent is not None or o.processes or o.agent_failure or o.link_failure:
            raise ValueError("--align at_once needs all agents to be there: --align in_turn does without")


def matrices(name: str, topology: Topology) -> list | None:
    """The mixing matrices of a topology that was read from files, as these may change."""
    if name in TOPOLOGIES | DIRECTED:
        return None
    return [pi.tolist() for pi in topology.schedule] or topology.pi.tolist()


def run(o: Namespace, network: Network, device: torch.device, command: str) -> Path:
    """All of it, in every process alike; the writer writes."""

    def prepare() -> tuple[dict, Fleet]:
        ckp, made_with, loaded = settle_options(o, network.agents)
        topology = topology_to_merge_over(o)
        reads_others = o.opt != ALONE and o.match_data == "all"
        dataset, train_parts, test_parts = load_agents_data(o, device, None if reads_others else network.agents)
        states = {i: {k: t.to(device) for k, t in state.items()}
                  for i, state in initial_states(o, dataset, ckp, loaded, network.agents).items()}
        fleet = Fleet(o, topology, network, LocalTrainer(new_model(o, dataset), dataset, o, device), train_parts,
                      test_parts, states, samples=dict.fromkeys(states, 0), steps=dict.fromkeys(states, 0))
        fleet.spec  # noqa: B018 - a model that can't be permuted at all is an error now, not after hours
        return made_with, fleet

    def open_folder() -> RunFolder | None:
        config = vars(o) | circumstances(command) | {
            "first_models": digest_of_all(digests), "exchanged_by": matter["exchanged_by"]}
        if read := matrices(o.topology, fleet.topology):
            config["pi"] = read
        return open_run(o, network, path, config, matter, start=o.merg_itr_init)

    made_with, fleet = network.together(prepare)
    digests = network.collect({i: digest(state) for i, state in fleet.states.items()})
    matter = options_that_matter(o, made_with)
    path = run_folder(vars(o), matter)
    name = name_for_others(o, path, fleet.topology)
    if o.agent is not None:
        path = path / f"agent_{o.agent}"
    neighbours = [j for i in network.agents for j in range(o.num_models)
                  if fleet.topology.connectivity[i, j] or fleet.topology.connectivity[j, i]]
    begun = (path / "metrics.csv").exists()
    with contextlib.ExitStack() as stack:
        stack.enter_context(network.meet(name, neighbours, o.merg_itr, fresh=not begun, overwrite=o.overwrite))
        folder = network.together(open_folder)
        stack.enter_context(folder or contextlib.nullcontext())
        if folder:
            say_what_is_unusual(fleet)
        saved = network.together(folder.load if folder else lambda: None)  # drops what a longer run had begun
        finished, phase = take_up(fleet, network.deal(shares(network, saved)))
        if finished < o.merg_itr:
            if finished and folder:
                print(f"continuing after iteration {finished} of {o.merg_itr}")
            merge_and_train(fleet, folder, finished, phase)
        elif folder:
            print(f"finished before: {finished} iterations are done (--overwrite starts afresh)")
    return folder.path if folder else Path()


def say_what_is_unusual(fleet: Fleet) -> None:
    o = fleet.o
    if not fleet.topology.is_connected and o.topology != "disconnected":
        print(f"note: --topology {o.topology} is not connected: its parts never hear of each other")
    if fleet.spec and fleet.spec.stuck:
        name, reason = next(iter(fleet.spec.stuck.items()))
        print(f"note: {o.opt} averages the units of {len(fleet.spec.stuck)} layers as they are, because they can't be "
              f"permuted: {name} ({reason}){', ...' if len(fleet.spec.stuck) > 1 else ''}")


def shares(network: Network, saved: dict | None) -> dict[int, dict | None] | None:
    """What each agent continues from, at the writer."""
    if not network.is_writer:
        return None
    if saved is None:
        return dict.fromkeys(network.recorded)
    alike = {key: saved[key] for key in ("iteration", "phase")}
    of_each = {key.removesuffix("s"): saved[key] for key in ("states", "samples", "steps", "memory", "orders")
               if key in saved}
    return {i: alike | {key: values[k] for key, values in of_each.items()} for k, i in enumerate(network.recorded)}


def take_up(fleet: Fleet, last: dict[int, dict | None]) -> tuple[int, str]:
    """Bring this process's agents to where each was last; the iteration they have finished, and how it ended."""
    finished, phase = 0, "trained"
    for i, share in last.items():
        if share is not None:
            fleet.states[i] = {k: t.to(fleet.trainer.device) for k, t in share["state"].items()}
            fleet.samples[i], fleet.steps[i] = share["sample"], share["step"]
            if share.get("order", -1) >= 0:
                fleet.orders[i] = share["order"]
            finished, phase = share["iteration"], share["phase"]
    return finished, phase


def make_parser() -> ArgumentParser:
    return main_parser(DATASETS, MODELS, PARTITIONS, [*METHODS, ALONE], [*TOPOLOGIES, *DIRECTED], EXPS, PRIORS, WIRES,
                       BACKENDS)


def settle_processes(o: Namespace) -> None:
    """Check which of the ways to be in several processes was asked for."""
    alone = o.agent is not None
    if is_launched() and not is_sibling() and (alone or o.processes or o.workers):
        raise ValueError("--agent, --processes and --workers are for a command that nobody has launched as a group")
    if o.merg_itr_init and (alone or o.processes):
        raise ValueError(f"--merg_itr_init {o.merg_itr_init}: agents on their own can't go back, as the others don't")
    if not (o.timeout or alone or o.processes):
        raise ValueError("--timeout 0 is for agents on their own: a group has to wait for one another")
    if o.workers and (alone or o.processes):
        raise ValueError("--workers are of one run: leave it out with --agent and --processes")
    if alone and not o.exchange:
        raise ValueError("--agent needs --exchange folder:PATH, where it finds its neighbours' models")
    if alone and o.agent >= o.num_models:
        raise ValueError(f"--agent {o.agent}: the {o.num_models} agents (--num_models) are 0 to {o.num_models - 1}")
    if o.processes and o.processes != o.num_models:
        raise ValueError(f"--processes {o.processes}: every agent is a process of its own, so give {o.num_models}, or "
                         "another --num_models; --workers deals agents out to fewer processes")
    for option in ("exchange", "staleness"):
        if getattr(o, option) and not (alone or o.processes):
            raise ValueError(f"--{option} is for agents on their own: give --agent or --processes as well")
    o.resume = o.resume or (alone and not o.overwrite)  # an agent comes back by the same command


def name_for_others(o: Namespace, path: Path, topology: Topology) -> str:
    """What agents must agree on to be of one run: all that changes its results."""
    return repr((path.parts[len(Path(o.results_dir).parts):], matrices(o.topology, topology)))


def run_agents(o: Namespace, argv: Sequence[str]) -> Path:
    """--processes: start every agent as a process of its own, and put together what they leave."""
    made_with = settle_options(o, [0])[1]
    topology = topology_to_merge_over(o)
    path = run_folder(vars(o), options_that_matter(o, made_with))
    exchange = Path(o.exchange or path / "exchange")
    name = name_for_others(o, path, topology)
    agents = range(o.num_models)
    with claim(path):
        if o.overwrite:
            clear(path)
        if not any((path / f"agent_{i}").exists() for i in agents):  # then it is of a run that was deleted
            forget(exchange, name)
        processes = [start(Path(__file__), [*argv, "--processes=0", f"--agent={i}", f"--exchange=folder:{exchange}",
                                            "--overwrite=False"],
                           {"OMP_NUM_THREADS": str(threads_each(o.num_models)), "TQDM_DISABLE": "1"}) for i in agents]
        try:
            codes = wait_for_all(processes, lambda i, code: print(
                f"warning: agent {i} ended with status {code}; the others go on", flush=True))
        finally:
            end(processes, 10)
        if failed := [i for i, code in enumerate(codes) if code]:
            raise ValueError(f"agents {failed} did not finish; the same command (without --overwrite) "
                             f"brings them back. What there is lies in {path}")
        collect(path)
        forget(exchange, name)
    return path


def number_of_workers(o: Namespace) -> int:
    """How many processes of this machine to deal the agents out to."""
    if is_launched() or o.agent is not None or o.processes:
        return 1
    on_cpu = o.device == "cpu" or (o.device == "auto" and pick_device("auto").type == "cpu")
    return min(o.workers or (torch.get_num_threads() if o.training and on_cpu else 1), o.num_models)


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    follow_parent()
    argv = sys.argv[1:] if argv is None else argv
    o = parse_once(make_parser(), argv)
    command = shlex.join(["main.py", *argv])

    def run_in_group() -> Path:
        device = pick_device(local_device(o.device))
        with connect(o.num_models, device, o.backend, o.timeout) as network:
            return run(o, network, device, command)

    def run_here() -> Path:
        settle_processes(o)
        if o.processes:
            return run_agents(o, argv)
        if o.agent is not None:
            network = SharedFolder(o.agent, Path(o.exchange), o.timeout, o.staleness)
            return run(o, network, pick_device(o.device), command)
        if workers == 1:
            return run_in_group()
        checked = copy.copy(o)  # what is wrong is better said before they are started
        settle_options(checked, [0])
        topology_to_merge_over(checked)
        return with_workers(workers, Path(__file__), argv, run_in_group)

    workers = number_of_workers(o)
    flag = "" if o.agent is not None or o.processes else " with --resume"
    code = run_script(run_here, "results", f"give the same command{flag} (without --overwrite)",
                      rank() if o.agent is None else int(is_sibling()))
    if code:
        leave(code, at_once=workers > 1 or is_sibling())
    return code


if __name__ == "__main__":
    sys.exit(main())
