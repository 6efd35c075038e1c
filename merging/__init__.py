"""How models of neighbouring agents become one: match the units, permute, average, re-estimate BatchNorm.

    merged = merge(models, weights, method="DIMAT", batches=images)

`python -m merging` prints the permutation groups of a model.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from merging.activation_matching import Edge, Matching, Pairing
from merging.averaging import ROBUST, State, robust_average, weighted_average
from merging.batch_norm import Batches, device_of, tracked_norms
from merging.divided import reestimate_all
from merging.inputs import first_image, images_per_agent, mixing_matrix, model_and_states
from merging.methods import METHODS, Average, Method, register_method
from merging.permutation import Permutations, PermutationSpec, derive_spec, permute
from merging.repair import repair
from merging.tracing.running import is_mixed

__all__ = ["BN_RESETS", "METHODS", "Match", "Matching", "Merged", "Method", "Pairing", "all_alike", "all_outgoing",
           "matches", "merge", "outgoing", "register_method"]

BN_RESETS = ("none", "after", "both", "repair")
BEFORE = ("both", "repair")


@dataclass(frozen=True)
class Match:
    """What a merge matched of one permutation group: its `units` of `agent` with those of `neighbour`.

    correlation: mean over the matched units; None if not matched by activations. moved: the share of the neighbour's
    units that change their place.
    """

    agent: int
    neighbour: int
    group: str
    units: int
    correlation: float | None
    moved: float


@dataclass(frozen=True, eq=False)
class Merged(Sequence):
    """What a merge came to; as a sequence, the agents' merged models.

    states: a state dict for each agent, None for those that were not asked for. matches: what was matched, by agent,
    neighbour and group. permutations: (i, j) -> what took agent j's units to agent i's order; pairs that are not in it
    were averaged as they were. basis: in whose order each agent's merged model has its units, its own as a rule.
    """

    states: list[State | None]
    matches: list[Match]
    permutations: Mapping[Edge, Permutations]
    basis: Sequence[int]

    def __getitem__(self, agent):
        return self.states[agent]

    def __len__(self) -> int:
        return len(self.states)

    def moved(self, agent: int) -> Permutations | None:
        """What took the agent's own units to the order that its merged model has; None: they stayed where they were."""
        return self.permutations.get((self.basis[agent], agent))


def outgoing(model: nn.Module, state: State, batches: Batches | None, bn_reset: str, compared: bool) -> State:
    """What an agent lends its neighbours for a merge: its model, where `bn_reset` asks for that and its activations are
    to be `compared` with BatchNorm's statistics of its own images. Its owner can do that once for all of them."""
    return all_outgoing(model, {0: state}, {0: batches}, bn_reset, compared)[0]


def all_outgoing(model: nn.Module, states: Mapping[int, State], images: Mapping[int, Batches | None], bn_reset: str,
                 compared: bool) -> dict[int, State]:
    """The same of several agents: see `outgoing`."""
    # Only activations depend on running statistics: otherwise it would change nothing.
    return reestimate_all(model, states, images) if compared and bn_reset in BEFORE else dict(states)


def merge(
    models_or_states: Sequence[nn.Module] | Sequence[State | None],
    weights: Any,
    method: str = "DIMAT",
    batches: Batches | None = None,
    *,
    local_batches: Sequence[Batches | None] | None = None,
    model: nn.Module | None = None,
    spec: PermutationSpec | None = None,
    matching: Any = None,
    bn_reset: str = "both",
    robust: str = "none",
    agents: Collection[int] | None = None,
    lent: bool = False,
) -> Merged:
    """One merge of N agents: x_i <- sum_j w_ij P_ij(x_j), P_ij taking j's units to i's order (DIMAT, Algorithm 1).

    Nothing that is passed in is changed; the merged state dicts are new tensors on the inputs' device.

    - An agent whose row is a unit vector gets that one model as it is, BatchNorm included, without any pass.
    - Rows that are all the same (fully connected) with shared `batches`: one merge, in agent 0's order of units, serves
      all; the same dict object is returned N times. The paper's approximation: else every agent would match anew, as
      it does where tensors differ in precision, and with `robust`, where nobody relies on agent 0.
    - With `local_batches` agent i matches its neighbours' models to its own on its own images and re-estimates its
      merged model on them; nobody else's are read for it.
    - Images go through a copy of the model in the model's own precision; merged tensors have that of the agent's own.
    - What is in DataParallel or compiled is merged as what is within, and comes back under the names that it had.
    - A module's extra state (`get_extra_state`), other entries that are no tensors, and integers stay the agent's own.

    Args:
        models_or_states: N models of one architecture, or their state dicts (then `model` is needed), dense and each
            tensor on the same device for all.
        weights: mixing matrix (N, N), rows sum to 1: an array, a tensor or nested lists.
        method: a name in METHODS: DIMAT (activation matching), C2M3 (of all models together), WM (weight matching) and
            WA (plain averaging). COMMON averages models that agents have brought into one order of units together,
            which is done before (`merging.common_basis`), and wants to hear that it was (`lent`).
        batches: shared by all agents and read more than once; each a tensor of images (B, ...), a tuple or list that
            starts with one, or a dict, of which the first of the keys "image", "images", "pixel_values", "x" and
            "input" that it has holds the images. What else is in them (labels) is not looked at.
        local_batches: the same, for each agent its own, instead of `batches`.
        model: the architecture, when state dicts are given (else the first of the models in the highest precision).
        spec: its permutation groups; derived from the model and the first image when not given.
        matching: what can be set of the method, as its `options` are; of DIMAT a `Matching`. None: the defaults.
            Methods of which nothing can be set do not look at it.
        bn_reset: "none"; "after": re-estimate the merged models' BatchNorm statistics; "both": also those of the
            agents' models before their activations are matched (local: each on its own images), as in the paper;
            "repair": that, and the activations of the merged models' layers without BatchNorm are brought to their
            parents' statistics (REPAIR).
        robust: "none", or "clip", "trimmed" or "median" in place of the sum, which some hostile models of several can't
            move far (see `robust_average`).
        agents: whose merged models to compute (None: everybody's). The others' are None in what comes back, and so may
            be, in `models_or_states`, those whose models these agents don't take.
        lent: the models are as their owners lend them: what has to be done before a merge, and takes the owner's images
            (`outgoing`) or turns (`merging.common_basis.align`), is done, and is not done again.

    Raises:
        ValueError: a mixing matrix of the wrong shape, with negative or non-finite entries or rows that don't sum to 1;
            models of different architectures, on different devices, with tensors that are sparse, quantised or without
            values, or with NaN or infinite values (agent and tensor are named); an unknown option, or `matching` of
            another kind than the method's; images that are needed and missing, can be read only once or are not found
            in a batch; a model whose forward pass fails on them, or that `derive_spec` refuses; a method for models in
            a common basis that are not `lent`; `robust` with a method that has an average of its own, or with
            bn_reset="repair", which takes statistics of every model.
    """
    way, matching = _way(method, matching, bn_reset, robust, lent)
    model, states, prefixes = model_and_states(models_or_states, model)
    weights = mixing_matrix(weights, len(states))
    if not isinstance(spec, PermutationSpec | None):
        raise ValueError(f"spec= is a {type(spec).__name__}: pass what derive_spec returns")

    wanted = range(len(states)) if agents is None else sorted(agents)
    if not all(isinstance(i, Integral) and 0 <= i < len(states) for i in wanted):
        raise ValueError(f"agents={list(wanted)}: there are agents 0 to {len(states) - 1}")
    wanted = [int(i) for i in wanted]  # True would index an array in another way
    mixing = [i for i in wanted if np.count_nonzero(weights[i]) > 1]
    precisions = {tuple(value.dtype for value in _mixed(state).values()) for state in states if state is not None}
    once = bool(mixing) and local_batches is None and all_alike(weights) and len(precisions) == 1 and robust == "none"
    bases = [0] if once else mixing
    # An agent's own model gives the order of units and the integers even where w_ii is 0, as in a bipartite graph.
    sources = {i: sorted({i, *np.flatnonzero(weights[i]).tolist()}) for i in bases}
    involved = sorted({agent for i in bases for agent in sources[i]})
    for i in wanted:
        for j in np.flatnonzero(weights[i]).tolist():
            if states[j] is None:
                raise ValueError(f"agent {i} takes agent {j}'s model (weight {weights[i, j]:.4g}), which is None")
    for i in {*bases, *mixing}:
        if states[i] is None:
            raise ValueError(f"agent {i} merges others' models, in the order of its own, which is None")
    resets, repairs = bn_reset != "none" and bool(tracked_norms(model)), bn_reset == "repair"
    resets_first = resets and bn_reset in BEFORE and way.reads_images and not lent

    read = {
        **dict.fromkeys(involved if resets_first else bases if resets or repairs else (), f"bn_reset={bn_reset!r}"),
        **dict.fromkeys(bases if way.reads_images else (), f"method={method!r}"),
        **dict.fromkeys(bases if way.permutes and spec is None else (), f"method={method!r} without spec="),
    }
    images = images_per_agent(batches, local_batches, len(states), read)

    if way.permutes and spec is None and bases:
        spec = derive_spec(model, first_image(images[bases[0]], device_of(model.state_dict())))
    senders = list(states)
    for i, state in all_outgoing(model, {i: states[i] for i in involved}, images, bn_reset, resets_first).items():
        senders[i] = state

    matched: list[Match] = []
    permutations: dict[Edge, Permutations] = {}

    def match(agents: list[int]) -> dict[Edge, Pairing]:
        pairs = [(i, j) for i in agents for j in sources[i] if j != i]
        found = way.match(spec, model, senders, pairs, images.get(agents[0]), matching=matching)
        found = {pair: one if isinstance(one, Pairing) else Pairing(one) for pair, one in found.items()}
        for i, j in sorted(set(pairs) & found.keys()) if spec is not None else ():
            matched.extend(matches(spec, i, j, found[i, j]))
        permutations.update({pair: found[pair].permutations for pair in found.keys() & set(pairs)})
        return found

    same_images = local_batches is None or not way.reads_images
    of_all = match(bases) if bases and same_images and not way.jointly else None
    merged = {}
    for i in bases:
        found = match([i]) if of_all is None else of_all
        moved = [permute(spec, found[i, j].permutations, senders[j]) if (i, j) in found else senders[j]
                 for j in sources[i]]
        shares = weights[i, sources[i]].tolist()
        merged[i] = senders[i] | _average(way, robust)([_mixed(s) for s in moved], shares, sources[i].index(i))
        if repairs:
            merged[i] = repair(model, merged[i], moved, shares, images[i])
    if resets:
        merged = reestimate_all(model, merged, images)
    result: list[State | None] = [None] * len(states)
    for i in wanted:
        if once or i in merged:
            result[i] = merged[0 if once else i]
            if kept := {key: copy.deepcopy(value) for key, value in states[i].items() if not is_mixed(key, value)}:
                result[i] = result[i] | kept
        else:
            state = states[int(weights[i].argmax())]
            result[i] = {key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
                         for key, value in state.items()}
    result = [{prefix + key: value for key, value in state.items()} if prefix and state else state
              for state, prefix in zip(result, prefixes, strict=True)]
    return Merged(result, matched, permutations, [0 if once and i in wanted else i for i in range(len(states))])


def all_alike(weights: np.ndarray) -> bool:
    """Whether several agents all merge with the same weights, so that one merge can serve them all."""
    return len(weights) > 1 and np.allclose(weights, weights[0], rtol=0, atol=1e-9)


def matches(spec: PermutationSpec, agent: int, neighbour: int, pairing: Pairing) -> Iterator[Match]:
    """A pairing of two agents' units, group by group."""
    for group, p in pairing.permutations.items():
        if spec.members[group]:  # else blocks, which hold nothing but units of other groups
            moved = float((p.cpu() != torch.arange(len(p))).float().mean())
            yield Match(agent, neighbour, group, len(p), pairing.correlations.get(group), moved)


def _way(method: str, matching: Any, bn_reset: str, robust: str, lent: bool) -> tuple[Method, Any]:
    """The method and what is set of it, once all of these are known to go together."""
    for name, value, choices in (("merge method", method, METHODS), ("bn_reset", bn_reset, BN_RESETS),
                                 ("robust", robust, ROBUST)):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r:.80}: choose from {', '.join(choices)}")
    way = METHODS[method]
    if way.aligned and not lent:
        raise ValueError(f"method={method!r} averages models that are in one order of units: bring them into one "
                         "(merging.common_basis.align or universe), and merge what comes out with lent=True; models as "
                         "they are take method='WA'")
    if matching is None or way.options is None:
        matching = way.options and way.options()
    elif not isinstance(matching, way.options):
        raise ValueError(f"matching is a {type(matching).__name__}: method={method!r} takes a {way.options.__name__}")
    if bn_reset == "repair" and robust != "none":
        raise ValueError(f"bn_reset='repair' takes statistics of every model, hostile ones too: leave it out with "
                         f"{robust=}")
    if way.average is not weighted_average and robust != "none":
        raise ValueError(f"method={method!r} averages in its own way: leave {robust=} out")
    return way, matching


def _average(way: Method, robust: str) -> Average:
    """The method's average, or a robust one: (states, weights, own) -> state."""
    if robust == "none":
        return way.average

    def average(states: Sequence[State], weights: Sequence[float], own: int) -> State:
        others = [k for k in range(len(states)) if k != own]
        return robust_average(states[own], [states[k] for k in others], [weights[k] for k in others], robust)

    return average


def _mixed(state: State) -> State:
    """What of a state dict is averaged."""
    return {key: value for key, value in state.items() if is_mixed(key, value)}
