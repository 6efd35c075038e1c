"""Every torchvision classification model, as ``tv:<name>``, with its head and stem fitted to the data set.

torchvision itself is imported by those who use it: that takes longer than all the rest of a start.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from models.registry import ModelBuilder

PREFIX = "tv:"
# Sizes tried, in this order, to tell the user which one a model needs.
USUAL_SIZES = (32, 64, 96, 128, 224, 256, 299, 384)


def zoo_builder(name: str) -> ModelBuilder:
    """The builder of ``tv:<torchvision name>``; raises ValueError, listing the choices, if torchvision has none."""
    import torchvision.models

    zoo_name = name.removeprefix(PREFIX)
    choices = torchvision.models.list_models(module=torchvision.models)
    if zoo_name not in choices:
        raise ValueError(
            f"torchvision has no classification model {zoo_name!r}; after {PREFIX} choose one of {', '.join(choices)}"
        )
    return partial(build_from_zoo, zoo_name)


def build_from_zoo(
    zoo_name: str, num_classes: int, *, in_channels: int = 3, image_size: int = 224, width_multiplier: int = 1,
    **options: Any,
) -> nn.Module:
    """torchvision's model with a head for `num_classes` and a first convolution for `in_channels`; one width only.

    options: torchvision's own.
    Raises ValueError if the model cannot take square images of `image_size`, naming a size that it can.
    """
    import torchvision.models

    options |= _size_options(zoo_name, image_size)
    if zoo_name in ("googlenet", "inception_v3"):
        # Auxiliary heads would make the output a tuple; init_weights is the architecture's own initialisation.
        options |= {"aux_logits": False, "init_weights": True}
    model = torchvision.models.get_model(zoo_name, weights=None, num_classes=num_classes, **options)
    _fit_stem(model, in_channels)
    if not _takes(model, in_channels, image_size):
        raise ValueError(
            f"torchvision's {zoo_name} needs images of {_needed_size(model, in_channels, image_size)}, "
            f"these are {image_size}x{image_size}"
        )
    return model


def _size_options(zoo_name: str, image_size: int) -> dict[str, object]:
    """What the models built for one fixed image size want to know of it; raises ValueError if it isn't a multiple."""
    if zoo_name.startswith("vit_"):
        step, options = int(zoo_name.rsplit("_", 1)[1]), {"image_size": image_size}  # vit_b_16: patches of 16x16
    elif zoo_name == "maxvit_t":
        step, options = 224, {"input_size": (image_size, image_size)}  # four halvings after the stem's, windows of 7
    else:
        return {}
    if image_size % step:
        raise ValueError(
            f"torchvision's {zoo_name} needs images whose side is a multiple of {step}, "
            f"these are {image_size}x{image_size}"
        )
    return options


def _fit_stem(model: nn.Module, in_channels: int) -> None:
    """Replaces the first convolution by a fresh one of the same kind, if it reads another number of channels."""
    name, conv = next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    if conv.in_channels == in_channels:
        return
    stem = nn.Conv2d(
        in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, stem)


def _takes(model: nn.Module, in_channels: int, image_size: int) -> bool:
    """Whether one image gets through; only shapes are computed (meta tensors), so this is cheap for any model."""
    state = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            functional_call(model, state, torch.empty(1, in_channels, image_size, image_size, device="meta"))
    except (RuntimeError, AssertionError, ValueError):
        return False
    finally:
        model.train(training)
    return True


def _needed_size(model: nn.Module, in_channels: int, too_small: int) -> str:
    """The size to name in the error: the smallest that works, bisected between one that does and one that does not."""
    works = next((size for size in USUAL_SIZES if size > too_small and _takes(model, in_channels, size)), None)
    if works is None:
        return "another size"
    fails = too_small
    while works - fails > 1:
        middle = (works + fails) // 2
        if _takes(model, in_channels, middle):
            works = middle
        else:
            fails = middle
    return f"at least {works}x{works}"
