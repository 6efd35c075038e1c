"""ResNet-20 for small images, with a width multiplier and 3x3 convolutions in its shortcuts."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.norms import norm, norm_before_relu, relu_after
from models.registry import register_model


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kind: str = "batch"):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1, self.relu1 = norm_before_relu(kind, out_channels), relu_after(kind)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = norm(kind, out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            # 3x3 where He et al. have 1x1: so are the checkpoints of the DIMAT paper
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
                norm(kind, out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet20(nn.Module):
    """Three stages of three blocks with 16w, 32w and 64w channels: (B, C, H, W) -> (B, num_classes), H and W >= 1.

    Source: He et al. 2016 (arXiv 1512.03385), section 4.2; the width as in DIMAT (arXiv 2404.08079), where w = 8 has
    18.65 M parameters at 100 classes. kind: one of `models.norms.NORMS`.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width_multiplier: int = 8, kind: str = "batch"):
        super().__init__()
        widths = [16 * width_multiplier, 32 * width_multiplier, 64 * width_multiplier]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1, self.relu1 = norm_before_relu(kind, widths[0]), relu_after(kind)
        self.layer1 = _stage(widths[0], widths[0], 1, kind)
        self.layer2 = _stage(widths[0], widths[1], 2, kind)
        self.layer3 = _stage(widths[1], widths[2], 2, kind)
        self.linear = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(in_channels: int, out_channels: int, stride: int, kind: str) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride, kind),
        BasicBlock(out_channels, out_channels, 1, kind),
        BasicBlock(out_channels, out_channels, 1, kind),
    )


@register_model("resnet20")
def build_resnet20(num_classes: int, *, in_channels: int, image_size: int, width_multiplier: int,
                   norm: str = "batch") -> ResNet20:
    """ResNet-20 of width `width_multiplier` with a norm of `models.norms`, for images of any size."""
    return ResNet20(num_classes, in_channels, width_multiplier, norm)
