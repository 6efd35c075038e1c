"""REPAIR: a merged network's activations brought back to the statistics that its parents' have.

Averaged units vary less than the units they are averages of, layer by layer less, until nothing gets through. BatchNorm
mends that once its statistics are estimated anew; this is for the layers without (Jordan et al. 2022, arXiv
2211.08403, section 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from merging.averaging import State
from merging.batch_norm import Batches, device_of, images_of, tracked_norms
from merging.tracing.running import own_copy, run

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
Moments = tuple[Tensor, Tensor]


def unnormalised(model: nn.Module, x: Tensor) -> list[str]:
    """The convolutions and linear layers to repair, by name: all but those that BatchNorm follows, the last one (what
    it puts out is the answer), and those that are run several times or share a weight, which have no one statistic, or
    whose weight is made of others (a parametrisation)."""
    state = model.state_dict(keep_vars=True)
    owners = Counter(id(tensor) for tensor in state.values())
    names = {module: name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    norms = [module for module in tracked_norms(model).values()]
    ran: list[tuple[nn.Module, Tensor]] = []
    normalised: list[nn.Module] = []

    def before_norm(norm: nn.Module, inputs: tuple) -> None:
        normalised.extend(module for module, y in ran if y is inputs[0])

    hooks = [module.register_forward_hook(lambda module, _, y: ran.append((module, y))) for module in names]
    hooks += [norm.register_forward_pre_hook(before_norm) for norm in norms]
    try:
        with torch.no_grad():
            run(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(module for module, _ in ran)

    def owns(module: nn.Module) -> bool:
        keys = [key for key in ("weight", "bias") if getattr(module, key) is not None]
        return all(owners[id(state.get(f"{names[module]}.{key}".lstrip(".")))] == 1 for key in keys)

    return [names[module] for module, _ in ran[:-1]
            if times[module] == 1 and module not in normalised and owns(module)]


def repair(model: nn.Module, merged: State, parents: Sequence[State], weights: Sequence[float],
           batches: Batches) -> State:
    """A state dict whose unnormalised layers put out the parents' mean and deviation, averaged with `weights`.

    parents: as they were averaged, in the merged model's order of units. Every batch goes through all of them and then
    through the merged model, each layer of which is rescaled and shifted before the next one sees it; the mean of these
    maps over the batches goes into the layers' weights and biases (a layer without bias is only rescaled). Identical
    parents leave the model as it is. BatchNorm works with each batch's own statistics meanwhile, and isn't changed.
    A model without such layers makes no pass: `merged` itself comes back. Nothing that is passed in is changed.
    """
    device = device_of(merged)
    runner = own_copy(model).to(device)
    names: list[str] | None = None
    for norm in tracked_norms(runner).values():
        norm.train()
    scales: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    counted = 0
    with torch.no_grad():
        for k, x in enumerate(images_of(batches, device, "repair")):
            if k and len(x) == 1:
                continue  # says nothing about variances
            if names is None:
                names = unnormalised(runner, x)
            if not names:
                return merged
            means = {name: torch.zeros(()) for name in names}
            deviations = dict(means)
            for parent, weight in zip(parents, weights, strict=True):
                if weight:
                    for name, (mean, deviation) in _moments(runner, parent, names, x).items():
                        means[name] = means[name] + weight * mean
                        deviations[name] = deviations[name] + weight * deviation

            def correct(name: str, layer: nn.Module, y: Tensor) -> Tensor:
                mean, deviation = _moments_of(layer, y)
                # A unit that is constant in the merged model can only be shifted.
                scale = torch.where(deviation > 0, deviations[name] / deviation, 1.0)  # noqa: B023 - run at once
                shift = means[name] - mean * scale if layer.bias is not None else torch.zeros_like(mean)  # noqa: B023
                scales[name] = scales.get(name, 0) + scale
                shifts[name] = shifts.get(name, 0) + shift
                return (y * _spread(layer, scale, y) + _spread(layer, shift, y)).to(y.dtype)

            runner.load_state_dict(merged)
            with _watched(runner, names, correct):
                run(runner, x)
            counted += 1
    layers = dict(model.named_modules())
    repaired = dict(merged)
    for name in names or ():
        scale, shift = scales[name] / counted, shifts[name] / counted
        weight = merged[f"{name}.weight"]
        repaired[f"{name}.weight"] = (weight * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
        if layers[name].bias is not None:
            bias = merged[f"{name}.bias"]
            repaired[f"{name}.bias"] = (bias * scale + shift).to(bias.dtype)
    return repaired


def _moments(model: nn.Module, state: State, names: Sequence[str], x: Tensor) -> dict[str, Moments]:
    """Layer -> mean and deviation of each of its units over a batch."""
    found: dict[str, Moments] = {}

    def note(name: str, layer: nn.Module, y: Tensor) -> Tensor:
        found[name] = _moments_of(layer, y)
        return y

    model.load_state_dict(state)
    with _watched(model, names, note):
        run(model, x)
    return found


@contextmanager
def _watched(model: nn.Module, names: Sequence[str],
             change: Callable[[str, nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Within it, what these layers put out is `change(name, layer, output)`."""
    hooks = [model.get_submodule(name).register_forward_hook(
        lambda layer, _, y, name=name: change(name, layer, y)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _moments_of(layer: nn.Module, y: Tensor) -> Moments:
    units = _unit_dim(layer, y)
    rest = [dim for dim in range(y.ndim) if dim != units]
    y = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    return y.mean(rest), y.std(rest, correction=0)


def _unit_dim(layer: nn.Module, y: Tensor) -> int:
    return y.ndim - 1 if isinstance(layer, nn.Linear) else 1


def _spread(layer: nn.Module, values: Tensor, y: Tensor) -> Tensor:
    """(units,) in the shape that multiplies y unit by unit."""
    return values.view(*[-1 if dim == _unit_dim(layer, y) else 1 for dim in range(y.ndim)])
