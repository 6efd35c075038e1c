"""Run a table's worth of experiments: a grid over the scripts' options, pre-training included.

A sweep is a list of jobs, each one command; some wait for others (a run for its checkpoints). As many run at a time as
allowed, one that fails stops nothing but what waits for it, and the same sweep given again skips what is finished and
resumes what was interrupted, because the scripts do.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from experiments import merges, steps, trainings
from experiments.checkpoints import checkpoint_folder
from experiments.options import OPTIONS, Command, base_lines_parser, main_parser, names, train_parser
from experiments.parsing import Formatter, Parser, boolean, number, only_option, parse, path
from network.workers import FOLLOWS, end_by
from storage.files import load_yaml
from utils.progress import command, say

SCRIPTS = ("train", "main", "base_lines")
FINISHED = {"train": trainings.finished, "main": merges.finished, "base_lines": steps.finished}
ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0  # seconds for a job to end after it was asked to


@dataclass(eq=False)
class Job:
    """One command.

    title: what tells it from its siblings; after: jobs that must have succeeded before; options: as the script reads
    them.
    """

    script: str
    title: str
    command: list[str]
    after: list[Job] = field(default_factory=list)
    state: str = "waiting"  # running, done, failed, skipped
    seconds: float = 0.0
    options: Command = field(default_factory=dict)

    def is_finished(self) -> bool:
        """Whether its script has done all that it would do: then it needn't be started to hear so."""
        with contextlib.suppress(Exception):  # what is wrong the script can best say itself
            return FINISHED[self.script](self.options) is not None
        return False

    @property
    def log(self) -> str:
        """A name of its own, the same in every sweep that holds this command."""
        readable = re.sub(r"[^\w.,=-]+", "_", f"{self.script}_{self.title}")[:150].strip("_")
        return f"{readable}_{hashlib.sha1(shlex.join(self.command[1:]).encode()).hexdigest()[:8]}.log"


# --------------------------------------------------------------------------------------------------------------------
# From options to jobs


def grid(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the options whose values are lists."""
    axes = {key: value if isinstance(value, list) else [value] for key, value in options.items()}
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def arguments(options: Mapping[str, Any]) -> list[str]:
    """--key=value for all that are not None."""
    return [f"--{key}={value}" for key, value in options.items() if value is not None]


class Planner:
    """Makes jobs of options, each distinct command once, and checks every command line on the way.

    parsers: script -> its argument parser. extra: arguments that every script that knows them is given.
    """

    def __init__(self, parsers: Mapping[str, ArgumentParser], extra: Sequence[str] = ()) -> None:
        self.parsers, self.extra = parsers, list(extra)
        self.jobs: dict[tuple[str, ...], Job] = {}

    def train(self, options: Mapping[str, Any], title: str) -> tuple[Job, dict[str, Any]]:
        """Pre-training, and all its options."""
        given = [*arguments(options), *self.known("train", self.extra)]
        settled = self.settled_training(given)
        return self._job("train", title, [sys.executable, "-u", "-m", "train", *given], settled), settled

    def checkpoints(self, argv: Sequence[str]) -> Path:
        """Where `train.py argv` puts its checkpoints."""
        return checkpoint_folder(self.settled_training(argv))

    def settled_training(self, argv: Sequence[str]) -> dict[str, Any]:
        """All options of `train.py argv`."""
        o = self._parse("train", argv)
        trainings.fill_defaults(o)
        return o

    def run(self, script: str, options: Mapping[str, Any], title: str, after: Job | None, launched: bool,
            trained: Mapping[str, Any] | None = None) -> Job:
        """A run of main.py or base_lines.py; with `launched` a process for each agent.

        trained: the options of the pre-training that it inherits from.
        """
        given = [*arguments(options), *self.extra, "--resume"]
        o = self._parse(script, given)
        for key in names(lambda option: option.inherited) if trained else ():
            if o[key] is None:
                o[key] = trained[key]
        start = ["-u", "-m", script]
        if launched:
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={o['num_models']}",
                     str(ROOT / f"{script}.py")]
        return self._job(script, title, [sys.executable, *start, *given], o, after)

    def _job(self, script: str, title: str, command: list[str], o: Command, after: Job | None = None) -> Job:
        job = self.jobs.setdefault(tuple(command), Job(script, title, command, options=o))
        if after and after not in job.after:
            job.after.append(after)
        return job

    def flags(self, script: str) -> set[str]:
        return {flag for action in self.parsers[script]._actions for flag in action.option_strings}

    def means(self, script: str, key: str, text: str) -> tuple[str, Any] | None:
        """The option that --key=text sets in a script, and its value; None where the script knows no such."""
        try:
            name = self.parsers[script]._option_string_actions[f"--{key}"].dest
            return name, self._parse(script, [f"--{key}={text}"])[name]
        except (KeyError, ValueError):
            return None

    def known(self, script: str, extra: Sequence[str]) -> list[str]:
        """Those of the extra arguments that this script has."""
        flags = self.flags(script)
        known, keep = [], False
        for word in extra:
            keep = word.partition("=")[0] in flags if word.startswith("--") else keep
            known += [word] if keep else []
        return known

    def _parse(self, script: str, argv: Sequence[str]) -> Command:
        """Now, rather than when the job's turn comes."""
        parser = self.parsers[script]
        parser.error = lambda message: _refuse(f"{script}: {message}")
        return vars(parse(parser, argv))


def _refuse(message: str) -> None:
    raise ValueError(message)


def read_plan(file: Path, planner: Planner) -> list[Job]:
    """The jobs of a sweep's YAML file. Raises ValueError that names the file and the part that is wrong."""
    try:
        return plan_file(load_yaml(file), planner)
    except ValueError as error:
        raise ValueError(f"{error}" if str(file) in str(error) else f"{file}: {error}") from None


def varying(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options that differ within a grid, or that always tell what a run is."""
    keys = dict.fromkeys(key for one in options for key in one)
    return [key for key in keys if len({str(one.get(key)) for one in options}) > 1]


def plan_file(content: Mapping[str, Any], planner: Planner) -> list[Job]:
    """The jobs of a sweep file.

    all: options of every script; train: a grid, or a list of grids, of pre-trainings; main, base_lines: the same, of
    runs that start at each of these (--ckp, data set, model, agents and seed follow), or at those whose data, model and
    agents are the ones they name. Without `train`, and with `randominit`, they stand alone.
    `launch: false` in a grid of base_lines keeps all agents in one process.
    """
    if odd := [part for part in content if part not in ("all", *SCRIPTS)]:
        raise ValueError(f"unknown part {odd[0]!r}: a sweep has the parts all, {', '.join(SCRIPTS)}")
    parts = {part: _grids(part, content[part]) for part in content}
    everywhere, *more = parts.get("all") or [{}]
    if more:
        raise ValueError("all: there are several grids, but one is for all scripts: give the others to each script")
    common = {key.replace("random_seed", "seed"): value for key, value in everywhere.items()}
    starts: list[tuple[dict, Job | None, dict | None]] = []  # options, pre-training, all of its options
    if "train" in parts:
        trainings = [options for one in parts["train"] for options in grid(common | one)]
        for options in trainings:
            title = ",".join(f"{k}={options[k]}" for k in varying(trainings) if k in options) or "training"
            starts.append((options, *planner.train(_for("train", options, planner), title)))
    else:
        starts = [(options, None, None) for options in grid(common)]
    for script in ("main", "base_lines"):
        for one in parts.get(script, ()):
            launched = script == "base_lines" and _is_true("launch", one.pop("launch", True))
            own = []
            for options in grid(one):
                named = _data_and_model(options, planner) if "train" in parts else {}
                fitting = [(base | options, job, trained) for base, job, trained in starts
                           if all(trained[key] == value for key, value in named.items())]
                fitting = fitting or [(base | options, None, None) for base in grid(common) if _random(base | options)]
                if not fitting:
                    said = ", ".join(f"{key}={options[key]}" for key in options if key in SAME)
                    raise ValueError(f"{script}: no pre-training has {said}: add it to train")
                own += fitting
            names = varying([options for options, *_ in own])
            for options, job, trained in own:
                job, trained = (None, None) if _random(options) else (job, trained)
                shared = {k: v for k, v in options.items() if k in one or k in common or k in SHARED}
                shared = _for(script, shared, planner) | {k: options[k] for k in one}
                shared |= {"ckp": checkpoint_folder(trained)} if trained else {}
                title = ",".join(f"{k}={options[k]}" for k in names if k in options) or script
                planner.run(script, shared, title, job, launched, trained)
    return list(planner.jobs.values())


SHARED = {flag for option in OPTIONS if option.handed_on for flag in (option.name, *option.of("flags", "train"))}
# What a run's pre-training has in common with it.
SAME = ("dataset", "data", "model", "num_models", *names(lambda option: option.inherited and option.handed_on))


def _data_and_model(options: Mapping[str, Any], planner: Planner) -> dict[str, Any]:
    """What these options say of the data and of the model, as train.py reads it."""
    given = {"dataset" if key == "data" else key: options[key] for key in SAME if options.get(key) is not None}
    o = planner._parse("train", arguments(given))
    return {key: o[key] for key in given}


def _random(options: Mapping[str, Any]) -> bool:
    """Whether a run starts from random models, and so needs no pre-training."""
    given = options.get("randominit")
    return given is not None and _is_true("randominit", given)


def _is_true(key: str, value: Any) -> bool:
    try:
        return boolean(str(value))
    except ArgumentTypeError as error:
        raise ValueError(f"{key}: {error}") from None


def _grids(part: str, content: Any) -> list[dict[str, Any]]:
    """A part's grids, of which one needs no list. Raises ValueError for what a command line can't say."""
    grids = content if isinstance(content, list) else [{} if content is None else content]
    for one in grids:
        if not isinstance(one, Mapping):
            raise ValueError(f"{part}: {_short(one)} is no grid (option: value or list of values)")
        for key, value in one.items():
            if not isinstance(key, str):
                raise ValueError(f"{part}: {_short(key)} is no option's name")
            if value == []:
                raise ValueError(f"{part}: {key} is an empty list, which leaves nothing to run")
            for single in value if isinstance(value, list) else [value]:
                if single is not None and not isinstance(single, str | int | float):
                    raise ValueError(f"{part}: {key}: {_short(single)} is neither text nor a number nor True or False")
    return [dict(one) for one in grids]


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 60, placeholder=" ...")


def _for(script: str, options: Mapping[str, Any], planner: Planner) -> dict[str, Any]:
    """Those of the options that a script has: what all scripts are given need not be known to each."""
    flags = planner.flags(script)
    return {key: value for key, value in options.items() if f"--{key}" in flags}


def only(jobs: Sequence[Job], wanted: Mapping[str, Sequence[str]], planner: Planner) -> list[Job]:
    """The jobs with one of the `wanted` values of each option, and what these wait for.

    Pre-trainings are run for themselves only where no run is wanted. A run's pretrain_epochs are its pre-training's
    epochs, as in tables and pictures.
    """
    means = cache(planner.means)

    def has(job: Job, key: str, text: str) -> bool:
        setting = means(job.script, key, text)
        if setting is None and key.startswith("pretrain_"):
            return any(has(other, key.removeprefix("pretrain_"), text) for other in job.after)
        return setting is not None and setting in job.options.items()

    those = set(jobs)
    for key, texts in wanted.items():
        having: set[Job] = set()
        for text in texts:
            found = {job for job in jobs if has(job, key, text)}
            if not found:
                raise ValueError(f"--only {key}={text}: no job has that (--dry_run lists what they have)")
            having |= found
        those &= having
    those = those - {other for job in jobs for other in job.after} or those
    return [job for job in jobs if job in those or any(job in other.after for other in those)]


def plan_flags(script: str, o: Namespace, planner: Planner) -> list[Job]:
    """The jobs of train.sh, main.sh and base_lines.sh: as the paper's scripts, every combination of the lists."""
    axes = {"dataset": [item.split(",")[0] for item in o.datasets_nums_classes], "model": o.models,
            "num_models": o.nums_models, "data_dist": o.data_dists, "seed": o.random_seeds}
    if script == "train":
        runs = list(grid(axes | {"epochs": o.epochs}))
        for options in runs:
            planner.train(options, ",".join(f"{k}={v}" for k, v in options.items()))
        return list(planner.jobs.values())
    axes |= {"exp": o.exps, "opt": o.opts, "randominit": o.randominits,
             "diffinit": o.diffinits}
    if script == "main":
        axes |= {"epochs": o.epochs, "merg_itr": o.merg_itrs, "merg_itr_init": o.merg_itr_inits,
                 "training": [True]}
    else:
        axes |= {"epochs": o.epoch, "num_epochs": o.nums_epochs}
    for options in grid(axes):
        title = ",".join(f"{k}={v}" for k, v in options.items() if k not in ("training", "merg_itr_init"))
        if not _random(options):
            data = {k: options[k] for k in ("dataset", "model", "num_models", "data_dist")}
            seed = options["seed"] if o.checkpoint_seed is None else o.checkpoint_seed
            how = arguments(data | {"seed": seed}) + planner.known("train", planner.extra)
            options |= {"ckp": planner.checkpoints([*how, f"--epochs={o.pretrain_epochs}"])}
        planner.run(script, options, title, None, launched=script == "base_lines")
    return list(planner.jobs.values())


# --------------------------------------------------------------------------------------------------------------------
# Running them


def environment(parallel: int, gpu: str | None) -> dict[str, str]:
    """A job's share of the machine."""
    env = dict(os.environ)
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    if parallel > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env


def run_jobs(jobs: Sequence[Job], parallel: int, gpus: Sequence[str], folder: Path) -> None:
    """Run all jobs, `parallel` at a time while there are so many left, each with a log in `folder`.

    Sets every job's state. Ctrl-C, or a TERM signal, ends exactly the processes that were started, and is raised again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running: dict[Job, tuple[subprocess.Popen, float, str | None]] = {}
    before = signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    try:
        while any(job.state in ("waiting", "running") for job in jobs):
            for job in jobs:
                if job.state == "waiting" and any(other.state in ("failed", "skipped") for other in job.after):
                    job.state = "skipped"
                ready = job.state == "waiting" and all(other.state == "done" for other in job.after)
                if ready and len(running) < parallel and job.is_finished():
                    job.state = "done"
                    _report(job, jobs, "finished before")
                elif ready and len(running) < parallel:
                    gpu = min(gpus, key=[g for *_, g in running.values()].count) if gpus else None
                    running[job] = (_start(job, folder, environment(parallel, gpu)), time.monotonic(), gpu)
                    job.state = "running"
                    _status(jobs, began)
            for job, (process, started, _) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    process.stdin.close()  # a launcher that was killed may have left workers
                    job.state, job.seconds = "failed" if process.returncode else "done", time.monotonic() - started
                    _report(job, jobs, f"failed (exit {process.returncode}), see {folder / job.log}"
                            if process.returncode else f"done in {job.seconds:.0f} s")
                    _status(jobs, began)
            time.sleep(0.1)
    except BaseException:
        _end([process for process, *_ in running.values()])
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _start(job: Job, folder: Path, env: dict[str, str]) -> subprocess.Popen:
    with open(folder / job.log, "a") as log:
        log.write(f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')}  {shlex.join(job.command)}\n")
        log.flush()
        # A session of its own: Ctrl-C is ours to pass on. A pipe that ends with this process, as the job then does.
        return subprocess.Popen(job.command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                                env=env | FOLLOWS, start_new_session=True)


def _signal(number: int, process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Ask, then insist, at once with a second Ctrl-C: a launcher that is killed can't end its workers itself."""
    kill = (partial(_signal, signal.SIGKILL), 5.0)
    try:
        end_by(processes, [(partial(_signal, number), PATIENCE) for number in (signal.SIGINT, signal.SIGTERM)])
    finally:
        end_by(processes, [kill])


def _counts(jobs: Sequence[Job]) -> str:
    states = [job.state for job in jobs]
    words = [f"{states.count(state)} {state}" for state in ("running", "waiting", "failed", "skipped")
             if states.count(state)]
    return f"{states.count('done')} of {len(jobs)} done" + "".join(f", {word}" for word in words)


def _status(jobs: Sequence[Job], began: float) -> None:
    """A line that is written over, where somebody is looking."""
    if sys.stderr.isatty():
        minutes = (time.monotonic() - began) / 60
        print(f"\r\033[K{_counts(jobs)}, {minutes:.0f} min", end="", file=sys.stderr, flush=True)


def _report(job: Job, jobs: Sequence[Job], how: str) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    say(f"[{_counts(jobs)}] {job.script} {job.title}: {how}")


def last_words(log: Path) -> str:
    """The line of a failed run's log that says why."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if line.startswith("error: ")] or [line for line in lines if line.strip()]
    return said[-1][:300] if said else ""


def carry_out(jobs: Sequence[Job], o: Namespace) -> int:
    """Print the commands, or run them; the exit status."""
    if not o.run_python:
        for job in jobs:
            print(shlex.join(job.command))
        print(f"# {len(jobs)} commands; {o.how_to_run} runs them, {o.num_parallel} at a time")
        return 0
    folder = Path(o.log_dir)
    gpus = [gpu.strip() for gpu in o.gpus.split(",") if gpu.strip()] if o.gpus else []
    print(f"{len(jobs)} jobs, {o.num_parallel} at a time, logs in {folder}/", flush=True)
    try:
        run_jobs(jobs, o.num_parallel, gpus, folder)
    except KeyboardInterrupt:
        done = sum(job.state == "done" for job in jobs)
        print(f"\nstopped after {done} of {len(jobs)} jobs; give the same command again to continue", file=sys.stderr)
        return 130
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        print(f"failed: {job.script} {job.title}\n    {last_words(folder / job.log)}\n    log: {folder / job.log}",
              file=sys.stderr)
    for job in jobs:
        if job.state == "skipped":
            why = ", ".join(other.title for other in job.after if other.state != "done")
            print(f"not run: {job.script} {job.title}: the {job.after[0].script} job it needs failed ({why})",
                  file=sys.stderr)
    print(_counts(jobs))
    return 1 if failed else 0


# --------------------------------------------------------------------------------------------------------------------
# The command line


def scripts_parsers() -> dict[str, ArgumentParser]:
    """The scripts' own parsers, with the registries' names."""
    return {"train": train_parser(), "main": main_parser(), "base_lines": base_lines_parser()}


def _options(p: ArgumentParser, runs: bool) -> None:
    p.add_argument("--num_parallel", type=number(int, 1), default=1, metavar="N", help="jobs at a time")
    p.add_argument("--gpus", default=None, metavar="0,1", help="deal the jobs out to these GPUs")
    p.add_argument("--log_dir", type=path, default="runs", metavar="DIR", help="where the logs go, one for each job")
    if runs:
        p.add_argument("--dry_run", action="store_true",
                       help="print the commands and how many there are, and run none")
    else:
        p.add_argument("--run_python", type=boolean, default=False, metavar="True|False",
                       help="run the commands; else they are only printed")


def file_parser() -> ArgumentParser:
    p = Parser(
        prog="python -m experiments.sweep", formatter_class=Formatter, allow_abbrev=False,
        description="Run every experiment of a sweep file, pre-training first. Finished runs are skipped, interrupted "
                    "ones resume.\n\nexample:\n  python -m experiments.sweep configs/digits.yaml --num_parallel 2",
        epilog="train.sh, main.sh and base_lines.sh are this command with the script's name for the file.")
    p.add_argument("file", type=path, metavar="FILE.yaml", help="a grid over the scripts' options")
    only_option(p, "run only jobs", ", and the pre-trainings that they need")
    _options(p, runs=True)
    return p


def words(text: str) -> list[str]:
    """An argparse type: what is separated by blanks."""
    if not text.split():
        raise ArgumentTypeError("an empty list leaves nothing to run")
    return text.split()


def flags_parser(script: str) -> ArgumentParser:
    """The flags of train.sh, main.sh, base_lines.sh: lists in one argument, separated by blanks."""
    p = Parser(
        prog=f"./{script}.sh", formatter_class=Formatter, allow_abbrev=False,
        description=f"Run {script}.py for every combination of the lists (separated by blanks, in quotes). Flags after "
                    "-- go to the script as they are.")
    lists = {"nums_models": ("5", "numbers of agents"), "data_dists": ("iid", "distributions of the data"),
             "datasets_nums_classes": ("cifar100", "data sets; a number of classes after a comma is not needed"),
             "models": ("resnet20", "architectures"), "random_seeds": ("0", "seeds")}
    if script == "train":
        lists["epochs"] = ("100", "epochs of training")
    else:
        lists |= {"opts": ("DIMAT" if script == "main" else "CDSGD", "methods"), "exps": ("1", "topologies by number"),
                  "randominits": ("False", "start from random models"), "diffinits": ("False", "different ones")}
    if script == "main":
        lists |= {"epochs": ("2", "local epochs of an iteration"), "merg_itrs": ("100", "merge iterations"),
                  "merg_itr_inits": ("0", "start after so many of them")}
    if script == "base_lines":
        lists |= {"epoch": ("200", "epochs in all"), "nums_epochs": ("2", "epochs between two evaluations")}
    for name, (default, text) in lists.items():
        p.add_argument(f"--{name}", type=words, default=default, metavar="LIST", help=text)
    if script != "train":
        p.add_argument("--pretrain_epochs", type=number(int, 0), default=100, help="of the checkpoints to start from")
        p.add_argument("--checkpoint_seed", type=number(int, 0), default=None, metavar="SEED",
                       help="start all seeds from this one's checkpoints, as the paper's scripts do with 0 "
                            "(default: each from its own)")
    _options(p, runs=False)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in SCRIPTS:
        script, *argv = argv
        cut = argv.index("--") if "--" in argv else len(argv)
        o = flags_parser(script).parse_args(argv[:cut])
        o.how_to_run = "--run_python true"
        jobs = plan_flags(script, o, Planner(scripts_parsers(), argv[cut + 1:]))
    else:
        o = file_parser().parse_args(argv)
        o.run_python, o.how_to_run = not o.dry_run, "leaving out --dry_run"
        if not Path(o.file).is_file():
            raise ValueError(f"{o.file} does not exist: give a sweep's YAML file")
        planner = Planner(scripts_parsers())
        jobs = only(read_plan(Path(o.file), planner), o.only or {}, planner)
    if not jobs:
        raise ValueError("nothing to run: " + ("no job has all that --only asks for" if vars(o).get("only")
                                               else "the grid is empty"))
    return carry_out(jobs, o)


if __name__ == "__main__":
    sys.exit(main())
