"""Re-estimation of BatchNorm statistics.

The statistics of a merged network are not the average of the statistics: without a fresh estimate merged ResNets fall
to chance (REPAIR, Jordan et al. 2022; DIMAT, section 4).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from merging.averaging import State
from merging.progress import progress
from merging.tracing.running import own_copy, run

Batches = Iterable[Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]]

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
    device = device_of(state)
    model = own_copy(model).to(device)
    model.load_state_dict(state)
    norms = tracked_norms(model)
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average; only in this copy
        norm.train()
    with torch.no_grad():
        for k, x in enumerate(images_of(batches, device, "BatchNorm")):
            if k == 0 or len(x) > 1:
                run(model, x)
    fresh = {f"{name}.{key}".lstrip("."): value for name, norm in norms.items() for key, value in norm.named_buffers()}
    return {key: fresh[key].to(value.dtype) if key in fresh else value for key, value in state.items()}
