"""The baselines: agents that mix their models in steps of training. `python -m base_lines --help` explains."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from agents.mixing import MixingAgents, MixSettings
from agents.run import Phase, carry_out, first_agents, first_models, say_finished
from experiments.options import Command, base_lines_parser
from experiments.parsing import parse_once, pick_device
from experiments.scripts import run_script
from experiments.settle import open_run
from experiments.steps import finished, settle, the_run
from network.processes import Network, connect, is_launched, leave, local_device, rank
from network.workers import follow_parent
from utils.memory import keep_freed_memory, memory_format


def train_together(agents: MixingAgents, iterations: Iterable[int], num_epochs: int) -> Iterator[Phase]:
    """Epochs in whose steps agents exchange and mix; an iteration is as many as lie between evaluations."""
    for k in iterations:
        for epoch in range((k - 1) * num_epochs + 1, k * num_epochs + 1):
            stats = agents.train(epoch)
        yield Phase(k, "trained", stats)


def run(o: Command, network: Network, device: torch.device, command: str) -> Path:
    """All of it, in every process alike; the first one writes."""

    def prepare() -> tuple[dict, MixingAgents]:
        made_with, files, topology = settle(o, network.agents)
        return made_with, MixingAgents(MixSettings.of(o), topology, network,
                                       *first_agents(o, network, device, files))

    made_with, agents = network.agree(prepare)
    path, config, matter = the_run(o, made_with, agents.topology)
    config["first_models"] = first_models(network, agents.states)
    config["processes"] = o["num_models"] if is_launched() else 1
    config["memory_layout"] = str(memory_format(device))  # the order of entries in an agent's memory
    num_epochs = o["num_epochs"]
    return carry_out(agents, lambda done, iterations: train_together(agents, iterations, num_epochs), o["merg_itr"],
                     lambda: open_run(o, network, command, path, config, matter), unit="epoch", units=num_epochs)


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    follow_parent()
    o = vars(parse_once(base_lines_parser(), argv))
    command = shlex.join(sys.argv if argv is None else ["base_lines.py", *argv])

    def work() -> Path:
        if not is_launched() and (done := finished(o)):
            say_finished(done[1] * o["num_epochs"], "epoch")
            return done[0]
        device = pick_device(local_device(o["device"]))
        with connect(o["num_models"], device, o["backend"], o["timeout"], one_each=True) as network:
            return run(o, network, device, command)

    code = run_script(work, "results", "give the same command with --resume (without --overwrite)", rank())
    leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
