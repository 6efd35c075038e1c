"""How a merge grows with the number of agents: time, memory, forward passes and bytes on the wire.

    python -m benchmarks.scale                 about five minutes
    python -m benchmarks.scale --quick         under a minute
    python -m benchmarks.scale --methods DIMAT --match_memory 0.01      edges taken in blocks

Each cell of the table is a process of its own with one thread: N random models of a small convolutional network with
BatchNorm are merged once over a graph on images of digits. DIMAT matches on images that all share, DIMAT-local on each
agent's own (here the same ones for all, which costs as much). Its columns:

seconds     CPU seconds of the process, which other work on the machine disturbs little; the median of the merges
ms/edge     that for each undirected edge, and as a ratio to the graph's and method's first cell
MB, kB/edge what the process holds at its peak above what it holds before the merge (the models, the images, the
            matrix): the merged models and all that is in between; the ratio as before
passes      forward passes over the images for each agent: to re-estimate BatchNorm, and to match
sent MB     what all agents together would send to their neighbours, in fp32

Below each graph and method: the exponents a of time ~ edges^a and memory ~ edges^a, by least squares over all its cells
and between the last two. 1 is linear in the edges; below 1 part of it is the agents', of whom an exponential graph has
ever fewer for an edge, or the process's. Then what DIMAT's matching holds at its peak against what Matching's `memory`
promises: the tensors counted, of --promise_agents ResNet-20 on a ring and fully connected, and the CPU seconds and
passes against those without a limit. At last what one agent of 10,000 needs the wire for.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import merging
from data.batches import Batches
from data.datasets import load_dataset
from merging.activation_matching import Comparison, similarities
from merging.permutation import derive_spec
from merging.tracing.watch import tensors_of
from models import build_model
from network.processes import taken
from network.topology import DIRECTED, TOPOLOGIES, directed_exponential, make_topology
from network.wire import WIRES, wire_bytes

METHODS = ("DIMAT", "DIMAT-local", "WM", "WA")
BATCH = 100
AT_LEAST = 0.5  # seconds of merges that a time is taken from


class TinyNet(nn.Module):
    """Digits to logits by two convolutions; counts the images that go in, by whether BatchNorm trains."""

    seen: ClassVar[Counter[bool]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        )
        self.head = nn.Linear(4 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        TinyNet.seen[self.body[1].training] += len(x)
        return self.head(self.body(x))


@dataclass(frozen=True)
class Cell:
    graph: str
    method: str
    agents: int
    images: int
    repeats: int
    match_memory: int | None


@dataclass(frozen=True)
class Cost:
    """seconds: CPU; memory, sent: bytes; passes: of re-estimation and of matching, for each agent."""

    edges: int
    seconds: float
    memory: int
    passes: tuple[float, float]
    sent: int


def measure(cell: Cell) -> Cost:
    """In this process, which has done nothing else before."""
    torch.set_num_threads(1)
    dataset = load_dataset("digits", train_samples=cell.images)
    batches = [x for x, _ in Batches(dataset, dataset.train, None, BATCH)]
    model, weights = TinyNet(), make_topology(cell.graph, cell.agents).weights(0)
    takes = taken(weights)
    edges = int((takes | takes.T).sum()) // 2
    if not edges:
        raise SystemExit(f"error: {cell.agents} agents on {cell.graph} have no edges")
    spec = derive_spec(model, batches[0][:1])
    torch.manual_seed(0)
    states = [TinyNet().state_dict() for _ in range(cell.agents)]
    method, _, local = cell.method.partition("-")

    def merge(agents: int, weights: np.ndarray) -> merging.Merged:
        data = {"local_batches": [batches] * agents} if local else {"batches": batches}
        return merging.merge(states[:agents], weights, method, model=model, spec=spec,
                             matching=merging.Matching(memory=cell.match_memory), **data)

    merge(min(3, cell.agents), make_topology("ring", min(3, cell.agents)).pi)  # what is done once in a process
    before = start_of_peak()
    TinyNet.seen.clear()
    began = time.process_time()
    merge(cell.agents, weights)
    times = [time.process_time() - began]
    memory = peak() - before
    passes = (TinyNet.seen[True] / cell.images / cell.agents, TinyNet.seen[False] / cell.images / cell.agents)
    while len(times) < cell.repeats or sum(times) < AT_LEAST:
        began = time.process_time()
        merge(cell.agents, weights)
        times.append(time.process_time() - began)
    sent = int(takes.sum()) * wire_bytes(model.state_dict(), "fp32")
    return Cost(edges, statistics.median(times), memory, passes, sent)


def peak() -> int:
    """The most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def start_of_peak() -> int:
    """What this process holds; on Linux the peak counts from here on, and freed memory goes back first."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def in_a_process(cell: Cell) -> Cost:
    """`measure` in a fresh process, so that no cell sees what another has allocated."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "data.datasets", "merging", "models", "network.topology"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(cell, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit(f"error: {cell} has not come to its end") from None
    finally:
        process.join()


def report(cell: Cell, there: Connection) -> None:
    there.send(measure(cell))


def exponent(costs: Sequence[Cost], of: Callable[[Cost], float]) -> float:
    """a of `of` ~ edges^a."""
    return float(np.polyfit(np.log([cost.edges for cost in costs]), np.log([of(cost) for cost in costs]), 1)[0])


def table(graph: str, method: str, options: argparse.Namespace) -> None:
    """A graph's and method's rows, as they come in, and their exponents."""
    costs: list[Cost] = []
    limit = None if options.match_memory is None else int(options.match_memory * 2**30)
    for agents in options.agents:
        cost = in_a_process(Cell(graph, method, agents, options.images, options.repeats, limit))
        costs.append(cost)
        time_each, memory_each = [c.seconds / c.edges for c in costs], [c.memory / c.edges for c in costs]
        print(f"{graph:<14} {method:<12}{agents:>6}{cost.edges:>8}{cost.seconds:>9.2f}{1e3 * time_each[-1]:>9.2f}"
              f"{time_each[-1] / time_each[0]:>7.2f}{cost.memory / 1e6:>9.2f}{memory_each[-1] / 1e3:>9.1f}"
              f"{memory_each[-1] / memory_each[0]:>7.2f}{cost.passes[0]:>7.2f} + {cost.passes[1]:<6.2f}"
              f"{cost.sent / 1e6:>9.2f}", flush=True)
    if len({cost.edges for cost in costs[-2:]}) > 1:
        for what, of in (("time", attrgetter("seconds")), ("memory", attrgetter("memory"))):
            print(f"{'':27}{what} ~ edges^{exponent(costs, of):.2f}, the last step ^{exponent(costs[-2:], of):.2f}")
        print(flush=True)


class Held(TorchDispatchMode):
    """Within it, `peak` is the most bytes of new tensors that were there at a time (in this thread)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = self.sum = 0

    def __torch_dispatch__(self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None):
        result = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(x.untyped_storage()) for x in tensors_of((args, kwargs))}
        for x in tensors_of(result):
            if (storage := StorageWeakRef(x.untyped_storage())) not in given and storage not in self.sizes:
                self.sizes[storage] = x.untyped_storage().nbytes()
                self.sum += self.sizes[storage]
        if self.sum > self.peak:  # only then does it matter what is gone
            self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
            self.sum = sum(self.sizes.values())
            self.peak = max(self.peak, self.sum)
        return result


class Counted(list):
    """Batches; how often they were read."""

    passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return super().__iter__()


def against_the_promise(agents: int, width: int, shares: Sequence[float]) -> None:
    """Peaks of matching, limited to shares of what it holds without a limit."""
    models = [build_model("resnet20", 10, width_multiplier=width) for _ in range(2)]
    states, x = [models[k % 2].state_dict() for k in range(agents)], torch.randn(32, 3, 32, 32)
    spec = derive_spec(models[0], x[:1], check=False)
    print(f"\n{f'{agents} ResNet-20 width {width}':<30}{'promised MB':>14}{'held MB':>10}{'ratio':>8}{'passes':>8}"
          f"{'seconds, ratio':>16}")
    for graph in ("ring", "fully_connected"):
        edges = [(int(i), int(j)) for i, j in np.argwhere(np.triu(make_topology(graph, agents).connectivity, 1))]
        whole, first = 0, 0.0
        for share in (None, *shares):
            memory, batches, held = None if share is None else int(share * whole), Counted([x]), Held()
            began = time.process_time()
            with held:
                for _ in similarities(spec, models[0], states, edges, batches, Comparison(memory=memory)):
                    pass
            took = time.process_time() - began
            whole, first = whole or held.peak, first or took
            print(f"{graph:<30}{'-' if memory is None else f'{memory / 1e6:.1f}':>14}{held.peak / 1e6:>10.1f}"
                  f"{held.peak / (memory or whole):>8.2f}{batches.passes:>8}{took / first:>16.2f}", flush=True)


def on_the_wire(agents: int = 10_000) -> None:
    """What one agent sends in a merge, and receives, for real networks; N matters only to the degree."""
    hops = directed_exponential(agents)
    degrees = {"one peer": 1, "ring": 2, "exponential": len({hop % agents for h in hops for hop in (h, -h)})}
    print(f"{'an agent of ' + format(agents, ',') + ', 100 classes':<30}{'':26}{'100 Mbit/s':>36}   {'10 Gbit/s':>36}\n"
          f"{'':<30}{'wire':>6}{'MB a model':>12}{'':>8}" + ("".join(f"{name:>12}" for name in degrees) + "   ") * 2)
    for name, network in (("ResNet-20 width 8", "resnet20"), ("ResNet-50", "resnet50")):
        state = build_model(network, 100, width_multiplier=8).state_dict()
        for wire in WIRES:
            size = wire_bytes(state, wire)
            seconds = "   ".join("".join(f"{degree * size * 8 / rate:>10.3f} s" for degree in degrees.values())
                                 for rate in (1e8, 1e10))
            print(f"{name:<30}{wire:>6}{size / 1e6:>12.2f}{'':>8}{seconds}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--agents", nargs="+", type=int, default=[10, 50, 200, 1000], help="how many, in turn")
    parser.add_argument("--graphs", nargs="+", choices=[*TOPOLOGIES, *DIRECTED], default=["ring", "exponential"],
                        metavar="NAME", help="names that --topology takes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="how agents merge")
    parser.add_argument("--images", type=int, default=100, help="digits that matching and BatchNorm read")
    parser.add_argument("--repeats", type=int, default=1, help="timed merges of a cell, at least (half a second's)")
    parser.add_argument("--match_memory", type=float, default=None, metavar="GB", help="as in main; default: no limit")
    parser.add_argument("--promise_agents", type=int, default=6, help="agents whose matching is held to a memory")
    parser.add_argument("--promise_width", type=int, default=2, help="width multiplier of their ResNet-20")
    parser.add_argument("--quick", action="store_true", help="10, 20 and 40 agents")
    options = parser.parse_args()
    if options.quick:
        options.agents = [10, 20, 40]
    size = wire_bytes(TinyNet().state_dict(), "fp32")
    print(f"models of {size:,} bytes, {options.images} images in batches of {BATCH}, one thread, torch "
          f"{torch.__version__}\n")
    print(f"{'graph':<15}{'method':<12}{'agents':>6}{'edges':>8}{'seconds':>9}{'ms/edge':>9}{'ratio':>7}{'MB':>9}"
          f"{'kB/edge':>9}{'ratio':>7}{'passes':>12}{'sent MB':>14}")
    for graph in options.graphs:
        for method in options.methods:
            table(graph, method, options)
    torch.set_num_threads(1)
    against_the_promise(options.promise_agents, options.promise_width, (0.5, 0.25, 0.1))
    on_the_wire()


if __name__ == "__main__":
    main()
