"""Tables of results: run folders in, mean and spread over seeds out. `python -m utils.report --help` explains.

Only runs that differ in nothing but the seed are averaged; whatever else tells them apart splits their row by name.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import save_text
from utils.options import only_option, parser
from utils.progress import command
from utils.runs import FOLLOWERS, IGNORED, Run, accuracy_curve, find_runs, of_seed

MISSING = "\N{EN DASH}"
LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "±": r"$\pm$", MISSING: "--"})

Labels = tuple[str, ...]
Cell = dict[int, float]  # seed -> value


def value(run: Run, column: str, at: int | str, phase: str | None) -> float:
    """The mean of `column` over the agents at iteration `at`, 'final' or 'best', or its 'mean' over all iterations.

    'to:A' is the first iteration at which that is at least A (at most, if it is no accuracy).
    Raises ValueError, saying why, where the run has none.
    """
    rows, point = run.whole(), run.phases[1]
    finished = max((int(row["iteration"]) for row in rows if row["phase"] == point), default=0)
    if isinstance(at, str) and finished < run.config["merg_itr"]:
        raise ValueError(f"unfinished: {finished} of {run.config['merg_itr']} iterations are done")
    curve = accuracy_curve(rows, column, ("initial" if at == 0 else phase or point,))
    if at == "best":
        return float(curve.mean.max() if "accuracy" in column else curve.mean.min())
    if at == "mean":
        return float(curve.mean.mean())
    if isinstance(at, str) and at.startswith("to:"):
        target = float(at[3:])
        there = curve.iterations[curve.mean >= target if "accuracy" in column else curve.mean <= target]
        if not len(there):
            raise ValueError(f"{column} never gets to {target:g}")
        return float(there[0])
    found = curve.mean[-1:] if at == "final" else curve.mean[curve.iterations == at]
    if not len(found):
        raise ValueError(f"nothing at iteration {at}: the last one is {curve.iterations[-1]}")
    return float(found[0])


def that_matter(run: Run, at: int | str) -> dict[str, Hashable]:
    """The options that change results. How far a run goes is one, but not for what it was on the way."""
    length = "epochs" if "num_epochs" in run.options else "merg_itr"  # a baseline's iterations follow from its epochs
    kept = {key: option for key, option in run.options.items() if key not in IGNORED | {length}}
    return kept if isinstance(at, int) else kept | {length: run.options.get(length)}


def several(values: Iterable[Hashable]) -> bool:
    return len(set(values)) > 1


def labels(options: dict[str, Hashable], names: Sequence[str]) -> Labels:
    return tuple(MISSING if options.get(name) is None else str(options[name]) for name in names)


def shared_by_all(options: Sequence[dict[str, Hashable]]) -> list[str]:
    return [key for key in dict.fromkeys(key for one in options for key in one)
            if all(one.get(key) is not None for one in options)]


def distinctions(runs: Sequence[Run], cols: Sequence[str], at: int | str) -> list[dict[str, Hashable]]:
    """For each run of a row, the options that take several values in one of the row's cells, with the run's own."""
    options = [that_matter(run, at) for run in runs]
    said: list[dict[str, Hashable]] = [{} for _ in runs]

    def groups() -> list[list[int]]:
        found: dict[Hashable, list[int]] = {}
        for i, run in enumerate(runs):
            found.setdefault((labels(run.options, cols), *said[i].items()), []).append(i)
        return list(found.values())

    # First what all runs have: an option that only some have (a method's own) mostly goes with one of those.
    for candidates in (shared_by_all(options), dict.fromkeys(key for one in options for key in one)):
        now = groups()
        varying = [key for key in candidates if key not in FOLLOWERS
                   and any(several(options[i].get(key) for i in group) for group in now)]
        for mine, one in zip(said, options, strict=True):
            mine |= {key: one.get(key) for key in varying}
    for key in FOLLOWERS:
        for group in groups():
            given = {i: str(options[i].get(key)) for i in group}
            to_seed = {i: of_seed(given[i], runs[i].seed) for i in group}
            if several(given.values()) and several(to_seed.values()):
                for i in group:
                    said[i][key] = to_seed[i]
    return said


def natural(names: Labels) -> list[list[Any]]:
    """A sort key by which numbers within names go by size."""
    parts = [re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", name) for name in names]
    return [[float(part) if i % 2 else part for i, part in enumerate(name)] for name in parts]


def arrange(runs: Sequence[Run], rows: Sequence[str], cols: Sequence[str],
            at: int | str) -> dict[tuple[Labels, Labels], list[Run]]:
    """(row, column) -> runs that are alike in everything but the seed, in the table's order."""
    by_row: dict[Labels, list[Run]] = {}
    for run in runs:
        by_row.setdefault(labels(run.options, rows), []).append(run)
    cells: dict[tuple[Labels, Labels], list[Run]] = {}
    for (first, *others), members in by_row.items():
        for run, said in zip(members, distinctions(members, cols, at), strict=True):
            differs = ", ".join(f"{key}={option}" for key, option in said.items() if option is not None)
            row = (f"{first} ({differs})" if differs else first, *others)
            cells.setdefault((row, labels(run.options, cols)), []).append(run)
    return dict(sorted(cells.items(), key=lambda cell: [natural(name) for name in cell[0]]))


def count_once(runs: Sequence[Run], values: dict[Run, float]) -> tuple[Cell, list[str]]:
    """The cell of runs that are alike but for the seed, and a note for each that repeats another's seed."""
    first: dict[int, Run] = {}
    notes = []
    for run in runs:
        same = first.setdefault(run.seed, run)
        if same is not run:
            differ = values[same] != values[run]
            notes.append(f"counted once: {same.path} and {run.path} have the same options and seed"
                         + (f", but not the same value ({values[same]}, which counts, and {values[run]})" * differ))
    return {seed: values[first[seed]] for seed in sorted(first)}, notes


def mean_and_std(cell: Cell) -> tuple[float, float | None]:
    """The standard deviation is the sample's; one seed has none."""
    figures = list(cell.values())
    return float(np.mean(figures)), float(np.std(figures, ddof=1)) if len(figures) > 1 else None


def grid(cells: dict[tuple[Labels, Labels], Cell], rows: Sequence[str], column: str) -> tuple[list[Labels], list[str]]:
    """The table's lines, header first, and remarks on cells with few seeds or none."""
    heads = {col: ", ".join(col) or column for col in sorted({col for _, col in cells}, key=natural)}
    largest = max(abs(mean_and_std(cell)[0]) for cell in cells.values())
    decimals = 4 if largest < 10 else 2 if largest < 1e5 else 0
    fullest = max(map(len, cells.values()))
    table, remarks = [(*rows, *heads.values())], []
    for row in dict.fromkeys(row for row, _ in cells):
        entries = []
        for col, head in heads.items():
            cell = cells.get((row, col), {})
            mean, std = mean_and_std(cell) if cell else (0.0, None)
            spread = "" if std is None else f" ± {std:.{decimals}f}"
            entries.append(f"{mean:.{decimals}f}{spread} ({len(cell)})" if cell else MISSING)
            if 0 < len(cell) < fullest:
                seeds = ", ".join(map(str, cell))
                remarks.append(f"fewer seeds than {fullest}: {' / '.join(row)}: {head} (seeds {seeds})")
        if MISSING in entries:
            lacking = "; ".join(head for head, entry in zip(heads.values(), entries, strict=True) if entry == MISSING)
            remarks.append(f"missing: {' / '.join(row)}: {lacking}")
        table.append((*row, *entries))
    return table, remarks


def uneven(cells: dict[tuple[Labels, Labels], list[Run]], cols: Sequence[str], at: int | str) -> list[str]:
    """A remark on each row along which options change that the columns don't name."""
    remarks = []
    for row in dict.fromkeys(row for row, _ in cells):
        options = [that_matter(run, at) for (other, _), runs in cells.items() if other == row for run in runs]
        differ = [key for key in shared_by_all(options)
                  if key not in [*cols, *FOLLOWERS] and several(one[key] for one in options)]
        if differ:
            remarks.append(f"not alike along the row: {' / '.join(row)}: {', '.join(differ)}")
    return remarks


def markdown(table: Sequence[Labels]) -> str:
    escaped = [[entry.replace("|", r"\|") for entry in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    escaped.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in escaped)


def latex(table: Sequence[Labels], num_rows: int) -> str:
    """A booktabs tabular; the first `num_rows` columns are the rows' labels."""
    head, *body = [" & ".join(entry.translate(LATEX) for entry in line) + r" \\" for line in table]
    kinds = "l" * num_rows + "c" * (len(table[0]) - num_rows)
    return "\n".join([rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
                      r"\end{tabular}", ""])


def long_form(cells: dict[tuple[Labels, Labels], Cell], rows: Sequence[str], cols: Sequence[str],
              shared: dict[str, str]) -> str:
    """CSV, a line for each cell that has runs; `seeds` and `values` are lists separated by blanks."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*shared, *rows, *cols, "mean", "std", "seeds", "values"])
    for (row, col), cell in cells.items():
        lists = (" ".join(map(str, figures)) for figures in (cell.keys(), cell.values()))
        writer.writerow([*shared.values(), *row, *col, *mean_and_std(cell), *lists])
    return out.getvalue()


def make_parser() -> ArgumentParser:
    p = parser("utils.report", "Tables of finished runs: mean ± sample standard deviation over seeds (their number).\n"
                               "Runs that differ in more than the seed are never averaged: their row is split, and\n"
                               "says by what.",
               "python -m utils.report results/ --rows opt,model --cols topology,data_dist --latex table.tex")
    p.add_argument("paths", nargs="+", metavar="FOLDER", help="folders with run folders somewhere below")
    only_option(p, "count only runs")
    p.add_argument("--rows", default="opt", metavar="A,B", help="options of config.yaml whose values make the rows")
    p.add_argument("--cols", default="topology,data_dist", metavar="A,B", help="options that make the columns")
    p.add_argument("--metric", default="final", metavar="final|best|mean|at:K|to:A",
                   help="a run's last iteration, its best (the lowest, if no accuracy), the mean over all (the area "
                        "under the curve), iteration K (0: the start), or the first iteration with an accuracy of at "
                        "least A (of the runs that get there)")
    p.add_argument("--column", default="test_accuracy", metavar="NAME", help="column of metrics.csv, mean over agents")
    p.add_argument("--phase", choices=["merged", "trained"], default=None,
                   help="rows of metrics.csv to read (default: merged, of baselines trained)")
    p.add_argument("--csv", default=None, metavar="FILE", help="write the table there too, a line for each cell")
    p.add_argument("--latex", default=None, metavar="FILE", help="write the table there too, as a booktabs tabular")
    p.add_argument("--overwrite", action="store_true", help="replace these files where they exist")
    return p


def check_names(flag: str, names: str, runs: Sequence[Run]) -> list[str]:
    """The options in a comma-separated list. Raises ValueError where no run has one of them."""
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    known = sorted({key for run in runs for key in run.options})
    for name in wanted:
        if name not in known:
            vary = [key for key in known if key not in IGNORED and several(run.options.get(key) for run in runs)]
            raise ValueError(f"{flag} {name}: no run has such an option; they differ in {', '.join(vary) or 'none'}")
    return wanted


def report(o: Namespace) -> tuple[str, list[str]]:
    """The table with what is said around it, and notes on runs. Raises ValueError for what the user can mend."""
    if not (metric := re.fullmatch(r"final|best|mean|at:(\d+)|to:\d+(\.\d+)?", o.metric)):
        raise ValueError(f"--metric {o.metric}: give final, best, mean, at:K with an iteration K, such as at:10, or "
                         "to:A with an accuracy, such as to:80")
    at = o.metric if metric[1] is None else int(metric[1])
    for file in filter(None, (o.csv, o.latex)):
        if Path(file).exists() and not o.overwrite:
            raise ValueError(f"{file} exists: give another name, or --overwrite")
    runs, notes = find_runs(o.paths, o.only)
    rows, cols = check_names("--rows", o.rows, runs), check_names("--cols", o.cols, runs)
    if not rows or set(rows) & set(cols):
        raise ValueError(f"--rows '{o.rows}' --cols '{o.cols}': rows need an option, and one that is no column's too")
    columns = dict.fromkeys(key for run in runs for row in run.rows[:1] for key in row)
    figures = [key for key in columns if key not in ("iteration", "phase", "agent")]
    if figures and o.column not in figures:
        raise ValueError(f"--column {o.column}: no run has such figures; there are {', '.join(figures)}")
    values: dict[Run, float] = {}
    for run in runs:
        try:
            values[run] = value(run, o.column, at, o.phase)
        except ValueError as error:
            notes.append(f"not counted: {run.path}: {error}")
    if not values:
        raise ValueError(f"no run has {o.column} for --metric {o.metric}; {notes[-1]}")

    shown = {name for name in [*rows, *cols] if several(labels(run.options, [name]) for run in values)}
    shared = dict(zip([*rows, *cols], labels(next(iter(values)).options, [*rows, *cols]), strict=True))
    rows, cols = [name for name in rows if name in shown] or rows[:1], [name for name in cols if name in shown]
    shared = {name: level for name, level in shared.items() if name not in [*rows, *cols]}
    arranged, cells = arrange(list(values), rows, cols, at), {}
    for key, members in arranged.items():
        cells[key], repeated = count_once(members, values)
        notes += repeated
    table, remarks = grid(cells, rows, o.column)
    remarks += uneven(arranged, cols, at)
    if o.csv:
        save_text(Path(o.csv), long_form(cells, rows, cols, shared))
    if o.latex:
        save_text(Path(o.latex), latex(table, len(rows)))
    phases = " or ".join(sorted({"initial" if at == 0 else o.phase or run.phases[1] for run in values}))
    title = f"{o.column}, {o.metric}, {phases}: mean ± sample standard deviation over seeds (number of seeds)"
    same = ["everywhere: " + ", ".join(f"{name}={level}" for name, level in shared.items())] if shared else []
    return "\n".join([title, *same, "", markdown(table), *([""] if remarks else []), *remarks]), notes


@command
def main(argv: Sequence[str] | None = None) -> int:
    table, notes = report(make_parser().parse_args(argv))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
