"""Merge checkpoints, or show which units of a network can be permuted together.

python -m merging torchvision:resnet18 --image_size=64
python -m merging a.safetensors b.pth --model=torchvision:resnet18 --images=photos --out=merged.safetensors
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from merging import METHODS, Merged, merge
from merging.averaging import State
from merging.batch_norm import tracked_norms
from merging.drawing import plot
from merging.files import check_state, load_tensors, save_model, state_in, with_counts
from merging.images import Folder, folder
from merging.named import KINDS, build
from merging.permutation import derive_spec, describe
from merging.tracing.running import own_copy

IMAGENET = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
HALF = (0.5,)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m merging", formatter_class=argparse.RawDescriptionHelpFormatter, description=(
            "With one model: print its permutation groups, once they have been checked.\n"
            "With checkpoints and --model: merge them into one, in the first one's order of units."),
        epilog=__doc__.split("\n\n")[1])
    p.add_argument("what", nargs="+", metavar="MODEL | FILE",
                   help=f"a model ({KINDS}), or checkpoints to merge (.pth, .pt, .safetensors)")
    p.add_argument("--model", metavar="MODEL", help="the checkpoints' architecture")
    p.add_argument("--model_args", nargs="*", default=[], metavar="KEY=VALUE",
                   help="what the model is called with, such as num_classes=10")
    p.add_argument("--image_size", type=int, default=224, metavar="N", help="pixels on a side (default: 224)")
    p.add_argument("--in_channels", type=int, default=3, metavar="N", help="channels of an image (default: 3)")
    p.add_argument("--plot", metavar="FILE.png", help="draw the groups over the layers (needs matplotlib)")
    to_merge = p.add_argument_group("merging")
    to_merge.add_argument("--method", default="DIMAT", choices=[name for name in METHODS if not METHODS[name].aligned],
                          help="how units are matched (default: DIMAT, by activations)")
    to_merge.add_argument("--weights", metavar="W,W,...", help="of the models, in all 1 (default: equal ones)")
    to_merge.add_argument("--images", type=Path, metavar="FOLDER",
                          help="images to match by and to re-estimate BatchNorm on, all of one folder or a folder for "
                               "each class: then accuracies are printed")
    to_merge.add_argument("--samples", type=int, default=1000, metavar="N", help="images that are read (default: 1000; "
                          "0 = all)")
    to_merge.add_argument("--mean", help="of the pixels, by channel, comma-separated (default: ImageNet's; 0.5 for "
                          "grey images)")
    to_merge.add_argument("--std", help="the same, standard deviation")
    to_merge.add_argument("--out", type=Path, metavar="FILE", help="where the merged model goes (.safetensors or .pth)")
    to_merge.add_argument("--overwrite", action="store_true", help="--out may be there already")
    return p


def show_groups(o: argparse.Namespace) -> None:
    name, = o.what
    model = build(name, **arguments_of(o.model_args))
    spec = derive_spec(model, torch.empty(1, o.in_channels, o.image_size, o.image_size))
    print(describe(spec))
    if o.plot:
        plot(model, spec, o.plot, f"{name}: {len(spec.sizes)} groups")
        print(f"drawn: {o.plot}")


def merge_files(o: argparse.Namespace) -> None:
    """Everything that can be wrong is looked at before anything is computed."""
    if o.out is None:
        raise ValueError("--out is missing: say where the merged model goes")
    if o.out.exists() and not o.overwrite:
        raise ValueError(f"--out {o.out} is there already: give another name, or --overwrite")
    if not o.out.parent.is_dir():
        raise ValueError(f"--out {o.out}: there is no folder {o.out.parent}")
    weights = numbers("--weights", o.weights) if o.weights else [1 / len(o.what)] * len(o.what)
    if len(weights) != len(o.what) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"--weights {o.weights}: give {len(o.what)} numbers, none negative, that add up to 1")
    model = build(o.model, **arguments_of(o.model_args)).eval()
    images = images_of(o) if o.images else None
    if images is None and (METHODS[o.method].reads_images or tracked_norms(model)):
        what = f"--method {o.method} matches by activations" if METHODS[o.method].reads_images else (
            "the model has BatchNorm, whose statistics must be estimated anew")
        raise ValueError(f"--images is missing: {what}")
    states = [model_in(Path(file), model.state_dict()) for file in o.what]
    # Row 0 is the merge, in the first model's order; the others stay as they are.
    mixing = np.eye(len(states))
    mixing[0] = weights
    example = torch.zeros(2, o.in_channels, o.image_size, o.image_size)
    spec = derive_spec(model, example) if METHODS[o.method].permutes else None
    merged = merge(states, mixing, o.method, images, model=model, spec=spec, agents=[0],
                   bn_reset="both" if images else "none")
    print_matches(o.what, merged)
    if images is not None and images.has_classes:
        for name, state in [*zip(o.what, states, strict=True), ("merged", merged[0])]:
            print(f"{accuracy(model, state, images):6.2f} %  {name}")
    save_model(o.out, merged[0])
    print(f"written: {o.out}")


def print_matches(files: Sequence[str], merged: Merged) -> None:
    """By model: how alike its matched units are to the first one's, and how many had to move."""
    for k, file in enumerate(files):
        rows = [row for row in merged.matches if row.neighbour == k]
        if not rows:
            continue
        units = sum(row.units for row in rows)
        moved = sum(row.moved * row.units for row in rows) / units
        known = [row for row in rows if row.correlation is not None]
        alike = sum(row.correlation * row.units for row in known) / max(sum(row.units for row in known), 1)
        alike = f", mean correlation {alike:.3f}" if known else ""
        print(f"{file} to {files[0]}: {len(rows)} groups, {units} units, {moved:.0%} moved{alike}")


def model_in(file: Path, template: State) -> State:
    """A checkpoint that fits the model. Raises ValueError, naming the file, for any other."""
    state = with_counts(state_in(load_tensors(file), file), template)
    check_state(state, template, str(file))
    return {key: state[key] for key in template}


@torch.no_grad()
def accuracy(model: nn.Module, state: State, images: Folder) -> float:
    """Percent of the images whose class has the highest score."""
    model = own_copy(model)
    model.load_state_dict(state)
    dtype = next(model.parameters()).dtype
    right = [(model(x.to(dtype)).argmax(1) == y).sum().item() for x, y in images]
    return 100 * sum(right) / len(images.files)


def images_of(o: argparse.Namespace) -> Folder:
    channels = o.in_channels
    mean, std = IMAGENET.get(channels, (HALF * channels, HALF * channels))
    mean, std = (numbers(f"--{name}", given) if given else usual
                 for name, given, usual in (("mean", o.mean, mean), ("std", o.std, std)))
    if not len(mean) == len(std) == channels or channels not in (1, 3) or min(std) <= 0:
        raise ValueError(f"--mean and --std are {channels} numbers (--in_channels), std above 0; images in files "
                         "have 1 or 3 channels")
    return folder(o.images, o.image_size, mean, std, o.samples)


def numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: give numbers with commas between them") from None


def arguments_of(given: Sequence[str]) -> Mapping[str, Any]:
    """KEY=VALUE: the value as Python writes it, or a text."""
    arguments = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not (equals and key.isidentifier()):
            raise ValueError(f"--model_args {one}: give KEY=VALUE")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    o = parser().parse_args(argv)
    try:
        if min(o.image_size, o.in_channels) < 1 or o.samples < 0:
            raise ValueError(f"--image_size {o.image_size} --in_channels {o.in_channels} --samples {o.samples}: give 1 "
                             "or more, of samples 0 or more")
        if o.model:
            merge_files(o)
        elif len(o.what) > 1:
            raise ValueError("--model is missing: to merge checkpoints say which architecture they are of")
        else:
            show_groups(o)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
