"""A run of main.py: its options settled, where it is written, and whether it is finished."""

from __future__ import annotations

from pathlib import Path

from experiments.options import ALONE, Command, silent
from experiments.run_folder import run_folder
from experiments.settle import completed, matrices, pretraining, settle_options
from merging import METHODS
from network.topology import Topology, make_topology


def options_that_matter(o: Command, made_with: dict) -> dict:
    """What changes this run's results and is not a level of its path already; None where it has no say."""
    folder = None if o["agent"] is None and not o["processes"] else "folder"
    return o | {"exchanged_by": folder} | dict.fromkeys(silent(o)) | pretraining(o, made_with)


def the_run(o: Command, made_with: dict, topology: Topology) -> tuple[Path, dict, dict]:
    """Where this run is written, what its config.yaml says, and which of it matters."""
    matter = options_that_matter(o, made_with)
    config = o | {"exchanged_by": matter["exchanged_by"]} | matrices(o["topology"], topology)
    return run_folder(o, matter), config, matter


def finished(o: Command) -> tuple[Path, int] | None:
    """The folder and the last iteration of a run of these options that has nothing left to do. No image is read."""
    o = dict(o)  # what is settled here is settled once more where the run begins
    if o["overwrite"] or o["merg_itr_init"]:
        return None
    made_with, files = settle_options(o, range(o["num_models"]))
    return completed(*the_run(o, made_with, topology_to_merge_over(o)), files)


def topology_to_merge_over(o: Command) -> Topology:
    topology = make_topology(o["topology"], o["num_models"], seed=o["seed"])
    settle_length(o)
    settle_training(o)
    settle_alignment(o)
    settle_averaging(o)
    settle_correction(o)
    if not topology.is_doubly_stochastic:
        raise ValueError(f"--topology {o['topology']} has one-way edges whose rows don't sum to 1: agents that merge "
                         "need what they take to add up to one model")
    return topology


def settle_length(o: Command) -> None:
    """`train_itr`: the last iteration that has training; None: the one before the last, however long the run is."""
    last, merges = o["last_merges"], o["merg_itr"]
    if last > 1 and not o["training"]:
        raise ValueError(f"--last_merges {last}: there is no training anyway: leave it out, or add --training")
    if last > 1 and last >= merges:
        raise ValueError(f"--last_merges {last} leaves no training between the merges of --merg_itr {merges}")
    if o["average_last"] and (last < 2 or o["opt"] == ALONE):
        what = ("a merge has to follow the average: add --last_merges=2 or more, with --training" if o["opt"] != ALONE
                else f"it is about merges, which --opt={ALONE} has none of")
        raise ValueError(f"--average_last {o['average_last']:g}: {what}; or leave it out (0)")
    o["train_itr"] = merges - last if last > 1 else None


def settle_training(o: Command) -> None:
    if o["train_at_once"] > 1 and (o["compile"] or o["amp"] == "fp16"):
        other = "--compile" if o["compile"] else "--amp fp16"
        raise ValueError(f"--train_at_once {o['train_at_once']} doesn't go with {other}: leave one of them out")


def settle_averaging(o: Command) -> None:
    if o["robust"] != "none" and o["bn_reset"] == "repair":
        raise ValueError("--bn_reset repair takes statistics of every model, hostile ones too: leave it out with "
                         f"--robust {o['robust']}")


def settle_correction(o: Command) -> None:
    """What a correction goes by is the weighted average of the models, and nothing else that is done in a merge."""
    if o["correction"] == "none":
        return
    if not o["training"]:
        raise ValueError(f"--correction {o['correction']} is about what agents learn between merges: add --training")
    if o["opt"] == ALONE:
        raise ValueError(f"--correction {o['correction']} is about merges: leave it out with --opt={ALONE}")
    if o["robust"] != "none" or o["bn_reset"] == "repair":
        other = f"--robust {o['robust']}" if o["robust"] != "none" else "--bn_reset repair"
        raise ValueError(f"--correction {o['correction']} takes a merge for the average of the models, which {other} "
                         "changes: leave one of them out")


def settle_alignment(o: Command) -> None:
    """The agent that --root names must be there; methods that don't align themselves have none."""
    if o["opt"] == ALONE or not METHODS[o["opt"]].aligned:
        o["root"] = None
    elif o["root"] is not None and o["root"] >= o["num_models"]:
        raise ValueError(f"--root {o['root']}: the {o['num_models']} agents (--num_models) are 0 to "
                         f"{o['num_models'] - 1}")
