"""ResNet-50 as torchvision has it."""

from functools import partial

from torch import nn

from models.registry import register_model
from models.torchvision_zoo import build_from_zoo

GROUPS = 32  # Wu and He 2018 (arXiv 1803.08494), as is usual for this network


@register_model("resnet50")
def build_resnet50(num_classes: int, *, in_channels: int, image_size: int, width_multiplier: int,
                   norm: str = "batch") -> nn.Module:
    """torchvision's resnet50 (its state-dict keys) with its own `fc`; images of any size, one width.

    Raises ValueError for EvoNorm, which torchvision's ReLUs leave no place for.
    """
    if norm == "evonorm":
        raise ValueError("--norm evonorm: resnet50 has batch and group; resnet20 and vgg16 have evonorm too")
    options = {} if norm == "batch" else {"norm_layer": partial(nn.GroupNorm, GROUPS)}
    return build_from_zoo("resnet50", num_classes, in_channels=in_channels, image_size=image_size, **options)
