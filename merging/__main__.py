"""Which units of a network can be permuted together. `python -m merging torchvision:resnet18 --image_size 64`"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch
from torch import nn

from merging.drawing import plot
from merging.permutation import derive_spec, describe


def build(name: str) -> nn.Module:
    """The model that `torchvision:NAME` stands for, or that the function of `package.module:function` returns.

    Raises ValueError where there is no such module or function, or what comes back is no model.
    """
    module, _, factory = name.partition(":")
    if not (module and factory):
        raise ValueError(f"{name!r}: give package.module:function or torchvision:NAME")
    try:
        found = importlib.import_module("torchvision.models" if module == "torchvision" else module)
    except Exception as error:  # whatever somebody's module raises
        raise ValueError(f"{name}: {module} can't be imported: {error}") from error
    if not callable(make := getattr(found, factory, None)):
        raise ValueError(f"{name}: {found.__name__} has no function {factory!r}")
    try:
        model = make()
    except Exception as error:
        raise ValueError(f"{name}: calling it without arguments fails: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: it returns a {type(model).__name__}, not an nn.Module")
    return model


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m merging", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Print the permutation groups of a model, once they have been checked.")
    p.add_argument("model", help="torchvision:NAME, or package.module:function, called without arguments")
    p.add_argument("--image_size", type=int, default=224, metavar="N", help="pixels on a side")
    p.add_argument("--in_channels", type=int, default=3, metavar="N", help="channels of an image")
    p.add_argument("--plot", metavar="FILE.png", help="draw the groups over the layers (needs matplotlib)")
    o = p.parse_args(argv)
    try:
        if min(o.image_size, o.in_channels) < 1:
            raise ValueError(f"--image_size {o.image_size} --in_channels {o.in_channels}: give 1 or more")
        model = build(o.model)
        spec = derive_spec(model, torch.empty(1, o.in_channels, o.image_size, o.image_size))
        print(describe(spec))
        if o.plot:
            plot(model, spec, o.plot, f"{o.model}: {len(spec.sizes)} groups")
            print(f"drawn: {o.plot}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
