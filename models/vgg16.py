"""VGG16 with norms and one linear classifier, for 32x32 images and larger."""

from torch import Tensor, nn

from models.norms import norm_before_relu, relu_after
from models.registry import register_model

POOL = 0
# Channels per unit of width, POOL for a 2x2 max pooling: width 8 is the usual 64 ... 512.
LAYOUT = (8, 8, POOL, 16, 16, POOL, 32, 32, 32, POOL, 64, 64, 64, POOL, 64, 64, 64, POOL)
REDUCTION = 2 ** LAYOUT.count(POOL)


class VGG16(nn.Module):
    """13 times conv + norm + ReLU, then a linear layer: (B, C, S, S) -> (B, num_classes), S = `image_size`.

    The classifier reads 64 * width_multiplier * (S // 32)**2 features.
    Source: Simonyan and Zisserman 2015 (arXiv 1409.1556), configuration D, with the head of DIMAT (arXiv 2404.08079).
    """

    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32, width_multiplier: int = 8,
                 kind: str = "batch"):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for item in LAYOUT:
            if item == POOL:
                layers.append(nn.MaxPool2d(2))
            else:
                width = item * width_multiplier
                layers += [nn.Conv2d(channels, width, 3, padding=1), norm_before_relu(kind, width), relu_after(kind)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * (image_size // REDUCTION) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


@register_model("vgg16")
def build_vgg16(num_classes: int, *, in_channels: int, image_size: int, width_multiplier: int,
                norm: str = "batch") -> VGG16:
    """VGG16 of width `width_multiplier` with a norm of `models.norms`.

    Raises ValueError below 32x32, where the poolings leave nothing.
    """
    if image_size < REDUCTION:
        raise ValueError(
            f"vgg16 needs images of at least {REDUCTION}x{REDUCTION}, these are {image_size}x{image_size}; "
            "resnet20 takes any size"
        )
    return VGG16(num_classes, in_channels, image_size, width_multiplier, norm)
