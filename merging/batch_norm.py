"""Re-estimation of BatchNorm statistics.

The statistics of a merged network are not the average of the statistics: without a fresh estimate merged ResNets fall
to chance (REPAIR, Jordan et al. 2022; DIMAT, section 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from merging.averaging import State
from merging.progress import progress
from merging.tracing.running import Slots, own_copy, run

Batches = Iterable[Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]]

STATISTICS = ("running_mean", "running_var")
AT_ONCE = 64  # batches whose statistics lie on the device before they are added up
IMAGE_KEYS = ("image", "images", "pixel_values", "x", "input")


def images_in(batch: Any) -> Tensor:
    """A batch's images: itself, the first entry of a tuple or list, or the first of IMAGE_KEYS that a mapping has.

    Nothing else of the batch is looked at. Raises ValueError where there are none.
    """
    images = batch
    if isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    elif isinstance(batch, Mapping):
        key = next((key for key in IMAGE_KEYS if key in batch), None)
        if key is None:
            raise ValueError(f"a batch is a dict with the keys {', '.join(map(repr, batch))}, none of which is one of "
                             f"{', '.join(map(repr, IMAGE_KEYS))}: name its images so, or pass the images alone")
        images = batch[key]
    if isinstance(images, Tensor) and (images.is_meta or images.layout != torch.strided):
        raise ValueError("the images of a batch are sparse or without values: dense tensors of numbers are needed")
    if not isinstance(images, Tensor) or images.ndim == 0:
        found = "a single number" if isinstance(images, Tensor) else f"of type {type(images).__name__}"
        raise ValueError(f"the images of a batch are {found}: a batch is a tensor of images (B, ...), a tuple or list "
                         f"that starts with one, or a dict that has one as {', '.join(map(repr, IMAGE_KEYS))}")
    return images


def images_of(batches: Batches, device: torch.device, desc: str) -> Iterator[Tensor]:
    """The images of every batch that has some, on `device`, with a progress bar; see `images_in`.

    Raises ValueError when there is none (an iterator that was read before looks like this).
    """
    empty = True
    for batch in progress(batches, desc=desc, unit="batch"):
        images = images_in(batch)
        if len(images):
            empty = False
            yield images.to(device, non_blocking=True)
    if empty:
        raise ValueError(f"{desc}: the batches hold no images; pass at least one batch, in something that can be read "
                         "more than once (a list, a DataLoader), not a used-up iterator")


def device_of(state: State) -> torch.device:
    """The device of a state dict's first tensor (a state dict lives on one device)."""
    return next((tensor.device for tensor in state.values() if isinstance(tensor, Tensor)), torch.device("cpu"))


def tracked_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that keep running statistics, by every name they have in the model."""
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def reestimate(model: nn.Module, state: State, batches: Batches) -> State:
    """A state dict with BatchNorm's running statistics estimated anew: one pass, every batch counts the same.

    `model` gives the architecture, `state` the values; neither is changed, nor is any layer's momentum. Only BatchNorm
    runs in training mode (dropout stays off). In the new state the running means and (unbiased) variances are averages
    over the batches and `num_batches_tracked` is their number; all other tensors are `state`'s own. A batch of a single
    image says nothing about variances and is left out unless it is the first.

    A model without BatchNorm statistics makes no pass: `state` itself comes back.
    """
    if not tracked_norms(model):
        return state
    estimate = Estimate(NormReader(model, device_of(state)), state)
    for x in telling(images_of(batches, device_of(state), "BatchNorm")):
        estimate.see(x)
    return estimate.state(estimate.sums())


def telling(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Without batches of a single image, unless it is the first."""
    return (x for k, x in enumerate(images) if k == 0 or len(x) > 1)


class NormReader:
    """reader(state, images): what BatchNorm's layers see of a batch, float (n,), each layer's means and variances; and
    how often each was called, over which the former are summed. One copy of the model serves many state dicts."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = own_copy(model).to(device)
        self.slots = Slots(self.model)
        self.norms = tracked_norms(self.model)
        self.layers = list(dict.fromkeys(self.norms.values()))  # some may have several names
        for norm in self.layers:
            norm.reset_running_stats()
            # What runs then is what the last call saw. With None, the mean over the calls, each would wait for the GPU.
            norm.momentum = 1.0  # only in this copy
            norm.train()
            norm.register_forward_hook(self._note)
        self.own = {f"{name}.{key}".lstrip("."): value.clone()
                    for name, norm in self.norms.items() for key, value in norm.named_buffers() if key in STATISTICS}
        self.sizes = [2 * norm.running_mean.numel() for norm in self.layers]
        self.found: dict[nn.Module, Tensor] = {}
        self.calls: dict[nn.Module, int] = {}

    def _note(self, norm: nn.Module, *_: Any) -> None:  # at once: the network may go on to change them
        both = torch.cat([norm.running_mean, norm.running_var])
        self.found[norm] = self.found[norm] + both if norm in self.found else both
        self.calls[norm] += 1

    @torch.no_grad()
    def __call__(self, state: State, images: Tensor) -> tuple[Tensor, list[int]]:
        self.found.clear()
        self.calls = dict.fromkeys(self.layers, 0)
        self.slots.put({**state, **self.own})
        run(self.model, images)
        for norm in self.layers:  # one whose `forward`, or whose statistics, the model uses by itself
            if not self.calls[norm] and not (norm.running_mean.eq(0).all() and norm.running_var.eq(1).all()):
                self._note(norm)
        return torch.cat([self.found.get(norm, norm.running_mean.new_zeros(size))
                          for norm, size in zip(self.layers, self.sizes, strict=True)]), [*self.calls.values()]


class Estimate:
    """BatchNorm's statistics of a model as the mean of those of the batches that it sees.

    They are added up in float64, so that it is of no account which process has seen which batch.
    """

    def __init__(self, reader: NormReader, state: State) -> None:
        self.reader, self.given = reader, state
        self.seen: list[Tensor] = []
        self.calls = torch.zeros(len(reader.layers), dtype=torch.float64)
        self.added = torch.zeros(sum(reader.sizes), dtype=torch.float64)

    def see(self, images: Tensor) -> None:
        found, calls = self.reader(self.given, images)
        self.seen.append(found)
        self.calls += torch.tensor(calls)
        if len(self.seen) == AT_ONCE:
            self._add_up()

    def _add_up(self) -> None:
        if self.seen:
            self.added += torch.stack(self.seen).cpu().double().sum(0)
            self.seen.clear()

    def sums(self) -> Tensor:
        """float64 (n,), on the CPU: how often each layer was called, and the sums of its means and variances."""
        self._add_up()
        return torch.cat([self.calls, self.added])

    def state(self, sums: Tensor) -> State:
        """The state dict with the statistics of all that these `sums` are of."""
        reader, fresh = self.reader, {}
        calls, added = sums.split([len(reader.layers), sum(reader.sizes)])
        for norm, count, both in zip(reader.layers, calls, added.split(reader.sizes), strict=True):
            mean, variance = (both / count).chunk(2) if count else (torch.zeros(1), torch.ones(1))  # nothing passed it
            for name in (name for name, other in reader.norms.items() if other is norm):
                found = {"running_mean": mean, "running_var": variance, "num_batches_tracked": count}
                fresh |= {f"{name}.{key}".lstrip("."): value for key, value in found.items()}
        return {key: torch.empty_like(value).copy_(fresh[key]) if key in fresh else value
                for key, value in self.given.items()}
