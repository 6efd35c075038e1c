"""The permutation groups of the built-in models. `python -m experiments.groups resnet20 --plot groups.png`"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from experiments.parsing import check_picture, number, parser, path
from merging.drawing import plot
from merging.permutation import derive_spec, describe
from models import NORMS, build_model
from utils.progress import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    p = parser("experiments.groups", "Print the permutation groups of a model, once they have been checked.",
               "python -m experiments.groups tv:densenet121 --image_size 64")
    count = number(int, 1, 2**20)
    p.add_argument("model", help="resnet20, resnet50, vgg16 or tv:NAME for any torchvision classifier")
    p.add_argument("--num_classes", type=count, default=10, metavar="N", help="classes")
    p.add_argument("--image_size", type=count, default=32, metavar="N", help="pixels on a side")
    p.add_argument("--in_channels", type=count, default=3, metavar="N", help="channels of an image")
    p.add_argument("--width_multiplier", type=count, default=8, metavar="W", help="width of resnet20 and vgg16")
    p.add_argument("--norm", choices=NORMS, default="batch", help="norm of resnet20, vgg16 and resnet50")
    p.add_argument("--plot", type=path, metavar="FILE.png", help="draw the groups over the layers (png, pdf, svg)")
    o = p.parse_args(argv)
    if o.plot:
        check_picture("--plot", o.plot)
    model = build_model(o.model, o.num_classes, in_channels=o.in_channels, image_size=o.image_size,
                        width_multiplier=o.width_multiplier, norm=o.norm)
    spec = derive_spec(model, torch.empty(1, o.in_channels, o.image_size, o.image_size))
    print(describe(spec))
    if o.plot:
        plot(model, spec, o.plot, f"{o.model}: {len(spec.sizes)} groups")
        print(f"drawn: {o.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
