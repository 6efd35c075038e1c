"""ResNet-50 as torchvision has it."""

from torch import nn

from models.registry import register_model
from models.torchvision_zoo import build_from_zoo


@register_model("resnet50")
def build_resnet50(num_classes: int, *, in_channels: int, image_size: int, width_multiplier: int) -> nn.Module:
    """torchvision's resnet50 (its state-dict keys) with its own `fc`; images of any size, one width."""
    return build_from_zoo("resnet50", num_classes, in_channels=in_channels, image_size=image_size)
