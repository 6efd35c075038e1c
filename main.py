"""Agents merge over a topology and train again, iteration by iteration. `python -m main --help` explains."""

from __future__ import annotations

import contextlib
import copy
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.datasets import DATASETS
from data.partition import PARTITIONS
from fleet import Fleet
from lifecycle import (
    initial_states,
    is_complete,
    matrices,
    open_run,
    record,
    settle_options,
    shares,
    start_that_matters,
)
from merging import METHODS
from merging.activation_matching import PRIORS
from models import MODELS
from train import LocalTrainer, load_agents_data, new_model
from utils import training
from utils.checkpoint import check_state, digest, digest_of_all
from utils.collect import collect
from utils.distributed import BACKENDS, Network, connect, is_launched, leave, local_device, rank
from utils.exchange import SharedFolder, forget, read_key
from utils.files import REFERENCE, circumstances, claim, clear
from utils.memory import keep_freed_memory
from utils.options import main_parser, parse_once, pick_device
from utils.progress import progress
from utils.results import RunFolder, run_folder
from utils.runs import ALONE, LOCAL_TRAINING
from utils.scripts import run_script
from utils.siblings import end, follow_parent, is_sibling, start, threads_each, wait_for_all, with_workers
from utils.topology import DIRECTED, EXPS, TOPOLOGIES, Topology, make_topology
from utils.wire import WIRES


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


def options_that_matter(o: Namespace, made_with: dict) -> dict:
    """What changes this run's results and is not a level of its path already; None where it has no say."""
    merges = o.opt != ALONE
    aligns = merges and METHODS[o.opt].aligned
    matches = aligns or (merges and METHODS[o.opt].reads_images)
    reads = matches or o.bn_reset != "none"
    trains = {} if o.training else dict.fromkeys(LOCAL_TRAINING)
    return vars(o) | trains | {
        "match_data": o.match_data if merges and reads else None,
        "match_samples": o.match_samples if reads else None,
        "match_augment": o.match_augment if reads else None,
        "match_at": o.match_at if matches else None,
        "match_prior": o.match_prior if o.opt == "DIMAT" or aligns else None,
        "wire": o.wire if merges else None,
        "link_failure": o.link_failure if merges else None,
        "robust": o.robust if merges else None,
        "max_distance": o.max_distance if merges and (o.agent is not None or o.processes) else None,
        "exchanged_by": None if o.agent is None and not o.processes else "folder",
    } | start_that_matters(o, made_with)


def the_run(o: Namespace, made_with: dict, topology: Topology) -> tuple[Path, dict, dict]:
    """Where this run is written, what its config.yaml says, and which of it matters."""
    matter = options_that_matter(o, made_with)
    config = vars(o) | {"exchanged_by": matter["exchanged_by"]} | matrices(o.topology, topology)
    return run_folder(vars(o), matter), config, matter


def is_finished(o: Namespace) -> bool:
    """Whether a run of these options has nothing left to do, so that a sweep needn't start it."""
    if o.overwrite or o.merg_itr_init:
        return False
    _, made_with, loaded = settle_options(o, range(o.num_models))
    return is_complete(*the_run(o, made_with, topology_to_merge_over(o)), loaded)


def topology_to_merge_over(o: Namespace) -> Topology:
    topology = make_topology(o.topology, o.num_models, seed=o.seed)
    settle_alignment(o, topology)
    settle_averaging(o)
    if not topology.is_doubly_stochastic:
        raise ValueError(f"--topology {o.topology} has one-way edges whose rows don't sum to 1: agents that merge need "
                         "what they take to add up to one model")
    return topology


def settle_averaging(o: Namespace) -> None:
    if o.robust != "none" and o.bn_reset == "repair":
        raise ValueError("--bn_reset repair takes statistics of every model, hostile ones too: leave it out with "
                         f"--robust {o.robust}")


def settle_alignment(o: Namespace, topology: Topology) -> None:
    """What --root and --align ask for must be there; methods that don't align themselves have neither."""
    if o.opt == ALONE or not METHODS[o.opt].aligned:
        o.align = o.align_every = o.root = None
        return
    if o.root is not None and o.root >= o.num_models:
        raise ValueError(f"--root {o.root}: the {o.num_models} agents (--num_models) are 0 to {o.num_models - 1}")
    if o.align == "at_once":
        together = topology.connectivity.sum() == o.num_models * (o.num_models - 1) and topology.draw is None
        if not together or topology.schedule or o.match_data != "all":
            raise ValueError("--align at_once compares all models in every agent, on the same images: it needs "
                             "--topology fully_connected and --match_data all (--align in_turn does without)")
        if o.match_prior != "none":
            raise ValueError(f"--align at_once knows no --match_prior {o.match_prior}: --align in_turn does")
        if o.agent is not None or o.processes or o.agent_failure or o.link_failure:
            raise ValueError("--align at_once needs all agents to be there: --align in_turn does without")


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


def make_parser() -> ArgumentParser:
    return main_parser(DATASETS, MODELS, PARTITIONS, [*METHODS, ALONE], [*TOPOLOGIES, *DIRECTED], EXPS, PRIORS, WIRES,
                       BACKENDS)


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
    for option, usual in {"exchange": None, "exchange_key": None, "staleness": 0,
                          "max_distance": REFERENCE["max_distance"]}.items():
        if getattr(o, option) != usual and not (alone or o.processes):
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
    o = parse_once(make_parser(), argv)
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
