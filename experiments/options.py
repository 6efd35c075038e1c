"""Every option of train.py, main.py and base_lines.py: one entry each, and all that follows from it.

Adding an option is adding an entry to OPTIONS. Command lines, the names of run folders, what makes two commands one
run, what a run inherits from its checkpoints, sweeps, tables and pictures read it there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.datasets import DATASETS, check_name
from data.partition import PARTITIONS, asks_for
from experiments.parsing import boolean, exchange, local_epochs, number, parser, path
from models import MODELS, NORMS
from models.training import LOSSES
from network.processes import BACKENDS, STARTING
from network.topology import DIRECTED, EXPS, TOPOLOGIES
from network.wire import WIRES
from network.workers import launched_agents

ALONE = "NONE"  # instead of a merge method: agents train and never merge
MOST_AGENTS = 20_000  # a mixing matrix of them takes 3.2 GB
NEVER = object()  # no level of a path
TRAIN, MAIN, BASE = SCRIPTS = ("train", "main", "base_lines")
RUNS = (MAIN, BASE)
GROUPS = ("algorithm", "data", "model", "training", "matching", "processes", "simulated faults", "run", "machine")
Settings = Mapping[str, Any]  # option -> value, of a command line or a config.yaml
Command = dict[str, Any]  # the same of a command, while it is settled


@dataclass(frozen=True)
class OneOf:
    """What registries offer when a command line is read: they may have grown."""

    names: Callable[[], Collection[str]]


@dataclass(frozen=True)
class Option:
    """An option. `kind`, `default`, `help`, `usual` and `flags` may be {script: ...} where the scripts differ.

    kind: an argparse type (`boolean` makes a switch), or the choices; default: of the scripts that have it; flags: its
    names but for --<name>.
    usual: the value that a run folder's path doesn't say, the paper's as a rule. It is frozen: a later change of a
    default never makes an old folder mean something else. NEVER: the path never says it.
    free: may differ between the sittings of one run; inherited: a run has it from its checkpoints, and where these
    don't say, it is `otherwise`; may_change: a run that was given it may differ from its checkpoints in it; handed_on:
    a sweep gives it to the runs of a pre-training, too; matters: whether it has a say, by the other options; short:
    its name in paths; derived: nobody gives it (any more), it follows from others; read: tables and pictures need it
    of every run ("always"), or of those that say it ("where said"); elsewhere: a picture tells it by a run's place, by
    its line or by another option; rare: only `--help all` shows it.
    """

    name: str
    group: str
    help: Any = ""
    kind: Any = str
    default: Any = None
    scripts: tuple[str, ...] = SCRIPTS
    metavar: str | None = None
    flags: Any = ()
    usual: Any = NEVER
    free: bool = False
    inherited: bool = False
    otherwise: str = ""
    may_change: bool = False
    handed_on: bool = False
    matters: Callable[[Settings], bool] = lambda o: True
    short: str = ""
    derived: bool = False
    read: str = ""
    elsewhere: bool = False
    rare: bool = False

    @property
    def fallback(self) -> Any:
        """`otherwise` as a value; None where it is said in words."""
        if self.kind is path or not callable(self.kind):
            return None if self.kind is path else self.otherwise
        try:
            return self.kind(self.otherwise)
        except argparse.ArgumentTypeError:
            return None

    def of(self, field: str, script: str) -> Any:
        """`kind`, `default`, ... in a script."""
        value = getattr(self, field)
        return value[script] if isinstance(value, dict) else value

    def could_be(self, value: Any, script: str) -> bool:
        """Whether a config.yaml can say so, by its type and range; names may be of what isn't registered any more."""
        parse = self.of("kind", script)
        kind = bool if parse is boolean else getattr(parse, "kind", str)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            return False
        try:
            return kind not in (int, float) or parse(str(value)) == value
        except argparse.ArgumentTypeError:
            return False


# When an option has a say. `o` may lack what is younger than a run.


def method(o: Settings):
    """The merge method of main.py; None for agents alone, and for one that isn't registered any more."""
    from merging import METHODS  # here: tables and pictures are asked for more often than this

    return METHODS.get(o["opt"])


def merges(o: Settings) -> bool:
    return o["opt"] != ALONE


def aligns(o: Settings) -> bool:
    way = method(o)
    return merges(o) and (way is None or way.aligned)


def matches(o: Settings) -> bool:
    """By activations: then it reads images to find what fits what."""
    way = method(o)
    return merges(o) and (way is None or way.aligned or way.reads_images)


def reads_images(o: Settings) -> bool:
    return is_baseline(o) or matches(o) or o["bn_reset"] != "none"


def weighs_units(o: Settings) -> bool:
    way = method(o)
    return aligns(o) or (way is not None and "prior" in way.option_names)


def trains(o: Settings) -> bool:
    return "training" not in o or bool(o["training"])


def merges_over_a_folder(o: Settings) -> bool:
    return merges(o) and bool(o.get("exchanged_by") or o.get("processes") or o.get("agent") is not None)


def deals_halves(o: Settings) -> bool:
    return o["data_dist"] == "non-iid-PF" and o["phase"] != ("finetune" if "opt" in o else "pretrain")


def deals_by_another_seed(o: Settings) -> bool:
    return o.get("partition_seed") not in (None, o["seed"])


def asked_for(name: str) -> Callable[[Settings], bool]:
    """Whether the partition asks for this option; one that isn't registered (any more) may."""
    return lambda o: o.get("data_dist") not in PARTITIONS or name in asks_for(o["data_dist"])


def is_baseline(o: Settings) -> bool:
    return "num_epochs" in o


def merge_methods() -> list[str]:
    from merging import METHODS

    return [*METHODS, ALONE]


def priors() -> list[str]:
    from merging.activation_matching import PRIORS

    return list(PRIORS)


def baselines() -> list[str]:
    from optimizers import BASELINES

    return list(BASELINES)


def corrections() -> list[str]:
    from optimizers.corrections import CORRECTIONS

    return ["none", *CORRECTIONS]


def data_set(text: str) -> str:
    try:
        return check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def cga_forms() -> list[str]:
    from optimizers.cga import CGA_FORMS

    return list(CGA_FORMS)


def cga_scopes() -> list[str]:
    from optimizers.cga import CGA_SCOPES

    return list(CGA_SCOPES)


COUNT, SHARE, POSITIVE = number(int, 0), number(float, 0, 1), number(float, 0, strict=True)
WAITS = {MAIN: "how long to wait for a neighbour, whose local epochs may take so much longer; then a group of "
               "processes gives up, and an agent on its own merges with those who are there",
         BASE: "how long to wait for a neighbour before giving up"}

# In the order in which paths name them.
OPTIONS = (
    Option("width_multiplier", "model", "width of resnet20 and vgg16; 8 is the paper's", number(int, 1, 10**6),
           metavar="W", usual=8, inherited=True, otherwise="8", handed_on=True, short="width"),
    Option("dataset", "data", f"{', '.join(DATASETS)}, folder:PATH of images by classes, FILE.npz, or tv:NAME of "
           "torchvision's classification sets", data_set, "digits", metavar="NAME", flags=("data",), handed_on=True,
           read="always", elsewhere=True),
    Option("num_models", "data", {TRAIN: "number of agents"} | dict.fromkeys(
        RUNS, "number of agents; in a group that torchrun launches, as many as processes"),
           number(int, 1, MOST_AGENTS), 5, metavar="N", handed_on=True, read="always", elsewhere=True),
    Option("data_dist", "data", "how the data is dealt to the agents", OneOf(lambda: list(PARTITIONS)), inherited=True,
           otherwise="iid", handed_on=True, read="always", elsewhere=True),
    Option("train_samples", "data", "use only a class-balanced slice of the training images; 0 = all", COUNT, usual=0,
           inherited=True, otherwise="0", handed_on=True),
    Option("test_samples", "data", "evaluate on a class-balanced slice of the test images only; 0 = all", COUNT, 0,
           usual=0, handed_on=True),
    Option("image_size", "data", "scale and crop the images of folder: and tv: to N x N; 0 = they are square and alike",
           COUNT, metavar="N", usual=0, inherited=True, otherwise="0", handed_on=True, rare=True),
    Option("holdout", "data", "keep N training images from training and evaluate on them instead of the test set, to "
           "choose settings by", COUNT, metavar="N", usual=0, inherited=True, otherwise="0", handed_on=True),
    Option("alpha", "data", "concentration of the Dirichlet partitions; small = each agent has few classes (quantity: "
           "sizes that are far apart)", POSITIVE, usual=None, inherited=True, otherwise="0.5", handed_on=True,
           matters=asked_for("alpha"),
           read="where said", elsewhere=True),
    Option("classes_per_agent", "data", "classes of each agent (--data_dist=classes) or shards of each (shards)",
           number(int, 1), metavar="K", usual=None, inherited=True, otherwise="2", handed_on=True,
           matters=asked_for("classes_per_agent")),
    Option("min_images", "data", "draw a Dirichlet partition anew until each agent has M images", number(int, 1),
           metavar="M", usual=1, inherited=True, otherwise="1", handed_on=True, matters=asked_for("min_images"),
           rare=True),
    Option("size_ratio", "data", "--data_dist=exponential: how many times as many images the first agent has as the "
           "last", number(float, 1), metavar="R", usual=None, inherited=True, otherwise="10", handed_on=True,
           matters=asked_for("size_ratio"), rare=True),
    Option("partition_file", "data", "--data_dist=file: CSV or npy file with a row for each agent and a column for "
           "each class, of shares of the class or of numbers of images", path, metavar="FILE", usual=None,
           inherited=True, handed_on=True, matters=asked_for("partition_file"), rare=True),
    Option("feature_noise", "data", "standard deviation of Gaussian noise on the last agent's training images, the "
           "others have less; black to white is 1", number(float, 0, 100), metavar="S", usual=0.0, inherited=True,
           otherwise="0", handed_on=True, rare=True),
    Option("partition_seed", "data", "seed of the partition", COUNT, usual=None, inherited=True,
           otherwise="the run's seed", matters=deals_by_another_seed, rare=True),
    Option("phase", "data", "which half of the data --data_dist=non-iid-PF deals", ["pretrain", "finetune"],
           {TRAIN: "pretrain"} | dict.fromkeys(RUNS, "finetune"), usual=None, matters=deals_halves, rare=True),
    Option("data_dir", "data", "where the data sets are", path, "datasets", metavar="DIR", free=True, handed_on=True),
    Option("imgntdir", "data", "a folder in Tiny ImageNet's layout", path, metavar="DIR", usual="tiny-imagenet-200",
           free=True, handed_on=True, rare=True),
    Option("model", "model", f"architecture: {', '.join(MODELS)}, tv:NAME of torchvision's classifiers, timm:NAME, or "
           "FILE.py:FUNCTION, called with num_classes and, if it takes them, in_channels, image_size, width_multiplier",
           default="resnet20", metavar="NAME", handed_on=True, read="always", elsewhere=True),
    Option("norm", "model", "normalisation of resnet20, vgg16 and resnet50 (which has no evonorm); group and evonorm "
           "don't depend on the batch", list(NORMS), usual="batch", inherited=True, otherwise="batch", handed_on=True),
    Option("epochs", "training", {TRAIN: "epochs of training", MAIN: "local epochs of an iteration; 0.5, 0.2 or "
                                  "another whole part of 1: so much of one", BASE: "epochs in all"},
           {TRAIN: COUNT, MAIN: local_epochs, BASE: number(int, 1)}, {TRAIN: 100, MAIN: 2, BASE: 200},
           matters=lambda o: trains(o) and not is_baseline(o),  # may be made longer
           read="where said"),
    Option("num_epochs", "training", "epochs between two evaluations", number(int, 1), 2, (BASE,), metavar="E",
           read="where said", elsewhere=True),
    Option("batch_size", "training", "images of an agent in a step", number(int, 1), 100, usual=100),
    Option("optim", "training", "optimiser", ["adam", "sgd"], "adam", (TRAIN, MAIN),
           flags={TRAIN: ("opt",), MAIN: ()}, usual="adam", matters=trains),
    Option("lr", "training", {TRAIN: "learning rate", MAIN: "learning rate", BASE: "learning rate of the first epoch"},
           POSITIVE, {TRAIN: 1e-3, MAIN: 1e-3, BASE: 0.01}, usual={TRAIN: 1e-3, MAIN: 1e-3, BASE: 0.01},
           matters=trains),
    Option("momentum", "training", {TRAIN: "momentum of --optim=sgd", MAIN: "momentum of --optim=sgd",
                                    BASE: "momentum of the methods that have one: CDMSGD, CGA, QGDSGDM, QGDSGDMN, "
                                          "DFEDAVGM (default: 0.9)"}, SHARE,
           {TRAIN: 0.0, MAIN: 0.0, BASE: None}, usual={TRAIN: 0.0, MAIN: 0.0, BASE: 0.9}, matters=trains),
    Option("weight_decay", "training", "L2 penalty", number(float, 0), 0.0, usual=0.0, matters=trains),
    Option("amp", "training", "mixed precision", ["none", "bf16", "fp16"], "none", usual="none", matters=trains),
    Option("loss", "training", "cross-entropy of the scores, or of scores adjusted by how often the agent has each "
           "class (logit adjustment, for unlike data); evaluation takes the plain scores", list(LOSSES),
           usual=LOSSES[0], inherited=True, otherwise=LOSSES[0], may_change=True, matters=trains),
    Option("adjust_tau", "training", "how strong --loss=adjusted is", number(float, 0), usual=1.0, inherited=True,
           otherwise="1", may_change=True, matters=lambda o: trains(o) and o.get("loss") == "adjusted", rare=True),
    Option("match_data", "matching", "whose training images matching and BatchNorm re-estimation read: every agent's, "
           "as in the paper, or only the merging agent's own", ["all", "local"], "all", (MAIN,), usual="all",
           matters=lambda o: merges(o) and reads_images(o)),
    Option("match_samples", "matching", "how many of these images, class-balanced where they are all agents'; 0 = all, "
           "as in the paper", COUNT, 1000, (MAIN,), usual=0, matters=reads_images),
    Option("match_augment", "matching", "augment them, for all models alike", boolean, False, (MAIN,), usual=True,
           matters=reads_images),
    Option("match_at", "matching", "read a group's features at the input of its last consumer, as in the paper, or sum "
           "over all", ["last", "all"], "all", (MAIN,), usual="last", matters=matches, rare=True),
    Option("bn_reset", "matching", "re-estimate BatchNorm statistics of the merged models, or of the agents' before as "
           "well; repair: both, and layers without BatchNorm are rescaled to their parents' statistics (REPAIR)",
           ["none", "after", "both", "repair"], "both", (MAIN,), usual="both"),
    Option("pretrain_epochs", "run", usual=100, scripts=RUNS, derived=True),
    Option("pretrain_seed", "run", usual=None, scripts=RUNS, derived=True),
    Option("pretrain_init", "run", usual="diff", scripts=RUNS, derived=True),
    Option("pretrain_loss", "run", usual=None, scripts=RUNS, derived=True),
    Option("wire", "processes", "how models travel: as they are, or their kernels and matrices in fewer bits",
           OneOf(lambda: list(WIRES)), "fp32", (MAIN,), usual="fp32", matters=merges),
    Option("link_failure", "simulated faults", {MAIN: "chance that an edge carries nothing in an iteration",
                                                BASE: "chance that an edge carries nothing in a step"}, SHARE, 0.0,
           RUNS, metavar="P", usual=0.0, matters=merges, rare=True),
    Option("agent_failure", "simulated faults", {
        MAIN: "chance that an agent neither merges nor trains in an iteration",
        BASE: "chance that an agent neither mixes nor trains in a step"}, SHARE, 0.0, RUNS, metavar="P", usual=0.0,
           rare=True),
    Option("exchanged_by", "processes", usual=None, scripts=(MAIN,), derived=True),
    Option("staleness", "processes", "agents on their own: use the last model of a neighbour that isn't there, if it "
           "is at most K iterations old", COUNT, 0, (MAIN,), metavar="K", usual=0, rare=True),
    Option("match_prior", "matching", "DIMAT and COMMON: identity leaves units where they are unless the gain in "
           "correlation exceeds the noise of its estimate (for agents that began alike)", OneOf(priors), "none",
           (MAIN,), usual="none", matters=weighs_units),
    Option("align", "matching", usual="in_turn", scripts=(MAIN,), matters=aligns, derived=True),  # gone: of older runs
    Option("align_every", "matching", usual=0, scripts=(MAIN,), matters=aligns, derived=True),  # gone: of older runs
    Option("root", "matching", "COMMON: the agent whose order of units the others take (default, and where it is down "
           "or in another part: the centre of the graph)", COUNT, None, (MAIN,), metavar="I", usual=None,
           matters=aligns, rare=True),
    Option("robust", "matching", "average so that some hostile models of several can't move the result far: clip what "
           "a neighbour's model differs by from one's own (self-centred clipping), or take each coordinate's trimmed "
           "mean or median; all N merge for themselves then, also fully_connected",
           ["none", "clip", "trimmed", "median"], "none", (MAIN,), usual="none", matters=merges),
    Option("max_distance", "processes", "agents on their own: leave out a neighbour's model whose parameters, in "
           "whatever order of units, are farther away than D times the norm of one's own; 0 = take any (ResNet-20, "
           "digits: neighbours 0.03, an untrained from a trained model 0.45, one with its signs flipped 1.7)",
           number(float, 0), 10.0, (MAIN,), metavar="D", usual=10.0, matters=merges_over_a_folder, rare=True),
    Option("lr_decay", "training", "what the learning rate is multiplied with after each epoch", POSITIVE, 0.981,
           (BASE,), usual=0.981),
    Option("local_steps", "algorithm", "exchange and mix in every K-th step only; the others are local",
           number(int, 1), 1, (BASE,), metavar="K", usual=1),
    Option("mix_buffers", "algorithm", "mix BatchNorm's statistics like the parameters", boolean, True, (BASE,),
           usual=True),
    Option("cga_form", "algorithm", "CGA's projection and momentum: the paper's, or the published code's (rows "
           "weighted by pi, margin 0.5, Nesterov-like) (default: paper)", OneOf(cga_forms), None, (BASE,),
           usual="paper"),
    Option("cga_scope", "algorithm", "CGA projects the whole gradient or each tensor's (default: model; authors' form: "
           "tensor)", OneOf(cga_scopes), None, (BASE,), usual="model"),
    Option("eval_bn", "algorithm", "evaluate with BatchNorm's running statistics or, as merged models have them, with "
           "statistics re-estimated on the agent's own or all agents' training images; training keeps the running ones",
           ["running", "local", "all"], "running", (BASE,), usual="running"),
    Option("bn_samples", "algorithm", "how many of these images, class-balanced where they are all agents'; 0 = all",
           COUNT, 1000, (BASE,), usual=0, matters=lambda o: o["eval_bn"] != "running"),

    Option("correction", "algorithm", "keep agents from drifting towards their own data while they train. LED (local "
           "exact diffusion): each step takes back a share of what the merges had to take back; no more bytes. KGT "
           "(local gradient tracking): the same by how agents differ in what they have walked, which is sent, too",
           OneOf(corrections), "none", (MAIN,), usual="none", matters=lambda o: merges(o) and trains(o)),
    Option("train_itr", "algorithm", usual=None, scripts=(MAIN,), matters=trains, derived=True),
    Option("average_last", "algorithm", "with --last_merges of 2 or more: once the first of these is done, each agent "
           "goes back to the mean of its models after the last such share of the merges so far (0.2: a fifth), and the "
           "others are of these means; models that swing from merge to merge have a better one", SHARE, 0.0, (MAIN,),
           metavar="F", usual=0.0, matters=lambda o: merges(o) and trains(o), rare=True),

    Option("opt", "algorithm", {
        MAIN: "DIMAT: activation matching, in every merge anew; COMMON: agents align themselves to one another once, "
              "by activations, and from then on average; C2M3: activation matching of all models that an agent merges "
              "at once, without contradictions; WM: weight matching; WA: plain averaging; NONE: agents alone, which "
              "re-estimate BatchNorm on their own images",
        BASE: "CDSGD: combine, then adapt; CDMSGD: with momentum; DPSGD: adapt, then combine; SGP: stochastic gradient "
              "push; CGA: cross-gradient aggregation; LED: local exact diffusion; KGT: local gradient tracking; DSGT: "
              "gradient tracking; D2: variance reduction; QGDSGDM, QGDSGDMN: quasi-global momentum, and its Nesterov "
              "form; DFEDAVGM: momentum that starts anew after each exchange; RELAYSGD: sums relayed over a tree"},
           {MAIN: OneOf(merge_methods), BASE: OneOf(baselines)}, {MAIN: "DIMAT", BASE: "CDSGD"}, RUNS,
           read="always", elsewhere=True),
    Option("exp", "algorithm", "topology by number: " + ", ".join(f"{k} {v}" for k, v in EXPS.items()),
           number(int, min(EXPS), max(EXPS)), None, RUNS, "N", free=True),
    Option("topology", "algorithm", f"{', '.join([*TOPOLOGIES, *DIRECTED])}, a JSON file with connectivity and pi, or "
           "a folder of such files that take turns (default: fully_connected)", path, None, RUNS,
           "NAME|FILE.json|FOLDER", read="always", elsewhere=True),
    Option("merg_itr", "algorithm", "merge iterations in all", number(int, 1), 100, (MAIN,), free=True, read="always"),
    Option("merg_itr_init", "algorithm", "start after this many iterations: the last finished one, or one kept by "
           "--keep all", COUNT, 0, (MAIN,), free=True, rare=True),
    Option("training", "algorithm", "train locally after each merge but the last", boolean, False, (MAIN,),
           elsewhere=True),
    Option("last_merges", "algorithm", "so many merges end the run with no training between them: the more, the closer "
           "the agents come to one model", number(int, 1), 1, (MAIN,), metavar="R", free=True, rare=True),
    Option("ckp", "algorithm", "folder of the agents' checkpoints, made by train.py", path, None, RUNS, "DIR",
           free=True),
    Option("randominit", "algorithm", "start from random models instead of --ckp", boolean, False, RUNS,
           elsewhere=True),
    Option("diffinit", "algorithm", "with --randominit: a different random model for every agent", boolean, False,
           RUNS, elsewhere=True),
    Option("init_seed", "run", "the same initialisation for all agents", boolean, False, (TRAIN,)),
    Option("seed", "run", "seed of the run", COUNT, 0, flags=("random_seed",), handed_on=True, read="always"),
    Option("save_folder", "run", "where the checkpoints go", path, "checkpoint", (TRAIN,), "DIR", free=True),
    Option("match_memory", "matching", "most memory for correlation matrices and features; beyond it batches are cut, "
           "then edges taken in blocks (but by C2M3, which holds all pairs)", POSITIVE, 4.0, (MAIN,), "GB", free=True,
           rare=True),
    Option("workers", "processes", "deal the agents out to N processes, which share this machine's threads; the data "
           "set and --match_memory are there for each (default: with --training on a CPU one for each thread, at most "
           "one for each agent; else 1)", number(int, 1), None, (MAIN,), "N", free=True),
    Option("processes", "processes", "start each of the N agents as a process of its own, as with --agent, on this "
           "machine", COUNT, None, (MAIN,), "N", free=True),
    Option("agent", "processes", "be agent I alone: others may be started anywhere, stop, and come back by the same "
           "command", COUNT, None, (MAIN,), "I", rare=True),
    Option("exchange", "processes", "where agents on their own leave their models for their neighbours: a folder that "
           "all of them see (default with --processes: in the run folder)", exchange, None, (MAIN,), "folder:PATH",
           free=True, rare=True),
    Option("exchange_key", "processes", "a secret that all agents on their own share, 16 bytes or more: models are "
           "signed with it, and others are refused. Without it nobody publishes as one of the agents; who has it can "
           "as any", path, None, (MAIN,), "FILE", free=True, rare=True),
    Option("backend", "processes", "what carries the messages: nccl where every process has a GPU of its own, else "
           "gloo", BACKENDS, "auto", RUNS, free=True, rare=True),
    Option("timeout", "processes", {k: f"{v} (at the start of a group at least {STARTING:g} s)"
                                    for k, v in WAITS.items()},
           {MAIN: number(float, 0), BASE: POSITIVE}, {MAIN: 1800.0, BASE: 300.0}, RUNS, "SECONDS", free=True,
           rare=True),
    Option("local_rank", "processes", argparse.SUPPRESS, COUNT, None, RUNS, flags=("local-rank",), free=True),
    Option("results_dir", "run", "where the results go", path, "results", RUNS, "DIR", free=True),
    Option("tensorboard", "run", "write live curves into the run folder (needs the package tensorboard)", boolean,
           False, RUNS, free=True, rare=True),
    Option("resume", "run", "continue an interrupted run (a group that torchrun restarts does so by itself)", boolean,
           False, RUNS, free=True),
    Option("keep", "run", "keep the state of the last iteration, or of each (for --merg_itr_init)", ["last", "all"],
           "last", (MAIN,), free=True, rare=True),
    Option("device", "machine", "auto, cpu, cuda, cuda:1 or mps", default="auto", free=True, handed_on=True),
    Option("data_memory", "machine", "most memory of a GPU for the training images, and for the test images; more "
           "stay in the file that they are mapped from, and go there batch by batch (default: a quarter of what is "
           "free)",
           POSITIVE, None, metavar="GB", free=True, rare=True, handed_on=True),
    Option("train_at_once", "machine", "train so many agents of a process at once, in batched calls: for many small "
           "models. The same up to rounding, but that dropout draws otherwise", number(int, 1), 1, (MAIN,), metavar="K",
           free=True, rare=True),
    Option("compile", "machine", "run the model through torch.compile", boolean, False, free=True, rare=True),
    Option("config", "machine", "read options from a file; flags override it", path, None, metavar="FILE.yaml",
           free=True),
    Option("overwrite", "machine", "start afresh, deleting what this very command made before", boolean, False,
           free=True),
)
# What a config.yaml says beside options, and may differ between the sittings of a run.
OF_THE_MACHINE = frozenset({"num_threads", "command", "versions", "launch"})


def names(wanted: Callable[[Option], Any]) -> tuple[str, ...]:
    """Of the options that are `wanted`, in the table's order."""
    return tuple(option.name for option in OPTIONS if wanted(option))


def free() -> set[str]:
    """What may differ between the sittings of one run: it changes no figure, or only how far the run goes."""
    return {*names(lambda option: option.free), *OF_THE_MACHINE}


def silent(o: Settings) -> set[str]:
    """The options that have no say in a run of these."""
    script = BASE if is_baseline(o) else MAIN if "opt" in o else TRAIN
    return set(names(lambda option: script in option.scripts and not option.matters(o)))


def dealt(o: Settings) -> str:
    """'dirichlet 0.5', 'classes 2': how the data is dealt, with what the partition asked for."""
    partition = o["data_dist"]
    asked = asks_for(partition) if partition in PARTITIONS else {"alpha"}
    said = {option.name: o[option.name] for option in OPTIONS if option.inherited and option.name in asked
            and o.get(option.name) not in (None, option.usual)}
    values = [(key, f"{value:g}" if isinstance(value, int | float) else Path(str(value)).name)
              for key, value in said.items()]
    return ", ".join([" ".join([partition, *(value for _, value in values[:1])]),
                      *(f"{key}={value}" for key, value in values[1:])])


def usual(script: str) -> dict[str, Any]:
    """Option -> the value that a path doesn't say, in the order in which paths say others."""
    return {option.name: option.of("usual", script) for option in OPTIONS
            if script in option.scripts and option.usual is not NEVER}


SHORT = {option.name: option.short for option in OPTIONS if option.short}


def variant(options: Settings, script: str) -> str:
    """'width=1,alpha=0.5' for the options that differ from the usual; '' if none does."""
    # A file's or folder's name says which one it is, not where it lies.
    paths = [option.name for option in OPTIONS if option.kind is path and option.usual is not NEVER]
    options = {**options, **{key: Path(options[key]).resolve().name for key in paths if options.get(key)}}
    return ",".join(f"{SHORT.get(key, key)}={options[key]}" for key, value in usual(script).items()
                    if key in options and options[key] not in (None, value))


# --------------------------------------------------------------------------------------------------------------------
# Command lines


def add_to(p: argparse.ArgumentParser, script: str, only: Collection[str] | None = None) -> None:
    """All options of a script, in groups; `only` some of them: these are None where they aren't given."""
    for title in GROUPS:
        options = [option for option in OPTIONS if option.group == title and script in option.scripts
                   and not option.derived and (only is None or option.name in only)]
        group = p.add_argument_group(title) if options else None
        for option in options:
            how = _how(option, script) | ({} if only is None else {"default": None})
            action = group.add_argument(*_flags(option, script), dest=option.name, **how)
            action.whole_help = action.help
            if option.rare and only is None:
                action.help = argparse.SUPPRESS


def _flags(option: Option, script: str) -> list[str]:
    return [f"--{name}" for name in (option.name, *option.of("flags", script))]


def _how(option: Option, script: str) -> dict[str, Any]:
    kind, default, text = (option.of(field, script) for field in ("kind", "default", "help"))
    if option.name == "num_models" and script != TRAIN:
        default = launched_agents() or default
    if option.inherited and option.otherwise:
        text += f" (default: {'what the checkpoint was made with, else ' * (script != TRAIN)}{option.otherwise})"
    how = {"default": default, "help": text}
    if kind is boolean:
        return how | {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
    if isinstance(kind, OneOf | list | tuple):
        return how | {"choices": list(kind.names() if isinstance(kind, OneOf) else kind)}
    return how | {"type": kind, "metavar": option.metavar}


def train_parser() -> argparse.ArgumentParser:
    p = parser("train", "Train every agent on its own part of the data and keep the checkpoints.\n"
                        "An interrupted run continues when the same command is given again.",
               "python -m train --dataset=cifar100 --model=resnet20 --num_models=5 --data_dist=iid --random_seed=0",
               all_help=True)
    add_to(p, TRAIN)
    return p


def main_parser() -> argparse.ArgumentParser:
    p = parser("main", "Merge the agents' models over a topology and train again, iteration by iteration.\n"
                       "All agents in this process or dealt out to several (--workers, torchrun), with the same "
                       "figures,\nor each on its own (--agent, --exchange), where any may stop and come back.",
               "python -m main --dataset=digits --num_models=5 --ckp=CHECKPOINT_FOLDER --opt=DIMAT --exp=2 "
               "--merg_itr=8 --training --epochs=2", all_help=True)
    add_to(p, MAIN)
    return p


def base_lines_parser() -> argparse.ArgumentParser:
    p = parser("base_lines", "Train the agents with a gradient-based method that mixes their models in its steps.\n"
                             "All agents in this process or, under torchrun, each in a process of its own; the figures "
                             "are the same.",
               "torchrun --standalone --nproc_per_node=5 base_lines.py --dataset=digits --num_models=5 --opt=CDSGD "
               "--exp=2 --randominit=True --epochs=10", all_help=True)
    add_to(p, BASE)
    return p
