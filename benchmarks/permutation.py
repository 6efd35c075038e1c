"""How long it takes to derive permutation groups, and to match weights.

    python -m benchmarks.permutation

Prints seconds for torchvision's networks; for growing networks the ratio of the time per operation to that of the
shortest one (1: linear); for two random models the CPU seconds of weight matching, and their ratio to those of a
descent that keeps nothing from one visit of a group to the next.
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision
from torch import nn

from merging import weight_matching
from merging.permutation import derive_spec, verify
from models import build_model

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


class Forgetful(weight_matching._Descent):
    """Computes everything anew in every visit."""

    def improve(self, group: str) -> bool:
        self.products.clear()
        self.visited.clear()
        return super().improve(group)


def matching_weights(name: str, width: int) -> None:
    """A line: CPU seconds with and without what is kept, which find the same."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(build_model(name, 10, width_multiplier=width))
    states, found, took = [model.state_dict() for model in models], [], []
    spec, descent = derive_spec(models[0], torch.zeros(1, 3, 32, 32), check=False), weight_matching._Descent
    weight_matching.match_weights(spec, *states, 1)  # what is done once in a process
    for weight_matching._Descent in (descent, Forgetful):
        began = time.process_time()
        found.append(weight_matching.match_weights(spec, *states))
        took.append(time.process_time() - began)
    weight_matching._Descent = descent
    same = all(torch.equal(found[0][group], found[1][group]) for group in spec.sizes)
    print(f"{f'{name} width {width}':20s} {took[0]:10.2f} {took[0] / took[1]:24.2f} {'yes' if same else 'NO':>6s}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.permutation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", default=ZOO.split(), help="names of torchvision (default: nineteen)")
    parser.add_argument("--image_size", type=int, default=64, help="where a model has no size of its own (default: 64)")
    parser.add_argument("--blocks", nargs="*", type=int, default=[100, 250, 500, 1000], help="of five operations each")
    parser.add_argument("--matched", nargs="*", default=["resnet20", "vgg16"], help="networks whose weights to match")
    parser.add_argument("--width", type=int, default=8, help="of these")
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

    print(f"\n{'two random models':20s} {'match (s)':>10s} {'against keeping nothing':>24s} {'same':>6s}")
    for name in options.matched:
        matching_weights(name, options.width)


if __name__ == "__main__":
    main()
