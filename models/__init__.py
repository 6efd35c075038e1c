"""The architectures agents train: `build_model` makes one by name, with its head and stem fitted to the data set."""

import inspect

import torch
from torch import nn

from models import resnet20, resnet50, vgg16  # noqa: F401  (each registers its builder)
from models.norms import NORMS
from models.registry import MODELS, ModelBuilder, register_model
from models.torchvision_zoo import PREFIX, zoo_builder
from utils.memory import usable_memory

__all__ = ["MODELS", "NORMS", "build_model", "infer_width", "model_builder", "register_model"]


def model_builder(name: str) -> ModelBuilder:
    """The builder behind `name`: one of `MODELS`, `tv:NAME` of torchvision, `timm:NAME`, or FILE.py:FUNCTION.

    Raises ValueError, listing the choices, for a name that is none of these.
    """
    if name.startswith(PREFIX):
        return zoo_builder(name)
    if name not in MODELS and ":" in name:
        from models.elsewhere import builder_elsewhere  # here: it imports merging, and tables do without

        return builder_elsewhere(name)
    if name not in MODELS:
        raise ValueError(
            f"unknown model {name!r}; choose one of {', '.join(sorted(MODELS))}, "
            f"or {PREFIX}NAME for a torchvision classification model (for example {PREFIX}densenet121), timm:NAME, or "
            "FILE.py:FUNCTION for a function of your own"
        )
    return MODELS[name]


def build_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    width_multiplier: int = 8,
    norm: str = "batch",
    seed: int | None = None,
) -> nn.Module:
    """A freshly initialised classifier from (B, in_channels, image_size, image_size) images to (B, num_classes) logits.

    `width_multiplier` scales resnet20 and vgg16 (8 is the paper's width of both) and means nothing to the others.
    `norm` is one of `NORMS`, for the builders that take it; "batch" leaves every model as it is.
    Without `seed` the initialisation draws from torch's global CPU generator; with one, the same seed gives the same
    tensors and the global generator is left as it was.

    Raises ValueError for an unknown name, for a norm that the model can't have, for a count below 1, and for an
    image size the model cannot take (the message says which it needs).
    """
    counts = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    for what, value in (counts | {"width_multiplier": width_multiplier}).items():
        if value < 1:
            raise ValueError(f"{what} is {value}; it must be at least 1")
    builder = model_builder(name)
    options = {} if norm == "batch" else {"norm": _chosen(norm, name, builder)}

    def build() -> nn.Module:
        return builder(num_classes, in_channels=in_channels, image_size=image_size, width_multiplier=width_multiplier,
                       **options)

    if width_multiplier > 8:  # the paper's is known to fit
        with torch.device("meta"):
            needed, there = sum(t.numel() * t.itemsize for t in build().state_dict().values()), usable_memory()
        if needed > there:
            raise ValueError(f"--width_multiplier {width_multiplier}: {name} takes {needed / 2**30:,.0f} GiB, "
                             f"there are {there / 2**30:,.0f} of memory")
    if seed is None:
        return build()
    with torch.random.fork_rng(devices=[]):
        # default_generator rather than torch.manual_seed, which would reseed every accelerator too
        torch.default_generator.manual_seed(seed)
        return build()


def _chosen(norm: str, name: str, builder: ModelBuilder) -> str:
    """`norm`, if the model can have it."""
    def chooses(builder: ModelBuilder) -> bool:
        return "norm" in inspect.signature(builder).parameters

    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose from {', '.join(NORMS)}")
    if not chooses(builder):
        able = ", ".join(sorted(other for other in MODELS if chooses(MODELS[other])))
        raise ValueError(f"--norm {norm}: {name} has the norms that it is built with; a choice have {able}")
    return norm


def infer_width(name: str, state: dict[str, torch.Tensor]) -> int | None:
    """The width multiplier of a state dict of model `name`, from its first tensor; None for a model of one width.

    Raises ValueError if that tensor is missing, so that `state` cannot be one of `name`.
    """
    if ":" in name:
        return None
    with torch.device("meta"):
        narrow, twice = (build_model(name, 10, image_size=64, width_multiplier=w).state_dict() for w in (1, 2))
    first = next(iter(narrow))
    if not isinstance(state, dict) or first not in state:
        raise ValueError(f"the checkpoint holds no '{first}': it is not a state dict of {name}")
    if narrow[first].shape == twice[first].shape:
        return None
    return max(1, state[first].shape[0] // narrow[first].shape[0])
