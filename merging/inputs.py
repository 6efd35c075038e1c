"""What `merge` is given, checked before any work is done: each error names the agent and the tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from merging.averaging import State
from merging.batch_norm import Batches, images_in
from merging.tracing.running import converted, is_mixed, prefix_of, unwrapped


def model_and_states(given: Sequence, model: nn.Module | None) -> tuple[nn.Module, list[State | None], list[str]]:
    """The architecture and the agents' detached state dicts, checked against each other; None stays None.

    Of what was in DataParallel or compiled, it is what is within; and what stood before each agent's names.
    """
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
    model = unwrapped(model)
    if (what := converted(model)).endswith("quantised"):
        raise ValueError(f"{what}: merge the models that these were made from, and quantise what comes out")
    states = [one.state_dict() if isinstance(one, nn.Module) else one for one in given]
    expected = model.state_dict()
    prefixes = [prefix_of(state or {}, expected) for state in states]
    states = [{name.removeprefix(prefix): value for name, value in state.items()} if prefix else state
              for state, prefix in zip(states, prefixes, strict=True)]
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
    } for state in states], prefixes


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


def mixing_matrix(weights: Any, num_agents: int) -> np.ndarray:
    """(N, N), float64; raises ValueError unless its entries are shares and each row sums to 1."""
    if isinstance(weights, Tensor) and weights.is_meta:
        raise ValueError("the weights are without values, on the meta device")
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


def images_per_agent(
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


def first_image(batches: Batches, device: torch.device) -> Tensor:
    """(1, ...), on `device`; raises ValueError where there is none."""
    for images in map(images_in, batches):
        if len(images):
            return images[:1].to(device)
    raise ValueError("the batches hold no images: pass at least one batch")
