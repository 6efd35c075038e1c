"""Re-estimation of BatchNorm statistics.

The statistics of a merged network are not the average of the statistics: without a fresh estimate merged ResNets fall
to chance (REPAIR, Jordan et al. 2022; DIMAT, section 4).
"""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from merging.averaging import State
from utils.progress import progress

Batches = Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]]


def images_of(batches: Batches, device: torch.device, desc: str) -> Iterator[Tensor]:
    """The images of every batch on `device`, with a progress bar; a batch is a tensor or a tuple that starts with one.

    Raises ValueError when there is none (an iterator that was read before looks like this).
    """
    empty = True
    for batch in progress(batches, desc=desc, unit="batch"):
        empty = False
        yield (batch if isinstance(batch, Tensor) else batch[0]).to(device, non_blocking=True)
    if empty:
        raise ValueError(f"{desc}: the batches hold no images; pass at least one batch, in something that can be read "
                         "more than once (a list, a DataLoader), not a used-up iterator")


def device_of(state: State) -> torch.device:
    """The device of a state dict's first tensor (a state dict lives on one device)."""
    return next((tensor.device for tensor in state.values()), torch.device("cpu"))


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
    model = copy.deepcopy(model).to(device).eval()
    model.load_state_dict(state)
    norms = tracked_norms(model)
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average; only in this copy
        norm.train()
    with torch.no_grad():
        for k, x in enumerate(images_of(batches, device, "BatchNorm")):
            if k == 0 or len(x) > 1:
                model(x)
    fresh = {f"{name}.{key}".lstrip("."): value for name, norm in norms.items() for key, value in norm.named_buffers()}
    return {key: fresh[key].to(value.dtype) if key in fresh else value for key, value in state.items()}
