"""How much the main job costs above the arithmetic it can't avoid.

    python -m benchmarks.main_job
    python -m benchmarks.main_job --data_dir=datasets      CIFAR-10 images in place of random ones

Every ratio compares two things timed in turns within this run, so that a busy machine slows both alike; the table gives
medians. With ResNet-20 on 32x32 images:

1. a local epoch of ours (shuffled, augmented, counted) against a bare forward/backward/step loop over the same images,
   already normalised and batched in memory, in the fastest of the memory formats tried;
2. a DIMAT merge (ring, `bn_reset both`, augmented) against the bare forward passes it needs: each agent's model twice
   and each merged model once;
3. one whole iteration (merge, evaluation, a local epoch of every agent, evaluation) in seconds;
4. on a CPU, real runs of main.py with `--workers=1` and with the default workers, once with the paper's settings and
   once with ours: a merge with its evaluation against the bare forward passes of both (one process, all threads), and
   an iteration with the default workers against one with `--workers=1`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import merging
from benchmarks.processes import ROOT, measure
from data.batches import Batches
from data.datasets import Dataset, ImageSet, load_dataset
from experiments.options import main_parser
from merging.activation_matching import READ_AT
from merging.averaging import weighted_average
from models import build_model
from models.training import autocast, evaluate, make_optimizer, snapshot, train_epoch
from network.topology import Topology, make_topology
from utils.memory import keep_freed_memory, memory_format
from utils.seeds import generator

PARTS = ["epoch", "merge", "iteration", "runs"]
BATCH = 100
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def random_images(train: int, test: int) -> Dataset:
    """A data set in CIFAR-10's shape. The time doesn't depend on what the pixels show."""
    g = generator(0, purpose="benchmark")

    def images(n: int) -> ImageSet:
        return ImageSet(torch.randint(256, (n, 3, 32, 32), generator=g).to(torch.uint8), torch.arange(n) % 10)

    half = (0.5, 0.5, 0.5)
    return Dataset("random", images(train), images(test), 10, half, half, flip=True, padding=4)


def cifar10(data_dir: str, train: int, test: int) -> Dataset:
    """Class-balanced slices of CIFAR-10."""
    return load_dataset("cifar10", data_dir, train_samples=train, test_samples=test)


def seconds(job: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of `job`, waiting for the device."""
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turns(jobs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Each job's times: one warm-up round, then `repeats` rounds of all jobs, one after the other."""
    times = {name: [] for name in jobs}
    for round_ in range(repeats + 1):
        for name, job in jobs.items():
            spent = seconds(job, device)
            if round_:
                times[name].append(spent)
    return times


@dataclass(frozen=True)
class Setting:
    """What all three measurements share."""

    dataset: Dataset
    topology: Topology
    width: int
    repeats: int
    match_at: str
    compile: bool

    @property
    def device(self) -> torch.device:
        return self.dataset.train.images.device

    def model(self, seed: int = 0, layout: torch.memory_format | None = None) -> nn.Module:
        torch.manual_seed(seed)
        model = build_model("resnet20", self.dataset.num_classes, width_multiplier=self.width)
        return model.to(self.device, memory_format=layout or memory_format(self.device))

    def fast(self, model: nn.Module) -> nn.Module:
        """What trains the model: itself or, sharing its tensors, its compiled form."""
        return torch.compile(model) if self.compile else model

    def augmented(self, indices: Tensor | None = None, agent: int = 0) -> Batches:
        def make_generator() -> torch.Generator:
            return generator(0, agent, purpose="benchmark")

        return Batches(
            self.dataset, self.dataset.train, indices, BATCH, shuffle=True, augment=True, make_generator=make_generator
        )

    def preloaded(self, layout: torch.memory_format) -> list[tuple[Tensor, Tensor]]:
        batches = Batches(self.dataset, self.dataset.train, None, BATCH)
        return [(x.clone(memory_format=layout), y.clone()) for x, y in batches]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(model, "adam", 1e-3, momentum=0.0, weight_decay=0.0)


def bare_training(setting: Setting, layout: torch.memory_format, amp: str = "none", seed: int = 0,
                  share: int = 1) -> Callable[[], None]:
    """An epoch of nothing but forward, backward and step. share: on one of so many batches only."""
    model, batches = setting.model(seed, layout), setting.preloaded(layout)[::share]
    optimizer, model = optimizer_of(model), setting.fast(model)

    def job() -> None:
        model.train()
        for x, y in batches:
            optimizer.zero_grad(set_to_none=True)
            with autocast(x.device, amp):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

    return job


def bare_passes(setting: Setting, layout: torch.memory_format, images: int = 0, evaluates: bool = False
                ) -> Callable[[], None]:
    """The forward passes of a merge: two BatchNorm re-estimations (batch statistics) and one matching per agent.

    images: so many of them in place of all; evaluates: and each merged model and their average on the test images.
    """
    model, agents = setting.model(layout=layout), setting.topology.num_agents
    batches = [x for x, _ in setting.preloaded(layout)][:-(-images // BATCH) or None]
    passes = [(True, batches)] * 2 * agents + [(False, batches)] * agents
    if evaluates:
        tests = Batches(setting.dataset, setting.dataset.test, None, BATCH)
        passes += [(False, [x.clone(memory_format=layout) for x, _ in tests])] * (agents + 1)

    @torch.inference_mode()
    def job() -> None:
        for mode, inputs in passes:
            model.train(mode)
            for x in inputs:
                model(x)

    return job


def local_epoch(setting: Setting) -> Callable[[], object]:
    model = setting.model()
    optimizer, model = optimizer_of(model), setting.fast(model)
    return lambda: train_epoch(model, setting.augmented(), optimizer)


def dimat_merge(setting: Setting) -> Callable[[], merging.Merged]:
    states = [snapshot(setting.model(agent)) for agent in range(setting.topology.num_agents)]
    model = setting.model()
    return lambda: merging.merge(
        states, setting.topology.pi, "DIMAT", setting.augmented(), model=model, bn_reset="both",
        matching=merging.Matching(at=setting.match_at),
    )


def whole_iteration(setting: Setting) -> Callable[[], None]:
    """Merge, evaluate every model and their plain average, train every agent for an epoch, evaluate again."""
    agents = range(setting.topology.num_agents)
    parts = torch.arange(len(setting.dataset.train.labels)).chunk(len(agents))
    tests = Batches(setting.dataset, setting.dataset.test, None, BATCH)
    merge, model = dimat_merge(setting), setting.model()
    fast = setting.fast(model)

    def evaluate_all(states: list[dict[str, Tensor]]) -> None:
        for state in [*states, weighted_average(states, [1 / len(agents)] * len(agents))]:
            model.load_state_dict(state)
            evaluate(model, tests)

    def job() -> None:
        merged = merge().states
        evaluate_all(merged)
        trained = []
        for agent in agents:
            model.load_state_dict(merged[agent])
            train_epoch(fast, setting.augmented(parts[agent], agent), optimizer_of(model))
            trained.append(snapshot(model))
        evaluate_all(trained)

    return job


PAPERS = f"--config={ROOT / 'configs/paper/dimat.yaml'}"


def real_runs(setting: Setting, data: Sequence[str], threads: int) -> Iterator[str]:
    """Rows of real runs of main.py, with one process and with the default number, against the passes they need."""
    for whose, flags, images in (("the paper's", [PAPERS], 0), ("our", [], main_parser().get_default("match_samples"))):
        flags = [*data, f"--num_models={setting.topology.num_agents}", f"--width_multiplier={setting.width}",
                 f"--batch_size={BATCH}", *flags, "--epochs=1"]
        bare = {name: bare_passes(setting, layout, images, evaluates=True) for name, layout in LAYOUTS.items()}
        spent: dict[str, list[float]] = {name: [] for name in (*bare, "1", "default", "1 whole", "default whole")}
        for round_ in range(setting.repeats + 1):
            for name, job in bare.items():
                spent[name].append(seconds(job, setting.device))
            for name, workers in (("1", ["--workers=1"]), ("default", [])) if round_ else ():
                taken = measure([*flags, *workers], threads)
                spent[name].append(taken["merged"])
                spent[f"{name} whole"].append(taken["merged"] + taken["trained"])
        best = min(LAYOUTS, key=lambda name: statistics.median(spent[name][1:]))

        def versus(label: str, ours: str, other: list[float], bound: float, remark: str, spent: dict = spent) -> str:
            ratio = statistics.median(a / b for a, b in zip(spent[ours], other, strict=True))
            return row(label, statistics.median(spent[ours]), statistics.median(other), ratio, bound, remark)

        for workers in ("1", "default"):
            yield versus(f"{whose} merge, workers {workers} : passes", workers, spent[best][1:], 1.2, best)
        yield versus(f"{whose} iteration, default : workers 1", "default whole", spent["1 whole"], 1.05, "--workers=1")


def write_npz(dataset: Dataset, file: Path) -> None:
    """For `--dataset=FILE.npz`."""
    parts = {"train": dataset.train, "test": dataset.test}
    np.savez_compressed(file, **{f"x_{name}": part.images.cpu().numpy() for name, part in parts.items()},
                        **{f"y_{name}": part.labels.cpu().numpy() for name, part in parts.items()}, flip=dataset.flip)


def compare(setting: Setting, label: str, bound: float, ours: Callable, bare: Callable) -> str:
    """A row of the table: our time, the bare loop's in its fastest layout, and the median ratio of the rounds."""
    jobs = {name: bare(setting, layout) for name, layout in LAYOUTS.items()}
    times = in_turns({**jobs, "ours": ours(setting)}, setting.repeats, setting.device)
    best = min(LAYOUTS, key=lambda name: statistics.median(times[name]))
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times[best], strict=True))
    return row(label, statistics.median(times["ours"]), statistics.median(times[best]), ratio, bound, best)


def row(label: str, ours: float, other: float, ratio: float, bound: float, remark: str) -> str:
    return f"{label:<46}{ours:>9.3f}{other:>9.3f}{ratio:>8.3f}{bound:>8.2f}   {remark}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.main_job",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="part", help=f"which of {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the medians are shown")
    parser.add_argument("--train_samples", type=int, default=2000, help="training images of all agents together")
    parser.add_argument("--test_samples", type=int, default=500, help="test images")
    parser.add_argument("--agents", type=int, default=5, help="agents on the ring")
    parser.add_argument("--width_multiplier", type=int, default=1, help="width of ResNet-20")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--match_at", choices=READ_AT, default="all", help="where merges read features")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training loops of both sides")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--data_dir", default=None, help="take CIFAR-10 from this folder, not random images")
    keep_freed_memory()
    options = parser.parse_args()
    if odd := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {odd[0]}: choose from {', '.join(PARTS)}")
    torch.set_num_threads(options.threads)
    sizes = (options.train_samples, options.test_samples)
    dataset = cifar10(options.data_dir, *sizes) if options.data_dir else random_images(*sizes)
    setting = Setting(
        dataset.to(torch.device(options.device)),
        make_topology("ring", options.agents),
        options.width_multiplier,
        options.repeats,
        options.match_at,
        options.compile,
    )
    print(f"ResNet-20 width {setting.width}, {sizes[0]} + {sizes[1]} {dataset.name} images of 32x32, batch {BATCH}, "
          f"ring of {options.agents}, features at {setting.match_at}\n{setting.device}, {options.threads} threads"
          f"{', training compiled' * setting.compile}, torch {torch.__version__}")
    print(f"{'medians':<46}{'ours (s)':>9}{'them (s)':>9}{'ratio':>8}{'bound':>8}   the other side")
    if "epoch" in options.parts:
        print(compare(setting, "a local epoch : bare training loop", 1.05, local_epoch, bare_training), flush=True)
    if "merge" in options.parts:
        print(compare(setting, "a DIMAT merge : its forward passes", 1.2, dimat_merge, bare_passes), flush=True)
    if "iteration" in options.parts:
        times = in_turns({"ours": whole_iteration(setting)}, setting.repeats, setting.device)["ours"]
        print(f"{'a whole iteration':<46}{statistics.median(times):>9.3f}")
    if "runs" in options.parts and options.device == "cpu":
        with tempfile.TemporaryDirectory() as home:
            data = ["--dataset=cifar10", f"--data_dir={options.data_dir}", f"--train_samples={sizes[0]}",
                    f"--test_samples={sizes[1]}"]
            if not options.data_dir:
                data = [f"--dataset={home}/random.npz"]
                write_npz(dataset, Path(home, "random.npz"))
            for line in real_runs(setting, data, options.threads):
                print(line, flush=True)


if __name__ == "__main__":
    main()
