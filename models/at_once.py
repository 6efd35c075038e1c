"""Training several models of one architecture at once: in each step one batched call in place of one for each model.

For many small models on a machine that starts an operation more slowly than it carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from models.training import Diverged, EpochStats, Loss, Tally, autocast


def scores_of(models: list[nn.Module], images: list[Tensor]) -> Tensor:
    """(models, batch, classes): each model's scores of its own images, as many for each.

    The models are of one architecture and in the same mode; gradients reach their parameters, and their buffers are
    brought up to date. Where chance has a say (dropout) each model has its own. Raises ValueError for a model whose
    `forward` looks at values, which no batched call can.
    """
    parameters, own_buffers = ([dict(of(model)) for model in models]
                               for of in (nn.Module.named_parameters, nn.Module.named_buffers))
    stacked, buffers = ({name: _stacked([tensors[name] for tensors in each]) for name in each[0]}
                        for each in (parameters, own_buffers))

    def forward(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(models[0], (parameters, buffers), (x,))

    try:
        scores = vmap(forward, randomness="different")(stacked, buffers, _stacked(images))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise ValueError(f"these models can't be trained at once, only one after the other: {error}") from error
    with torch.no_grad():
        for name, new in buffers.items():
            for own, value in zip(own_buffers, new, strict=True):
                own[name].copy_(value)
    return scores


def train_at_once(models: Mapping[Hashable, nn.Module], batches: Mapping[Hashable, Iterable[tuple[Tensor, Tensor]]],
                  optimizer: torch.optim.Optimizer, losses: Mapping[Hashable, Loss], amp: str = "none",
                  after_step: Mapping[Hashable, Callable[[], None] | None] | None = None
                  ) -> dict[Hashable, EpochStats]:
    """One pass of training of each model over its own batches, as `train_epoch` does it for one; equal to float
    tolerance, dropout aside.

    models: of one architecture, by name, in plain memory layout (else it is slow); optimizer: of the parameters of all
    of them. Models whose batches of a step are of one shape share a call; one that has none left is done. Raises
    Diverged, naming the model, as `train_epoch`.
    """
    for model in models.values():
        model.train()
    tallies = {name: Tally() for name in models}
    left = {name: iter(of_model) for name, of_model in batches.items()}
    while True:
        got = {name: batch for name, batches_left in left.items() if (batch := next(batches_left, None)) is not None}
        if not got:
            break
        optimizer.zero_grad(set_to_none=True)  # and parameters without a gradient stay as they are
        for names in _of_one_shape(got):
            with autocast(got[names[0]][0].device, amp):
                scores = scores_of([models[name] for name in names], [got[name][0] for name in names])
                each = [losses[name](own, got[name][1]) for name, own in zip(names, scores, strict=True)]
            torch.stack(each).sum().backward()
            right = (scores.argmax(-1) == torch.stack([got[name][1] for name in names])).sum(-1)
            for k, name in enumerate(names):
                tallies[name].add(each[k].detach(), right[k], scores.shape[1])
        optimizer.step()
        for name in got:
            if after_step and after_step[name] is not None:
                after_step[name]()
    stats = {}
    for name, model in models.items():
        try:
            stats[name] = tallies[name].stats(model)
        except Diverged as error:
            raise Diverged(f"agent {name}: {error}") from None
    return stats


def _stacked(tensors: list[Tensor]) -> Tensor:
    """In plain memory layout, one channel or many: channels-last ones torch takes one after the other."""
    return torch.stack([t.reshape(-1) for t in tensors]).view(len(tensors), *tensors[0].shape)


def _of_one_shape(batches: Mapping[Hashable, tuple[Tensor, Tensor]]) -> list[list[Hashable]]:
    """The names, those whose images are of one shape together."""
    groups: dict[torch.Size, list[Hashable]] = {}
    for name, (images, _) in batches.items():
        groups.setdefault(images.shape, []).append(name)
    return [*groups.values()]
