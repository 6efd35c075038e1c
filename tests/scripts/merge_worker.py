"""Some runs of main.py with its agents in one process, or dealt out over the processes of a launched group.

As a program, started by a launcher: python merge_worker.py CHECKPOINTS FOLDER CASES [poison] writes the runs of CASES
(names, with commas) below FOLDER and what each process did to FOLDER/process_<rank>.pt. `poison`: every process has
noise for images of agents elsewhere.
"""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

import main
from data.partition import make_partition
from experiments import dealing
from experiments.options import main_parser
from network.processes import connect, leave, rank

AGENTS = 4
CASES = {
    "DIMAT ring all": ["--opt=DIMAT", "--exp=2"],
    "DIMAT ring local": ["--opt=DIMAT", "--exp=2", "--match_data=local"],
    "DIMAT fully connected all": ["--opt=DIMAT", "--exp=1", "--wire=int8", "--match_samples=100"],
    "DIMAT fully connected robust": ["--opt=DIMAT", "--exp=1", "--robust=clip", "--match_samples=100"],
    "WM bipartite all": ["--opt=WM", "--exp=3", "--wire=bf16"],
    "WM matching local": ["--opt=WM", "--topology=random_matching", "--match_data=local"],
    "WA one-way local": ["--opt=WA", "--topology=one_peer_exponential", "--match_data=local", "--wire=fp16"],
    "WA star all": ["--opt=WA", "--topology=star", "--bn_reset=after"],
    "WA faults all": ["--opt=WA", "--topology=torus", "--link_failure=0.3", "--agent_failure=0.3"],
    "COMMON ring local": ["--opt=COMMON", "--exp=2", "--match_data=local", "--root=2"],
    "COMMON faults all": ["--opt=COMMON", "--topology=torus", "--link_failure=0.3", "--agent_failure=0.3",
                          "--wire=int8", "--match_samples=100"],
    "COMMON fully connected prior": ["--opt=COMMON", "--exp=1", "--match_prior=identity", "--match_samples=100"],
    "COMMON ring corrected": ["--opt=COMMON", "--exp=2", "--match_data=local", "--correction=LED"],
    "C2M3 ring": ["--opt=C2M3", "--exp=2", "--match_samples=100", "--bn_reset=repair"],
    "alone": ["--opt=NONE"],
}
COMMON = ["--dataset=digits", f"--num_models={AGENTS}", "--merg_itr=2", "--training", "--epochs=1",
          "--test_samples=50", "--timeout=60"]


def results_dir(folder: Path, case: str) -> Path:
    return folder / case.replace(" ", "_")


def arguments(checkpoints: Path, folder: Path, case: str) -> list[str]:
    return [*COMMON, f"--ckp={checkpoints}", *CASES[case], f"--results_dir={results_dir(folder, case)}"]


def watch_the_wire() -> Counter:
    """What this process hands to isend: bytes and messages, for every receiving rank."""
    seen: Counter = Counter()
    isend = dist.isend

    def watched(tensor, dst=None, *args, **kwargs):
        seen[dst, "bytes"] += tensor.numel() * tensor.element_size()
        seen[dst, "messages"] += 1
        return isend(tensor, dst, *args, **kwargs)

    import torch.distributed.distributed_c10d as c10d

    dist.isend = c10d.isend = watched  # batch_isend_irecv compares with the latter
    return seen


def poison_others(agents) -> None:
    """From now on, the training images of all agents but these are noise, another in every process."""
    load = dealing.load_dataset

    def poisoned(*args, **more):
        dataset = load(*args, **more)
        labels = (dataset.train.labels.numpy(), dataset.test.labels.numpy())
        parts, _ = make_partition("iid", *labels, AGENTS, num_classes=dataset.num_classes, seed=0)
        images = dataset.train.images.clone()
        generator = torch.Generator().manual_seed(rank())
        for i, part in enumerate(parts):
            if i not in agents:
                images[part] = torch.randint(256, images[part].shape, generator=generator, dtype=images.dtype)
        return dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, images=images))

    dealing.load_dataset = poisoned


if __name__ == "__main__":
    torch.set_num_threads(1)
    checkpoints, folder = map(Path, sys.argv[1:3])
    cases, poison = sys.argv[3].split(","), sys.argv[4:] == ["poison"]
    seen, done = watch_the_wire(), {}
    with connect(AGENTS, torch.device("cpu"), "gloo", timeout=60) as network:
        if poison:
            poison_others(network.agents)
        for case in cases:
            before = Counter(seen)
            o = vars(main_parser().parse_args(arguments(checkpoints, folder, case)))
            main.run(o, network, torch.device("cpu"), "merge_worker")
            done[case] = dict(seen - before)
        torch.save({"agents": network.agents, "sent": done}, folder / f"process_{rank()}.pt")
    leave(0)
