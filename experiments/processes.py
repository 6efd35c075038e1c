"""The ways in which the agents of main.py's run can be in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.collect import collect
from experiments.merges import options_that_matter, topology_to_merge_over
from experiments.options import MAIN, Command, usual
from experiments.parsing import pick_device
from experiments.run_folder import run_folder
from experiments.settle import matrices, settle_options
from network.folder import forget
from network.processes import is_launched
from network.topology import Topology
from network.workers import end, is_sibling, start, threads_each, wait_for_all
from storage.files import claim, clear


def settle_processes(o: Command) -> None:
    """Check which of the ways to be in several processes was asked for."""
    alone = o["agent"] is not None
    if is_launched() and not is_sibling() and (alone or o["processes"] or o["workers"]):
        raise ValueError("--agent, --processes and --workers are for a command that nobody has launched as a group")
    if o["merg_itr_init"] and (alone or o["processes"]):
        raise ValueError(f"--merg_itr_init {o['merg_itr_init']}: agents on their own can't go back, as the others "
                         "don't")
    if not (o["timeout"] or alone or o["processes"]):
        raise ValueError("--timeout 0 is for agents on their own: a group has to wait for one another")
    if o["workers"] and (alone or o["processes"]):
        raise ValueError("--workers are of one run: leave it out with --agent and --processes")
    if alone and not o["exchange"]:
        raise ValueError("--agent needs --exchange folder:PATH, where it finds its neighbours' models")
    if alone and o["agent"] >= o["num_models"]:
        raise ValueError(f"--agent {o['agent']}: the {o['num_models']} agents (--num_models) are 0 to "
                         f"{o['num_models'] - 1}")
    if o["processes"] and o["processes"] != o["num_models"]:
        raise ValueError(f"--processes {o['processes']}: every agent is a process of its own, so give "
                         f"{o['num_models']}, or another --num_models; --workers deals agents out to fewer processes")
    for option, default in {"exchange": None, "exchange_key": None, "staleness": 0,
                            "max_distance": usual(MAIN)["max_distance"]}.items():
        if o[option] != default and not (alone or o["processes"]):
            raise ValueError(f"--{option} is for agents on their own: give --agent or --processes as well")
    o["resume"] = o["resume"] or (alone and not o["overwrite"])  # an agent comes back by the same command


def number_of_workers(o: Command) -> int:
    """How many processes of this machine to deal the agents out to."""
    if is_launched() or o["agent"] is not None or o["processes"]:
        return 1
    on_cpu = o["device"] == "cpu" or (o["device"] == "auto" and pick_device("auto").type == "cpu")
    return min(o["workers"] or (torch.get_num_threads() if o["training"] and on_cpu else 1), o["num_models"])


def name_for_others(o: Command, path: Path, topology: Topology) -> str:
    """What agents must agree on to be of one run: all that changes its results."""
    return repr((path.parts[len(Path(o["results_dir"]).parts):], matrices(o["topology"], topology).get("pi")))


def run_agents(o: Command, script: Path, argv: Sequence[str]) -> Path:
    """--processes: start every agent as a process of its own, and put together what they leave."""
    made_with, _ = settle_options(o, [0])
    topology = topology_to_merge_over(o)
    path = run_folder(o, options_that_matter(o, made_with))
    exchange = Path(o["exchange"] or path / "exchange")
    name = name_for_others(o, path, topology)
    agents = range(o["num_models"])
    with claim(path):
        if o["overwrite"]:
            clear(path)
        if not any((path / f"agent_{i}").exists() for i in agents):  # then it is of a run that was deleted
            forget(exchange, name)
        processes = [start(script, [*argv, "--processes=0", f"--agent={i}", f"--exchange=folder:{exchange}",
                                    "--overwrite=False"],
                           {"OMP_NUM_THREADS": str(threads_each(len(agents))), "TQDM_DISABLE": "1"}) for i in agents]
        try:
            codes = wait_for_all(processes, lambda i, code: print(
                f"warning: agent {i} ended with status {code}; the others go on", flush=True))
        finally:
            end(processes, 10)
        if failed := [i for i, code in enumerate(codes) if code]:
            raise ValueError(f"agents {failed} did not finish; the same command (without --overwrite) "
                             f"brings them back. What there is lies in {path}")
        collect(path)
        forget(exchange, name)
    return path
