"""Who has what: `python -m reports.partitions FOLDER`, or the options of a partition instead of a folder.

A bubble for each agent and class, as large as the number of images. Nothing need have been trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.checkpoints import describe
from experiments.dealing import deal
from experiments.options import OPTIONS, TRAIN, add_to, dealt, train_parser
from experiments.parsing import Formatter, Parser, check_picture, path
from experiments.trainings import fill_defaults
from reports.drawing import new_figure, save_figure
from utils.progress import command

WHERE_IMAGES_LIE = {"data_dir", "imgntdir"}  # where images lie, which may have moved since
OF_DATA = {option.name for option in OPTIONS if option.group == "data"} | {"seed"}


def class_counts(parts: Sequence[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """(agents, classes): how many images of each class each agent has; parts: the indices of each one's images."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def bubbles(axes, counts: np.ndarray, area: float) -> None:
    """Draw (agents, classes) counts as circles on matplotlib `axes`; area: of one image, in square points."""
    agents, classes = np.nonzero(counts)
    axes.scatter(agents, classes, s=area * counts[agents, classes], color="#0072B2", alpha=0.8, linewidths=0)
    axes.set(xlim=(-0.6, len(counts) - 0.4), ylim=(-0.6, counts.shape[1] - 0.4), xlabel="agent", ylabel="class")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.grid(color="#EEEEEE", linewidth=0.6)
    axes.set_axisbelow(True)


def partition_figure(panels: Mapping[str, np.ndarray]):
    """A matplotlib figure with a panel for each title -> (agents, classes) counts, side by side and to one scale."""
    cell = 72 * min(0.35, 12 / max(max(counts.shape) for counts in panels.values()))  # points
    widths = [max(3.2, 1 + cell / 72 * len(counts)) for counts in panels.values()]
    most = max(int(counts.max()) for counts in panels.values())
    rows = max(counts.shape[1] for counts in panels.values())
    figure = new_figure(sum(widths), max(2.6, 1.4 + cell / 72 * rows))
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, (title, counts) in zip(grid, panels.items(), strict=True):
        of_agent = counts.sum(axis=1)
        bubbles(axes, counts, area=(0.95 * cell) ** 2 / max(most, 1))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"agent, with {of_agent.min()} to {of_agent.max()} images", fontsize=8)
    figure.supxlabel(f"Area: number of training images, at most {most}", fontsize=7, color="#444444")
    return figure


def settings_of(folder: Path) -> dict:
    """The options of the data in a run's or a checkpoint's folder. Raises ValueError or OSError where it has none."""
    said = describe(folder, train_parser())
    for key in ("dataset", "num_models", "data_dist", "seed"):
        if said.get(key) is None:
            raise ValueError(f"{folder} doesn't say its {key}: give the folder of a run or of checkpoints")
    return {key: value for key, value in said.items() if key in OF_DATA and value is not None}


def counts_of(settings: Mapping) -> tuple[str, np.ndarray]:
    """A title and the (agents, classes) counts of training images; settings: some of train.py's options, by name."""
    o = vars(train_parser().parse_args([])) | settings
    fill_defaults(o)
    dataset, parts, _ = deal(o)
    return (f"{o['dataset']}, {o['num_models']} agent{'s' * (o['num_models'] != 1)}, {dealt(o)}",
            class_counts(parts, dataset.train.labels.numpy(), dataset.num_classes))


def make_parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m reports.partitions", formatter_class=Formatter, allow_abbrev=False,
        description="Draw which agent has how many images of which class.\n\nexamples:\n"
                    "  python -m reports.partitions --dataset=digits --data_dist=dirichlet --alpha=0.1\n"
                    "  python -m reports.partitions FOLDER_OF_A_RUN_OR_OF_CHECKPOINTS --out who_has_what.pdf")
    p.add_argument("folder", nargs="?", type=path, metavar="FOLDER",
                   help="of a run or of checkpoints, whose data is drawn; without it, the options below say which")
    p.add_argument("--out", type=path, default="partition.png", metavar="FILE", help="the picture (png, pdf, svg)")
    p.add_argument("--overwrite", action="store_true", help="replace a picture that is there")
    add_to(p, TRAIN, OF_DATA)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    o = vars(make_parser().parse_args(argv))
    folder, out, overwrite = o.pop("folder"), Path(o.pop("out")), o.pop("overwrite")
    check_picture("--out", str(out))
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another --out, or --overwrite to replace it")
    typed = {key: value for key, value in o.items() if value is not None}
    settings = typed
    if folder is not None:
        if known := sorted(typed.keys() - WHERE_IMAGES_LIE):
            raise ValueError(f"--{known[0]}: {folder} says how its data is dealt: leave the option or the folder out")
        settings = settings_of(Path(folder)) | typed
    title, counts = counts_of(settings)
    save_figure(partition_figure({title: counts}), out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
