"""The agents of one process that merge their models, and what they do in an iteration: exchange, merge and train."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from agents.alignment import Alignment
from agents.correction import DriftCorrection
from agents.local import LocalTrainer
from agents.run import Agents
from agents.tail import TailAverage
from data.batches import Batches
from merging import METHODS, Merged, Method, all_outgoing, merge
from merging.activation_matching import Matching
from merging.averaging import State, least_distance
from merging.batch_norm import images_of
from merging.divided import Divided, reestimate_all
from merging.files import check_state
from merging.permutation import FeatureReader, Permutations, PermutationSpec, derive_spec
from models import training
from network.faults import surviving, without
from network.processes import Network, homes, taken
from network.topology import Topology
from network.turns import CommonBasis
from optimizers.corrections import CORRECTIONS
from utils.progress import progress, say
from utils.settings import FromOptions

SHARED = -1


@dataclass(frozen=True)
class MergeSettings(FromOptions):
    """What agents do in an iteration, and `of_method`: the options that a merge method may have, by its names."""

    opt: str
    epochs: float
    train_at_once: int
    batch_size: int
    match_data: str
    match_samples: int
    match_augment: bool
    match_at: str
    match_prior: str
    match_memory: float
    root: int | None
    bn_reset: str
    robust: str
    max_distance: float
    wire: str
    correction: str
    train_itr: int | None
    average_last: float
    link_failure: float
    agent_failure: float
    seed: int
    of_method: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> MergeSettings:
        """A method's option NAME is --match_NAME."""
        return super().of({**options, "of_method": {name.removeprefix("match_"): value
                                                    for name, value in options.items()}})

    @property
    def method(self) -> Method | None:
        """How models are merged; None: agents stay alone."""
        return METHODS.get(self.opt)

    def part(self, iteration: int) -> tuple[int, int]:
        """Which part of a local epoch an iteration trains: (k, h) is the k-th of h, (0, 1) all of it."""
        h = round(1 / self.epochs) if 0 < self.epochs < 1 else 1
        return (iteration - 1) % h, h

    @property
    def reads_others(self) -> bool:
        """Whether an agent reads images of others."""
        return self.method is not None and self.match_data == "all"

    @property
    def matching(self) -> Matching:
        """How models are compared by their activations."""
        return Matching(at=self.match_at, memory=int(self.match_memory * 2**30), prior=self.match_prior)

    @property
    def options_of_method(self) -> Any:
        """None where nothing can be set."""
        values = {**self.of_method, **asdict(self.matching)}
        return self.method.options and self.method.options(
            **{name: values[name] for name in self.method.option_names if name in values})


@dataclass
class MergingAgents(Agents):
    """The agents of this process, their models, what they have done so far, and the network that ties them to the rest.

    train_parts, test_parts: of all agents, but train_parts may be empty for those that live elsewhere.
    model_of: agents here -> a number for their model: their own, or SHARED after a merge that served all of them.
    samples, steps: agents here -> how many they have trained with.
    """

    settings: MergeSettings
    topology: Topology
    network: Network
    trainer: LocalTrainer
    train_parts: list[np.ndarray]
    test_parts: list[np.ndarray]
    states: dict[int, State]
    model_of: dict[int, int] = field(init=False)
    samples: dict[int, int] = field(init=False)
    steps: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.model_of = {i: i for i in self.states}
        self.samples, self.steps = dict.fromkeys(self.states, 0), dict.fromkeys(self.states, 0)

    # What it goes by

    @property
    def num_agents(self) -> int:
        return self.topology.num_agents

    @property
    def method(self) -> Method | None:
        return self.settings.method

    @cached_property
    def spec(self) -> PermutationSpec | None:
        """The permutation groups, for the methods that permute."""
        if not (self.method and (self.method.permutes or self.method.aligned)):
            return None
        dataset = self.trainer.dataset
        example = torch.zeros(2, dataset.in_channels, dataset.image_size, dataset.image_size)
        model = copy.deepcopy(self.trainer.model).to("cpu", memory_format=torch.contiguous_format)
        return derive_spec(model, example)

    @cached_property
    def alignment(self) -> Alignment | None:
        """For the method whose agents align themselves before they merge."""
        if not (self.method and self.method.aligned):
            return None
        return Alignment(CommonBasis(self.weights, self.num_agents, self.settings.root), self.network, self.states,
                         self.spec, self.trainer.model, self.settings.matching, self.reordered)

    @cached_property
    def correction(self) -> DriftCorrection | None:
        """What keeps the agents from drifting apart while they train; None: nothing does."""
        rule = CORRECTIONS.get(self.settings.correction)
        return rule and DriftCorrection(rule, self.trainer.model, self.spec)

    @cached_property
    def tail(self) -> TailAverage | None:
        """What the merges that no training follows are of, but the first of them; None: of what that one made."""
        s = self.settings
        if not s.average_last:
            return None
        last = s.train_itr + 1
        return TailAverage(last + 1 - max(round(s.average_last * last), 1), last, self.spec)

    def reordered(self, agent: int, permutations: Permutations) -> None:
        """The units of an agent's model have another order from now on."""
        for kept in filter(None, (self.correction, self.tail)):
            kept.reorder(agent, permutations)

    @property
    def like_sent(self) -> State:
        """A state dict with the entries of what travels for a merge."""
        return self.sent(-1, self.trainer.model.state_dict())

    def sent(self, agent: int, state: State) -> State:
        """What travels for a merge when an agent's model is `state`."""
        return self.correction.with_walk(agent, state) if self.correction else state

    @property
    def compares_activations(self) -> bool:
        return self.method.reads_images or self.method.aligned

    def up(self, iteration: int) -> list[int]:
        """The agents of this process that take part in an iteration."""
        up = self.faults.agents(iteration, self.num_agents)
        return [i for i in self.states if up[i]]

    def weights(self, iteration: int) -> np.ndarray:
        """(N, N): the mixing matrix of iteration 1, 2, ..., without what fails in it."""
        if self.method is None:
            return np.eye(self.num_agents)
        return surviving(self.topology.weights(iteration - 1), self.faults.links(iteration, self.num_agents))

    def neighbours(self) -> list[int]:
        """With whom the agents here ever exchange models."""
        ties = self.topology.connectivity | self.topology.connectivity.T
        return [j for i in self.network.agents for j in np.flatnonzero(ties[i]).tolist()]

    def matching_batches(self, agent: int | None, iteration: int) -> Batches:
        """What matching and BatchNorm re-estimation read in an iteration: an agent's images, or (None) all agents'."""
        s = self.settings
        return self.trainer.sample(self.train_parts, agent, s.match_samples, iteration, "match", s.match_augment)

    def divides(self, weights: np.ndarray) -> bool:
        """Whether the processes go through the shared images together: each of them has somebody to match for."""
        team, merging = self.network.team, np.count_nonzero(weights, axis=1) > 1
        if not (team and self.settings.reads_others and self.method.reads_images and not self.method.jointly):
            return False
        home = homes(self.num_agents, team.size)
        return {home[i] for i in np.flatnonzero(merging).tolist()} == set(range(team.size))

    # Merging

    def merge(self, iteration: int) -> dict[int, dict[str, Any]]:
        """x_i <- sum_j w_ij P_ij(x_j) for every agent i here.

        Returns whose models each one `merged_with` its own: "0 3", or "0 3@7" where the last that was to be had of 3
        was of iteration 7; and what was `matched` for it, rows of merge_stats.csv.
        """
        if self.method is None:
            return self.stay_alone(iteration)
        back = self.go_back(iteration)
        weights = self.weights(iteration)
        takes = taken(weights)
        merging = [i for i in self.states if (takes[i] | takes[:, i]).any()]
        wanted = set(np.flatnonzero(takes[merging].any(0)).tolist())
        shared = self.matching_batches(None, iteration) if self.settings.match_data == "all" else None
        divided = self.divides(weights)
        if divided:
            shared = Divided(shared, self.network.team)
        images = {i: self.matching_batches(i, iteration) if shared is None else shared for i in merging}
        matched: list[dict] = []
        merged_with = dict.fromkeys(self.states, "")
        try:
            models = self.exchange(iteration, weights, images, divided)
            untimely = self.network.old.keys() & models
            in_step = not self.network.staleness and models.keys() >= wanted and not untimely
            weights = without(weights, [j for j in range(self.num_agents) if j not in models])
            merging = [i for i in merging if weights[i, i] != 1]  # nobody may have come
            merged = self.merged(merging, models, weights, images, shared)
            if self.correction:
                self.correction.update(self.drifted(merging, iteration), models, weights, merged, in_step, untimely)
                self.correction.begin({i: merged.states[i] for i in merging})
            for i in merging if self.tail else ():
                if order := merged.moved(i):
                    self.tail.reorder(i, order)
                self.tail.add(iteration, i, merged.states[i])
            back -= set(merging)
            self.states |= {i: merged.states[i] for i in merging}
            served = [merged.basis[i] for i in merging]
            self.model_of |= {i: i if served.count(b) == 1 else SHARED for i, b in zip(merging, served, strict=True)}
            matched = [asdict(match) for match in merged.matches]
            names = {j: f"{j}@{self.network.old[j]}" if j in self.network.old else str(j) for j in models}
            merged_with = {i: " ".join(names[j] for j in np.flatnonzero(taken(weights)[i]).tolist())
                           for i in self.states}
        except ValueError as error:
            if not self.network.may_miss:
                raise ValueError(f"iteration {iteration}: {error}") from error
            say(f"warning: agent {self.network.agents[0]}, iteration {iteration}: {error}: it goes on without this "
                "merge")
        self.reestimate(back, iteration)
        rows = (self.alignment.take_matched() if self.alignment else []) + matched
        return {i: {"merged_with": merged_with[i], "matched": [row for row in rows if row["agent"] == i]}
                for i in self.states}

    def drifted(self, agents: list[int], iteration: int) -> list[int]:
        """Those of them that have merged before: what agents differ by until then is no drift.

        All agents of a group count as having merged in the first iteration, so that their corrections add up to 0.
        """
        if self.network.may_miss:
            return [i for i in agents if i in self.correction.y]
        return agents if iteration > 1 else []

    def merged(self, agents: Sequence[int], models: Mapping[int, State], weights: np.ndarray,
               images: Mapping[int, Batches], shared: Batches | None) -> Merged:
        """The merge of these agents here."""
        s, num_agents = self.settings, range(self.num_agents)
        data = {"local_batches": [images.get(i) for i in num_agents]} if shared is None else {"batches": shared}
        return merge([models.get(i) for i in num_agents], weights, method=s.opt, model=self.trainer.model,
                     spec=self.spec, matching=self.settings.options_of_method, bn_reset=s.bn_reset, robust=s.robust,
                     agents=agents, lent=True, **data)

    def stay_alone(self, iteration: int) -> dict[int, dict[str, Any]]:
        """What re-estimating BatchNorm gives to models that are merged, those of agents alone get from their images."""
        self.reestimate(self.up(iteration), iteration)
        return {i: {"merged_with": "", "matched": []} for i in self.states}

    def reestimate(self, agents: Collection[int], iteration: int) -> None:
        """The statistics of BatchNorm, on each agent's own images."""
        if self.settings.bn_reset != "none":
            self.states |= reestimate_all(self.trainer.model, {i: self.states[i] for i in agents},
                                          {i: self.matching_batches(i, iteration) for i in agents})

    def go_back(self, iteration: int) -> set[int]:
        """The agents here that take the mean of their last models now. Its statistics are of none of these."""
        means = self.tail.take(iteration, self.up(iteration)) if self.tail else {}
        for i, state in means.items():
            self.states[i], self.model_of[i] = state, i
        if self.correction:
            self.correction.begin(means)
        return set(means)

    def exchange(self, iteration: int, weights: np.ndarray, images: Mapping[int, Batches],
                 with_team: bool) -> dict[int, State]:
        """The models that the agents here merge in this iteration, their own too; with_team: see `Network.share`."""
        s, everybody = self.settings, range(self.num_agents)
        aligns = self.alignment is not None and bool(self.alignment.turns(iteration).towards)
        lent = all_outgoing(self.trainer.model, {i: self.states[i] for i in images}, images, s.bn_reset,
                            compared=aligns or self.method.reads_images)

        def share(lent: Mapping[int, State], lenders: Sequence[int], turn: int) -> dict[int, State]:
            arrived = self.network.share(iteration, {i: self.sent(i, lent[i]) for i in lent if i in lenders},
                                         np.where(np.isin(everybody, lenders), weights, 0), s.wire,
                                         like=self.like_sent, turn=turn, with_team=with_team)
            if self.correction:
                arrived = self.correction.without_walks(arrived)
            return self.plausible(iteration, arrived, lent, images) if self.network.may_miss else arrived

        if self.alignment:
            return self.alignment.exchange(iteration, weights, lent, images, share)
        return share(lent, everybody, 0)

    def plausible(self, iteration: int, models: dict[int, State], lent: Mapping[int, State],
                  images: Mapping[int, Batches]) -> dict[int, State]:
        """The models that have come to an agent on its own, without those that it can't or shan't merge."""
        for i, own in lent.items():
            flaws = {j: self.flaw(own, j, models[j], images[i]) for j in sorted(models) if j != i}
            for j in filter(flaws.get, flaws):
                say(f"warning: agent {i}, iteration {iteration}: agent {j}'s model {flaws[j]}: merging without it")
            models = {j: state for j, state in models.items() if not flaws.get(j)}
        return models

    def flaw(self, own: State, agent: int, other: State, images: Batches) -> str:
        most, names = self.settings.max_distance, [name for name, _ in self.trainer.model.named_parameters()]
        if most and not (apart := least_distance(own, other, names)) <= most:
            return f"is {apart:.3g} times the norm of its own away (--max_distance {most:g})"
        if most and self.correction and not (walked := self.correction.walk_of(agent, own)) <= most:
            return f"has walked {walked:.3g} times the norm of its own since its last merge (--max_distance {most:g})"
        if self.compares_activations and not self.has_finite_features(other, images):
            return "makes activations that are not finite"
        return ""

    def has_finite_features(self, state: State, images: Batches) -> bool:
        """Whether what matching reads of a model on the first batch has finite squares."""
        first = next(images_of(images, self.trainer.device, "a look at the models"))
        reads = FeatureReader(self.trainer.model, self.spec, self.settings.match_at, self.trainer.device)(state, first)
        return all(bool(read.float().square().sum().isfinite()) for group in reads.values() for read in group)

    # Training

    def train(self, iteration: int) -> dict[int, dict[str, training.EpochStats]]:
        """E local epochs of every agent, or a part of one, with a fresh optimiser; `stats` are the last epoch's."""
        up, most = self.up(iteration), self.settings.train_at_once
        stats: dict[int, training.EpochStats] = {}
        try:
            for first in progress(range(0, len(up), most), f"iteration {iteration}: training",
                                  unit="agent" if most == 1 else f"{most} agents"):
                stats |= self._train(up[first : first + most], iteration)
        except training.Diverged as error:
            raise training.Diverged(f"iteration {iteration}, {error}; the run folder keeps what was finished "
                                    "before") from None
        return {i: {"stats": last} for i, last in stats.items()}

    def _train(self, agents: list[int], iteration: int) -> dict[int, training.EpochStats]:
        """Of one agent, or of several at once."""
        trainer, epochs, correct = self.trainer, math.ceil(self.settings.epochs), {}
        part = self.settings.part(iteration)
        models = trainer.models({i: self.states[i] for i in agents})
        optimizer, scaler = trainer.fresh_optimizer(*models.values())
        for i, model in models.items():
            steps = epochs * len(trainer.batches(self.train_parts[i], (i, iteration, ""), part))
            correct[i] = self.correction.step(i, model, steps) if self.correction and epochs else None
        last = dict.fromkeys(agents, training.EpochStats(math.nan, math.nan, 0, 0))
        for epoch in range(1, epochs + 1):
            last = trainer.epoch_of(models, self.train_parts, (iteration, f"local epoch {epoch}"), optimizer, scaler,
                                    correct, part)
            for i in agents:
                self.samples[i] += last[i].samples
                self.steps[i] += last[i].steps
        for i, model in models.items():
            self.states[i], self.model_of[i] = training.snapshot(model), i
        return last

    # As a run sees them

    def report(self, iteration: int) -> dict[int, dict[str, Any]]:
        up = self.up(iteration) if iteration else self.states
        orders = self.alignment.orders if self.alignment else {}
        return {i: {"state": state, "model": self.model_of[i],
                    "samples": self.samples[i], "steps": self.steps[i], "took_part": int(i in up),
                    "saved": {"agents": i, "orders": orders.get(i, -1)} | (
                        self.correction.saved(i) if self.correction else {}) | (
                        self.tail.saved(i) if self.tail else {})}
                for i, state in self.states.items()}

    def take_up(self, shares: Mapping[int, Mapping[str, Any] | None]) -> None:
        for i, share in shares.items():
            if share is not None:
                state = share["states"]
                check_state(state, self.trainer.model.state_dict(), f"agent {i}'s model in the run's state.pt")
                self.states[i] = {k: t.to(self.trainer.device) for k, t in state.items()}
                self.samples[i], self.steps[i] = share["samples"], share["steps"]
                if self.correction:
                    self.correction.take_up(i, share, self.states[i])
                if self.tail:
                    self.tail.take_up(i, share, self.states[i])
                if self.alignment and share.get("orders", -1) >= 0:
                    self.alignment.orders[i] = share["orders"]

    def catch_up(self, iteration: int) -> int:
        return self.network.catch_up(iteration, self.weights)

    def notes(self) -> list[str]:
        made = super().notes()
        if self.tail and self.tail.first == self.tail.last:
            made.append(f"--average_last {self.settings.average_last:g} of so few merges is one, whose mean is itself")
        if not (self.spec and self.spec.stuck):
            return made
        name, reason = next(iter(self.spec.stuck.items()))
        return [*made,
                f"{self.settings.opt} averages the units of {len(self.spec.stuck)} layers as they are, because they "
                f"can't be permuted: {name} ({reason}){', ...' if len(self.spec.stuck) > 1 else ''}"]
