"""Pictures of runs. matplotlib is imported only when a picture is drawn."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.files import write_atomically

# Okabe and Ito's colours: they stay apart for colour-blind readers and in grey print, where the markers help too.
STYLES = {
    "DIMAT": {"color": "#0072B2", "marker": "o"},
    "WA": {"color": "#D55E00", "marker": "s"},
    "WM": {"color": "#009E73", "marker": "^"},
    "NONE": {"color": "#555555", "marker": "", "linestyle": "--"},
}
OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000")
LABELS = {"NONE": "agents alone"}


@dataclass(frozen=True)
class Curve:
    """A figure per iteration over the agents: `iterations` (K,) ascending; `mean`, `low`, `high` (K,)."""

    iterations: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def read_metrics(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of a run's `metrics.csv`; `path` is that file or the run's folder.

    Raises FileNotFoundError where there is none, ValueError where it has no rows.
    """
    path = Path(path)
    path = path / "metrics.csv" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}: is this the folder of a run?")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows yet: let the run finish an iteration first")
    return rows


def accuracy_curve(
    rows: list[dict[str, str]],
    column: str = "test_accuracy",
    phases: tuple[str, ...] = ("initial", "merged"),
) -> Curve:
    """Mean, lowest and highest `column` over the agents, for every iteration that has rows in one of `phases`.

    The default reads the agents as they came (iteration 0) and right after each merge, the point the paper plots.
    Raises ValueError where no row fits.
    """
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["phase"] in phases and row[column] != "":
            values.setdefault(int(row["iteration"]), []).append(float(row[column]))
    if not values:
        raise ValueError(f"no {column} in the phases {', '.join(phases)}")
    iterations = sorted(values)
    reduce = [[function(values[k]) for k in iterations] for function in (np.mean, np.min, np.max)]
    return Curve(np.array(iterations), *map(np.array, reduce))


def style(method: str, position: int = 0) -> dict[str, str]:
    """Line style of a method; one that is not known by name gets a colour by its `position` in the legend."""
    other = {"color": OTHER_COLOURS[position % len(OTHER_COLOURS)], "marker": "D"}
    return STYLES.get(method, other)


def accuracy_panel(axes, curves: dict[str, Curve], title: str) -> None:
    """Draw one curve per method on matplotlib `axes`: the mean as a line, the spread over agents as a band.

    `NONE` (agents alone) is the reference and is drawn as a line without a band.
    """
    for position, (method, curve) in enumerate(curves.items()):
        line = style(method, position)
        axes.plot(curve.iterations, curve.mean, label=LABELS.get(method, method), linewidth=2, markersize=5, **line)
        if method != "NONE":
            axes.fill_between(curve.iterations, curve.low, curve.high, color=line["color"], alpha=0.2, linewidth=0)
    axes.set_title(title)
    axes.set_xlabel("merge iteration")
    axes.set_ylim(0, 100)
    axes.margins(x=0.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def accuracy_figure(panels: dict[str, dict[str, Curve]], path: str | os.PathLike, caption: str = "") -> None:
    """Write a picture with one panel per entry of `panels` (title -> method -> curve), side by side, to `path`.

    The file appears complete or not at all. The format follows the suffix of `path` (.png, .pdf, .svg).
    """
    figure = new_figure(0.6 + 4.6 * len(panels), 4.2)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        accuracy_panel(axes, curves, title)
    all_axes[0].set_ylabel("test accuracy (%)")
    all_axes[-1].legend(loc="lower right", frameon=False)
    if caption:
        figure.supxlabel(caption, fontsize="small", color="#444444")
    save_figure(figure, path)


def groups_figure(groups: dict[str, str], layers: list[str], makes: list[tuple[int, int]],
                  reads: list[tuple[int, int]], path: str | os.PathLike, title: str = "") -> None:
    """Draw which layers hold which permutation groups: groups from top to bottom, layers from left to right.

    groups: name -> what stands beside it; makes, reads: (group, layer) where the layer makes or scales the group's
    units, and where it takes them in.
    """
    figure = new_figure(max(5.0, 3.5 + 0.17 * len(layers)), max(3.0, 1.6 + 0.17 * len(groups)))
    axes = figure.subplots()
    for group in range(len(groups)):
        held = [layer for g, layer in (*makes, *reads) if g == group]
        axes.plot([min(held, default=0), max(held, default=0)], [group, group], color="#CCCCCC", linewidth=1, zorder=1)
    for marks, label, options in (
        (makes, "makes its units", {"color": "#0072B2", "marker": "o"}),
        (reads, "reads them", {"facecolors": "white", "edgecolors": "#D55E00", "marker": "s", "linewidths": 1.2}),
    ):
        rows, columns = [group for group, _ in marks], [layer for _, layer in marks]
        axes.scatter(columns, rows, s=26, label=label, zorder=2, **options)
    axes.set_yticks(range(len(groups)), [f"{name}  {note}" for name, note in groups.items()], fontsize=7)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(-1, len(layers))
    axes.grid(color="#F0F0F0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="outside upper right", frameon=False, fontsize=8, ncols=2)
    save_figure(figure, path)


def new_figure(width: float, height: float):
    """A matplotlib figure (inches) of its own instead of pyplot's: no global state, no window, whatever the backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: str | os.PathLike) -> None:
    """Complete or not at all; the suffix of `path` (.png, .pdf, .svg) says how."""
    path = Path(path)
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:] or "png", dpi=130))
