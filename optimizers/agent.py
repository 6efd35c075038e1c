"""An agent of a gradient-based method: its model as one flat vector, its batches, and what it remembers."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.training import Diverged, EpochStats, Loss, Tally, autocast
from utils.seeds import generator

Batch = Sequence[Tensor]


class FlatModel:
    """A model whose parameters, and after them its floating buffers, are views of one vector.

    vector: (P + B,); gradient: (P,), of which every parameter's `grad` is a view. The module passed in is changed so; a
    state dict loads into the vector, and what is written to the vector is in the module. forward: what runs it, the
    module itself or what `compiled` makes of it.
    Raises ValueError for a model of several floating types, which have no common vector.
    """

    def __init__(self, module: nn.Module, compiled: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
        parameters = list(module.parameters())
        buffers = [(home, name, b) for home in module.modules() for name, b in home.named_buffers(recurse=False)
                   if b.is_floating_point()]
        tensors = [p.detach() for p in parameters] + list({id(b): b for _, _, b in buffers}.values())
        kinds = {(t.dtype, t.device) for t in tensors}
        if len(kinds) != 1:
            raise ValueError(f"the model's tensors are of different types or devices: {sorted(map(str, kinds))}")
        self.module = module
        self.num_parameters = sum(p.numel() for p in parameters)
        self.vector = tensors[0].new_empty(sum(t.numel() for t in tensors))
        self.gradient = self.vector.new_zeros(self.num_parameters)
        self.sizes = [p.numel() for p in parameters]
        places, offset = {}, 0
        for tensor in tensors:
            places[id(tensor)] = _place(self.vector, tensor, offset)
            places[id(tensor)].copy_(tensor)
            offset += tensor.numel()
        offset = 0
        for parameter, tensor in zip(parameters, tensors, strict=False):
            parameter.data = places[id(tensor)]
            if parameter.requires_grad:
                parameter.grad = _place(self.gradient, parameter.data, offset)
            offset += parameter.numel()
        for home, name, buffer in buffers:
            setattr(home, name, places[id(buffer)])
        self.forward = compiled(module)


def _place(vector: Tensor, tensor: Tensor, offset: int) -> Tensor:
    """A view of `vector` from `offset` on in the tensor's shape and, so that kernels stay fast, its memory layout."""
    if tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return vector.as_strided(tensor.shape, tensor.stride(), offset)
    return vector[offset : offset + tensor.numel()].view(tensor.shape)


class Agent:
    """What a step works on.

    x: the model as a vector, parameters first, buffers after them. parameters: its part of P entries. shared: what is
    mixed with the neighbours', all of it or (`mix_buffers=False`) the parameters; buffers: the rest of that. memory:
    named vectors that a method keeps from step to step; they are saved with the agent's state.

    While a message of the agent is on its way, what BatchNorm learns from a batch is kept apart from `buffers`, and
    added at the end of the step to what they are mixed to. Were it mixed itself, an agent would learn its statistics
    pi_ii times as fast, and they would lag behind the weights.

    flat: the agent's own model; batches: an endless stream of them; loss(forward, batch) -> (scalar, number of correct
    answers); scratch() -> a model to take cross-gradients in, the same whenever it is called: all agents of a process
    may share it.
    """

    def __init__(self, index: int, flat: FlatModel, batches: Iterator[Batch], *, loss: Callable | None = None,
                 mix_buffers: bool = True, weight_decay: float = 0.0, amp: str = "none", seed: int = 0,
                 scratch: Callable[[], FlatModel] | None = None) -> None:
        self.index, self.flat, self.batches, self.seed = index, flat, batches, seed
        self.scratch = scratch or functools.cache(lambda: FlatModel(copy.deepcopy(flat.module)))
        self.loss, self.amp, self.weight_decay = loss or classification, amp, weight_decay
        self.x = flat.vector
        self.parameters = self.x[: flat.num_parameters]
        self.shared = self.x if mix_buffers else self.parameters
        self.buffers = self.shared[flat.num_parameters :]
        self.memory: dict[str, Tensor] = {}
        self.steps = self.samples = 0
        self.has_sent = False  # in this step
        self.learnt: Tensor | None = None  # by BatchNorm, since then
        self.batch: Batch = ()
        self.forget_stats()

    def gradient(self) -> Tensor:
        """(P,): the gradient at x on the next batch, valid until the next call. BatchNorm sees the batch."""
        self.batch = next(self.batches)
        with self._buffers_as_sent():
            loss, right = self._backward(self.flat, owner=self.index)
        size = len(self.batch[0])
        self.tally.add(loss, right, size)
        self.samples += size
        return self.flat.gradient

    def cross_gradient(self, x: Tensor, owner: int) -> Tensor:
        """(P,): the gradient of agent `owner`'s model x on this agent's batch, the one that `gradient` used.

        It is taken in the scratch model, so that nobody's BatchNorm statistics change.
        """
        scratch = self.scratch()
        scratch.vector[: len(x)].copy_(x)
        self._backward(scratch, owner)
        return scratch.gradient.clone()

    @contextlib.contextmanager
    def _buffers_as_sent(self) -> Iterator[None]:
        """Keeps apart what happens to the buffers, if a message has left."""
        if not self.has_sent:
            yield
            return
        sent = self.buffers.clone()
        if self.learnt is not None:
            self.buffers.add_(self.learnt)
        yield
        self.learnt = self.buffers - sent
        self.buffers.copy_(sent)

    def end_step(self) -> None:
        if self.learnt is not None:
            self.buffers.add_(self.learnt)
        self.has_sent, self.learnt = False, None
        self.steps += 1

    def _backward(self, flat: FlatModel, owner: int) -> tuple[Tensor, Tensor]:
        flat.module.train()
        flat.gradient.zero_()
        torch.manual_seed(generator(self.seed, self.index, self.steps, f"step of {owner}").initial_seed())  # dropout
        try:
            with autocast(flat.vector.device, self.amp):
                loss, right = self.loss(flat.forward, self.batch)
        except ValueError as error:  # BatchNorm can't be trained on one value per channel
            raise ValueError(f"agent {self.index}, a batch of {len(self.batch[0])} images: {error}") from error
        loss.backward()
        if self.weight_decay:
            flat.gradient.add_(flat.vector[: flat.num_parameters], alpha=self.weight_decay)
        return loss.detach(), right

    def keeps(self, name: str, entries: int | None = None) -> Tensor:
        """The vector `name` of its memory, to be written to; P zeros at first, or as many as said."""
        if name not in self.memory:
            self.memory[name] = self.x.new_zeros(entries or self.flat.num_parameters)
        return self.memory[name]

    # Running averages since `forget_stats`

    def forget_stats(self) -> None:
        self.tally = Tally()

    def stats(self) -> EpochStats | None:
        """None without a step. Raises Diverged when the loss or the model is not finite any more."""
        try:
            return self.tally.stats(self.flat.module) if self.tally.steps else None
        except Diverged as error:
            raise Diverged(f"agent {self.index}: {error}") from None


def classification(forward: nn.Module, batch: Batch, loss: Loss = F.cross_entropy) -> tuple[Tensor, Tensor]:
    """The loss of (x (B, C, H, W), y (B,)), and how many answers are right."""
    x, y = batch
    scores = forward(x)
    return loss(scores, y), (scores.detach().argmax(1) == y).sum()
