"""Networks that others keep: `timm:NAME`, or `FILE.py:FUNCTION` for what a function returns."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from merging.named import build, maker
from models.registry import ModelBuilder

CALLED_WITH = ("num_classes", "in_channels", "image_size", "width_multiplier")


def builder_elsewhere(name: str) -> ModelBuilder:
    """The builder of such a name, which asks the function for what it can be asked for. ValueError without one."""
    if name.startswith("timm:"):
        maker(name)
        return partial(_from_timm, name)
    able = inspect.signature(maker(name)).parameters
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in able.values())
    asked = [key for key in CALLED_WITH if takes_all or key in able]
    if "num_classes" not in asked:
        raise ValueError(f"{name}: it must take num_classes, and may take {', '.join(CALLED_WITH[1:])}")
    return partial(_from_function, name, asked)


def _from_function(name: str, asked: list[str], num_classes: int, **options: Any) -> nn.Module:
    told = {"num_classes": num_classes, **options}
    return _that_fits(name, build(name, **{key: told[key] for key in asked}), num_classes, **options)


def _from_timm(name: str, num_classes: int, *, in_channels: int = 3, image_size: int = 224,
               **unused: Any) -> nn.Module:
    """timm's model, fresh, with a head and a stem for the data; `img_size` goes to those that are of one size."""
    arguments = {"num_classes": num_classes, "in_chans": in_channels, "pretrained": False}
    try:
        model = build(name, **arguments, img_size=image_size)
    except ValueError as error:
        if "img_size" not in str(error).partition(" fails: ")[2]:
            raise
        model = build(name, **arguments)
    return _that_fits(name, model, num_classes, in_channels=in_channels, image_size=image_size)


def _that_fits(name: str, model: nn.Module, num_classes: int, *, in_channels: int, image_size: int,
               **unused: Any) -> nn.Module:
    """The model itself. Raises ValueError unless it makes (B, num_classes) of the data set's images."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            scores = model(torch.zeros(2, in_channels, image_size, image_size))
    except Exception as error:  # whatever somebody's forward raises
        raise ValueError(f"{name} fails on images of {in_channels}x{image_size}x{image_size}: "
                         f"{' '.join(str(error).split())}") from error
    finally:
        model.train(mode)
    shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
    if shape != (2, num_classes):
        raise ValueError(f"{name} makes {shape} of 2 images, not (2, {num_classes}), a score for each class")
    return model
