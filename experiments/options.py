"""Every command-line option of the scripts, in one place, so that one flag means one thing everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data.datasets import DATASETS
from data.partition import PARTITIONS
from experiments.parsing import exchange, flag, number, parser, path
from merging import METHODS
from merging.activation_matching import PRIORS
from models import MODELS
from network.processes import BACKENDS, STARTING
from network.topology import DIRECTED, EXPS, TOPOLOGIES
from network.wire import WIRES
from network.workers import launched_agents
from optimizers import BASELINES
from optimizers.cga import CGA_FORMS, CGA_SCOPES

MOST_AGENTS = 20_000  # a mixing matrix of them takes 3.2 GB


def data_options(p: argparse.ArgumentParser, inherit: bool) -> None:
    """What the agents see. With `inherit` the partition defaults to what the checkpoint folder was made with."""
    said = " (default: what the checkpoint was made with, else %s)" if inherit else " (default: %s)"
    g = p.add_argument_group("data")
    g.add_argument("--dataset", "--data", choices=sorted(DATASETS), default="digits", help="data set")
    g.add_argument("--num_models", type=number(int, 1, MOST_AGENTS), metavar="N",
                   default=(inherit and launched_agents()) or 5,
                   help="number of agents" + "; in a group that torchrun launches, as many as processes" * inherit)
    g.add_argument("--data_dist", choices=list(PARTITIONS), default=None,
                   help="how the data is dealt to the agents" + said % "iid")
    g.add_argument("--alpha", type=number(float, 0, strict=True), default=None,
                   help="concentration of --data_dist=dirichlet; small = each agent has few classes" + said % "0.5")
    g.add_argument("--partition_seed", type=number(int, 0), default=None,
                   help="seed of the partition" + said % "the run's seed")
    g.add_argument("--phase", choices=["pretrain", "finetune"], default="finetune" if inherit else "pretrain",
                   help="which half of the data --data_dist=non-iid-PF deals")
    g.add_argument("--train_samples", type=number(int, 0), default=None,
                   help="use only a class-balanced slice of the training images; 0 = all" + said % "0")
    g.add_argument("--test_samples", type=number(int, 0), default=0,
                   help="evaluate on a class-balanced slice of the test images only; 0 = all")
    g.add_argument("--holdout", type=number(int, 0), default=None, metavar="N",
                   help="keep N training images from training and evaluate on them instead of the test set, to choose "
                        "settings by" + said % "0")
    g.add_argument("--data_dir", type=path, default="datasets", metavar="DIR", help="where the data sets are")
    g.add_argument("--imgntdir", type=path, default=None, metavar="DIR", help="a folder in Tiny ImageNet's layout")


def model_options(p: argparse.ArgumentParser, inherit: bool) -> None:
    g = p.add_argument_group("model")
    g.add_argument("--model", default="resnet20", metavar="NAME",
                   help=f"architecture: {', '.join(MODELS)} or tv:NAME for any torchvision classifier")
    g.add_argument("--width_multiplier", type=number(int, 1, 10**6), default=None, metavar="W",
                   help="width of resnet20 and vgg16; 8 is the paper's"
                        + (" (default: the checkpoint's, else 8)" if inherit else " (default: 8)"))


def training_options(p: argparse.ArgumentParser, epochs: int, epochs_help: str, optim: Sequence[str]) -> None:
    """`optim`: the option strings that name the optimiser; train.py has the alias --opt, main.py has not."""
    g = p.add_argument_group("local training")
    g.add_argument("--epochs", type=number(int, 0), default=epochs, help=epochs_help)
    g.add_argument("--batch_size", type=number(int, 1), default=100, help="images per step")
    g.add_argument(*optim, dest="optim", choices=["adam", "sgd"], default="adam", help="optimiser")
    g.add_argument("--lr", type=number(float, 0, strict=True), default=1e-3, help="learning rate")
    g.add_argument("--momentum", type=number(float, 0, 1), default=0.0, help="momentum of --optim=sgd")
    g.add_argument("--weight_decay", type=number(float, 0), default=0.0, help="L2 penalty")


def machine_options(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    g.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed precision in training")
    flag(g, "--compile", help="run the model through torch.compile")
    g.add_argument("--config", type=path, default=None, metavar="FILE.yaml",
                   help="read options from a file; flags override it")
    flag(g, "--overwrite", help="start afresh, deleting what this very command made before")


def train_parser() -> argparse.ArgumentParser:
    p = parser("train", "Train every agent on its own part of the data and keep the checkpoints.\n"
                        "An interrupted run continues when the same command is given again.",
               "python -m train --dataset=cifar100 --model=resnet20 --num_models=5 --data_dist=iid --random_seed=0")
    data_options(p, inherit=False)
    model_options(p, inherit=False)
    training_options(p, 100, "epochs of training", ["--optim", "--opt"])
    g = p.add_argument_group("run")
    flag(g, "--init_seed", help="the same initialisation for all agents")
    g.add_argument("--random_seed", "--seed", dest="seed", type=number(int, 0), default=0, help="seed of the run")
    g.add_argument("--save_folder", type=path, default="checkpoint", metavar="DIR", help="where the checkpoints go")
    machine_options(p)
    return p


def topology_options(g) -> None:
    g.add_argument("--exp", type=number(int, 0), choices=sorted(EXPS), default=None,
                   help="topology by number: " + ", ".join(f"{k} {v}" for k, v in EXPS.items()))
    g.add_argument("--topology", type=path, default=None, metavar="NAME|FILE.json|FOLDER",
                   help=f"{', '.join([*TOPOLOGIES, *DIRECTED])}, a JSON file with connectivity and pi, or a folder of "
                        "such files that take turns (default: fully_connected)")


def start_options(g) -> None:
    """Where the agents begin."""
    g.add_argument("--ckp", type=path, default=None, metavar="DIR",
                   help="folder of the agents' checkpoints, made by train.py")
    flag(g, "--randominit", help="start from random models instead of --ckp")
    flag(g, "--diffinit", help="with --randominit: a different random model for every agent")
    g.add_argument("--seed", "--random_seed", dest="seed", type=number(int, 0), default=0, help="seed of the run")


def group_options(g, timeout: float, waits: str, strict: bool = True) -> None:
    """How launched processes reach each other; `strict`: they have to wait at all."""
    g.add_argument("--backend", choices=BACKENDS, default="auto",
                   help="what carries the messages: nccl where every process has a GPU of its own, else gloo")
    g.add_argument("--timeout", type=number(float, 0, strict=strict), default=timeout, metavar="SECONDS",
                   help=f"{waits} (at the start of a group at least {STARTING:g} s)")
    g.add_argument("--local-rank", "--local_rank", type=number(int, 0), default=None, help=argparse.SUPPRESS)


def main_parser() -> argparse.ArgumentParser:
    p = parser("main", "Merge the agents' models over a topology and train again, iteration by iteration.\n"
                       "All agents in this process or dealt out to several (--workers, torchrun), with the same "
                       "figures,\nor each on its own (--agent, --exchange), where any may stop and come back.",
               "python -m main --dataset=digits --num_models=5 --ckp=CHECKPOINT_FOLDER --opt=DIMAT --exp=2 "
               "--merg_itr=8 --training --epochs=2")
    g = p.add_argument_group("algorithm")
    g.add_argument("--opt", choices=[*METHODS, "NONE"], default="DIMAT",
                   help="DIMAT: activation matching, in every merge anew; COMMON: agents align themselves to one "
                        "another once, by activations, and from then on average; C2M3: activation matching of all "
                        "models that an agent merges at once, without contradictions; WM: weight matching; WA: plain "
                        "averaging; NONE: agents alone, which re-estimate BatchNorm on their own images")
    topology_options(g)
    g.add_argument("--merg_itr", type=number(int, 1), default=100, help="merge iterations in all")
    g.add_argument("--merg_itr_init", type=number(int, 0), default=0,
                   help="start after this many iterations: the last finished one, or one kept by --keep all")
    flag(g, "--training", help="train locally after each merge but the last")
    start_options(g)
    data_options(p, inherit=True)
    model_options(p, inherit=True)
    training_options(p, 2, "local epochs of an iteration", ["--optim"])
    g = p.add_argument_group("matching")
    g.add_argument("--match_data", choices=["all", "local"], default="all",
                   help="whose training images matching and BatchNorm re-estimation read: every agent's, as in the "
                        "paper, or only the merging agent's own")
    g.add_argument("--match_samples", type=number(int, 0), default=1000,
                   help="how many of these images, class-balanced where they are all agents'; 0 = all, as in the paper")
    flag(g, "--match_augment", help="augment them, for all models alike")
    g.add_argument("--match_at", choices=["last", "all"], default="all",
                   help="read a group's features at the input of its last consumer, as in the paper, or sum over all")
    g.add_argument("--match_memory", type=number(float, 0, strict=True), default=4.0, metavar="GB",
                   help="most memory for the correlation matrices; beyond it the edges are taken in blocks (but by "
                        "C2M3, which holds all pairs)")
    g.add_argument("--match_prior", choices=list(PRIORS), default="none",
                   help="DIMAT and COMMON: identity leaves units where they are unless the gain in correlation exceeds "
                        "the noise of its estimate (for agents that began alike)")
    g.add_argument("--root", type=number(int, 0), default=None, metavar="I",
                   help="COMMON: the agent whose order of units the others take (default, and where it is down or in "
                        "another part: the centre of the graph)")
    g.add_argument("--bn_reset", choices=["none", "after", "both", "repair"], default="both",
                   help="re-estimate BatchNorm statistics of the merged models, or of the agents' before as well; "
                        "repair: both, and layers without BatchNorm are rescaled to their parents' statistics (REPAIR)")
    g.add_argument("--robust", choices=["none", "clip", "trimmed", "median"], default="none",
                   help="average so that some hostile models of several can't move the result far: clip what a "
                        "neighbour's model differs by from one's own (self-centred clipping), or take each "
                        "coordinate's trimmed mean or median; all N merge for themselves then, also fully_connected")
    g = p.add_argument_group("processes")
    g.add_argument("--workers", type=number(int, 1), default=None, metavar="N",
                   help="deal the agents out to N processes, which share this machine's threads; the data set and "
                        "--match_memory are there for each (default: with --training on a CPU one for each thread, at "
                        "most one for each agent; else 1)")
    g.add_argument("--processes", type=number(int, 0), default=None, metavar="N",
                   help="start each of the N agents as a process of its own, as with --agent, on this machine")
    g.add_argument("--agent", type=number(int, 0), default=None, metavar="I",
                   help="be agent I alone: others may be started anywhere, stop, and come back by the same command")
    g.add_argument("--exchange", type=exchange, default=None, metavar="folder:PATH",
                   help="where agents on their own leave their models for their neighbours: a folder that all of them "
                        "see (default with --processes: in the run folder)")
    g.add_argument("--exchange_key", type=path, default=None, metavar="FILE",
                   help="a secret that all agents on their own share, 16 bytes or more: models are signed with it, and "
                        "others are refused. Without it nobody publishes as one of the agents; who has it can as any")
    g.add_argument("--max_distance", type=number(float, 0), default=10.0, metavar="D",
                   help="agents on their own: leave out a neighbour's model whose parameters, in whatever order of "
                        "units, are farther away than D times the norm of one's own; 0 = take any (ResNet-20, digits: "
                        "neighbours 0.03, an untrained from a trained model 0.45, one with its signs flipped 1.7)")
    g.add_argument("--staleness", type=number(int, 0), default=0, metavar="K",
                   help="agents on their own: use the last model of a neighbour that isn't there, if it is at most K "
                        "iterations old")
    g.add_argument("--wire", choices=WIRES, default=WIRES[0],
                   help="how models travel: as they are, or their kernels and matrices in fewer bits")
    group_options(g, 1800.0, "how long to wait for a neighbour, whose local epochs may take so much longer; "
                  "then a group of processes gives up, and an agent on its own merges with those who are there",
                  strict=False)
    g = p.add_argument_group("simulated faults")
    g.add_argument("--link_failure", type=number(float, 0, 1), default=0.0, metavar="P",
                   help="chance that an edge carries nothing in an iteration")
    g.add_argument("--agent_failure", type=number(float, 0, 1), default=0.0, metavar="P",
                   help="chance that an agent neither merges nor trains in an iteration")
    g = p.add_argument_group("run")
    g.add_argument("--results_dir", type=path, default="results", metavar="DIR", help="where the results go")
    flag(g, "--tensorboard", help="write live curves into the run folder (needs the package tensorboard)")
    flag(g, "--resume", help="continue an interrupted run (a group that torchrun restarts does so by itself)")
    g.add_argument("--keep", choices=["last", "all"], default="last",
                   help="keep the state of the last iteration, or of each (for --merg_itr_init)")
    machine_options(p)
    return p


def base_lines_parser() -> argparse.ArgumentParser:
    p = parser("base_lines", "Train the agents with a gradient-based method that mixes their models in every step.\n"
                             "All agents in this process or, under torchrun, each in a process of its own; the figures "
                             "are the same.",
               "torchrun --standalone --nproc_per_node=5 base_lines.py --dataset=digits --num_models=5 --opt=CDSGD "
               "--exp=2 --randominit=True --epochs=10")
    g = p.add_argument_group("algorithm")
    g.add_argument("--opt", choices=list(BASELINES), default="CDSGD",
                   help="CDSGD: combine, then adapt; CDMSGD: with momentum; DPSGD: adapt, then combine; SGP: "
                        "stochastic gradient push; CGA: cross-gradient aggregation")
    topology_options(g)
    g.add_argument("--cga_form", choices=CGA_FORMS, default=None,
                   help="CGA's projection and momentum: the paper's, or the published code's (rows weighted by pi, "
                        "margin 0.5, Nesterov-like) (default: paper)")
    g.add_argument("--cga_scope", choices=CGA_SCOPES, default=None,
                   help="CGA projects the whole gradient or each tensor's (default: model; authors' form: tensor)")
    flag(g, "--mix_buffers", default=True, help="mix BatchNorm's statistics like the parameters")
    g.add_argument("--eval_bn", choices=["running", "local", "all"], default="running",
                   help="evaluate with BatchNorm's running statistics or, as merged models have them, with statistics "
                        "re-estimated on the agent's own or all agents' training images; training keeps the running "
                        "ones")
    g.add_argument("--bn_samples", type=number(int, 0), default=1000,
                   help="how many of these images, class-balanced where they are all agents'; 0 = all")
    start_options(g)
    data_options(p, inherit=True)
    model_options(p, inherit=True)
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=number(int, 1), default=200, help="epochs in all")
    g.add_argument("--num_epochs", type=number(int, 1), default=2, metavar="E", help="epochs between two evaluations")
    g.add_argument("--batch_size", type=number(int, 1), default=100, help="images of an agent in a step")
    g.add_argument("--lr", type=number(float, 0, strict=True), default=0.01, help="learning rate of the first epoch")
    g.add_argument("--lr_decay", type=number(float, 0, strict=True), default=0.981,
                   help="what the learning rate is multiplied with after each epoch")
    g.add_argument("--momentum", type=number(float, 0, 1), default=None,
                   help="momentum of CDMSGD and CGA (default: 0.9)")
    g.add_argument("--weight_decay", type=number(float, 0), default=0.0, help="L2 penalty")
    g = p.add_argument_group("run")
    g.add_argument("--results_dir", type=path, default="results", metavar="DIR", help="where the results go")
    flag(g, "--tensorboard", help="write live curves into the run folder (needs the package tensorboard)")
    flag(g, "--resume", help="continue an interrupted run (a group that torchrun restarts does so by itself)")
    g = p.add_argument_group("processes")
    group_options(g, 300.0, "how long to wait for a neighbour before giving up")
    machine_options(p)
    return p
