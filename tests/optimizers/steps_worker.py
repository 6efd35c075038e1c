"""Some steps of every method over every kind of graph: in one process, or as one process of a launched group.

As a program, started by a launcher: python steps_worker.py FOLDER writes FOLDER/agent_<i>.pt.
"""

import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from network.processes import connect, leave
from network.topology import DIRECTED, make_topology
from optimizers import BASELINES, LOCAL, Agent, FlatModel, Settings, neighbourhood, take_step

AGENTS, STEPS, LOCAL_STEPS = 4, 4, 2
CASES = [
    *[(name, topology, form) for name in BASELINES for topology in ("ring", "bipartite", "fully_connected")
      for form in (("paper", "authors") if name == "CGA" else ("paper",))],
    *[("SGP", topology, "paper") for topology in DIRECTED],
    *[(name, "ring", "local") for name, baseline in BASELINES.items() if not baseline.every_step],
]


def graph_of(name, topology):
    return BASELINES[name].graph(make_topology(topology, AGENTS))


def model(agent):
    torch.manual_seed(agent)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
                         nn.Linear(144, 10))


def batches(agent):
    g = torch.Generator().manual_seed(agent)
    while True:
        yield torch.randn(5, 1, 8, 8, generator=g), torch.randint(10, (5,), generator=g)


def run_cases(network, watch=lambda: None):
    """case -> agent -> (vector after the last step, bytes sent, bytes received, what `watch` says)."""
    results = {}
    for name, topology, form in CASES:
        graph = graph_of(name, topology)
        agents = {i: Agent(i, FlatModel(model(i)), batches(i)) for i in network.agents}
        before = dict(network.sent), dict(network.received), watch()
        momentum = 0.9 if BASELINES[name].momentum else 0.0
        settings = Settings(0.1, momentum, "authors" if form == "authors" else "paper",
                            "tensor" if form == "authors" else "model", LOCAL_STEPS if form == "local" else 1)
        for step in range(STEPS):
            local = (step + 1) % settings.local_steps
            hoods = {i: LOCAL if local else neighbourhood(graph.weights(step), i) for i in agents}
            take_step(BASELINES[name], agents, hoods, settings, network)
        after = watch()
        results[f"{name} {topology} {form}"] = {
            i: (agent.x.clone(), network.sent[i] - before[0][i], network.received[i] - before[1][i],
                after and dict(after - before[2]))
            for i, agent in agents.items()}
    return results


def watch_the_wire():
    """Counts the calls of torch.distributed and the bytes that isend and irecv are given."""
    seen = Counter()

    def watched(name, function):
        def call(*args, **kwargs):
            seen[name] += 1
            if name in ("isend", "irecv"):
                seen[f"{name} bytes"] += args[0].numel() * args[0].element_size()
            return function(*args, **kwargs)
        return call

    for name in ("isend", "irecv", "send", "recv", "broadcast", "all_reduce", "all_gather", "reduce", "gather",
                 "scatter", "all_gather_object", "gather_object", "scatter_object_list", "barrier", "all_to_all"):
        setattr(dist, name, watched(name, getattr(dist, name)))
    import torch.distributed.distributed_c10d as c10d

    c10d.isend, c10d.irecv = dist.isend, dist.irecv  # batch_isend_irecv compares with these
    return lambda: dict(seen)


if __name__ == "__main__":
    torch.set_num_threads(1)
    watch = watch_the_wire()
    with connect(AGENTS, torch.device("cpu"), "gloo", timeout=60) as network:
        results = run_cases(network, lambda: Counter(watch()))
        torch.save(results, Path(sys.argv[-1]) / f"agent_{network.agents[0]}.pt")
    assert os.environ["MASTER_PORT"] == "0"
    leave(0)
