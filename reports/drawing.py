"""Pictures: which runs are one line, what a line looks like, and the drawing that the demo and the toolkit share.

`python -m reports.plots results/ --out figures/` draws all that run folders hold; run_plots.py says what.
matplotlib is imported only when a picture is drawn.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.options import ALONE, MAIN, SHORT, usual
from reports.runs import FOLLOWERS, IGNORED, Curve, Run, of_seed, without_say
from storage.files import write_atomically

# Okabe and Ito's colours: they stay apart for colour-blind readers and in grey print, where the markers help too.
STYLES = {
    "DIMAT": {"color": "#0072B2", "marker": "o"},
    "WA": {"color": "#D55E00", "marker": "s"},
    "WM": {"color": "#009E73", "marker": "^"},
    "COMMON": {"color": "#CC79A7", "marker": "D"},
    "C2M3": {"color": "#E69F00", "marker": "v"},
    "NONE": {"color": "#555555", "marker": "", "linestyle": "--"},
}
OTHER_COLOURS = ("#56B4E9", "#000000", "#F0E442", "#8B4513")
OTHER_MARKERS = ("P", "X", "<", ">", "*", "h")
LINESTYLES = ("-", "--", "-.", ":")
LABELS = {"NONE": "agents alone"}


@dataclass(frozen=True, eq=False)
class Line:
    """Runs that differ in nothing but the seed, ascending; `label` names what tells them from other lines."""

    panel: tuple[str, ...]
    method: str
    label: str
    runs: tuple[Run, ...]

    @property
    def rank(self) -> tuple:
        """Its place in a legend: known methods first, agents alone last; a method's usual form first, 20 before 100."""
        known = [method for method in STYLES if method != ALONE]
        place = known.index(self.method) if self.method in known else len(known) + (self.method == ALONE)
        options = self.runs[0].options
        unusual = sum(options.get(key) not in (None, value) for key, value in usual(MAIN).items() if type(value) is str)
        words = re.split(r"(\d+)", self.label)
        return place, unusual, [(int(word), "") if word.isdigit() else (-1, word) for word in words]


# Told by a run's place in the picture, by its line or by other options.
ELSEWHERE = IGNORED | {"opt", "dataset", "model", "topology", "num_models", "data_dist", "alpha", "num_epochs",
                       "training", "randominit", "diffinit"}
# Differences in these make any two lines of a panel unequal, whatever their methods.
FAIRNESS = {"epochs", "init", "pretrain_epochs", "pretrain_seed", "partition_seed", "phase", "train_samples",
            "test_samples", "holdout", "width_multiplier", "norm", "feature_noise"}


def options_that_matter(run: Run) -> dict[str, Any]:
    """What of a run's options can change its figures, but for seed and panel, and only where they have a say."""
    different = "different_random" if run.config.get("diffinit") else "same_random"
    init = different if run.config.get("randominit") else "trained"
    idle = ELSEWHERE | without_say(run.options)
    return {key: value for key, value in run.options.items() if key not in idle} | {
        "epochs": run.local_epochs, "init": init}  # `epochs` of base_lines.py says only how far the run goes


def varying(options: Sequence[dict[str, Any]]) -> set[str]:
    """The options with several values; where one has no say it differs from nothing."""
    keys = {key for one in options for key in one}
    return {key for key in keys if len({str(one[key]) for one in options if key in one}) > 1}


def lines_of(runs: Sequence[Run]) -> tuple[list[Line], list[str]]:
    """Put the runs that differ only in their seed together, and name what differs otherwise; with notes.

    A label holds the options that differ, in any panel, within its method, and those of FAIRNESS that differ between
    the methods of any panel: it means the same in all panels. A run of a line and seed that is there already is left
    out, and noted: repeating a run gives no second seed.
    """
    options = [options_that_matter(run) for run in runs]
    panels: dict[tuple[str, ...], list[int]] = {}
    for index, run in enumerate(runs):
        panels.setdefault(run.panel, []).append(index)
    shown: dict[str, set[str]] = {run.method: set() for run in runs}
    for members in panels.values():
        for key in FOLLOWERS:  # as a rule they go with the seed, and then are no difference in themselves
            having = [i for i in members if key in options[i]]
            if len({options[i][key] for i in having}) > 1:
                for i in having:
                    options[i][key] = of_seed(options[i][key], runs[i].seed)
        unfair = varying([options[i] for i in members]) & FAIRNESS
        for method in shown:
            shown[method] |= unfair | varying([options[i] for i in members if runs[i].method == method])
    groups: dict[tuple[tuple[str, ...], str, str], dict[int, Run]] = {}
    notes = []
    for run, matter in zip(runs, options, strict=True):
        said = [_said(key, matter[key]) for key in sorted(shown[run.method], key=lambda key: (key != "epochs", key))
                if key in matter]
        label = ", ".join([LABELS.get(run.method, run.method), *said])
        same = groups.setdefault((run.panel, run.method, label), {})
        other = same.get(run.seed)
        kept = same[run.seed] = run if other is None or run.last > other.last else other
        if other is not None:
            dropped = other if kept is run else run
            notes.append(f"left out {dropped.path}: it has the options and the seed of {kept.path}")
    lines = [Line(*key, tuple(same[seed] for seed in sorted(same))) for key, same in groups.items()]
    for line in lines:
        if len({run.last for run in line.runs}) > 1:
            reached = ", ".join(f"{run.seed}: {run.last}" for run in line.runs)
            notes.append(f"{line.label} ({', '.join(line.panel)}): the seeds have got to different iterations "
                         f"({reached}); only those that all have are drawn")
    return sorted(lines, key=lambda line: (line.panel, line.rank)), notes


def _said(key: str, value: Any) -> str:
    if key == "epochs":
        return f"{value} local epoch{'s' * (value != 1)}" if value else "no training"
    return f"{SHORT.get(key, key)}={value}"


# --------------------------------------------------------------------------------------------------------------------
# Drawing


def styles(methods: dict[str, str]) -> dict[str, dict[str, str]]:
    """A line style for every label (label -> method), each different from the others.

    The first line of a known method keeps the method's style; all others take the colours that are left.
    """
    kept, others = {}, []
    for label, method in methods.items():
        if method in STYLES and method not in {methods[one] for one in kept}:
            kept[label] = STYLES[method]
        else:
            others.append(label)
    taken = {line["color"] for line in kept.values()} | {STYLES[ALONE]["color"]}
    free = [*OTHER_COLOURS, *(line["color"] for line in STYLES.values() if line["color"] not in taken)]
    for n, label in enumerate(others):
        kept[label] = {"color": free[n % len(free)], "marker": OTHER_MARKERS[n % len(OTHER_MARKERS)],
                       "linestyle": LINESTYLES[(n + n // len(free)) % len(LINESTYLES)]}
    return kept


def style(method: str, position: int = 0) -> dict[str, str]:
    """Line style of a method; one that is not known by name gets a colour by its `position` in the legend."""
    other = {"color": OTHER_COLOURS[position % len(OTHER_COLOURS)], "marker": "D"}
    return STYLES.get(method, other)


def curves_panel(axes, curves: dict[str, Curve], looks: dict[str, dict[str, str]], bands: float = 0.2) -> list:
    """Draw curves (label -> curve) on matplotlib `axes`: the mean as a line, low to high as a band; returns the lines.

    looks: each label's line style; bands: their opacity, 0 for none.
    """
    lines = []
    for label, curve in curves.items():
        look = looks[label]
        marked = max(1, len(curve.iterations) // 12)  # a hundred markers would hide their line
        lines += axes.plot(curve.iterations, curve.mean, label=label, linewidth=2, markersize=5, markevery=marked,
                           **look)
        if bands:
            axes.fill_between(curve.iterations, curve.low, curve.high, color=look["color"], alpha=bands, linewidth=0)
    axes.margins(x=0.02)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return lines


def accuracy_panel(axes, curves: dict[str, Curve], title: str) -> None:
    """Draw one curve per method on matplotlib `axes`: the mean as a line, the spread over agents as a band.

    `NONE` (agents alone) is the reference and is drawn as a line without a band.
    """
    for position, (method, curve) in enumerate(curves.items()):
        label = LABELS.get(method, method)
        curves_panel(axes, {label: curve}, {label: style(method, position)}, bands=0.2 if method != ALONE else 0)
    axes.set_title(title)
    axes.set_xlabel("merge iteration")
    axes.set_ylim(0, 100)
    axes.xaxis.get_major_locator().set_params(integer=True)


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


def new_figure(width: float, height: float):
    """A matplotlib figure (inches) of its own instead of pyplot's: no global state, no window, whatever the backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure, path: str | os.PathLike) -> None:
    """Complete or not at all; the suffix of `path` (.png, .pdf, .svg) says how.

    All text is drawn as it stands: a dollar sign in somebody's name for a graph begins no formula.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    path = Path(path)
    kind = path.suffix[1:] or "png"
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)  # the same run, the same file
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    # Text of ticks that are made when they are drawn; and many venues refuse PDFs with Type 3 fonts.
    with rc_context({"text.parse_math": False, "pdf.fonttype": 42, "svg.hashsalt": "dimat"}):
        write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=130, metadata=undated))
