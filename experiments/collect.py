"""Agents on their own write a folder each; this puts them together as one run's.

    python -m experiments.collect RUN_FOLDER

`main.py --processes` does so itself. Columns that nobody knew (consensus distance, accuracy of the average model) stay
empty, as do the rows of iterations that an agent was away for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.checkpoints import digest_of_all
from experiments.options import free
from experiments.parsing import parser
from experiments.run_folder import PHASES, is_part
from experiments.scripts import run_script
from storage.files import claim, load_tensors, load_yaml, read_rows, save_rows, save_tensors, save_yaml


def collect(path: Path) -> Path:
    """Write what is in `path`/agent_<i> into `path` as a run of all of them, over what was there.

    Raises ValueError where an agent has no figures yet, or was run with other options than the rest.
    """
    parts = {int(part.name.removeprefix("agent_")): part for part in path.glob("agent_*") if is_part(part)}
    if not parts:
        raise ValueError(f"{path} has no folder of an agent (agent_0, ...): give the run folder that holds them")
    parts = dict(sorted(parts.items()))
    configs = {i: load_yaml(part / "config.yaml") for i, part in parts.items()}
    if odd := [part for i, part in parts.items() if not isinstance(configs[i].get("first_models"), str)]:
        raise ValueError(f"{odd[0]} has no config.yaml of a run")
    first = configs[next(iter(parts))]
    for i, config in configs.items():
        for key in (config.keys() | first.keys()) - free() - {"agent", "first_models"}:
            if config.get(key) != first.get(key):
                raise ValueError(f"{parts[i]} was run with {key}={config.get(key)}, another agent with "
                                 f"{first.get(key)}: they are not of one run")
    if type(first.get("num_models")) is not int:
        raise ValueError(f"{next(iter(parts.values()))}/config.yaml says num_models: {first.get('num_models')}")
    if missing := set(range(first["num_models"])) - parts.keys():
        print(f"note: {path} has nothing of agents {', '.join(map(str, sorted(missing)))}")
    if not _join_tables(path, parts, "metrics.csv", lambda row: (
            int(row["iteration"]), PHASES.index(row["phase"]), int(row["agent"]))):
        raise ValueError(f"{path}: the agents have no figures yet")
    _join_tables(path, parts, "merge_stats.csv", lambda row: (int(row["iteration"]), int(row["agent"])))
    for name in {file.name for part in parts.values() for file in part.glob("accuracy_matrix/*.csv")}:
        _join_tables(path, parts, f"accuracy_matrix/{name}", lambda row: int(row["agent"]))
    for i, part in parts.items():
        for model in part.glob(f"*/model_{i}.pth"):  # nobody leaves another agent's
            save_tensors(path / model.relative_to(part), load_tensors(model))
    digests = {i: config["first_models"] for i, config in configs.items()}
    save_yaml(path / "config.yaml", first | {"agent": None, "first_models": digest_of_all(digests)})
    return path


def _join_tables(path: Path, parts: dict[int, Path], name: str, order: Callable[[dict[str, str]], Any]) -> bool:
    """The rows of all parts' CSV files of this name in `order`. Whether there are any."""
    rows = [row for part in parts.values() for row in read_rows(part / name)]
    try:
        rows = sorted(rows, key=order)
    except (KeyError, ValueError):
        raise ValueError(f"{path}: an agent's {name} has a line that is not of a run") from None
    if rows:
        save_rows(path / name, list(rows[0]), rows)
    return bool(rows)


def main(argv: list[str] | None = None) -> int:
    p = parser("experiments.collect", "Put the folders of agents that ran on their own together as one run.",
               "python -m experiments.collect results/digits/.../seed_0")
    p.add_argument("run_folder", type=Path, help="the folder that holds agent_0, agent_1, ...")
    o = p.parse_args(argv)

    def work() -> Path:
        if not o.run_folder.is_dir():
            raise ValueError(f"{o.run_folder} is not a folder")
        with claim(o.run_folder):
            return collect(o.run_folder)

    return run_script(work, "results", "give the same command again")


if __name__ == "__main__":
    sys.exit(main())
