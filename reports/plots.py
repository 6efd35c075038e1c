"""Pictures of run folders: `python -m reports.plots results/ --out figures/`.

Each picture is a function from the lines (runs that differ in their seed only) to pages, which are drawn when they are
called: names come first, so that nothing is written when one of them is taken. What a page shows is prepared by pure
functions above it.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.options import ALONE
from experiments.parsing import FORMATS, Formatter, Parser, number, only_option
from experiments.run_folder import PHASES
from network.topology import Topology, make_topology, short_name
from reports.drawing import (
    Line,
    curves_panel,
    lines_of,
    new_figure,
    save_figure,
    styles,
)
from reports.runs import Curve, Run, find_runs
from storage.files import read_rows
from utils.progress import command

Page = Callable[[], Any]  # draws a matplotlib figure
Note = Callable[[str], None]
HATCHES = ("", "///", "\\\\\\", "xxx", "...", "++", "--", "oo")
COLOURS = "cividis"  # the same to colour-blind readers, and its lightness rises evenly: grey print keeps the order
NEEDED = ("test_accuracy", "consensus_distance", "bytes_sent")  # columns of metrics.csv
GIGABYTE = 1e9
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


# --------------------------------------------------------------------------------------------------------------------
# Words around a picture


def title_of(panel: Sequence[str], among: Iterable[Sequence[str]]) -> str:
    """'ring, 5 agents, iid', and the data set and the model where there are several."""
    among = list(among)
    dataset, model, topology, agents, data_dist = panel
    where = f"{topology}, {agents} agent{'s' * (agents != '1')}, {data_dist}"
    which = [name for position, name in enumerate((dataset, model)) if len({one[position] for one in among}) > 1]
    return f"{', '.join(which)}: {where}" if which else where


def setting(lines: Sequence[Line]) -> str:
    """The data set and the model, if all lines share them, to start a caption with."""
    shared = [names.pop() for names in ({line.panel[k] for line in lines} for k in (0, 1)) if len(names) == 1]
    return f"{', '.join(shared)}. " if shared else ""


def band_of(lines: Sequence[Line]) -> str:
    """What the bands around these lines show."""
    counts = {len(line.runs) for line in lines}
    if counts == {1}:
        return "One seed: mean of the agents, band from the lowest to the highest agent."
    seeds = f"{counts.pop()} seeds" if len(counts) == 1 else "Several seeds (number in the legend)"
    text = f"{seeds}: mean of the agents and seeds, band from the lowest to the highest seed."
    return text + (" One seed: band from the lowest to the highest agent." if 1 in counts else "")


def points_of(lines: Sequence[Line]) -> str:
    """Where the points of these lines were taken."""
    said = []
    if any(line.runs[0].phases[1] == "merged" for line in lines):
        said.append("right after each merge")
    epochs = sorted({line.runs[0].local_epochs for line in lines if line.runs[0].phases[1] == "trained"})
    if epochs:
        every = f"every {epochs[0]} epochs" if len(epochs) == 1 else "an iteration's epochs"
        every = "every epoch" if epochs == [1] else every
        said.append(f"gradient-based methods after {every}" if len(said) else f"after {every}")
    return f"Points {'; '.join(said)}."


def names_of(lines: Sequence[Line]) -> dict[Line, str]:
    """What the legend calls the lines: their labels, with the numbers of seeds where these aren't the same for all."""
    counts: dict[str, set[int]] = {}
    for line in lines:
        counts.setdefault(line.label, set()).add(len(line.runs))
    if len(set().union(*counts.values())) == 1:
        return {line: line.label for line in lines}
    seeds = {label: " or ".join(map(str, sorted(some))) + (" seed" if some == {1} else " seeds")
             for label, some in counts.items()}
    return {line: f"{line.label} ({unbroken(seeds[line.label])})" for line in lines}


def unbroken(text: str) -> str:
    """Lines may be broken after a comma or a colon: '5 agents' stays together."""
    return re.sub(r"(?<![,:]) ", "\N{NO-BREAK SPACE}", text)


def size_of(count: float) -> str:
    """Bytes for a reader: 2360000 -> '2.36 MB'."""
    unit, name = next(((unit, name) for unit, name in UNITS if count >= unit), UNITS[-1])
    return f"{count / unit:.3g} {name}"


def by_panel(lines: Sequence[Line]) -> dict[tuple[str, ...], list[Line]]:
    panels: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        panels.setdefault(line.panel, []).append(line)
    return panels


def look(lines: Sequence[Line]) -> dict[str, dict[str, str]]:
    """A style for each label, the same in every panel and picture."""
    return styles({line.label: line.method for line in sorted(lines, key=lambda line: line.rank)})


def pages(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[k : k + size] for k in range(0, len(items), size)]


# --------------------------------------------------------------------------------------------------------------------
# Curves: accuracy, accuracy per gigabyte, consensus


def over_seeds(curves: Sequence[Curve]) -> Curve:
    """Mean, lowest and highest of the seeds' means, at the iterations that all have; one seed's curve as it is."""
    if len(curves) == 1:
        return curves[0]
    shared = functools.reduce(np.intersect1d, [curve.iterations for curve in curves])
    means = np.array([curve.mean[np.isin(curve.iterations, shared)] for curve in curves])
    return Curve(shared, means.mean(axis=0), means.min(axis=0), means.max(axis=0))


def line_curve(line: Line, column: str = "test_accuracy") -> Curve:
    """`column` per iteration; low and high are of the seeds, or of the agents where there is one seed."""
    return over_seeds([run.curve(column) for run in line.runs])


def bytes_so_far(run: Run) -> Curve:
    """Bytes that an agent had sent, all in all, when each point of the run's curve was taken; over the agents."""
    sent = np.zeros(run.agents)
    points: dict[int, np.ndarray] = {}
    for row in sorted(run.rows, key=lambda row: (int(row["iteration"]), PHASES.index(row["phase"]))):
        sent[int(row["agent"])] += float(row["bytes_sent"] or 0)
        if row["phase"] in run.phases:
            points[int(row["iteration"])] = sent.copy()
    values = np.array(list(points.values()))
    return Curve(np.array(list(points)), values.mean(axis=1), values.min(axis=1), values.max(axis=1))


@dataclass(frozen=True, eq=False)
class Drawn:
    """A curve over x (K,); without x, a level: one figure that holds all along the axis."""

    x: np.ndarray | None
    curve: Curve


def against_bytes(line: Line) -> Drawn:
    """Test accuracy over the gigabytes that an agent has sent on average; the last one where nothing is sent."""
    curve = line_curve(line)
    x = over_seeds([bytes_so_far(run) for run in line.runs]).mean / GIGABYTE
    return Drawn(x if x[-1] > 0 else None, curve)


def spans_decades(values: np.ndarray, decades: float = 2) -> bool:
    """Whether the positive values differ by more than that."""
    positive = values[values > 0]
    return bool(positive.size) and positive.max() / positive.min() > 10**decades


def limits(values: np.ndarray) -> tuple[float, float]:
    """Axis limits for percentages: whole tens around all of them."""
    return max(0.0, math.floor((values.min() - 1) / 10) * 10), min(100.0, math.ceil((values.max() + 1) / 10) * 10)


def accuracy(lines: Sequence[Line], note: Note) -> list[Page]:
    """Test accuracy per iteration, a panel for each topology, data distribution, data set and model."""
    looks = look(lines)
    drawn = {line: Drawn((curve := line_curve(line)).iterations, curve) for line in lines}
    caption = f"{setting(lines)}{points_of(lines)} {band_of(lines)}"
    return [lambda: curves_figure(drawn, looks, "iteration", "test accuracy (%)", caption, percent=True)]


def accuracy_per_gigabyte(lines: Sequence[Line], note: Note) -> list[Page]:
    """Test accuracy over the gigabytes that an agent has sent."""
    looks = look(lines)
    drawn = {line: one for line in lines if len((one := against_bytes(line)).curve.iterations) > 1}
    if left_out := len(lines) - len(drawn):
        note(f"accuracy per gigabyte: {left_out} of {len(lines)} lines are left out, for they have only begun")
    sent = [one.x for one in drawn.values() if one.x is not None]
    if not sent:
        return []
    log = spans_decades(np.concatenate(sent))
    caption = f"{setting(list(drawn))}{points_of(list(drawn))} {band_of(list(drawn))}"
    if log:
        caption += " The start, before anything was sent, is left of the logarithmic axis."
    if any(one.x is None for one in drawn.values()):
        caption += " Level lines: agents that send nothing, at their last iteration."
    axis = f"sent per agent (GB){', logarithmic' if log else ''}"
    return [lambda: curves_figure(drawn, looks, axis, "test accuracy (%)", caption, percent=True, log_x=log)]


def consensus(lines: Sequence[Line], note: Note) -> list[Page]:
    """How far the agents' models are apart, per iteration."""
    drawn, looks = {}, look(lines)
    for line in lines:
        if any(row["consensus_distance"] == "" for run in line.runs for row in run.rows):
            note(f"no consensus distance of {line.label}: its agents were on their own, so nobody knew all models")
            continue
        curve = line_curve(line, "consensus_distance")
        drawn[line] = Drawn(curve.iterations, Curve(curve.iterations, *(
            np.where(values > 0, values, np.nan) for values in (curve.mean, curve.low, curve.high))))
    agreed = any(np.isnan(one.curve.mean).any() for one in drawn.values())
    if all(np.isnan(one.curve.mean).all() for one in drawn.values()):
        return []
    caption = (f"{setting(lines)}{points_of(lines)} Root of the mean squared distance of the agents' parameters to "
               "their average.")
    if any(len(line.runs) > 1 for line in lines):
        caption += " Lines of several seeds: their mean, band from the lowest to the highest."
    if agreed:
        caption += " Points of exact agreement (0) are below the logarithmic axis."
    return [lambda: curves_figure(drawn, looks, "iteration", "consensus distance", caption, log_y=True)]


def log_axis(axis, values: np.ndarray, say: Callable[[float], str]) -> None:
    """A logarithmic axis whose ticks can be read: at 1, 2, 5, 10, ... where the values span little."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0,) if spans_decades(values, 1.5) else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: say(value)))
    axis.set_minor_formatter(NullFormatter())


def curves_figure(drawn: dict[Line, Drawn], looks: dict[str, dict[str, str]], xlabel: str, ylabel: str, caption: str, *,
                  percent: bool = False, log_x: bool = False, log_y: bool = False):
    """A grid of panels with a curve for each line, one legend above and a caption below; looks: label -> style."""
    lines, panels = list(drawn), by_panel(list(drawn))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = figure_for(0.8 + 4.4 * columns, 3.6 * rows, caption, names := names_of(lines))
    grid = figure.subplots(rows, columns, sharey=True, sharex=log_x, squeeze=False)
    handles = {}
    for axes, (panel, members) in zip(grid.flat, panels.items(), strict=False):
        for line in members:
            one = drawn[line]
            line_style = looks[line.label]
            if one.x is None:
                handles[names[line]] = axes.axhline(one.curve.mean[-1], linewidth=2,
                                                    **{"linestyle": "--", **line_style, "marker": ""})
            else:
                shown = one.x > 0 if log_x else np.full(len(one.x), True)
                curve = Curve(one.x[shown], one.curve.mean[shown], one.curve.low[shown], one.curve.high[shown])
                band = 0 if line.method == ALONE else 0.2 if len(members) <= 4 else 0.1
                handles[names[line]], = curves_panel(axes, {names[line]: curve}, {names[line]: line_style}, band)
        axes.set_title(textwrap.fill(unbroken(title_of(panel, panels)), 50), fontsize=10)
        if log_y:
            log_axis(axes.yaxis, np.concatenate([one.curve.mean for one in drawn.values()]), "{:g}".format)
        if log_x:
            log_axis(axes.xaxis, np.concatenate([one.x for one in drawn.values() if one.x is not None]), "{:g}".format)
        else:
            axes.xaxis.get_major_locator().set_params(integer=xlabel == "iteration")
    for row in grid:
        row[0].set_ylabel(ylabel)
    for column in range(columns):
        below = [axes for axes in grid[:, column] if axes.lines]
        below[-1].set_xlabel(xlabel)
        below[-1].xaxis.set_tick_params(labelbottom=True)
    for axes in grid.flat[len(panels):]:
        axes.remove()
    if percent:
        curves = [one.curve for one in drawn.values()]
        grid[0, 0].set_ylim(limits(np.concatenate([values for c in curves for values in (c.low, c.high)])))
    legend(figure, {names[line]: handles[names[line]] for line in sorted(lines, key=lambda line: line.rank)})
    return figure


def reached(run: Run, target: float) -> float:
    """The first iteration after which the agents' mean accuracy is at least the target; NaN where it never is."""
    curve = run.curve("test_accuracy")
    there = curve.iterations[(curve.mean >= target) & (curve.iterations > 0)]
    return float(there[0]) if len(there) else math.nan


def iterations_to_target(lines: Sequence[Line], note: Note, target: float) -> list[Page]:
    """With --target: iterations to an accuracy over the spectral gap of the graph, a line for each method."""
    points: dict[Line, list[tuple[float, ...]]] = {}
    gaps: dict[tuple[str, str], dict[int, float]] = {}  # (agents, graph) -> seed -> gap
    heads: dict[tuple, Line] = {}
    for line in lines:
        dataset, model, graph, agents, data_dist = line.panel
        counts = [reached(run, target) for run in line.runs]
        if any(map(math.isnan, counts)):
            note(f"not every seed of {line.label} gets to {target:g} % ({', '.join(line.panel)}): no point")
            if line.method == ALONE:  # a level, which has no place for a gap
                continue
            counts = [math.nan]  # a gap in the line: between its neighbours' points it is not to be read off
        try:
            own = {run.seed: 1 - topology_of(run).second_eigenvalue for run in line.runs if line.method != ALONE}
        except (ValueError, OSError) as error:
            note(str(error))
            continue
        gaps.setdefault((agents, graph), {}).update(own)
        head = heads.setdefault((dataset, model, agents, data_dist, line.label), Line(
            (dataset, model, "all graphs", agents, data_dist), line.method, line.label, line.runs))
        gap = float(np.mean(list(own.values()))) if own else math.nan
        points.setdefault(head, []).append((gap, float(np.mean(counts)), min(counts), max(counts), len(counts)))
    drawn = {}
    for line, found in points.items():
        x, *figures, _ = np.array(sorted(found)).T
        if not np.isnan(figures[0]).all():
            drawn[line] = Drawn(None if line.method == ALONE else x, Curve(x, *figures))
    if not drawn:
        return []
    means: dict[str, dict[str, float]] = {}
    for (agents, graph), of in gaps.items():
        if of:
            means.setdefault(agents, {})[graph] = float(np.mean(list(of.values())))
    known = "; ".join(f"{agents} agents: " + ", ".join(f"{graph} {of[graph]:.2f}" for graph in sorted(of, key=of.get))
                      for agents, of in means.items())
    seeds = sorted({count for found in points.values() for _, mean, *_, count in found if not math.isnan(mean)})
    broken = any(np.isnan(one.curve.mean).any() for one in drawn.values())
    several = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seed{'s' * (seeds[0] > 1)}"
    caption = (f"{setting(list(drawn))}First iteration after which the agents' mean accuracy is at least {target:g} %: "
               f"mean of {several}, band from the lowest to the highest. The gap is 1 less the factor by which a step "
               f"of averaging alone brings agents together. {known}."
               + " A line is broken where a seed doesn't get there." * broken)
    return [lambda: curves_figure(drawn, look(lines), "spectral gap", f"iterations to {target:g} %", caption)]


# --------------------------------------------------------------------------------------------------------------------
# What agents send


def bytes_per_epoch(run: Run) -> float | None:
    """Bytes that an agent sends in an iteration, per local epoch of it, on average; None where nothing is trained.

    Merges that follow one another at the end (--last_merges) count as one with the epochs before them.
    """
    so_far = bytes_so_far(run)
    iterations = int(so_far.iterations[-1])
    iterations = min(iterations, (run.config.get("train_itr") or iterations) + 1)
    if not iterations or not run.local_epochs:
        return None
    return float(so_far.mean[-1]) / iterations / run.local_epochs


def communication(lines: Sequence[Line], note: Note) -> list[Page]:
    """Bytes that an agent sends in an epoch, by method."""
    sent = {}
    for line in lines:
        values = [value for run in line.runs if (value := bytes_per_epoch(run)) is not None]
        if values:
            sent[line] = float(np.mean(values))
    if left_out := len(lines) - len(sent):
        note(f"communication: {left_out} of {len(lines)} lines are left out, for they have trained no epoch")
    if not any(sent.values()):
        return []
    caption = (f"{setting(list(sent))}Bytes that an agent sends, mean over agents and iterations, per epoch of local "
               "training.")
    return [lambda: bars_figure(sent, look(lines), caption)]


def bars_figure(sent: dict[Line, float], looks: dict[str, dict[str, str]], caption: str):
    """Bars on a logarithmic axis, panel below panel; the value stands beside each bar."""
    panels = by_panel(list(sent))
    hatches = {label: HATCHES[k % len(HATCHES)] for k, label in enumerate(looks)}
    heights = [0.2 + 0.3 * len(members) for members in panels.values()]
    figure = figure_for(8.0, sum(heights) + 0.45 * len(heights) + 0.5, caption, {})
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    positive = [value for value in sent.values() if value]
    for axes, (panel, members) in zip(grid, panels.items(), strict=True):
        for row, line in enumerate(members):
            value = sent[line]
            axes.barh(row, value, height=0.7, color=looks[line.label]["color"], hatch=hatches[line.label],
                      edgecolor="white", linewidth=0)
            axes.annotate(size_of(value) if value else "nothing", (value or min(positive) / 2, row), (4, 0),
                          textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(range(len(members)), [textwrap.fill(line.label, 44) for line in members], fontsize=8)
        axes.set_ylim(len(members) - 0.4, -0.6)
        log_axis(axes.xaxis, np.array(positive), size_of)
        axes.set_xlim(min(positive) / 2, max(positive) * (4 if len(set(positive)) > 1 else 2))
        axes.set_title(title_of(panel, panels), fontsize=10, loc="left")
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set_xlabel("sent per epoch and agent, logarithmic")
    return figure


# --------------------------------------------------------------------------------------------------------------------
# Pictures of single runs: the lowest seed of each line


def spread(values: Sequence[int], count: int = 4) -> list[int]:
    """The first, the last and what lies evenly between, `count` at most."""
    chosen = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[k] for k in chosen]


def accuracy_matrices(run: Run) -> dict[int, np.ndarray]:
    """iteration -> (N, N) percent: row agent i, column j its accuracy on the test images that go with agent j's data.

    Up to four iterations, the first and the last among them, right after the merge (baselines: after training); {} if
    there are none. Raises ValueError for a file that is no such matrix.
    """
    files = {int(re.sub(r"\D", "", file.stem)): file
             for file in (run.path / "accuracy_matrix").glob(f"iteration_*_{run.phases[1]}.csv")}
    matrices = {}
    for iteration in spread(sorted(files)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy's, about an empty file
                matrix = np.loadtxt(files[iteration], delimiter=",", skiprows=1, ndmin=2)[:, 1:-1]
        except ValueError:
            matrix = np.empty(0)
        if matrix.shape != (run.agents, run.agents) or np.isinf(matrix).any() or np.isnan(matrix).all():
            raise ValueError(f"{files[iteration]} is not an accuracy matrix of {run.agents} agents")
        matrices[iteration] = matrix
    return matrices


def of_runs(lines: Sequence[Line], prepare: Callable[[Run], Any], note: Note) -> list[tuple[Line, Any]]:
    """What `prepare` makes of the lowest seed of each line, without those it makes nothing of or fails at."""
    made = []
    for line in lines:
        try:
            if (content := prepare(line.runs[0])) is not None:
                made.append((line, content))
        except (ValueError, OSError) as error:
            note(str(error))
    return made


def heading(line: Line, lines: Sequence[Line], width: int) -> str:
    """A run's title: its line, panel and seed."""
    where = f"{title_of(line.panel, [one.panel for one in lines])}, seed {line.runs[0].seed}"
    return "\n".join(textwrap.fill(part, width, break_on_hyphens=False) for part in (line.label, unbroken(where)))


def accuracy_matrix(lines: Sequence[Line], note: Note) -> list[Page]:
    """Which agent knows what: heatmaps of the accuracy matrix at up to four iterations, a row of them per run."""
    made = of_runs(lines, lambda run: accuracy_matrices(run) or None, note)
    return [functools.partial(matrices_figure, page, lines) for page in pages(made, 6)]


def matrices_figure(made: Sequence[tuple[Line, dict[int, np.ndarray]]], lines: Sequence[Line]):
    """Rows of heatmaps on one colour scale."""
    columns = max(3, *(len(matrices) for _, matrices in made))  # narrower, there is no room for the headings
    low, high = limits(np.concatenate([m[~np.isnan(m)] for _, matrices in made for m in matrices.values()]))
    caption = (f"{setting(lines)}Accuracy of agent i (row) on the test images that go with agent j's data (column); "
               f"{points_of([line for line, _ in made]).lower()}")
    headings = [heading(line, lines, 30 * columns) for line, _ in made]
    taken = 0.14 * sum(text.count("\n") + 1 for text in headings)
    figure = figure_for(1.6 + 2.2 * columns, 0.2 + 2.9 * len(made) + taken, caption, {})
    grid = figure.subplots(len(made), columns, squeeze=False)
    for row, text, (_, matrices) in zip(grid, headings, made, strict=True):
        above = "\n" * (text.count("\n") + 2)
        for axes, (iteration, matrix) in zip(row, matrices.items(), strict=False):
            image = axes.imshow(matrix, cmap=COLOURS, vmin=low, vmax=high)
            axes.set_title(f"{above}iteration {iteration}", fontsize=8)
            ticks = range(0, len(matrix), 1 if len(matrix) <= 10 else 5)
            axes.set_xticks(ticks, ticks, fontsize=7)
            axes.set_yticks(ticks, ticks, fontsize=7)
            if len(matrix) <= 5:
                for (i, j), value in np.ndenumerate(matrix):
                    axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink(image, value))
        # As wide as the row: the empty lines in the titles keep its place, no column grows for it.
        row[0].annotate(text, (0, 1), (-18, 18), xycoords="axes fraction", textcoords="offset points",
                        annotation_clip=False, fontsize=8.5).set_in_layout(False)
        row[0].set_ylabel("agent", fontsize=8)
        row[0].set_xlabel("data of agent", fontsize=8)
        for axes in row[len(matrices):]:
            axes.axis("off")
    figure.colorbar(image, ax=grid, label="accuracy (%)", fraction=0.04, pad=0.02, aspect=30)
    return figure


def ink(image, value: float) -> str:
    """Black on light colours, white on dark ones."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def topology_of(run: Run) -> Topology:
    """The graph that a run's agents merge over. Raises ValueError or FileNotFoundError where it can't be told."""
    config = run.config
    if config.get("pi") is not None:  # the file may have changed since, or be gone
        try:
            several = np.asarray(config["pi"], dtype=float)
            if several.shape[-2:] != (run.agents, run.agents) or several.ndim > 3 or not (several >= 0).all():
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(f"{run.path}: pi in config.yaml holds no weights of {run.agents} agents") from None
        schedule = tuple(several) if several.ndim == 3 else ()  # one of a folder's matrices after the other
        pi = np.mean(schedule, axis=0) if schedule else several
        connectivity = (pi > 0) & ~np.eye(len(pi), dtype=bool)
        directed = not np.array_equal(connectivity, connectivity.T)
        return Topology(short_name(config["topology"]), connectivity, pi, directed, schedule)
    return make_topology(config["topology"], run.agents, run.seed)


def final_accuracies(run: Run) -> np.ndarray:
    """(N,) test accuracy (percent) of each agent at the last point of the run's curve; NaN where it is missing."""
    points = [row for row in run.rows if row["phase"] in run.phases]
    last = max(int(row["iteration"]) for row in points)
    final = np.full(run.agents, math.nan)
    for row in points:
        if int(row["iteration"]) == last:
            final[int(row["agent"])] = float(row["test_accuracy"])
    return final


def edges_of(topology: Topology) -> list[tuple[int, int, float]]:
    """(from, to, weight) of each edge; one that goes both ways once, with the mean of its two weights."""
    pi, both = topology.pi, topology.connectivity & topology.connectivity.T
    return [(j, i, float(pi[i, j] + pi[j, i]) / 2 if both[i, j] else float(pi[i, j]))
            for i, j in zip(*np.nonzero(topology.connectivity), strict=True) if not both[i, j] or j < i]


def topology(lines: Sequence[Line], note: Note) -> list[Page]:
    """The graph of each run, its agents coloured by their last accuracy."""
    made = of_runs(lines, lambda run: (topology_of(run), final_accuracies(run)), note)
    return [functools.partial(graphs_figure, page, lines) for page in pages(made, 12)]


def graphs_figure(made: Sequence[tuple[Line, tuple[Topology, np.ndarray]]], lines: Sequence[Line]):
    """Agents on circles, four graphs in a row."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    columns = min(4, len(made))
    rows = math.ceil(len(made) / columns)
    caption = (f"{setting(lines)}Colour: the agent's test accuracy at the last point; width of an edge: the "
               "weight of the neighbour's model. One-way edges have arrows; over changing graphs, the mean weight.")
    headings = [heading(line, lines, 34) + "\n(no edges used)" * (line.method == ALONE) for line, _ in made]
    taken = 0.15 * max(text.count("\n") + 1 for text in headings)
    figure = figure_for(0.9 + 3.0 * columns, (2.9 + taken) * rows, caption, {})
    grid = figure.subplots(rows, columns, squeeze=False)
    accuracies = np.concatenate([final for _, (_, final) in made])
    colours = ScalarMappable(Normalize(*limits(accuracies[~np.isnan(accuracies)])), COLOURS)
    for axes, text, (line, (graph, final)) in zip(grid.flat, headings, made, strict=False):
        angles = np.pi / 2 - 2 * np.pi * np.arange(graph.num_agents) / graph.num_agents
        x, y = np.cos(angles), np.sin(angles)
        edges = [] if line.method == ALONE else edges_of(graph)
        for source, target, weight in edges:
            arrow = {"arrowstyle": "-|>" if graph.directed and not graph.connectivity[source, target] else "-",
                     "linewidth": max(0.4, 7 * weight), "color": "#888888", "shrinkA": 8, "shrinkB": 8,
                     "mutation_scale": 9}
            axes.annotate("", (x[target], y[target]), (x[source], y[source]), arrowprops=arrow, zorder=1)
        axes.scatter(x, y, s=210, c=colours.to_rgba(final), edgecolors="#333333", linewidths=0.8, zorder=2)
        for agent, value in enumerate(final):
            axes.text(x[agent], y[agent], str(agent), ha="center", va="center", fontsize=7, zorder=3,
                      color=ink(colours, 0 if math.isnan(value) else value))
        axes.set_title(text, fontsize=8)
        # The corners hold the circle in the middle, and the limits give way: a box that did would pull at its title.
        axes.plot((-1.15, 1.15), (-1.15, 1.15), linestyle="none")
        axes.margins(0)
        axes.set_aspect("equal", adjustable="datalim")
        axes.axis("off")
    for axes in grid.flat[len(made):]:
        axes.axis("off")
    figure.colorbar(colours, ax=grid, label="test accuracy (%)", fraction=0.03, pad=0.02)
    return figure


@dataclass(frozen=True, eq=False)
class MergeStats:
    """Per merge (M of them) and layer group (G): how alike matched units were, and which share of them moved."""

    iterations: list[int]
    groups: list[str]
    correlation: np.ndarray  # (M, G), -1 to 1, NaN where the method measures none
    moved: np.ndarray  # (M, G), 0 to 1


def merge_stats_of(run: Run) -> MergeStats | None:
    """Means over agents and neighbours at the first and the last merge in merge_stats.csv; None without figures.

    Raises ValueError for a file that is no such table.
    """
    path = run.path / "merge_stats.csv"
    if not path.is_file():
        return None
    rows = read_rows(path)
    values: dict[tuple[int, str, str], list[float]] = {}
    try:
        groups = list(dict.fromkeys(row["group"] for row in rows))  # first appearance: in order of execution
        merges = sorted({int(row["iteration"]) for row in rows})
        for row in rows:
            for column in ("correlation", "moved"):
                if row[column] != "":
                    values.setdefault((int(row["iteration"]), row["group"], column), []).append(float(row[column]))
        if not np.isfinite([one for some in values.values() for one in some]).all():
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a table of merge statistics") from None
    ends = list(dict.fromkeys(spread(merges, 2)))
    means = [np.array([[np.mean(values.get((k, group, column), [math.nan])) for group in groups] for k in ends])
             for column in ("correlation", "moved")]
    return MergeStats(ends, groups, *means) if ends else None


def merge_stats(lines: Sequence[Line], note: Note) -> list[Page]:
    """How alike matched units are, and how many move, per layer group at the first and the last merge."""
    made = of_runs(lines, merge_stats_of, note)
    return [functools.partial(stats_figure, page, lines) for page in pages(made, 5)]


def stats_figure(made: Sequence[tuple[Line, MergeStats]], lines: Sequence[Line]):
    """A row for each run: correlation on the left, share moved on the right, over the groups."""
    most = max(len(stats.groups) for _, stats in made)
    caption = (f"{setting(lines)}Per group of layers that are permuted together, in order of execution; means over "
               "agents and their neighbours.")
    figure = figure_for(2 * max(3.4, 0.6 + 0.17 * most), 3.2 * len(made), caption, {"": "first merge"})
    boxes = figure.subfigures(len(made), 1, squeeze=False)[:, 0]
    # The first merge's marks are the larger ones: they show around the last one's where the two agree.
    looks = ({"color": "#0072B2", "marker": "o", "markersize": 7, "linestyle": "--", "markerfacecolor": "white"},
             {"color": "#D55E00", "marker": "s", "markersize": 3, "linestyle": "-"})
    handles = {}
    for box, (line, stats) in zip(boxes, made, strict=True):
        merges = " and ".join(map(str, stats.iterations))
        box.suptitle(f"{heading(line, lines, 90)}, iteration{'s' * (len(stats.iterations) > 1)} {merges}", fontsize=9,
                     x=0.02, ha="left")
        for axes, figures, what in zip(box.subplots(1, 2), (stats.correlation, stats.moved),
                                       ("correlation of matched units", "share of units moved"), strict=True):
            for values, name, options in zip(figures, ("first merge", "last merge"), looks, strict=False):
                handles[name], = axes.plot(values, linewidth=1.4, **options)
            axes.set_xticks(range(len(stats.groups)), stats.groups, rotation=90, fontsize=6)
            axes.set_ylabel(what, fontsize=8)
            axes.tick_params(axis="y", labelsize=7)
            lowest = np.nanmin(figures) if np.isfinite(figures).any() else 0.0
            axes.set_ylim(min(-0.03, lowest - 0.05), 1.03)
            axes.set_xlim(-0.6, len(stats.groups) - 0.4)
            axes.grid(color="#E8E8E8", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if not np.isfinite(figures).any():
                axes.text(0.5, 0.5, f"{line.method} measures none", ha="center", transform=axes.transAxes, fontsize=8)
    legend(figure, handles)
    return figure


# --------------------------------------------------------------------------------------------------------------------
# Figures, legends, captions


def figure_for(width: float, height: float, caption: str, names: dict[Any, str]):
    """A figure (inches) with room for the caption, and for a legend of these names."""
    text = textwrap.fill(caption, int(width * 15))
    figure = new_figure(width, height + 0.17 * (text.count("\n") + 1) + 0.2 * legend_shape(width, names.values())[1])
    figure.supxlabel(text, fontsize="small", color="#444444", x=0.01, ha="left")
    return figure


def legend_shape(width: float, names: Iterable[str]) -> tuple[int, int]:
    """(columns, lines of text) of a legend of these names in a figure of this width (inches)."""
    names = set(names)
    if not names:
        return 1, 0
    wrapped = [textwrap.wrap(name, 60) or [""] for name in names]
    longest = max(len(part) for name in wrapped for part in name)
    columns = max(1, min(len(names), int(width / (0.6 + 0.066 * longest))))
    return columns, math.ceil(len(names) / columns) * max(len(name) for name in wrapped)


def legend(figure, handles: dict[str, Any]) -> None:
    """One legend for all panels, above them."""
    columns, _ = legend_shape(figure.get_figwidth(), handles)
    figure.legend(list(handles.values()), [textwrap.fill(name, 60) for name in handles], ncols=columns, fontsize=8,
                  loc="outside upper left", frameon=False, handlelength=3.2)


# --------------------------------------------------------------------------------------------------------------------
# The command line

PICTURES: dict[str, Callable[[Sequence[Line], Note], list[Page]]] = {
    picture.__name__: picture for picture in (accuracy, accuracy_per_gigabyte, accuracy_matrix, topology, communication,
                                              consensus, merge_stats)
}
def formats(text: str) -> list[str]:
    """An argparse type: 'png,pdf' -> ['png', 'pdf']."""
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    if not names or set(names) - set(FORMATS):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of {', '.join(FORMATS)}")
    return names


def make_parser() -> argparse.ArgumentParser:
    pictures = [*PICTURES.values(), iterations_to_target]
    what = "\n".join(f"  {picture.__name__:<23}{picture.__doc__.splitlines()[0]}" for picture in pictures)
    p = Parser(
        prog="python -m reports.plots", formatter_class=Formatter, allow_abbrev=False,
        description="Draw the runs below some folders: every folder with a config.yaml beside a metrics.csv.\n\n"
                    "example:\n  python -m reports.plots results/ --out figures/ --format png",
        epilog=f"pictures, each where the runs hold what it shows:\n{what}\n\nRuns that differ in nothing but their "
               "seed are one line; what differs otherwise is in its name.\nMany runs make several pages "
               "(topology.png, topology_2.png, ...).")
    p.add_argument("paths", nargs="+", metavar="FOLDER", help="run folders, or folders above them")
    only_option(p, "draw only runs")
    p.add_argument("--out", default="figures", metavar="DIR", help="where the pictures go")
    p.add_argument("--target", type=number(float, 0, 100), default=None, metavar="A",
                   help="draw how many iterations it takes to this accuracy (percent), by graph")
    p.add_argument("--format", type=formats, default="png,pdf", metavar="LIST", help=f"of {', '.join(FORMATS)}")
    p.add_argument("--overwrite", action="store_true", help="replace pictures that are there")
    return p


def draw(runs: Sequence[Run], out: Path, kinds: Sequence[str], overwrite: bool, note: Note,
         target: float | None = None) -> list[Path]:
    """Draw all `runs` into `out` and return the files. Raises ValueError or OSError, saying why not."""
    lines, left_out = lines_of(runs)
    for text in left_out:
        note(text)
    plan: dict[str, Page] = {}
    by_target = {} if target is None else {
        "iterations_to_target": functools.partial(iterations_to_target, target=target)}
    for name, picture in (PICTURES | by_target).items():
        for count, page in enumerate(picture(lines, note), start=1):
            plan[name if count == 1 else f"{name}_{count}"] = page
    files = [out / f"{name}.{kind}" for name in plan for kind in kinds]
    taken = [file for file in files if file.exists()]
    if taken and not overwrite:
        those = f"{taken[0]} and {len(taken) - 1} more exist" if len(taken) > 1 else f"{taken[0]} exists"
        raise ValueError(f"{those}: choose another --out, or --overwrite to replace")
    for name, page in plan.items():
        figure = page()
        for kind in kinds:
            save_figure(figure, out / f"{name}.{kind}")
    return files


@command
def main(argv: Sequence[str] | None = None) -> int:
    def say(note: str) -> None:
        print(f"note: {note}", file=sys.stderr, flush=True)

    o = make_parser().parse_args(argv)
    runs, skipped = find_runs(o.paths, o.only)
    lacking = {run: column for run in runs for column in NEEDED if column not in run.rows[0]}
    for text in [*skipped, *(f"skipped {run.path}: no column {column}" for run, column in lacking.items())]:
        say(text)
    if len(lacking) == len(runs):
        raise ValueError(f"nothing to draw: no run has all of {', '.join(NEEDED)}")
    runs = [run for run in runs if run not in lacking]
    for file in draw(runs, Path(o.out), o.format, o.overwrite, say, o.target):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
