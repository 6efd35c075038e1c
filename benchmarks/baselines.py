"""How much the baselines' steps cost above their gradients, and one flat exchange against a collective per parameter.

    python -m benchmarks.baselines

Every ratio compares two things timed in turns within this run; the table gives medians.

1. A step of every method (ResNet-20, batches of 100 images of 32x32, two neighbours) against the bare forward and
   backward passes that it needs: one, and for CGA one more for each neighbour. The neighbours' messages are there at
   once, so that communication doesn't count.
2. On a ring of processes over gloo, our exchange of models against what the published code does: one all_gather for
   every parameter over all ranks, of which everybody keeps its neighbours' shares.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.main_job import in_turns
from models import build_model
from network.processes import Mail, ManyProcesses, Network
from network.topology import make_topology
from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step
from utils.memory import keep_freed_memory, memory_format

BATCH, NEIGHBOURS = 100, (1, 2)


class Instant(Network):
    """One agent whose neighbours' messages, copies of what it sends, are there at once."""

    agents = (0,)

    def exchange(self, mails: Mapping[int, Mail]) -> dict:
        return {0: _There({j: mails[0].to[j] for j in mails[0].sources})}


class _There:
    def __init__(self, vectors: dict[int, Tensor]) -> None:
        self.vectors = vectors

    def wait(self) -> dict[int, Tensor]:
        return self.vectors


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", 10, width_multiplier=width).to(memory_format=memory_format(torch.device("cpu")))


def images() -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=memory_format(torch.device("cpu")))
    return x, torch.arange(BATCH) % 10


def bare_passes(width: int, passes: int, steps: int) -> Callable[[], None]:
    model, (x, y) = network(width).train(), images()

    def job() -> None:
        for _ in range(passes * steps):
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()

    return job


def steps_of(name: str, width: int, steps: int) -> Callable[[], None]:
    agent = Agent(0, FlatModel(network(width)), itertools.repeat(images()))
    hood = neighbourhood(make_topology("ring", 3).pi, 0)
    settings, wire = Settings(1e-4, 0.9 if BASELINES[name].momentum else 0.0), Instant()

    def job() -> None:
        for _ in range(steps):
            take_step(BASELINES[name], {0: agent}, {0: hood}, settings, wire)

    return job


def overheads(width: int, steps: int, repeats: int) -> None:
    print(f"{'a step : its bare passes':<36}{'ours (s)':>9}{'them (s)':>9}{'ratio':>8}{'bound':>8}")
    for name in BASELINES:
        passes = 1 + len(NEIGHBOURS) if name == "CGA" else 1
        jobs = {"ours": steps_of(name, width, steps), "bare": bare_passes(width, passes, steps)}
        times = in_turns(jobs, repeats, torch.device("cpu"))
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["bare"], strict=True))
        ours, bare = (statistics.median(times[key]) / steps for key in ("ours", "bare"))
        print(f"{f'{name} ({passes} gradients)':<36}{ours:>9.3f}{bare:>9.3f}{ratio:>8.3f}{1.05:>8.2f}", flush=True)


def exchange_worker(rank: int, processes: int, width: int, repeats: int, home: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=rank, world_size=processes)
    wire = ManyProcesses(processes, torch.device("cpu"), timedelta(seconds=60))
    flat, hood = FlatModel(network(width)), neighbourhood(make_topology("ring", processes).pi, rank)

    def flat_exchange() -> None:
        hood.mix(flat.vector, wire.exchange({rank: hood.send(flat.vector)})[rank].wait())

    def collectives() -> None:
        for parameter in flat.module.parameters():
            mine = parameter.detach()
            everyones = [torch.empty_like(mine) for _ in range(processes)]
            dist.all_gather(everyones, mine)
            hood.mix(mine, dict(enumerate(everyones)))

    def ten_times(exchange: Callable[[], None]) -> Callable[[], None]:
        def job() -> None:
            dist.barrier()
            for _ in range(10):
                exchange()

        return job

    jobs = {"flat": ten_times(flat_exchange), "collectives": ten_times(collectives)}
    times = in_turns(jobs, repeats, torch.device("cpu"))
    if rank == 0:
        ours, theirs = (statistics.median(times[key]) / 10 for key in ("flat", "collectives"))
        ratio = statistics.median(a / b for a, b in zip(times["flat"], times["collectives"], strict=True))
        print(f"{'an exchange : all_gather each tensor':<36}{ours:>9.4f}{theirs:>9.4f}{ratio:>8.3f}"
              f"{'':>8}   {processes} processes on a ring, {1 / ratio:.1f} times faster", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the medians are shown")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--processes", type=int, default=5, help="processes of the exchange")
    parser.add_argument("--width_multiplier", type=int, default=1, help="width of ResNet-20")
    options = parser.parse_args()
    keep_freed_memory()
    print(f"ResNet-20 width {options.width_multiplier}, batch {BATCH}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}")
    overheads(options.width_multiplier, options.steps, options.repeats)
    with tempfile.TemporaryDirectory() as home:
        arguments = (options.processes, options.width_multiplier, options.repeats, str(Path(home).resolve()))
        mp.spawn(exchange_worker, arguments, nprocs=options.processes)


if __name__ == "__main__":
    main()
