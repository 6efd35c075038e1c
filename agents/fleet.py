"""The agents of one process, and what they do in an iteration: exchange models, align, merge, train, evaluate."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from agents.local import LocalTrainer, new_model
from data.batches import Batches
from data.datasets import some_images
from experiments.options import ALONE
from merging import METHODS, Pairing, matches, merge, outgoing
from merging.activation_matching import Matching
from merging.averaging import State, least_distance
from merging.batch_norm import images_of, reestimate
from merging.common_basis import CommonBasis, Turns, align, universe
from merging.permutation import FeatureReader, PermutationSpec, derive_spec, permute
from models import training
from network.faults import Faults, surviving, without
from network.processes import Network, taken
from network.topology import Topology
from utils.progress import progress, say
from utils.seeds import generator


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

    def matching_batches(self, agent: int | None, iteration: int) -> Batches:
        """What matching and BatchNorm re-estimation read in an iteration: an agent's images, or (None) all agents'."""
        o, dataset = self.o, self.trainer.dataset
        indices = some_images(dataset.train, self.train_parts, agent, o.match_samples,
                              generator(o.seed, agent or 0, iteration, "sample"))
        return Batches(dataset, dataset.train, indices, o.batch_size, shuffle=True, augment=o.match_augment,
                       make_generator=lambda: generator(o.seed, agent or 0, iteration, "match"))

    @cached_property
    def basis(self) -> CommonBasis:
        return CommonBasis(self.weights, self.o.num_models, self.o.root, self.o.align_every)

    def turns(self, iteration: int) -> Turns:
        """Whom the agents wait for and align themselves to before they lend their models in this iteration."""
        return self.basis.at(iteration) if METHODS[self.o.opt].aligned else Turns()

    def merge(self, iteration: int, stats: list[dict]) -> dict[int, str]:
        """x_i <- sum_j w_ij P_ij(x_j) for every agent i here; `stats` gets a row for all that was matched.

        Returns whose models each one merged with its own: "0 3", or "0 3@7" where the last that was to be had of 3 was
        of iteration 7.
        """
        o, network = self.o, self.network
        if o.opt == ALONE:
            return self.stay_alone(iteration)
        weights = self.weights(iteration)
        takes = taken(weights)
        merging = [i for i in self.states if (takes[i] | takes[:, i]).any()]
        if o.match_data == "all":
            shared = self.matching_batches(None, iteration)
            images, data = dict.fromkeys(merging, shared), {"batches": shared}
        else:
            images = {i: self.matching_batches(i, iteration) for i in merging}
            data = {"local_batches": [images.get(i) for i in range(o.num_models)]}
        try:
            models = self.exchange(iteration, weights, images, stats)
            weights = without(weights, [j for j in range(o.num_models) if j not in models])
            merging = [i for i in merging if weights[i, i] != 1]  # nobody may have come
            merged = merge([models.get(i) for i in range(o.num_models)], weights, method=o.opt,
                           model=self.trainer.model, spec=self.spec, matching=self.options_of_method,
                           bn_reset=o.bn_reset, robust=o.robust, agents=merging, lent=True, **data)
            stats += map(asdict, merged.matches)
        except ValueError as error:
            if not network.may_miss:
                raise ValueError(f"iteration {iteration}: {error}") from error
            say(f"warning: agent {network.agents[0]}, iteration {iteration}: {error}: it goes on without this merge")
            return dict.fromkeys(self.states, "")
        self.states |= {i: merged[i] for i in merging}
        names = {j: f"{j}@{network.old[j]}" if j in network.old else str(j) for j in models}
        return {i: " ".join(names[j] for j in np.flatnonzero(taken(weights)[i]).tolist()) for i in self.states}

    def stay_alone(self, iteration: int) -> dict[int, str]:
        """What re-estimating BatchNorm gives to models that are merged, those of agents alone get from their images."""
        for i in self.up(iteration) if self.o.bn_reset != "none" else ():
            self.states[i] = reestimate(self.trainer.model, self.states[i], self.matching_batches(i, iteration))
        return dict.fromkeys(self.states, "")

    def exchange(self, iteration: int, weights: np.ndarray, images: dict[int, Batches],
                 stats: list[dict]) -> dict[int, State]:
        """The models that the agents here merge in this iteration, their own too, in the order in which they lend."""
        o, network, everybody = self.o, self.network, range(self.o.num_models)
        turns = self.turns(iteration)
        aligns = bool(turns.towards)
        at_once = aligns and o.align == "at_once"
        lent = {i: outgoing(self.trainer.model, self.states[i], images[i], o.bn_reset,
                            compared=aligns or METHODS[o.opt].reads_images) for i in images}
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
            arrived = network.share(iteration, {i: lent[i] for i in lent if i in wave},
                                    np.where(np.isin(everybody, wave), weights, 0), o.wire,
                                    like=self.trainer.model.state_dict(), turn=turn)
            models |= self.plausible(iteration, arrived, lent, images) if network.may_miss else arrived
        if at_once:
            return self.align_at_once(models, turns.roots[0], images, stats)
        if network.may_miss and METHODS[o.opt].aligned:
            for i in images:
                models = self.in_own_order(i, models, weights, images[i], stats)
        return models

    def plausible(self, iteration: int, models: dict[int, State], lent: dict[int, State],
                  images: dict[int, Batches]) -> dict[int, State]:
        """The models that have come to an agent on its own, without those that it can't or shan't merge."""
        for i, own in lent.items():
            flaws = {j: self.flaw(own, models[j], images[i]) for j in sorted(models) if j != i}
            for j in filter(flaws.get, flaws):
                say(f"warning: agent {i}, iteration {iteration}: agent {j}'s model {flaws[j]}: merging without it")
            models = {j: state for j, state in models.items() if not flaws.get(j)}
        return models

    def flaw(self, own: State, other: State, images: Batches) -> str:
        most, names = self.o.max_distance, [name for name, _ in self.trainer.model.named_parameters()]
        if most and not (apart := least_distance(own, other, names)) <= most:
            return f"is {apart:.3g} times the norm of its own away (--max_distance {most:g})"
        if self.reads_features and not self.has_finite_features(other, images):
            return "makes activations that are not finite"
        return ""

    @property
    def reads_features(self) -> bool:
        """Whether models are compared by their activations."""
        return METHODS[self.o.opt].reads_images or METHODS[self.o.opt].aligned

    def has_finite_features(self, state: State, images: Batches) -> bool:
        """Whether what matching reads of a model on the first batch has finite squares."""
        first = next(images_of(images, self.trainer.device, "a look at the models"))
        reads = FeatureReader(self.trainer.model, self.spec, self.o.match_at, self.trainer.device)(state, first)
        return all(bool(read.float().square().sum().isfinite()) for group in reads.values() for read in group)

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
        """Agent i's model in the order of units of `references`, among the models that have come.

        What was matched is noted down for the agent that is here, be it i or, where i's model came, the reference.
        """
        found, correlations = align(self.spec, self.trainer.model, state, [models[j] for j in references],
                                    [weights[i, j] or 1.0 for j in references], images, self.matching,
                                    names=[*references, i])
        for j, of_pair in zip(references, correlations, strict=True):
            pair = (i, j) if i in self.states else (j, i)
            stats += map(asdict, matches(self.spec, *pair, Pairing(found, of_pair)))
        return permute(self.spec, found, state)

    def align_at_once(self, models: dict[int, State], root: int, images: dict[int, Batches],
                      stats: list[dict]) -> dict[int, State]:
        """Everybody's models in one order of units, that of `root`; the same in every process."""
        shared = next(iter(images.values()))
        found, correlations = universe(self.spec, self.trainer.model, [models[j] for j in sorted(models)], shared,
                                       self.matching, root=root)
        for (i, j), of_pair in correlations.items():
            stats += [asdict(match) for a, b in ((i, j), (j, i))
                      for match in matches(self.spec, a, b, Pairing(found[a], of_pair))]
        return {j: permute(self.spec, found[j], models[j]) for j in sorted(models)}

    @property
    def matching(self) -> Matching:
        """How the agents here compare models by their activations."""
        return Matching(at=self.o.match_at, memory=int(self.o.match_memory * 2**30), prior=self.o.match_prior)

    @property
    def options_of_method(self) -> Any:
        """What is set of the merge method: its option NAME is --match_NAME. None where nothing can be."""
        way = METHODS[self.o.opt]
        values = {name.removeprefix("match_"): value for name, value in vars(self.o).items()} | asdict(self.matching)
        return way.options and way.options(**{name: values[name] for name in way.option_names if name in values})

    @cached_property
    def spec(self) -> PermutationSpec | None:
        """The permutation groups, for the methods that permute."""
        way = METHODS.get(self.o.opt)  # agents alone have none
        if not (way and (way.permutes or way.aligned)):
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
