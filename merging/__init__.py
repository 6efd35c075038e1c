"""How models of neighbouring agents become one: match the units, permute, average, re-estimate BatchNorm.

    merged = merge(models, weights, method="DIMAT", batches=images)
"""

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from merging.activation_matching import PRIORS, Edge, match_activations
from merging.averaging import ROBUST, State, robust_average, weighted_average
from merging.batch_norm import Batches, device_of, images_in, reestimate, tracked_norms
from merging.common_basis import between, universe
from merging.permutation import Permutations, PermutationSpec, derive_spec, invert, permute
from merging.repair import repair
from merging.running import is_mixed
from merging.weight_matching import match_weights

# `python -m merging.permutation` imports this package, and so the module itself, before it runs it: harmless there.
warnings.filterwarnings("ignore", message=r"'merging\.\w+' found in sys\.modules", category=RuntimeWarning)

BN_RESETS = ("none", "after", "both")
MATCH_AT = ("last", "all")


@dataclass(frozen=True)
class Method:
    """A way to match models.

    match(spec, model, states, pairs, batches, at=, prior=, match_memory=, correlations=) returns, for the pairs (i, j),
    the permutations that take model j's units to model i's order; a pair it leaves out is averaged as it is. It may
    fill `correlations`, (i, j) -> group -> mean correlation of the matched units.
    permutes: it needs the model's spec; reads_images: it needs the batches; jointly: what it finds for a pair depends
    on the other pairs, so every agent's are asked for separately; aligned: models must have been brought into one basis
    before (`merging.common_basis`).
    """

    match: Callable[..., dict[Edge, Permutations]]
    permutes: bool
    reads_images: bool
    jointly: bool = False
    aligned: bool = False


METHODS: dict[str, Method] = {}


def register_method(name: str, *, permutes: bool = True, reads_images: bool = False, jointly: bool = False,
                    aligned: bool = False) -> Callable[[Callable], Callable]:
    """Adds a matching function to METHODS, which see."""

    def register(match: Callable[..., dict[Edge, Permutations]]) -> Callable[..., dict[Edge, Permutations]]:
        METHODS[name] = Method(match, permutes, reads_images, jointly, aligned)
        return match

    return register


@register_method("DIMAT", reads_images=True)
def match_by_activations(spec, model, states, pairs, batches, **options: Any) -> dict[Edge, Permutations]:
    """Activation matching (DIMAT, the paper's method)."""
    return match_activations(spec, model, states, pairs, batches, **options)


@register_method("WM")
def match_by_weights(spec, model, states, pairs, batches, **unused: Any) -> dict[Edge, Permutations]:
    """Weight matching (Git Re-Basin): no images; computed for i < j, (j, i) is the inverse."""
    matched = {}
    for i, j in sorted({(min(pair), max(pair)) for pair in pairs}):
        matched[i, j] = match_weights(spec, states[i], states[j])
        matched[j, i] = invert(matched[i, j])
    return matched


@register_method("C2M3", reads_images=True, jointly=True)
def match_all_at_once(spec, model, states, pairs, batches, *, at, match_memory, correlations,
                      **unused: Any) -> dict[Edge, Permutations]:
    """Cycle-consistent matching of all models that one agent merges (C2M3)."""
    agents = sorted({agent for pair in pairs for agent in pair})
    of_pairs: dict[Edge, dict[str, float]] = {}
    found = dict(zip(agents, universe(spec, model, [states[i] for i in agents], batches, at=at,
                                      match_memory=match_memory, correlations=of_pairs, names=agents), strict=True))
    correlations |= {(agents[i], agents[j]): values for (i, j), values in of_pairs.items()}
    return {(i, j): between(found[i], found[j]) for i, j in pairs}


@register_method("COMMON", permutes=False, aligned=True)
@register_method("WA", permutes=False)
def match_nothing(spec, model, states, pairs, batches, **unused: Any) -> dict[Edge, Permutations]:
    """Weight averaging: every unit stays where it is."""
    return {}


def outgoing(model: nn.Module, state: State, batches: Batches | None, bn_reset: str, compared: bool) -> State:
    """What an agent lends its neighbours for a merge: its model, for bn_reset="both" and where its activations are to
    be `compared` with BatchNorm's statistics of its own images. Its owner can do that once for all of them."""
    # Only activations depend on running statistics: otherwise it would change nothing.
    return reestimate(model, state, batches) if compared and bn_reset == "both" else state


def merge(
    models_or_states: Sequence[nn.Module] | Sequence[State | None],
    weights: Any,
    method: str = "DIMAT",
    batches: Batches | None = None,
    local_batches: Sequence[Batches | None] | None = None,
    model: nn.Module | None = None,
    spec: PermutationSpec | None = None,
    bn_reset: str = "both",
    rescale: bool = False,
    match_at: str = "all",
    match_prior: str = "none",
    match_memory: int | None = None,
    stats: list[dict[str, Any]] | None = None,
    agents: Collection[int] | None = None,
    robust: str = "none",
) -> list[State | None]:
    """One merge of N agents: x_i <- sum_j w_ij P_ij(x_j), P_ij taking j's units to i's order (DIMAT, Algorithm 1).

    Nothing that is passed in is changed; the merged state dicts are new tensors on the inputs' device.

    - An agent whose row is a unit vector gets that one model as it is, BatchNorm included, without any pass.
    - Rows that are all the same (fully connected) with shared `batches`: one merge, in agent 0's order of units, serves
      all; the same dict object is returned N times. The paper's approximation: else every agent would match anew, as
      it does where tensors differ in precision, and with `robust`, where nobody relies on agent 0.
    - With `local_batches` agent i matches its neighbours' models to its own on its own images and re-estimates its
      merged model on them; nobody else's are read for it.
    - Images go through a copy of the model in the model's own precision; merged tensors have that of the agent's own.
    - A module's extra state (`get_extra_state`), other entries that are no tensors, and integers stay the agent's own.

    Args:
        models_or_states: N models of one architecture, or their state dicts (then `model` is needed), dense and each
            tensor on the same device for all.
        weights: mixing matrix (N, N), rows sum to 1: an array, a tensor or nested lists.
        method: a name in METHODS: DIMAT (activation matching), C2M3 (of all models together), WM (weight matching), WA
            (plain averaging) and COMMON (the same, of models that have been brought into a common basis).
        batches: shared by all agents and read more than once; each a tensor of images (B, ...), a tuple or list that
            starts with one, or a dict, of which the first of the keys "image", "images", "pixel_values", "x" and
            "input" that it has holds the images. What else is in them (labels) is not looked at.
        local_batches: the same, for each agent its own, instead of `batches`.
        model: the architecture, when state dicts are given (else the first of the models in the highest precision).
        spec: its permutation groups; derived from the model and the first image when not given.
        bn_reset: "none"; "after": re-estimate the merged models' BatchNorm statistics; "both": also those of the
            agents' models before their activations are matched (local: each on its own images), as in the paper.
        rescale: bring the activations of the merged models' layers without BatchNorm to their parents' statistics
            (REPAIR).
        match_at, match_prior, match_memory: see `match_activations`.
        stats: a list that gets a row for every agent, neighbour and group: {agent, neighbour, group, units,
            correlation (mean over the matched units; None if not matched by activations), moved (share of the
            neighbour's units that change their place)}.
        agents: whose merged models to compute (None: everybody's). The list that comes back has None for the others,
            and so may `models_or_states` for those whose models these agents don't take.
        robust: "none", or "clip", "trimmed" or "median" in place of the sum, which some hostile models of several can't
            move far (see `robust_average`).

    Raises:
        ValueError: a mixing matrix of the wrong shape, with negative or non-finite entries or rows that don't sum to 1;
            models of different architectures, on different devices, with tensors that are sparse, quantised or without
            values, or with NaN or infinite values (agent and tensor are named); an unknown option; images that are
            needed and missing, can be read only once or are not found in a batch; a model whose forward pass fails on
            them, or that `derive_spec` refuses; `robust` with `rescale`, which takes statistics of every model.
    """
    if method not in METHODS:
        raise ValueError(f"unknown merge method {method!r}: choose from {', '.join(METHODS)}")
    if bn_reset not in BN_RESETS:
        raise ValueError(f"unknown bn_reset {bn_reset!r}: choose from {', '.join(BN_RESETS)}")
    if match_at not in MATCH_AT:
        raise ValueError(f"unknown match_at {match_at!r}: choose from {', '.join(MATCH_AT)}")
    if match_prior not in PRIORS:
        raise ValueError(f"unknown match_prior {match_prior!r}: choose from {', '.join(PRIORS)}")
    if robust not in ROBUST:
        raise ValueError(f"unknown robust {robust!r}: choose from {', '.join(ROBUST)}")
    if rescale and robust != "none":
        raise ValueError(f"rescale takes statistics of every model, hostile ones too: leave it out with {robust=}")
    way = METHODS[method]
    model, states = _model_and_states(models_or_states, model)
    weights = _mixing_matrix(weights, len(states))

    wanted = range(len(states)) if agents is None else sorted(agents)
    if not all(0 <= i < len(states) for i in wanted):
        raise ValueError(f"agents={list(wanted)}: there are agents 0 to {len(states) - 1}")
    mixing = [i for i in wanted if np.count_nonzero(weights[i]) > 1]
    precisions = {tuple(value.dtype for value in _mixed(state).values()) for state in states if state is not None}
    once = bool(mixing) and local_batches is None and all_alike(weights) and len(precisions) == 1 and robust == "none"
    bases = [0] if once else mixing
    sources = {i: np.flatnonzero(weights[i]).tolist() for i in bases}
    involved = sorted({agent for i in bases for agent in (i, *sources[i])})
    for i in wanted:
        for j in np.flatnonzero(weights[i]).tolist():
            if states[j] is None:
                raise ValueError(f"agent {i} takes agent {j}'s model (weight {weights[i, j]:.4g}), which is None")
    for i in {*bases, *mixing}:
        if states[i] is None:
            raise ValueError(f"agent {i} merges others' models, in the order of its own, which is None")
    resets = bn_reset != "none" and bool(tracked_norms(model))
    resets_first = resets and bn_reset == "both" and way.reads_images

    read = {
        **dict.fromkeys(involved if resets_first else (), "bn_reset='both'"),
        **dict.fromkeys(bases if resets else (), f"bn_reset={bn_reset!r}"),
        **dict.fromkeys(bases if rescale else (), "rescale=True"),
        **dict.fromkeys(bases if way.reads_images else (), f"method={method!r}"),
        **dict.fromkeys(bases if way.permutes and spec is None else (), f"method={method!r} without spec="),
    }
    images = _images_per_agent(batches, local_batches, len(states), read)

    if way.permutes and spec is None and bases:
        spec = derive_spec(model, _first_image(images[bases[0]], device_of(model.state_dict())))
    senders = list(states)
    for i in involved if resets_first else ():
        senders[i] = outgoing(model, states[i], images[i], bn_reset, compared=True)

    def match(agents: list[int]) -> dict[Edge, Permutations]:
        pairs = [(i, j) for i in agents for j in sources[i] if j != i]
        correlations: dict[Edge, dict[str, float]] = {}
        found = way.match(spec, model, senders, pairs, images.get(agents[0]), at=match_at, prior=match_prior,
                          match_memory=match_memory, correlations=correlations)
        if stats is not None and spec is not None:
            for i, j in sorted(set(pairs) & found.keys()):
                of_pair = correlations.get((i, j), correlations.get((j, i), {}))
                stats.extend(match_stats(spec, i, j, found[i, j], of_pair))
        return found

    same_images = local_batches is None or not way.reads_images
    matched = match(bases) if bases and same_images and not way.jointly else None
    merged = {}
    for i in bases:
        permutations = match([i]) if matched is None else matched
        moved = [
            permute(spec, permutations[i, j], senders[j]) if (i, j) in permutations else senders[j] for j in sources[i]
        ]
        # Integer buffers come from agent i even where w_ii is 0, as in a bipartite graph of three.
        shares = weights[i, sources[i]].tolist()
        own, *others = (_mixed(state) for state in (senders[i], *moved))
        if robust == "none":
            average = weighted_average([own, *others], [0, *shares])
        else:
            neighbours = [k for k, j in enumerate(sources[i]) if j != i]
            average = robust_average(own, [others[k] for k in neighbours], [shares[k] for k in neighbours], robust)
        merged[i] = senders[i] | average
        if rescale:
            merged[i] = repair(model, merged[i], moved, shares, images[i])
        if resets:
            merged[i] = reestimate(model, merged[i], images[i])
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
    return result


def all_alike(weights: np.ndarray) -> bool:
    """Whether several agents all merge with the same weights, so that one merge can serve them all."""
    return len(weights) > 1 and np.allclose(weights, weights[0], rtol=0, atol=1e-9)


def match_stats(spec: PermutationSpec, agent: int, neighbour: int, permutations: Permutations,
                correlations: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each group, as in `merge`'s stats."""
    for group, p in permutations.items():
        if spec.members[group]:  # else blocks, which hold nothing but units of other groups
            moved = float((p.cpu() != torch.arange(len(p))).float().mean())
            yield {"agent": agent, "neighbour": neighbour, "group": group, "units": len(p),
                   "correlation": correlations.get(group), "moved": moved}


def _mixed(state: State) -> State:
    """What of a state dict is averaged."""
    return {key: value for key, value in state.items() if is_mixed(key, value)}


def _model_and_states(given: Sequence, model: nn.Module | None) -> tuple[nn.Module, list[State | None]]:
    """The architecture and the agents' detached state dicts, checked against each other; None stays None."""
    given = list(given)
    if not given:
        raise ValueError("merge needs at least one model")
    for agent, one in enumerate(given):
        if not isinstance(one, (nn.Module, Mapping, type(None))):
            raise ValueError(f"agent {agent}'s model is a {type(one).__name__}: pass models or state dicts")
    if model is None:
        modules = [one for one in given if isinstance(one, nn.Module)]
        if not modules:
            raise ValueError("merge was given state dicts: pass the architecture as model= as well")
        model = max(modules, key=lambda one: max((p.dtype.itemsize for p in one.parameters()), default=0))
    if not isinstance(model, nn.Module):
        raise ValueError(f"model= is a {type(model).__name__}: pass the architecture, an nn.Module")
    states = [one.state_dict() if isinstance(one, nn.Module) else one for one in given]
    expected = model.state_dict()
    first = next((state for state in states if state is not None), expected)
    for agent, state in enumerate(states):
        if state is None:
            continue
        for key in [*expected, *state]:
            if key not in state or key not in expected:
                side = "lacks" if key not in state else "has an unexpected"
                raise ValueError(f"agent {agent}'s model {side} {key!r}: all agents need the architecture of `model`")
            if is_mixed(key, state[key]) or is_mixed(key, expected[key]):
                _check_tensor(f"agent {agent}'s {key!r}", state[key], expected[key])
                if state[key].device != first[key].device:
                    raise ValueError(f"agent {agent}'s {key!r} is on {state[key].device}, another agent's on "
                                     f"{first[key].device}: bring the models to one device")
    return model, [None if state is None else {
        key: value.detach() if isinstance(value, Tensor) else value for key, value in state.items()
    } for state in states]


def _check_tensor(name: str, tensor: Any, expected: Any) -> None:
    """Raises ValueError for what can't be averaged with tensors like `expected`, the model's own."""
    for owner, value in ((name, tensor), (f"`model`'s tensor for {name}", expected)):
        what = ("not a tensor" if not isinstance(value, Tensor) else
                "not initialised (run the model on some images)" if is_lazy(value) else
                "without values, on the meta device" if value.is_meta else
                "quantised" if value.is_quantized or (value.is_floating_point() and value.dtype.itemsize == 1) else
                "sparse or nested" if value.layout != torch.strided or value.is_nested else "")
        if what:
            raise ValueError(f"{owner} is {what}: dense tensors of numbers are needed")
    if tensor.shape != expected.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, `model` has {tuple(expected.shape)}: all agents "
                         "need the same architecture")
    if any(kind(expected) and not kind(tensor) for kind in (torch.is_floating_point, torch.is_complex)):
        raise ValueError(f"{name} is of {tensor.dtype}, `model`'s of {expected.dtype}, which is another kind of number")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or infinite values: it has diverged, leave it out")


def _mixing_matrix(weights: Any, num_agents: int) -> np.ndarray:
    weights = weights.detach().cpu().numpy() if isinstance(weights, Tensor) else weights
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (num_agents, num_agents):
        expected = (num_agents, num_agents)
        raise ValueError(f"the weights of {num_agents} models must have shape {expected}, not {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"weights must be finite and not negative; they range from {weights.min()} to {weights.max()}")
    sums = weights.sum(axis=1)
    worst = int(abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > 1e-6:
        raise ValueError(f"each row of the weights must sum to 1; row {worst} sums to {sums[worst]:.6g}")
    return weights


def _images_per_agent(
    batches: Batches | None, local_batches: Sequence[Batches | None] | None, num_agents: int, read: dict[int, str]
) -> dict[int, Batches]:
    """What each agent in `read` (agent -> which option reads them) reads: the shared batches or its own."""
    if batches is not None and local_batches is not None:
        raise ValueError("pass either batches or local_batches, not both")
    if local_batches is not None and len(local_batches) != num_agents:
        raise ValueError(f"local_batches needs one entry per agent: got {len(local_batches)} for {num_agents} agents")
    images = {}
    for agent, reader in read.items():
        images[agent] = batches if local_batches is None else local_batches[agent]
        name = "batches" if local_batches is None else f"local_batches[{agent}]"
        if images[agent] is None:
            raise ValueError(f"{reader} reads images, but {name} is None: pass some")
        if isinstance(images[agent], Iterator):
            raise ValueError(f"{name} is an iterator, which can be read only once: pass a list or another re-iterable")
        if isinstance(images[agent], Mapping) or not (
                hasattr(images[agent], "__iter__") or hasattr(images[agent], "__getitem__")):
            raise ValueError(f"{name} is a {type(images[agent]).__name__}: pass a list of batches or a DataLoader")
    return images


def _first_image(batches: Batches, device: torch.device) -> Tensor:
    for images in map(images_in, batches):
        if len(images):
            return images[:1].to(device)
    raise ValueError("the batches hold no images: pass at least one batch")
