"""Agents merge over a topology and train again, iteration by iteration. `python -m main --help` explains."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from agents.merging import MergeSettings, MergingAgents
from agents.run import Phase, carry_out, first_agents, first_models, say_finished
from experiments.merges import finished, the_run, topology_to_merge_over
from experiments.options import Command, main_parser
from experiments.parsing import parse_once, pick_device
from experiments.processes import name_for_others, number_of_workers, run_agents, settle_processes
from experiments.scripts import run_script
from experiments.settle import open_run, settle_options
from network.folder import SharedFolder, read_key
from network.processes import Network, connect, is_launched, leave, local_device, rank
from network.workers import follow_parent, is_sibling, with_workers
from utils.memory import keep_freed_memory


def dimat(agents: MergingAgents, iterations: Iterable[int], trained: int) -> Iterator[Phase]:
    """Algorithm 1 of the paper: merge, train, merge, train ..., up to iteration `trained`, and merge."""
    for k in iterations:
        yield Phase(k, "merged", agents.merge(k))
        if k <= trained:
            yield Phase(k, "trained", agents.train(k))


def run(o: Command, network: Network, device: torch.device, command: str) -> Path:
    """All of it, in every process alike; the writer writes."""

    def prepare() -> tuple[dict, MergingAgents]:
        made_with, files = settle_options(o, network.agents)
        topology = topology_to_merge_over(o)
        settings = MergeSettings.of(o)
        agents = MergingAgents(settings, topology, network, *first_agents(
            o, network, device, files, settings.reads_others))
        agents.spec  # noqa: B018 - a model that can't be permuted at all is an error now, not after hours
        return made_with, agents

    def phases(done: Phase, iterations: Iterator[int]) -> Iterator[Phase]:
        trained = o["merg_itr"] - o["last_merges"] if o["training"] else 0
        if done.name == "merged" and done.iteration <= trained:  # a finished run is made longer
            yield Phase(done.iteration, "trained", agents.train(done.iteration))
        yield from dimat(agents, iterations, trained)

    made_with, agents = network.agree(prepare)
    path, config, matter = the_run(o, made_with, agents.topology)
    config["first_models"] = first_models(network, agents.states)
    own = path if o["agent"] is None else path / f"agent_{o['agent']}"
    fresh = not (own / "metrics.csv").exists()
    with network.meet(name_for_others(o, path, agents.topology), agents.neighbours(), o["merg_itr"],
                      agents.like_sent, o["wire"], fresh, o["overwrite"]):
        return carry_out(agents, phases, o["merg_itr"],
                         lambda: open_run(o, network, command, own, config, matter, start=o["merg_itr_init"]),
                         keep=o["keep"] == "all")


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    follow_parent()
    argv = sys.argv[1:] if argv is None else argv
    o = vars(parse_once(main_parser(), argv))
    command = shlex.join(["main.py", *argv])

    def run_in_group() -> Path:
        device = pick_device(local_device(o["device"]))
        with connect(o["num_models"], device, o["backend"], o["timeout"],
                     one_user=workers > 1 or is_sibling()) as network:
            return run(o, network, device, command)

    def run_here() -> Path:
        settle_processes(o)
        key = read_key(Path(o["exchange_key"])) if o["exchange_key"] else None
        if o["processes"]:
            return run_agents(o, Path(__file__), argv)
        if o["agent"] is not None:
            network = SharedFolder(o["agent"], Path(o["exchange"]), o["timeout"], o["staleness"], key)
            return run(o, network, pick_device(o["device"]), command)
        if not is_launched() and (done := finished(o)):
            say_finished(done[1], "iteration")
            return done[0]
        if workers == 1:
            return run_in_group()
        checked = dict(o)  # what is wrong is better said before they are started
        settle_options(checked, [0])
        topology_to_merge_over(checked)
        return with_workers(workers, Path(__file__), argv, run_in_group)

    workers = number_of_workers(o)
    flag = "" if o["agent"] is not None or o["processes"] else " with --resume"
    code = run_script(run_here, "results", f"give the same command{flag} (without --overwrite)",
                      rank() if o["agent"] is None else int(is_sibling()))
    leave(code, at_once=bool(code) and (workers > 1 or is_sibling()))
    return code


if __name__ == "__main__":
    sys.exit(main())
