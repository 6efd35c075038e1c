"""The agents of one process that mix their models every step or few of training, as the baselines do."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from agents.local import LocalTrainer, TrainSettings, training_batches
from agents.run import Agents
from data.batches import Batches
from data.datasets import Dataset
from experiments.checkpoints import State
from merging.batch_norm import reestimate
from merging.files import check_state
from models import training
from network.faults import kept_by_senders, surviving
from network.processes import Network
from network.topology import Topology
from optimizers import BASELINES, LOCAL, Agent, FlatModel, Neighbourhood, Settings, neighbourhood, take_step
from optimizers.agent import classification
from utils.progress import progress
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
    local_steps: int
    link_failure: float
    agent_failure: float
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
    """The agents of this process, and the network that ties them to all the others.

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

    def train(self, epoch: int) -> dict[int, dict[str, training.EpochStats | None]]:
        """One epoch, 1 the first: as many steps for each agent that doesn't fail."""
        s, baseline = self.settings, BASELINES[self.settings.opt]
        told = Settings(s.lr * s.lr_decay ** (epoch - 1), s.momentum or 0.0, s.cga_form, s.cga_scope, s.local_steps)
        for agent in self.agents.values():
            agent.forget_stats()
        steps = steps_of_an_epoch(self.train_parts, s.batch_size)
        for step in progress(range((epoch - 1) * steps, epoch * steps), f"epoch {epoch}", total=steps, unit="step"):
            up = self.up(step)
            take_step(baseline, up, self.hoods(step, up), told, self.network)
        try:
            return {i: {"stats": agent.stats()} for i, agent in self.agents.items()}
        except training.Diverged as error:
            raise training.Diverged(f"epoch {epoch}, {error}; the run folder keeps what was finished "
                                    "before") from None

    def up(self, step: int) -> dict[int, Agent]:
        """The agents of this process that take part in step 0, 1, 2, ... of the run."""
        up = self.faults.agents(step + 1, self.topology.num_agents)
        return {i: agent for i, agent in self.agents.items() if up[i]}

    def hoods(self, step: int, agents: Collection[int]) -> dict[int, Neighbourhood]:
        """The neighbourhoods of these agents in a step; every K-th one, K being --local_steps, is an exchange."""
        exchanges, left = divmod(step + 1, self.settings.local_steps)
        if left:
            return dict.fromkeys(agents, LOCAL)
        pi = self.weights(exchanges - 1, step)
        return {i: neighbourhood(pi, i) for i in agents}

    def weights(self, exchange: int, step: int) -> np.ndarray:
        """(N, N): the mixing matrix of exchange 0, 1, 2, ..., without what fails in this step."""
        pi = self.topology.weights(exchange)
        if not (self.settings.link_failure or self.settings.agent_failure):
            return pi
        left = kept_by_senders if self.topology.directed else surviving
        return left(pi, self.faults.links(step + 1, self.topology.num_agents))

    def as_evaluated(self, i: int, state: State, iteration: int) -> State:
        """Agent i's model with the BatchNorm statistics of --eval_bn; all other tensors are those of `state`."""
        s = self.settings
        if s.eval_bn == "running":
            return state
        agent = i if s.eval_bn == "local" else None
        return reestimate(self.trainer.model, state, self.trainer.sample(
            self.train_parts, agent, s.bn_samples, iteration, "BatchNorm"))

    # As a run sees them

    def report(self, iteration: int) -> dict[int, dict[str, Any]]:
        mine = {}
        for i, agent in self.agents.items():
            running = training.snapshot(agent.flat.module)
            state = self.as_evaluated(i, running, iteration)
            mine[i] = {
                "state": state, "model": i, "samples": agent.samples, "steps": agent.steps,
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
                lengths = [size + more for size in (len(flat.gradient), len(agent.shared)) for more in (0, 1)]
                if any(t.ndim != 1 or len(t) not in lengths for t in agent.memory.values()):
                    raise ValueError(f"what agent {i} keeps from step to step in the run's state.pt is of another "
                                     "model")
                agent.samples, agent.steps = share["samples"], share["steps"]
            self.agents[i] = agent


def batch_stream(s: TrainSettings, dataset: Dataset, indices: np.ndarray, agent: int, start: int) -> Iterator:
    """An agent's batches from its step `start` on, pass after pass over its images, each in an order of its own."""

    def whole_pass(number: int) -> Batches:
        return training_batches(s, dataset, indices, agent, number, "pass")

    done, skipped = divmod(start, len(whole_pass(1)))
    yield from itertools.islice(whole_pass(done + 1), skipped, None)
    for number in itertools.count(done + 2):
        yield from whole_pass(number)


def steps_of_an_epoch(train_parts: list[np.ndarray], batch_size: int) -> int:
    """The same for everybody: as many full batches as it takes for as many images as all agents have together.

    Agents with fewer images than the mean see them more often than once in an epoch, those with more not all of them.
    """
    return math.ceil(sum(map(len, train_parts)) / (len(train_parts) * batch_size))
