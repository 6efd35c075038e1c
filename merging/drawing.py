"""A picture of a model's permutation groups. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
import os
from pathlib import Path

from torch import nn

from merging.permutation import PermutationSpec


def plot(model: nn.Module, spec: PermutationSpec, path: str | os.PathLike, title: str = "") -> None:
    """Draw the groups over the model's layers, in order of the state dict (.png, .pdf or .svg)."""
    matrices = [name for name, tensor in model.state_dict().items() if tensor.ndim > 1]
    where = {layer: n for n, layer in enumerate(dict.fromkeys(name.removesuffix(".weight") for name in matrices))}
    groups, makes, reads = {}, [], []
    for group, members in spec.members.items():
        if members:  # others are blocks of units, and known by what they hold
            blocks = f" in {spec.sizes[spec.blocks[group]]} blocks" if group in spec.blocks else ""
            for member in members:
                if member.tensor in matrices:
                    place = len(groups), where[member.tensor.removesuffix(".weight")]
                    (reads if member.dims == (1,) or member.blocks else makes).append(place)
            groups[group] = f"({spec.sizes[group]}{blocks})"
    groups_figure(groups, list(where), makes, reads, path, title)


def groups_figure(groups: dict[str, str], layers: list[str], makes: list[tuple[int, int]],
                  reads: list[tuple[int, int]], path: str | os.PathLike, title: str = "") -> None:
    """Draw which layers hold which permutation groups: groups from top to bottom, layers from left to right.

    groups: name -> what stands beside it; makes, reads: (group, layer) where the layer makes or scales the group's
    units, and where it takes them in.
    """
    from matplotlib.text import Text

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
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign in a layer's name begins no formula
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:] or "png", dpi=130)
    Path(path).write_bytes(drawn.getvalue())


def new_figure(width: float, height: float):
    """A matplotlib figure (inches) of its own instead of pyplot's: no global state, no window, whatever the backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
