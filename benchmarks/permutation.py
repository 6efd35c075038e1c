"""How long it takes to derive permutation groups: for torchvision's networks, and against the length of a network.

    python -m benchmarks.permutation

Prints seconds, and for growing networks the ratio of the time per operation to that of the shortest one (1: linear).
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision
from torch import nn

from merging.permutation import derive_spec, verify

SIZES = {"inception_v3": 299, "vit_b_16": 224}
ZOO = ("resnet18 resnet50 wide_resnet50_2 resnext50_32x4d vgg16 vgg16_bn densenet121 mobilenet_v2 mobilenet_v3_small "
       "efficientnet_b0 regnet_y_400mf convnext_tiny squeezenet1_0 shufflenet_v2_x0_5 mnasnet0_5 googlenet "
       "inception_v3 vit_b_16 swin_t")


class Chain(nn.Module):
    """`length` residual blocks of five operations each."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1))
            for _ in range(length)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x.mean((2, 3))


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.permutation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", default=ZOO.split(), help="names of torchvision (default: nineteen)")
    parser.add_argument("--image_size", type=int, default=64, help="where a model has no size of its own (default: 64)")
    parser.add_argument("--blocks", nargs="*", type=int, default=[100, 250, 500, 1000], help="of five operations each")
    options = parser.parse_args()

    print(f"{'model':20s} {'derive (s)':>10s} {'check (s)':>10s} {'groups':>7s} {'units':>7s}")
    for name in options.models:
        weights = {"init_weights": False} if name.startswith(("vgg", "googlenet", "inception")) else {}
        model = torchvision.models.get_model(name, num_classes=10, **weights)
        size = SIZES.get(name, options.image_size)
        x, found = torch.zeros(1, 3, size, size), []
        took = seconds(lambda model=model, x=x, found=found: found.append(derive_spec(model, x, check=False)))
        check = seconds(lambda model=model, x=x, found=found: verify(model, found[0], x))
        spec = found[0]
        print(f"{name:20s} {took:10.2f} {check:10.2f} {len(spec.sizes):7d} {sum(spec.sizes.values()):7d}", flush=True)

    print(f"\n{'operations':>10s} {'derive (s)':>10s} {'per operation, against the first':>34s}")
    first = None
    for blocks in options.blocks:
        model = Chain(blocks, 16)
        took = min(seconds(lambda model=model: derive_spec(model, torch.zeros(1, 3, 4, 4), check=False)) for _ in "ab")
        first = first or took / blocks
        print(f"{5 * blocks + 2:10d} {took:10.2f} {took / blocks / first:34.2f}", flush=True)


if __name__ == "__main__":
    main()
