"""The agents of one process that mix their models in every step of training, as the baselines do."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from agents.local import LocalTrainer, TrainSettings
from agents.run import Agents
from data.batches import Batches
from data.datasets import Dataset, some_images
from experiments.checkpoints import State, check_state
from merging.batch_norm import reestimate
from models import training
from network.processes import Network
from network.topology import Topology
from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step
from optimizers.agent import classification
from utils.progress import progress
from utils.seeds import generator
from utils.settings import FromOptions


@dataclass(frozen=True)
class MixSettings(FromOptions):
    """What agents do in a step, and how they are evaluated."""

    opt: str
    lr: float
    lr_decay: float
    momentum: float | None
    cga_form: str | None
    cga_scope: str | None
    weight_decay: float
    batch_size: int
    mix_buffers: bool
    eval_bn: str
    bn_samples: int
    amp: str
    compile: bool
    seed: int


@dataclass
class MixingAgents(Agents):
    """The agents of this process, the network that ties them to all the others, and how far they are.

    train_parts, test_parts: of all agents; states: the first models of those that are here.
    """

    settings: MixSettings
    topology: Topology
    network: Network
    trainer: LocalTrainer  # evaluates
    train_parts: list[np.ndarray]
    test_parts: list[np.ndarray]
    states: dict[int, State]
    agents: dict[int, Agent] = field(default_factory=dict)
    step: int = 0

    def train(self, epoch: int) -> dict[int, dict[str, training.EpochStats]]:
        """One epoch, 1 the first: as many steps for each agent."""
        s, baseline = self.settings, BASELINES[self.settings.opt]
        told = Settings(s.lr * s.lr_decay ** (epoch - 1), s.momentum or 0.0, s.cga_form, s.cga_scope)
        for agent in self.agents.values():
            agent.forget_stats()
        steps = steps_of_an_epoch(self.train_parts, s.batch_size)
        for _ in progress(range(steps), f"epoch {epoch}", total=steps, unit="step"):
            pi = self.topology.weights(self.step)
            hoods = {i: neighbourhood(pi, i) for i in self.agents}
            take_step(baseline, self.agents, hoods, told, self.network)
            self.step += 1
        try:
            return {i: {"stats": agent.stats()} for i, agent in self.agents.items()}
        except training.Diverged as error:
            raise training.Diverged(f"epoch {epoch}, {error}; the run folder keeps what was finished "
                                    "before") from None

    def as_evaluated(self, i: int, state: State, iteration: int) -> State:
        """Agent i's model with the BatchNorm statistics of --eval_bn; all other tensors are those of `state`."""
        s, dataset = self.settings, self.trainer.dataset
        if s.eval_bn == "running":
            return state
        agent = i if s.eval_bn == "local" else None
        indices = some_images(dataset.train, self.train_parts, agent, s.bn_samples,
                              generator(s.seed, agent or 0, iteration, "sample"))
        return reestimate(self.trainer.model, state, Batches(
            dataset, dataset.train, indices, s.batch_size, shuffle=True,
            make_generator=lambda: generator(s.seed, agent or 0, iteration, "BatchNorm")))

    # As a run sees them

    def report(self, iteration: int) -> dict[int, dict[str, Any]]:
        mine = {}
        for i, agent in self.agents.items():
            running = training.snapshot(agent.flat.module)
            state = self.as_evaluated(i, running, iteration)
            self.trainer.model.load_state_dict(state)
            mine[i] = {
                "state": state, "model": i, "evaluation": self.trainer.evaluate(self.trainer.dataset.test),
                "samples": agent.samples, "steps": agent.steps,
                "saved": {"states": {k: t.cpu() for k, t in running.items() if t is not state[k]},
                          "memory": {k: t.cpu() for k, t in agent.memory.items()}}}
        return mine

    def take_up(self, shares: Mapping[int, Mapping[str, Any] | None]) -> None:
        s, trainer = self.settings, self.trainer

        def flat_model() -> FlatModel:
            return FlatModel(copy.deepcopy(trainer.model), torch.compile if s.compile else lambda module: module)

        scratch = functools.cache(flat_model)  # one for all of them
        for i, share in shares.items():
            flat = flat_model()
            if share:
                check_state(share["states"], flat.module.state_dict(), f"agent {i}'s model in the run's state.pt")
            flat.module.load_state_dict(share["states"] if share else self.states[i])
            batches = batch_stream(trainer.settings, trainer.dataset, self.train_parts[i], i,
                                   share["steps"] if share else 0)
            agent = Agent(i, flat, batches, amp=s.amp, mix_buffers=s.mix_buffers, weight_decay=s.weight_decay,
                          seed=s.seed, scratch=scratch,
                          loss=functools.partial(classification, loss=trainer.loss(self.train_parts[i])))
            if share:
                agent.memory = {k: t.to(trainer.device) for k, t in share.get("memory", {}).items()}
                lengths = (len(flat.gradient), len(agent.shared) + 1)
                if any(t.ndim != 1 or len(t) not in lengths for t in agent.memory.values()):
                    raise ValueError(f"what agent {i} keeps from step to step in the run's state.pt is of another "
                                     "model")
                agent.samples, agent.steps = share["samples"], share["steps"]
                self.step = share["steps"]
            self.agents[i] = agent


def batch_stream(s: TrainSettings, dataset: Dataset, indices: np.ndarray, agent: int, start: int) -> Iterator:
    """An agent's batches from its step `start` on, pass after pass over its images, each in an order of its own."""

    def whole_pass(number: int) -> Batches:
        return Batches(dataset, dataset.train, indices, s.batch_size, shuffle=True, augment=True,
                       make_generator=lambda: generator(s.seed, agent, number, "pass"))

    done, skipped = divmod(start, len(whole_pass(1)))
    yield from itertools.islice(whole_pass(done + 1), skipped, None)
    for number in itertools.count(done + 2):
        yield from whole_pass(number)


def steps_of_an_epoch(train_parts: list[np.ndarray], batch_size: int) -> int:
    """The same for everybody: as many full batches as it takes for as many images as all agents have together.

    Agents with fewer images than the mean see them more often than once in an epoch, those with more not all of them.
    """
    return math.ceil(sum(map(len, train_parts)) / (len(train_parts) * batch_size))
