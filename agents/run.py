"""A run of main.py or base_lines.py: how it starts, and what is done with the phases that its algorithm yields."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from agents.local import LocalTrainer, ModelSettings, TrainSettings, load_agents_data, new_model
from data.datasets import Dataset
from experiments.checkpoints import digest, digest_of_all, load_model
from experiments.run_folder import METRICS, RunFolder, consensus_distance, record_agents
from merging.averaging import weighted_average
from merging.files import check_state, with_counts
from models.training import Evaluation
from network.faults import Faults
from network.processes import Network
from network.topology import Topology
from network.wire import State
from utils.progress import progress
from utils.seeds import generator
from utils.settings import FromOptions

AVERAGE = -2  # the number of the mean of all models, beside those that agents' models have


@dataclass(frozen=True)
class Phase:
    """A part of an iteration that is done. What the agents are then is asked of them.

    name: one of the run folder's PHASES; figures: agent here -> what the phase has to say of it: columns of
    metrics.csv, `stats` of its last local epoch, `matched`, rows of merge_stats.csv.
    """

    iteration: int
    name: str
    figures: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


class MayFail(Protocol):
    """Settings that say how often links and agents fail."""

    link_failure: float
    agent_failure: float
    seed: int


class Agents(ABC):
    """The agents of one process, as a run sees them."""

    settings: MayFail
    network: Network
    topology: Topology
    trainer: LocalTrainer
    test_parts: list[np.ndarray]  # of all agents

    @abstractmethod
    def take_up(self, shares: Mapping[int, Mapping[str, Any] | None]) -> None:
        """Bring each agent to what state.pt keeps of it, by the names there; None: it begins.

        Raises ValueError for what is of another model.
        """

    @abstractmethod
    def report(self, iteration: int) -> dict[int, dict[str, Any]]:
        """Each agent's `state` to evaluate and write down, columns of metrics.csv, and what is `saved`.

        model: the same number for agents that share one model; as a rule it is the agent's own.
        saved: what state.pt keeps of it besides samples and steps; `states` only where they differ from `state`.
        """

    def evaluate(self, models: Mapping[int, State]) -> dict[int, Evaluation]:
        """Each model once over the test set."""
        found = {}
        for number in progress(models, "evaluation", unit="model"):
            self.trainer.model.load_state_dict(models[number])
            found[number] = self.trainer.evaluate(self.trainer.dataset.test)
        return found

    @cached_property
    def faults(self) -> Faults:
        return Faults(self.settings.link_failure, self.settings.agent_failure, self.settings.seed)

    def catch_up(self, iteration: int) -> int:
        """The iteration to go on with instead of this one: another where the others have gone on without us."""
        return iteration

    def notes(self) -> list[str]:
        """What is unusual about this run."""
        made = [self.topology.note] if self.topology.note else []
        if self.topology.is_connected or self.topology.name == "disconnected":
            return made
        return [*made, f"the topology {self.topology.name} is not connected: its parts never hear of each other"]


Algorithm = Callable[[Phase, Iterator[int]], Iterator[Phase]]
"""The phases that follow one which is done, and the iterations that are left."""


def say_finished(count: int, unit: str) -> None:
    print(f"finished before: {count} {unit}s are done (--overwrite starts afresh)")


def carry_out(agents: Agents, algorithm: Algorithm, last: int, open_folder: Callable[[], RunFolder | None], *,
              keep: bool = False, unit: str = "iteration", units: int = 1) -> Path:
    """Do what is left of a run of `last` iterations, in every process alike; its folder.

    keep: every iteration's state; unit, units: in what its length is said, and how many of them an iteration has.
    """
    network = agents.network
    folder = network.agree(open_folder)
    with folder or contextlib.nullcontext():
        for note in agents.notes() if folder else ():
            print(f"note: {note}")
        # Drops what a longer run had begun.
        saved = network.agree(lambda: shares(network, folder.load() if folder else None))
        mine = network.scatter(saved)
        network.agree(lambda: agents.take_up(mine))
        share = next(iter(mine.values()))
        done = Phase(share["iteration"], share["phase"]) if share else Phase(0, "initial")
        if done.iteration < last:
            if done.iteration and folder:
                print(f"continuing after {unit} {done.iteration * units} of {last * units}")
            logbook = Logbook(agents, folder, last, keep)
            if not done.iteration:
                logbook.record(done)
            for phase in algorithm(done, logbook.iterations(done.iteration + 1)):
                logbook.record(phase)
        elif folder:
            say_finished(done.iteration * units, unit)
    return folder.path if folder else Path()


class Logbook:
    """Records phases and commits iterations. folder: at the writer."""

    def __init__(self, agents: Agents, folder: RunFolder | None, last: int, keep: bool) -> None:
        self.agents, self.network, self.folder, self.last, self.keep = agents, agents.network, folder, last, keep
        self.uncommitted: dict[str, Any] = {}
        self.begin()

    def begin(self) -> None:
        """The next phase takes time, and sends bytes, from now on."""
        self.began = time.perf_counter()
        self.sent, self.received = dict(self.network.sent), dict(self.network.received)

    def iterations(self, first: int) -> Iterator[int]:
        """Those that are left, without what the others did meanwhile: one is done when the next is asked for."""
        wanted = first
        for iteration in progress(range(first, self.last + 1), "iterations"):
            self.commit()
            if iteration >= wanted:
                wanted = self.agents.catch_up(iteration)
            if iteration == wanted:
                self.begin()
                yield iteration
        self.commit()

    def record(self, phase: Phase) -> None:
        """Gather what the agents of all processes have done and, at the writer, write it down."""
        mine = {i: own | {"stats": None, "bytes_sent": self.network.sent[i] - self.sent[i],
                          "bytes_received": self.network.received[i] - self.received[i]} | phase.figures.get(i, {})
                for i, own in self.agents.report(phase.iteration).items()}
        on_cpu = {own["model"]: {k: t.cpu() for k, t in own["state"].items()} for own in mine.values()}
        everyone = self.network.gather({i: own | {"state": on_cpu[own["model"]]} for i, own in mine.items()})
        columns, models = {}, {own["model"]: own["state"] for own in mine.values()}
        if self.folder:
            of_all = [everyone[i] for i in self.network.recorded]
            columns = {key: [own[key] for own in of_all] for key in of_all[0]}
            if self.sees_all and len(set(columns["model"])) > 1:
                models[AVERAGE] = weighted_average(columns["state"], [1 / len(of_all)] * len(of_all))
        found = self.agents.evaluate(models)  # after all models have come: the writer evaluates their average meanwhile
        everyones = self.network.gather({i: found[own["model"]] for i, own in mine.items()})
        if self.folder:
            columns["evaluation"] = [everyones[i] for i in self.network.recorded]
            self.write(phase, columns, found.get(AVERAGE, columns["evaluation"][0]) if self.sees_all else None)
        self.begin()

    @property
    def sees_all(self) -> bool:
        """Whether the folder is of all agents, not of one on its own."""
        return len(self.network.recorded) == len(self.agents.test_parts)

    def write(self, phase: Phase, columns: dict[str, list], of_average: Evaluation | None) -> None:
        """columns: a list each, with a value for every agent of the folder; of_average: of the mean of all models."""
        agents, states = self.network.recorded, columns["state"]
        names = [name for name, _ in self.agents.trainer.model.named_parameters()]
        record_agents(self.folder, phase.iteration, phase.name, agents, columns["evaluation"], of_average,
                      self.agents.test_parts, self.began, columns["stats"],
                      consensus_distance=consensus_distance(states, names) if self.sees_all else None,
                      **{key: values for key, values in columns.items() if key in METRICS})
        if phase.iteration:
            self.folder.record_merge(phase.iteration, [row for rows in columns.get("matched", ()) for row in rows])
            self.folder.save_models(phase.name, dict(zip(agents, states, strict=True)))
            saved = {key: [own[key] for own in columns["saved"]] for key in columns["saved"][0]}
            differing = saved.pop("states", [{}] * len(states))
            self.uncommitted = {
                "iteration": phase.iteration, "phase": phase.name, "samples": columns["samples"],
                "steps": columns["steps"], **saved,
                "states": [state | own for state, own in zip(states, differing, strict=True)]}

    def commit(self) -> None:
        """What is recorded is done: state.pt says so."""
        if self.uncommitted:
            self.folder.commit(self.uncommitted, self.keep)
            self.uncommitted = {}


def shares(network: Network, saved: dict | None) -> dict[int, dict | None] | None:
    """What each agent continues from, at the writer."""
    if not network.is_writer:
        return None
    if saved is None:
        return dict.fromkeys(network.recorded)
    if len(saved["states"]) != len(network.recorded):
        raise ValueError(f"the run's state.pt holds {len(saved['states'])} agents instead of {len(network.recorded)}: "
                         "restore it, or give --overwrite")
    return {i: {key: value[k] if isinstance(value, list) else value for key, value in saved.items()}
            for k, i in enumerate(network.recorded)}


# How it starts


@dataclass(frozen=True)
class FirstModels(FromOptions):
    """What the agents begin with: the checkpoints in `files`, or random models, equal or different."""

    randominit: bool
    diffinit: bool
    seed: int
    files: Mapping[int, Path] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> dict[int, State]:
        return {i: load_model(file) for i, file in self.files.items()}

    def make(self, model: ModelSettings, dataset: Dataset, agents: Collection[int]) -> dict[int, State]:
        """These agents' models. Raises ValueError for a checkpoint of another architecture."""
        template = new_model(model, dataset, seed=0).state_dict()
        if self.randominit:
            seeds = {i: generator(self.seed, i if self.diffinit else 0, 0, "init").initial_seed() for i in agents}
            return {i: new_model(model, dataset, seed).state_dict() for i, seed in seeds.items()}
        loaded = {i: with_counts(state, template) for i, state in self.loaded.items()}
        for i, state in loaded.items():
            check_state(state, template, str(self.files[i]))
        return {i: {key: state[key].to(tensor.dtype) for key, tensor in template.items()}
                for i, state in loaded.items()}


def first_agents(options: Mapping[str, Any], network: Network, device: torch.device, files: Mapping[int, Path],
                 all_images: bool = True
                 ) -> tuple[LocalTrainer, list[np.ndarray], list[np.ndarray], dict[int, State]]:
    """Who trains and evaluates, all agents' training and test images, and the first models of those that are here.

    files: with the models of those agents; {} where these are random. all_images: whether other agents' training images
    are kept too.
    """
    first = FirstModels.of({**options, "files": files})
    first.loaded  # noqa: B018 - before the images: of a damaged file the user hears at once
    model = ModelSettings.of(options)
    dataset, train_parts, test_parts = load_agents_data(options, device,
                                                        None if all_images else network.agents)
    states = {i: {k: t.to(device) for k, t in state.items()}
              for i, state in first.make(model, dataset, network.agents).items()}
    trainer = LocalTrainer(new_model(model, dataset), dataset, TrainSettings.of(options), device)
    return trainer, train_parts, test_parts, states


def first_models(network: Network, states: Mapping[int, State]) -> str:
    """At the writer, a short name for what all agents begin with."""
    return digest_of_all(network.gather({i: digest(state) for i, state in states.items()}))
