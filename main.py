"""Agents merge over a topology and train again, iteration by iteration. `python -m main --help` explains."""

from __future__ import annotations

import contextlib
import copy
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.fleet import Fleet
from agents.lifecycle import initial_states, open_run, record, shares
from agents.local import LocalTrainer, load_agents_data, new_model
from experiments.checkpoints import check_state, digest, digest_of_all
from experiments.collect import collect
from experiments.merges import options_that_matter, the_run, topology_to_merge_over
from experiments.options import ALONE, MAIN, main_parser, usual
from experiments.parsing import parse_once, pick_device
from experiments.run_folder import RunFolder, circumstances, run_folder
from experiments.scripts import run_script
from experiments.settle import matrices, settle_options
from models import training
from network.folder import SharedFolder, forget, read_key
from network.processes import Network, connect, is_launched, leave, local_device, rank
from network.topology import Topology
from network.workers import end, follow_parent, is_sibling, start, threads_each, wait_for_all, with_workers
from storage.files import claim, clear
from utils.memory import keep_freed_memory
from utils.progress import progress


def merge_and_train(fleet: Fleet, folder: RunFolder | None, finished: int, phase: str) -> None:
    """Algorithm 1 of the paper: merge, train, merge, train ..., and merge. Commits after every iteration.

    `finished`, `phase`: the last iteration done (0: none) and whether it ended `merged` or `trained`.
    """
    o, network = fleet.o, fleet.network

    def write(iteration: int, phase: str, began: float, stats: dict[int, training.EpochStats],
              **figures: dict[int, Any]) -> None:
        nonlocal last
        evaluations, up = fleet.evaluate(), fleet.up(iteration) if iteration else fleet.states
        last = record(folder, network, fleet.trainer, fleet.test_parts, iteration, phase, began, {
            i: {"state": state, "evaluation": evaluations[i], "stats": stats.get(i), "samples": fleet.samples[i],
                "steps": fleet.steps[i], "bytes_sent": 0, "bytes_received": 0, "took_part": int(i in up),
                "order": fleet.orders.get(i, -1)}
            | {key: values[i] for key, values in figures.items()} for i, state in fleet.states.items()})
        if folder and iteration:
            folder.record_merge(iteration, [row for rows in last.get("matched", ()) for row in rows])
            folder.save_models(phase, dict(zip(network.recorded, last["state"], strict=True)))

    def merge_phase(iteration: int) -> None:
        began, matched, sent, received = time.perf_counter(), [], dict(network.sent), dict(network.received)
        merged_with = fleet.merge(iteration, matched)
        write(iteration, "merged", began, {}, merged_with=merged_with,
              bytes_sent={i: network.sent[i] - sent[i] for i in fleet.states},
              bytes_received={i: network.received[i] - received[i] for i in fleet.states},
              matched={i: [row for row in matched if row["agent"] == i] for i in fleet.states})

    def train_phase(iteration: int) -> None:
        began = time.perf_counter()
        write(iteration, "trained", began, fleet.train(iteration))

    def commit(iteration: int, phase: str) -> None:
        if folder:
            folder.commit({"iteration": iteration, "phase": phase, "agents": list(network.recorded),
                           "samples": last["samples"], "steps": last["steps"], "orders": last["order"],
                           "states": last["state"]},
                          keep=o.keep == "all")

    last: dict[str, list] = {}
    turn = finished + 1
    if not finished:
        write(0, "initial", time.perf_counter(), {})
    elif o.training and phase == "merged" and finished < o.merg_itr:  # a finished run that goes on
        train_phase(finished)
        commit(finished, "trained")
    for iteration in progress(range(finished + 1, o.merg_itr + 1), "iterations"):
        if iteration >= turn:
            turn = network.turn(iteration, fleet.weights)
        if iteration < turn:
            continue  # the others have merged without this agent
        merge_phase(iteration)
        if train := o.training and iteration < o.merg_itr:
            train_phase(iteration)
        commit(iteration, "trained" if train else "merged")


def run(o: Namespace, network: Network, device: torch.device, command: str) -> Path:
    """All of it, in every process alike; the writer writes."""

    def prepare() -> tuple[dict, Fleet]:
        ckp, made_with, loaded = settle_options(o, network.agents)
        topology = topology_to_merge_over(o)
        reads_others = o.opt != ALONE and o.match_data == "all"
        dataset, train_parts, test_parts = load_agents_data(o, device, None if reads_others else network.agents)
        states = {i: {k: t.to(device) for k, t in state.items()}
                  for i, state in initial_states(o, dataset, ckp, loaded, network.agents).items()}
        fleet = Fleet(o, topology, network, LocalTrainer(new_model(o, dataset), dataset, o, device), train_parts,
                      test_parts, states, samples=dict.fromkeys(states, 0), steps=dict.fromkeys(states, 0))
        fleet.spec  # noqa: B018 - a model that can't be permuted at all is an error now, not after hours
        return made_with, fleet

    def open_folder() -> RunFolder | None:
        return open_run(o, network, path, config | circumstances(command), matter, start=o.merg_itr_init)

    made_with, fleet = network.together(prepare)
    digests = network.collect({i: digest(state) for i, state in fleet.states.items()})
    path, config, matter = the_run(o, made_with, fleet.topology)
    config["first_models"] = digest_of_all(digests)
    name = name_for_others(o, path, fleet.topology)
    if o.agent is not None:
        path = path / f"agent_{o.agent}"
    neighbours = [j for i in network.agents for j in range(o.num_models)
                  if fleet.topology.connectivity[i, j] or fleet.topology.connectivity[j, i]]
    begun = (path / "metrics.csv").exists()
    with contextlib.ExitStack() as stack:
        stack.enter_context(network.meet(name, neighbours, o.merg_itr, fleet.trainer.model.state_dict(), o.wire,
                                         fresh=not begun, overwrite=o.overwrite))
        folder = network.together(open_folder)
        stack.enter_context(folder or contextlib.nullcontext())
        if folder:
            say_what_is_unusual(fleet)
        # Drops what a longer run had begun.
        saved = network.together(lambda: shares(network, folder.load() if folder else None))
        last = network.deal(saved)
        finished, phase = network.together(lambda: take_up(fleet, last))
        if finished < o.merg_itr:
            if finished and folder:
                print(f"continuing after iteration {finished} of {o.merg_itr}")
            merge_and_train(fleet, folder, finished, phase)
        elif folder:
            print(f"finished before: {finished} iterations are done (--overwrite starts afresh)")
    return folder.path if folder else Path()


def say_what_is_unusual(fleet: Fleet) -> None:
    o = fleet.o
    if not fleet.topology.is_connected and o.topology != "disconnected":
        print(f"note: --topology {o.topology} is not connected: its parts never hear of each other")
    if fleet.spec and fleet.spec.stuck:
        name, reason = next(iter(fleet.spec.stuck.items()))
        print(f"note: {o.opt} averages the units of {len(fleet.spec.stuck)} layers as they are, because they can't be "
              f"permuted: {name} ({reason}){', ...' if len(fleet.spec.stuck) > 1 else ''}")


def take_up(fleet: Fleet, last: dict[int, dict | None]) -> tuple[int, str]:
    """Bring this process's agents to where each was last; the iteration they have finished, and how it ended."""
    finished, phase = 0, "trained"
    for i, share in last.items():
        if share is not None:
            check_state(share["state"], fleet.trainer.model.state_dict(), f"agent {i}'s model in the run's state.pt")
            fleet.states[i] = {k: t.to(fleet.trainer.device) for k, t in share["state"].items()}
            fleet.samples[i], fleet.steps[i] = share["sample"], share["step"]
            if share.get("order", -1) >= 0:
                fleet.orders[i] = share["order"]
            finished, phase = share["iteration"], share["phase"]
    return finished, phase


def settle_processes(o: Namespace) -> None:
    """Check which of the ways to be in several processes was asked for."""
    alone = o.agent is not None
    if is_launched() and not is_sibling() and (alone or o.processes or o.workers):
        raise ValueError("--agent, --processes and --workers are for a command that nobody has launched as a group")
    if o.merg_itr_init and (alone or o.processes):
        raise ValueError(f"--merg_itr_init {o.merg_itr_init}: agents on their own can't go back, as the others don't")
    if not (o.timeout or alone or o.processes):
        raise ValueError("--timeout 0 is for agents on their own: a group has to wait for one another")
    if o.workers and (alone or o.processes):
        raise ValueError("--workers are of one run: leave it out with --agent and --processes")
    if alone and not o.exchange:
        raise ValueError("--agent needs --exchange folder:PATH, where it finds its neighbours' models")
    if alone and o.agent >= o.num_models:
        raise ValueError(f"--agent {o.agent}: the {o.num_models} agents (--num_models) are 0 to {o.num_models - 1}")
    if o.processes and o.processes != o.num_models:
        raise ValueError(f"--processes {o.processes}: every agent is a process of its own, so give {o.num_models}, or "
                         "another --num_models; --workers deals agents out to fewer processes")
    for option, default in {"exchange": None, "exchange_key": None, "staleness": 0,
                            "max_distance": usual(MAIN)["max_distance"]}.items():
        if getattr(o, option) != default and not (alone or o.processes):
            raise ValueError(f"--{option} is for agents on their own: give --agent or --processes as well")
    o.resume = o.resume or (alone and not o.overwrite)  # an agent comes back by the same command


def name_for_others(o: Namespace, path: Path, topology: Topology) -> str:
    """What agents must agree on to be of one run: all that changes its results."""
    return repr((path.parts[len(Path(o.results_dir).parts):], matrices(o.topology, topology).get("pi")))


def run_agents(o: Namespace, argv: Sequence[str]) -> Path:
    """--processes: start every agent as a process of its own, and put together what they leave."""
    made_with = settle_options(o, [0])[1]
    topology = topology_to_merge_over(o)
    path = run_folder(vars(o), options_that_matter(o, made_with))
    exchange = Path(o.exchange or path / "exchange")
    name = name_for_others(o, path, topology)
    agents = range(o.num_models)
    with claim(path):
        if o.overwrite:
            clear(path)
        if not any((path / f"agent_{i}").exists() for i in agents):  # then it is of a run that was deleted
            forget(exchange, name)
        processes = [start(Path(__file__), [*argv, "--processes=0", f"--agent={i}", f"--exchange=folder:{exchange}",
                                            "--overwrite=False"],
                           {"OMP_NUM_THREADS": str(threads_each(o.num_models)), "TQDM_DISABLE": "1"}) for i in agents]
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


def number_of_workers(o: Namespace) -> int:
    """How many processes of this machine to deal the agents out to."""
    if is_launched() or o.agent is not None or o.processes:
        return 1
    on_cpu = o.device == "cpu" or (o.device == "auto" and pick_device("auto").type == "cpu")
    return min(o.workers or (torch.get_num_threads() if o.training and on_cpu else 1), o.num_models)


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    follow_parent()
    argv = sys.argv[1:] if argv is None else argv
    o = parse_once(main_parser(), argv)
    command = shlex.join(["main.py", *argv])

    def run_in_group() -> Path:
        device = pick_device(local_device(o.device))
        with connect(o.num_models, device, o.backend, o.timeout) as network:
            return run(o, network, device, command)

    def run_here() -> Path:
        settle_processes(o)
        key = read_key(Path(o.exchange_key)) if o.exchange_key else None
        if o.processes:
            return run_agents(o, argv)
        if o.agent is not None:
            network = SharedFolder(o.agent, Path(o.exchange), o.timeout, o.staleness, key)
            return run(o, network, pick_device(o.device), command)
        if workers == 1:
            return run_in_group()
        checked = copy.copy(o)  # what is wrong is better said before they are started
        settle_options(checked, [0])
        topology_to_merge_over(checked)
        return with_workers(workers, Path(__file__), argv, run_in_group)

    workers = number_of_workers(o)
    flag = "" if o.agent is not None or o.processes else " with --resume"
    code = run_script(run_here, "results", f"give the same command{flag} (without --overwrite)",
                      rank() if o.agent is None else int(is_sibling()))
    if code:
        leave(code, at_once=workers > 1 or is_sibling())
    return code


if __name__ == "__main__":
    sys.exit(main())
