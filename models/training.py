"""Local training and evaluation of one model."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import NoneType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from storage.files import mismatch

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Diverged(RuntimeError):
    """The training loss, or what it made of the model, is not finite."""


@dataclass(frozen=True)
class EpochStats:
    """Running averages over an epoch, as the model changed."""

    loss: float
    accuracy: float  # percent
    samples: int
    steps: int


@dataclass
class Tally:
    """Sums over a model's batches so far. They lie on its device, which is waited for only where `stats` are asked."""

    loss: Tensor | float = 0.0
    right: Tensor | int = 0
    samples: int = 0
    steps: int = 0

    def add(self, loss: Tensor, right: Tensor, samples: int) -> None:
        """A batch of so many: its mean loss, without gradients, and how many answers are right."""
        self.loss, self.right = self.loss + loss * samples, self.right + right
        self.samples, self.steps = self.samples + samples, self.steps + 1

    def stats(self, model: nn.Module) -> EpochStats:
        """NaN of no batches. Raises Diverged when the loss or the model is not finite any more."""
        if not self.steps:
            return EpochStats(math.nan, math.nan, 0, 0)
        mean = float(self.loss) / self.samples
        if not math.isfinite(mean):
            raise Diverged(f"the training loss became {mean}: try a smaller --lr")
        if not all_finite(model):
            raise Diverged("the model has NaN or infinite values: try a smaller --lr")
        return EpochStats(mean, 100.0 * int(self.right) / self.samples, self.samples, self.steps)


@dataclass(frozen=True)
class Evaluation:
    """Per image, in the data set's order: was it right, and the cross-entropy."""

    correct: Tensor  # bool (n,)
    losses: Tensor  # float32 (n,)

    def accuracy(self, indices=None) -> float:
        """Percent right of all images or of those at `indices`; NaN for none."""
        chosen = self.correct if indices is None else self.correct[torch.as_tensor(indices, dtype=torch.long)]
        return 100.0 * chosen.double().mean().item()

    @property
    def loss(self) -> float:
        return self.losses.double().mean().item()


def uncompiled(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The same optimiser without what torch wraps around it for torch.compile: at its first call that imports the
    whole compiler, which takes 2 s in every process that trains. Nothing here compiles an optimiser."""
    within = {name: inspect.unwrap(getattr(optimizer, name))
              for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad", "step")}
    return type(optimizer.__name__, (optimizer,), within | {"step": torch.no_grad()(within["step"])})


Adam, SGD = uncompiled(torch.optim.Adam), uncompiled(torch.optim.SGD)


def make_optimizer(model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float, *,
                   fused: bool | None = None):
    """`name`: adam or sgd. Momentum belongs to sgd alone. fused: all tensors in one call (None: as torch sees fit)."""
    if name == "adam":
        return Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=fused)
    return SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused)


# What an optimiser keeps of each parameter: tensors of its shape, or of a single entry.
KEPT = {Adam: {"step": Tensor, "exp_avg": Tensor, "exp_avg_sq": Tensor},
        SGD: {"momentum_buffer?": (Tensor, NoneType)}}


def misfit(optimizer: torch.optim.Optimizer, saved: dict) -> str | None:
    """Why a state dict {"state": ..., "param_groups": ...} can't be loaded into this optimiser; None if it can."""
    ours = optimizer.state_dict()["param_groups"]
    if len(saved["param_groups"]) != len(ours):
        return "its optimiser has other groups of parameters"
    for own, their in zip(ours, saved["param_groups"], strict=True):
        if differs := [key for key in own.keys() & their.keys() if own[key] != their[key]]:  # other versions have more
            return f"its optimiser has another {min(differs)}"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for k, kept in saved["state"].items():
        where = f"its optimiser's entry {k!r}"
        if type(k) is not int or not 0 <= k < len(parameters):
            return f"{where} is of no parameter"
        if wrong := mismatch(kept, KEPT[type(optimizer)], where):
            return wrong
        if any(t is not None and t.numel() != 1 and t.shape != parameters[k].shape for t in kept.values()):
            return f"{where} has another shape than its parameter"
    return None


class Adjusted:
    """Cross-entropy of scores + tau log p, p (C,) an agent's own class shares: logit adjustment, on the scores' device.

    An agent then learns what tells its classes apart and not which of them it has most of; a model is evaluated by its
    plain scores. Classes that it lacks count as a share of 1e-9: they are left as they are.
    Source: Menon et al. 2021 (arXiv 2007.07314); balanced softmax, Ren et al. 2020; FedLC, Zhang et al. 2022.
    """

    def __init__(self, labels: Tensor, num_classes: int, tau: float) -> None:
        counts = torch.bincount(labels, minlength=num_classes).double()
        self.offsets = (tau * (counts / counts.sum()).clamp_min(1e-9).log()).float()

    def __call__(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores + self.offsets, labels)


LOSSES = ("cross_entropy", "adjusted")
Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(name: str, tau: float, labels: Tensor, num_classes: int) -> Loss:
    """The loss (scores (B, C), labels (B,)) -> scalar of an agent whose training images have these `labels`."""
    return Adjusted(labels, num_classes, tau) if name == "adjusted" else F.cross_entropy


def autocast(device: torch.device, amp: str):
    return torch.autocast(device.type, dtype=AMP[amp]) if amp != "none" else contextlib.nullcontext()


def train_epoch(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer,
                amp: str = "none", scaler: torch.amp.GradScaler | None = None,
                loss_of: Loss = F.cross_entropy, after_step: Callable[[], None] | None = None) -> EpochStats:
    """One pass of training over `batches` of (x (B,C,H,W), y (B,)).

    Raises Diverged when the loss or the model is not finite any more; that is looked at once per epoch, so that the
    device never waits.
    """
    model.train()
    tally = Tally()
    for x, y in batches:
        optimizer.zero_grad(set_to_none=True)
        with autocast(x.device, amp):
            scores = model(x)
            loss = loss_of(scores, y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if after_step is not None:
            after_step()
        tally.add(loss.detach(), (scores.detach().argmax(1) == y).sum(), len(y))
    return tally.stats(model)


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter and buffer is; the device is waited for once."""
    return bool(torch.stack([t.isfinite().all() for t in model.state_dict().values()]).all())


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """One pass over `batches`, which must keep the data set's order."""
    model.eval()
    correct, losses = [], []
    for x, y in batches:
        scores = model(x)
        correct.append(scores.argmax(1) == y)
        losses.append(F.cross_entropy(scores, y, reduction="none"))
    return Evaluation(torch.cat(correct).cpu(), torch.cat(losses).float().cpu())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy of the state dict, in plain memory layout so that equal models are equal files."""
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in model.state_dict().items()}
