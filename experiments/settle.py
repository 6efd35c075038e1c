"""What main.py and base_lines.py are asked for: where the agents start, and what of that changes a run's results."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from experiments.checkpoints import describe, digest_in, digest_of_all, inherit, load_model, model_files
from experiments.options import Command, train_parser
from experiments.run_folder import RunFolder, circumstances, contradictions, how_far
from experiments.trainings import fill_defaults
from models import infer_width
from models.training import LOSSES
from network.processes import Network, is_launched, is_restart, launch
from network.topology import DIRECTED, EXPS, TOPOLOGIES, Topology
from storage.files import load_yaml


def settle_options(o: Command, agents: Collection[int]) -> tuple[dict, dict[int, Path]]:
    """Fill in what follows from the checkpoint, and check what contradicts.

    Returns its description and the files with the models of `agents`.
    """
    if o["exp"] is not None and o["topology"] is not None:
        raise ValueError(f"--exp {o['exp']} and --topology {o['topology']} both name the topology: give one")
    o["topology"] = o["topology"] or EXPS[o["exp"] or 1]
    made_with, files, ckp = {}, {}, Path(o["ckp"]) if o["ckp"] is not None else None
    if o["merg_itr_init"] >= o["merg_itr"]:
        raise ValueError(f"--merg_itr_init {o['merg_itr_init']} leaves nothing to do of --merg_itr {o['merg_itr']}")
    if o["diffinit"] and not o["randominit"]:
        raise ValueError("--diffinit belongs to --randominit: the models come from --ckp here")
    if ckp is None and not o["randominit"]:
        raise ValueError("--ckp is missing: give the folder that train.py printed, or --randominit")
    if ckp is not None:  # random models too learn on the data that the checkpoint's would
        made_with = describe(ckp, train_parser())
        inherit(o, made_with, f"--ckp {ckp}")
        if o["randominit"] and made_with.get("num_models", o["num_models"]) != o["num_models"]:
            raise ValueError(f"--num_models {o['num_models']}: {ckp} deals its data to {made_with['num_models']} "
                             "agents")
        if o["partition_seed"] is None:
            o["partition_seed"] = made_with.get("seed")
        if not o["randominit"]:
            files = model_files(ckp, o["num_models"], agents)
            if o["width_multiplier"] is None:
                o["width_multiplier"] = infer_width(o["model"], load_model(next(iter(files.values()))))
    fill_defaults(o)
    if made_with.get("partition_digest") not in (None, o.get("partition_digest")):
        raise ValueError(f"--partition_file {o['partition_file']} has changed since {ckp} was made: restore it")
    return made_with, files


def pretraining(o: Command, made_with: dict) -> dict:
    """How the first models were made, where they are no random ones."""
    return {} if o["randominit"] else {
        "pretrain_epochs": made_with.get("epochs"),
        "pretrain_seed": made_with["seed"] if made_with.get("seed") not in (None, o["seed"]) else None,
        "pretrain_init": "same" if made_with.get("init_seed") else None,
        "pretrain_loss": loss if (loss := made_with.get("loss") or LOSSES[0]) != (
            (o["training"] and o["loss"]) or LOSSES[0]) else None,
    }


def without_say(matter: dict) -> set[str]:
    return {key for key, value in matter.items() if value is None}


def completed(path: Path, config: dict, matter: dict, files: dict[int, Path]) -> tuple[Path, int] | None:
    """The folder and its last iteration, if it holds just this run, from the models in `files` on, and nothing is left
    to do; else None."""
    old, metrics = load_yaml(path / "config.yaml"), path / "metrics.csv"
    if not (old and metrics.exists()) or contradictions(old, config, without_say(matter)):
        return None
    iteration, metrics_bytes = how_far(path)
    if iteration < config["merg_itr"] or metrics_bytes != metrics.stat().st_size:
        return None
    if files:
        begun_with = {"first_models": digest_of_all({i: digest_in(file) for i, file in files.items()})}
        same = not contradictions(old, begun_with, ())
    else:  # random models are the same as then if torch is
        same = old.get("versions") == circumstances("")["versions"]
    return (path, iteration) if same else None


def matrices(name: str, topology: Topology) -> dict[str, list]:
    """For config.yaml, the mixing matrices of a topology that was read from files, as these may change."""
    if name in TOPOLOGIES | DIRECTED:
        return {}
    return {"pi": [pi.tolist() for pi in topology.schedule] or topology.pi.tolist()}


def open_run(o: Command, network: Network, command: str, path: Path, config: dict, matter: dict,
             start: int = 0) -> RunFolder | None:
    """The run folder, at the writer. A group that its launcher has started again continues by itself."""
    if not network.is_writer:
        return None
    config |= circumstances(command) | {"launch": launch() if is_launched() else None}
    goes_on = is_restart() and load_yaml(path / "config.yaml").get("launch") == config["launch"]
    return RunFolder(path, config, silent=without_say(matter), resume=o["resume"] or goes_on, start=start,
                     overwrite=o["overwrite"] and not goes_on, tensorboard=o["tensorboard"])
