"""The stages of `benchmarks.gpu`: each adds rows to its results as soon as it has them, and may be stopped."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from benchmarks.iteration import agents_of, evaluated, iterate, models_of
from benchmarks.main_job import (
    BATCH,
    LAYOUTS,
    Setting,
    bare_passes,
    bare_training,
    dimat_merge,
    in_turns,
    local_epoch,
    random_images,
    seconds,
    write_npz,
)
from benchmarks.processes import ROOT, measure
from data.datasets import Dataset, ImageSet, load_dataset
from merging import METHODS
from models import build_model
from models.training import AMP
from network.topology import make_topology
from network.wire import WIRES, through
from optimizers import BASELINES


@dataclass(frozen=True)
class Target:
    """What is measured. data: a file of images, None: random ones."""

    device: torch.device
    width: int
    agents: int
    train_samples: int
    test_samples: int
    data: Path | None

    def dataset(self) -> Dataset:
        if self.data:
            return load_dataset(str(self.data), train_samples=self.train_samples, test_samples=self.test_samples)
        return random_images(self.train_samples, self.test_samples)

    def small(self) -> Dataset:
        """Enough to compare devices by."""
        return random_images(2 * SMALL_BATCH * SMALL_AGENTS, SMALL_BATCH)

    def options(self, *more: str) -> list[str]:
        return ["--dataset=digits", f"--num_models={self.agents}", f"--width_multiplier={self.width}", "--randominit",
                f"--batch_size={BATCH}", "--topology=ring", *more]

    def main_options(self, *more: str) -> list[str]:
        return self.options("--training", "--epochs=1", "--match_samples=0", *more)


class Results:
    """A stage's rows, each on the disk as soon as it is there."""

    def __init__(self, out: Path, stage: str) -> None:
        self.file = out / f"{stage}.jsonl"

    def add(self, **row: object) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(row, flush=True)


@dataclass(frozen=True)
class Stage:
    """share: of the time, in proportion to the others'."""

    name: str
    function: Callable[[Target, Results, float], None]
    share: float


STAGES: dict[str, Stage] = {}


def stage(share: float) -> Callable[[Callable], Callable]:
    def register(function: Callable[[Target, Results, float], None]) -> Callable:
        STAGES[function.__name__] = Stage(function.__name__, function, share)
        return function

    return register


# --------------------------------------------------------------------------------------------------------------------
# Is it right?

Check = Callable[[Target], float]
SMALL_BATCH, SMALL_AGENTS = 20, 3
FEW = (f"--batch_size={SMALL_BATCH}", f"--num_models={SMALL_AGENTS}")


def apart(ours: dict[int, dict[str, Tensor]], theirs: dict[int, dict[str, Tensor]]) -> float:
    """The largest distance of two tensors of the same name, relative to the second one's largest entry."""
    return max(float((ours[i][key].double() - value.double()).abs().max() / value.double().abs().max().clamp_min(1e-6))
               for i, state in theirs.items() for key, value in state.items())


def after(target: Target, script: str, argv: Sequence[str], device: torch.device, merge_only: bool = False):
    agents = agents_of(script, argv, target.small(), device)
    if merge_only:
        agents.merge(1)
    else:
        iterate(agents, 1)
    return models_of(agents)


def on_both(script: str, *options: str, merge_only: bool = False) -> Check:
    """The device's models against the CPU's."""

    def check(target: Target) -> float:
        argv = (target.main_options if script == "main" else target.options)(*FEW, *options)
        return apart(after(target, script, argv, target.device, merge_only),
                     after(target, script, argv, torch.device("cpu"), merge_only))

    return check


def with_option(*options: str) -> Check:
    """The test loss after training with these options against that without, relative, on the device."""

    def check(target: Target) -> float:
        losses = []
        for argv in (["--opt=WA"], ["--opt=WA", *options]):
            agents = agents_of("main", target.main_options(*FEW, "--optim=sgd", "--lr=0.01", *argv), target.small(),
                               target.device)
            iterate(agents, 1)
            losses.append(evaluated(agents, 1)[0]["evaluation"].loss)
        return abs(losses[1] / losses[0] - 1)

    return check


def of_wire(wire: str) -> Check:
    def check(target: Target) -> float:
        state = build_model("resnet20", 10, width_multiplier=target.width, seed=0).state_dict()
        ours = through({key: t.to(target.device) for key, t in state.items()}, wire)
        return float(any(not torch.equal(ours[key].cpu(), value) for key, value in through(state, wire).items()))

    return check


def scripts(target: Target, home: Path, *more: str, name: str = "main", launcher: Sequence[str] = ()) -> float:
    """The last accuracy of a run of the real program; `launcher`: what starts it in place of Python."""
    start = [sys.executable, *launcher, str(ROOT / f"{name}.py")]
    argv = ["--dataset=digits", "--train_samples=400", "--num_models=4", "--width_multiplier=1", "--randominit",
            f"--device={target.device.type}", f"--results_dir={home}", *more]
    done = subprocess.run([*start, *argv], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error")]
        raise RuntimeError(said[-1] if said else done.stderr[-500:])
    table, = home.glob("**/metrics.csv")
    return list(mean_accuracies(table).values())[-1]


def mean_accuracies(table: Path) -> dict[tuple[str, str], float]:
    """(iteration, phase) -> the agents' mean test accuracy, of a metrics.csv."""
    of_agents: dict[tuple[str, str], list[float]] = {}
    for row in csv.DictReader(table.open()):
        of_agents.setdefault((row["iteration"], row["phase"]), []).append(float(row["test_accuracy"]))
    return {when: statistics.mean(values) for when, values in of_agents.items()}


RUN = ("--opt=DIMAT", "--exp=2", "--training", "--epochs=1")
STEPS = ("--opt=SGP", "--exp=2", "--epochs=2", "--num_epochs=1")


def torchrun(count: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")


def real(one: Sequence[Sequence[str]], other: Sequence[Sequence[str]], **how: object) -> Check:
    """Points of accuracy between the ends of two real runs, each of commands one after the other."""

    def check(target: Target) -> float:
        ends = []
        for commands, hows in ((one, {}), (other, how)):
            with tempfile.TemporaryDirectory() as home:
                for options in commands:
                    name = "base_lines" if "--opt=SGP" in options else "main"
                    ends.append(scripts(target, Path(home), *options, name=name, **hows))
        return abs(ends[-1] - ends[len(one) - 1])

    return check


def nccl(target: Target) -> float:
    if torch.cuda.device_count() < 2:
        raise Skipped(f"there are {torch.cuda.device_count()} GPUs, it takes two")
    count = min(4, torch.cuda.device_count())
    return real([STEPS], [(*STEPS, "--backend=nccl")], launcher=torchrun(count))(target)


class Skipped(RuntimeError):
    """A check that this machine can't make; why."""


# What is compared, how, and by how much it may differ.
CHECKS: list[tuple[str, Check, float]] = [
    *((f"a merge by {name}: GPU, CPU", on_both("main", f"--opt={name}", merge_only=True), 1e-3) for name in METHODS),
    ("a merge with REPAIR: GPU, CPU", on_both("main", "--opt=DIMAT", "--bn_reset=repair", merge_only=True), 1e-3),
    ("a merge on local images: GPU, CPU", on_both("main", "--opt=DIMAT", "--match_data=local", merge_only=True), 1e-3),
    ("a local epoch of SGD: GPU, CPU", on_both("main", "--opt=WA", "--optim=sgd", "--lr=0.01"), 1e-2),
    ("drift correction: GPU, CPU", on_both("main", "--opt=COMMON", "--correction=LED", "--optim=sgd", "--lr=0.01"),
     1e-2),
    ("GroupNorm: GPU, CPU", on_both("main", "--opt=DIMAT", "--norm=group", "--optim=sgd", "--lr=0.01"), 1e-2),
    *((f"an epoch of {name}: GPU, CPU", on_both("base_lines", f"--opt={name}", "--epochs=1", "--num_epochs=1"), 1e-2)
      for name in BASELINES),
    *((f"{name} on the wire: GPU, CPU", of_wire(name), 0.0) for name in WIRES),
    *((f"--amp={name}: with it, without", with_option(f"--amp={name}"), 0.05) for name in AMP),
    ("--compile: with it, without", with_option("--compile"), 1e-3),
    ("a run in two sittings and in one (points)",
     real([(*RUN, "--merg_itr=3")], [(*RUN, "--merg_itr=1"), (*RUN, "--merg_itr=3", "--resume")]), 2.0),
    ("two processes on the device and one (points)",
     real([(*RUN, "--merg_itr=2", "--workers=1")], [(*RUN, "--merg_itr=2", "--workers=2")]), 2.0),
    ("four launched agents of SGP on the device, over gloo, and one process (points)",
     real([STEPS], [(*STEPS, "--backend=gloo")], launcher=torchrun(4)), 2.0),
    ("SGP over NCCL and in one process (points)", nccl, 2.0),
]


@stage(share=5)
def checks(target: Target, results: Results, limit: float) -> None:
    """Does the device compute what the CPU computes? `apart` is the largest distance of two tensors, relative to the
    largest entry (TF32 switched off), or points of accuracy; it may be as large as `most`."""
    torch.backends.cudnn.allow_tf32 = False
    for name, check, most in CHECKS:
        began = time.perf_counter()
        row: dict[str, object] = {"what": name, "apart": "", "most": most}
        try:
            row["apart"] = check(target)
            row["verdict"] = "right" if row["apart"] <= most else "OFF"
        except Skipped as reason:
            row["verdict"] = f"not tried: {reason}"
        except Exception as error:  # the others want to be seen as well
            traceback.print_exc()
            row["verdict"] = f"FAILED: {type(error).__name__}: {str(error)[:300]}"
        results.add(**row, seconds=round(time.perf_counter() - began, 1))


# --------------------------------------------------------------------------------------------------------------------
# What does it wait for?


@contextlib.contextmanager
def waits_counted(device: torch.device) -> Iterator[Counter[str]]:
    """Every call in which the host waits for the GPU, by our line."""
    counted: Counter[str] = Counter()
    if device.type != "cuda":
        yield counted
        return

    def note(message: object, *_: object, **__: object) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(str(ROOT)) and f.name != "note"
                  and "site-packages" not in f.filename]
        counted[f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno} {frames[-1].line}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counted
        finally:
            torch.cuda.set_sync_debug_mode("default")


@stage(share=2)
def waits(target: Target, results: Results, limit: float) -> None:
    """One iteration of DIMAT (merge, local epoch, evaluation): how long the device is busy, what it is busy with, and
    where the host waits for it."""
    agents = agents_of("main", target.main_options("--opt=DIMAT", "--match_samples=1000"), target.dataset(),
                       target.device)

    def one(iteration: int) -> float:
        return seconds(lambda: (iterate(agents, iteration), evaluated(agents, iteration)), target.device)

    one(1)
    results.add(what="an iteration", seconds=one(2))
    on_gpu = target.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profile:
        profiled = one(3)
    events = profile.key_averages()
    # A kernel is an event of the GPU's, and its time is in the operation on the CPU that launched it as well.
    times = ({event.key: event.self_device_time_total / 1e6 for event in events if event.device_type == DeviceType.CUDA}
             if on_gpu else {event.key: event.self_cpu_time_total / 1e6 for event in events})
    results.add(what="device busy" if on_gpu else "CPU in operations", seconds=sum(times.values()),
                share=sum(times.values()) / profiled)
    for name in sorted(times, key=times.get, reverse=True)[:12]:
        results.add(what=name[:80], seconds=times[name], share=times[name] / profiled)
    with waits_counted(target.device) as counted:
        one(4)
    for line, times_ in counted.most_common():
        results.add(what=f"waits at {line}", times=times_)


# --------------------------------------------------------------------------------------------------------------------
# How fast is it?


def graphed(setting: Setting, layout: torch.memory_format) -> Callable[[], None]:
    """The bare loop with forward, backward and step as one CUDA graph."""
    model, batches = setting.model(layout=layout), setting.preloaded(layout)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True)
    x, y = (t.clone() for t in batches[0])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    model.train()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def job() -> None:
        for images, labels in batches:
            if len(images) == len(x):
                x.copy_(images), y.copy_(labels)
                graph.replay()

    return job


def side_by_side(setting: Setting, layout: torch.memory_format) -> Callable[[], None]:
    """All agents' bare loops as one, their models stacked; `one_by_one` is the same work."""
    models = [setting.model(seed, layout) for seed in range(setting.topology.num_agents)]
    for model in models:
        model.train()
    parameters, buffers = stack_module_state(models)
    within = setting.model(layout=layout).train()
    optimizer = torch.optim.Adam(list(parameters.values()), lr=1e-3)
    batches = setting.preloaded(layout)[:: len(models)]

    def loss(parameters: dict, buffers: dict, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(within, (parameters, buffers), (x,)), y)

    def job() -> None:
        for x, y in batches:
            optimizer.zero_grad(set_to_none=True)
            losses = vmap(loss, in_dims=(0, 0, None, None))(parameters, buffers, x, y)
            losses.sum().backward()
            optimizer.step()

    return job


def one_by_one(setting: Setting, layout: torch.memory_format) -> Callable[[], None]:
    agents = setting.topology.num_agents
    jobs = [bare_training(setting, layout, seed=seed, share=agents) for seed in range(agents)]

    def job() -> None:
        for one in jobs:
            one()

    return job


@stage(share=5)
def throughput(target: Target, results: Results, limit: float) -> None:
    """An epoch over all images of one model, batch 100, and a merge of all agents on 2,000 of them: bare loops and
    ours; medians of three. `images/s` counts each image that a model sees once."""
    began = time.perf_counter()
    dataset = target.dataset().to(target.device)
    setting = Setting(dataset, make_topology("ring", target.agents), target.width, 3, "all", compile=False)
    count, last = len(dataset.train), LAYOUTS["channels last"]

    def timed(what: str, job: Callable[[], Callable], images: int = count, **more: object) -> float:
        if time.perf_counter() - began > 0.8 * limit:
            results.add(what=what, seconds="no time left")
            return float("nan")
        try:
            spent = statistics.median(in_turns({"": job()}, 3, target.device)[""])
        except Exception as error:  # what one backend lacks the others may have
            traceback.print_exc()
            results.add(what=what, seconds=f"FAILED: {type(error).__name__}: {str(error)[:200]}")
            return float("nan")
        results.add(what=what, seconds=spent, **{"images/s": round(images / spent)}, **more)
        return spent

    def found(what: str, **value: float) -> None:
        """Nothing, where one of what it is made of had no time or failed."""
        if all(map(math.isfinite, value.values())):
            results.add(what=what, **value)

    bare = min(timed(f"bare training loop, {name}", lambda layout=layout: bare_training(setting, layout))
               for name, layout in LAYOUTS.items())
    epoch = timed("our local epoch", lambda: local_epoch(setting))
    found("our local epoch : bare training loop", ratio=epoch / bare)
    matched = replace(setting, dataset=with_first(dataset, 2000))
    passes = 3 * target.agents * len(matched.dataset.train)
    bare = timed("bare forward passes of a merge", lambda: bare_passes(matched, last), passes)
    ours = timed("our DIMAT merge", lambda: dimat_merge(matched), passes)
    found("our DIMAT merge : its bare passes", ratio=ours / bare)
    whole = epoch * 300 * CELL / count + ours * 100 * CELL / len(matched.dataset.train)
    found("a cell of configs/paper/tables.yaml: 50,000 images, 300 epochs, 100 merges", hours=whole / 3600)
    shared = count // target.agents // BATCH * BATCH * target.agents
    one = timed("agents' bare loops, one after the other", lambda: one_by_one(setting, last), shared)
    both = timed("agents' bare loops, side by side (vmap)", lambda: side_by_side(setting, last), shared)
    found("side by side : one after the other", ratio=both / one)
    for amp in ("bf16", "fp16"):
        timed(f"bare training loop, {amp}, unscaled", lambda amp=amp: bare_training(setting, last, amp))
    if target.device.type == "cuda":
        timed("bare training loop as a CUDA graph", lambda: graphed(setting, last))
    compiled = replace(setting, compile=True)
    timed("bare training loop, compiled", lambda: bare_training(compiled, last))
    timed("bare training loop, bf16, compiled", lambda: bare_training(compiled, last, "bf16"))
    with tempfile.TemporaryDirectory() as home:
        write_npz(target.dataset(), Path(home, "images.npz"))
        for workers in (1, 2):
            if time.perf_counter() - began < 0.8 * limit:
                taken = measure([f"--dataset={home}/images.npz", f"--num_models={target.agents}",
                                 f"--width_multiplier={target.width}", "--epochs=1", f"--device={target.device}",
                                 f"--batch_size={BATCH}", f"--workers={workers}"], torch.get_num_threads())
                results.add(what=f"main.py, {workers} process{'es' * (workers > 1)}: training of an iteration",
                            seconds=taken["trained"])
                results.add(what=f"main.py, {workers} process{'es' * (workers > 1)}: merge and evaluation",
                            seconds=taken["merged"])


CELL = 50_000  # CIFAR's training images


def with_first(dataset: Dataset, count: int) -> Dataset:
    return replace(dataset, train=ImageSet(dataset.train.images[:count], dataset.train.labels[:count]))


@stage(share=2)
def memory(target: Target, results: Results, limit: float) -> None:
    """The most that a DIMAT merge on 1,000 images holds on the device, above models and images, against
    `--match_memory` (4 GiB) and the merged models."""
    dataset = with_first(target.dataset(), 1000).to(target.device)
    for agents in (5, 10, 20):
        setting = Setting(dataset, make_topology("ring", agents), target.width, 1, "all", compile=False)
        job = dimat_merge(setting)
        model = sum(t.nbytes for t in setting.model().state_dict().values())
        row = {"what": f"{agents} agents", "models (MiB)": agents * model / 2**20}
        if target.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(target.device)
            before = torch.cuda.memory_allocated(target.device)
            job()
            most = torch.cuda.max_memory_allocated(target.device) - before
            row |= {"held (MiB)": most / 2**20, "promised (MiB)": (4 * 2**30 + 2 * agents * model) / 2**20}
        else:
            job()
            row["held (MiB)"] = "counted on a GPU only"
        results.add(**row)


# --------------------------------------------------------------------------------------------------------------------
# The paper's cell

MERGES, EPOCHS = 12, 100


@stage(share=11)
def cell(target: Target, results: Results, limit: float) -> None:
    """ResNet-20, a ring of five, IID, `configs/paper/`: pre-training as long as fits (100 epochs at most), then twelve
    merges, two local epochs apart. Mean test accuracy of the agents after each."""
    began = time.perf_counter()
    dataset = target.dataset() if target.data else load_dataset("digits")
    named = ["--dataset", str(target.data) if target.data else "digits", "--num_models", str(target.agents),
             "--data_dist=iid", f"--device={target.device}"]
    if target.data:
        named += [f"--train_samples={target.train_samples}", f"--test_samples={target.test_samples}"]
    agents = agents_of("main", target.main_options("--opt=WA"), dataset, target.device)
    agents.train(1)
    epoch = seconds(lambda: agents.train(2), target.device)  # of all agents
    # An iteration is two epochs, and a merge of three passes, which cost at most as much as two more.
    left = limit - (time.perf_counter() - began)
    fit = left / epoch
    epochs = int(min(EPOCHS, max(1, 0.3 * fit, 0.9 * fit - 2 * MERGES * 4)))
    results.add(what="seconds of an epoch of all agents", seconds=epoch, epochs=epochs)
    with tempfile.TemporaryDirectory() as home:
        checkpoint = run_for(left, "train", [f"--config={ROOT}/configs/paper/train.yaml", *named,
                                             f"--epochs={epochs}", f"--width_multiplier={target.width}"], Path(home))
        for opt in ("dimat", "wa"):
            left = limit - (time.perf_counter() - began)
            run_for(left, "main", [f"--config={ROOT}/configs/paper/{opt}.yaml", *named[:4], f"--ckp={checkpoint}",
                                   "--exp=2", f"--merg_itr={MERGES}", "--training", f"--device={target.device}",
                                   *([] if opt == "dimat" else ["--bn_reset=both"])], Path(home))
            for table in Path(home).glob(f"results/**/{opt.upper()}/**/metrics.csv"):
                for (iteration, phase), accuracy in mean_accuracies(table).items():
                    if phase != "trained":
                        results.add(what=opt.upper(), merges=int(iteration), accuracy=accuracy)


def run_for(most: float, name: str, argv: Sequence[str], home: Path) -> str:
    """A script in `home`, interrupted when its time is over; the folder that it prints."""
    process = subprocess.Popen([sys.executable, str(ROOT / f"{name}.py"), *argv], cwd=home, stdout=subprocess.PIPE,
                               text=True)
    try:
        said, _ = process.communicate(timeout=max(5.0, most))
        if process.returncode:
            raise RuntimeError(f"{name}.py ended with status {process.returncode}")
    except subprocess.TimeoutExpired:
        process.terminate()
        said, _ = process.communicate()
    print(said, flush=True)
    folders = [line.split(": ", 1)[1] for line in said.splitlines() if line.startswith(("checkpoints: ", "results: "))]
    return str(home / folders[-1]) if folders else ""
