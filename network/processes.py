"""How agents reach their neighbours: all in one process, or dealt out to processes under torch.distributed.

Both networks carry the same things and give the same numbers; the one in a single process is the oracle of the other.
`Mail` is what the baselines exchange in every step, `share` what agents that merge exchange once per iteration.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from network.wire import State, pack, pickled, through, unpack, wire_bytes

if TYPE_CHECKING:
    from merging.divided import Team

BACKENDS = ("auto", "gloo", "nccl")


@dataclass(frozen=True)
class Mail:
    """What an agent sends in one exchange: receiver -> vector. A vector like `like` is due from every source."""

    to: Mapping[int, Tensor]
    sources: tuple[int, ...]
    like: Tensor


class Arriving(Protocol):
    """What is on its way to an agent."""

    def wait(self) -> dict[int, Tensor]:
        """source -> vector, to be read only; returns when all of them are there."""


class NeighbourLost(RuntimeError):
    """A neighbour's message did not come in time, or its process is gone."""


class Refused(ValueError):
    """Some process can't begin; all of them know why."""


class Network:
    """Carries messages between agents; `agents` are those that live in this process.

    sent, received: bytes so far of each local agent's messages to and from other agents, wherever these live.
    """

    agents: tuple[int, ...]
    is_writer = True  # the one process that writes the run folder
    recorded: tuple[int, ...]  # the agents in that run folder
    team: Team | None = None  # the processes of this run, where they may have all of its models
    may_miss = False  # whether an agent may have to do without another's model, or with an old one
    staleness = 0  # by how many iterations it may be old

    def __init__(self) -> None:
        self.old: dict[int, int] = {}  # of which iteration a model is that `share` returned, where not of its own
        # Agent -> a label of its model, to be set before it is shared; of others', where one may miss them.
        self.labels: dict[int, int] = {}
        self.sent = dict.fromkeys(self.agents, 0)
        self.received = dict.fromkeys(self.agents, 0)

    def exchange(self, mails: Mapping[int, Mail]) -> dict[int, Arriving]:
        """Take every local agent's mail, which may be overwritten afterwards, and return at once."""
        raise NotImplementedError

    def share(self, iteration: int, models: Mapping[int, State], mixing: np.ndarray, wire: str, like: State,
              turn: int = 0, with_team: bool = False) -> dict[int, State]:
        """Agent -> model: all that the agents here take by `mixing` (N, N), entry i, j what i takes of j's, theirs too.

        models: of the agents here that somebody takes; like: a state dict of the same architecture; wire: a name in
        `network.wire.WIRES`. What comes back has been through it, so that everybody merges the same; nothing in it may
        be written to. turn: after how many others' turns these models are sent, who may each keep them waiting.
        with_team: all processes of the team get what anybody takes. It is on one machine and counts as nothing sent.
        """
        raise NotImplementedError

    def meet(self, run: str, neighbours: Collection[int], last: int, like: State, wire: str, fresh: bool,
             overwrite: bool) -> AbstractContextManager:
        """Take the agents' place in the run that `run` describes, where that is not a matter of who was started."""
        return contextlib.nullcontext()

    def catch_up(self, iteration: int, weights: Callable[[int], np.ndarray]) -> int:
        """The iteration to go on with instead of this one: another only where the others have gone on without it."""
        return iteration

    def gather(self, things: Mapping[int, Any]) -> dict[int, Any]:
        """Every agent's thing to the writer (elsewhere: {})."""
        return dict(things)

    def scatter(self, things: Mapping[int, Any] | None) -> dict[int, Any]:
        """The writer's things, one for each agent, to the process where the agent lives."""
        return dict(things)

    def agree(self, prepare: Callable[[], Any]) -> Any:
        """`prepare()` in every process. Where it fails in one, Refused with the first reason in all of them."""
        return prepare()

    def _count(self, agent: int, mail: Mail) -> None:
        self.sent[agent] += sum(v.numel() * v.element_size() for v in mail.to.values())
        self.received[agent] += len(mail.sources) * mail.like.numel() * mail.like.element_size()

    def _count_models(self, takes: np.ndarray, size: int) -> None:
        """`takes` (N, N) bool: a model of `size` bytes goes from j to i."""
        for agent in self.agents:
            self.sent[agent] += size * int(takes[:, agent].sum())
            self.received[agent] += size * int(takes[agent].sum())


def taken(mixing: np.ndarray) -> np.ndarray:
    """(N, N) bool: i takes the model of another agent j."""
    return (mixing != 0) & ~np.eye(len(mixing), dtype=bool)


class OneProcess(Network):
    """All agents here: the messages of an exchange lie in a dictionary."""

    def __init__(self, num_agents: int) -> None:
        self.agents = self.recorded = tuple(range(num_agents))
        super().__init__()

    def share(self, iteration: int, models: Mapping[int, State], mixing: np.ndarray, wire: str, like: State,
              turn: int = 0, with_team: bool = False) -> dict[int, State]:
        self._count_models(taken(mixing), wire_bytes(like, wire))
        return {j: through(state, wire) for j, state in models.items()}

    def exchange(self, mails: Mapping[int, Mail]) -> dict[int, Arriving]:
        copies: dict[int, Tensor] = {}
        for agent, mail in mails.items():
            self._count(agent, mail)
            copies |= {id(vector): vector.clone() for vector in mail.to.values() if id(vector) not in copies}
        box = {(i, j): copies[id(vector)] for i, mail in mails.items() for j, vector in mail.to.items()}
        return {j: _Here({i: box[i, j] for i in mail.sources}) for j, mail in mails.items()}


@dataclass(frozen=True)
class _Here:
    vectors: dict[int, Tensor]

    def wait(self) -> dict[int, Tensor]:
        return self.vectors


def homes(num_agents: int, world: int) -> dict[int, int]:
    """Agent -> rank: blocks of neighbouring numbers; a small one first, as rank 0 evaluates the average too."""
    return {i: ((i + 1) * world - 1) // num_agents for i in range(num_agents)}


def _living_at(rank: int, home: Mapping[int, int]) -> str:
    return ", ".join(str(i) for i, r in home.items() if r == rank)


def _named(rank: int, home: Mapping[int, int]) -> str:
    agents = _living_at(rank, home)
    return f"rank {rank} (agent{'s' * (',' in agents)} {agents})"


class ManyProcesses(Network):
    """Agents dealt out to the ranks in blocks: point to point, non-blocking.

    Over gloo, vectors of a GPU travel through pinned memory; over nccl, which needs a GPU for each rank, directly.
    """

    def __init__(self, num_agents: int, device: torch.device, timeout: timedelta, one_user: bool = False) -> None:
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.recorded = tuple(range(num_agents))
        self.home = homes(num_agents, world)
        self.agents = tuple(i for i, r in self.home.items() if r == self.rank)
        self.is_writer = self.rank == 0
        self.device, self.timeout = device, timeout
        self.through_cpu = device.type != "cpu" and dist.get_backend() == "gloo"
        # Figures and models for the run folder are Python objects: they go over gloo whatever carries the steps.
        self.control = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo",
                                                                                           timeout=timeout)
        self.team = _Team(self) if one_user else None
        super().__init__()

    def exchange(self, mails: Mapping[int, Mail]) -> dict[int, Arriving]:
        """For one agent in each process, whose number is its rank."""
        mail = mails[self.rank]
        self._count(self.rank, mail)
        staged = self._staged(mail.to.values())
        arrivals = {j: self._empty(mail.like) for j in mail.sources}
        works = self._start([(j, vector, f"agent {j}'s message") for j, vector in arrivals.items()],
                            [(j, staged[id(v)], f"agent {j} to take its message") for j, v in mail.to.items()])
        return {self.rank: _OnItsWay(self, arrivals, works, list(staged.values()))}

    def share(self, iteration: int, models: Mapping[int, State], mixing: np.ndarray, wire: str, like: State,
              turn: int = 0, with_team: bool = False) -> dict[int, State]:
        takes, size = taken(mixing), wire_bytes(like, wire)
        self._count_models(takes, size)
        if with_team:
            takes = np.repeat(takes.any(0)[None], len(takes), 0)
        readers = {j: sorted({self.home[i] for i in np.flatnonzero(takes[:, j]).tolist()} - {self.home[j]})
                   for j in self.recorded}
        packed = {j: pack(models[j], wire) for j in self.agents if readers[j]}
        staged = self._staged(packed.values()) if self.through_cpu else {id(v): v for v in packed.values()}
        arrivals = {j: self._empty(torch.empty(size, dtype=torch.uint8, device=self.device))
                    for j in self.recorded if self.rank in readers[j]}
        # A rank sends its agents' models in their order, which is how another one tells them apart.
        works = self._start(
            [(self.home[j], vector, f"agent {j}'s model of iteration {iteration}") for j, vector in arrivals.items()],
            [(r, staged[id(vector)], f"the process of agents {self._living_at(r)} to take agent {j}'s model of "
              f"iteration {iteration}") for j, vector in packed.items() for r in readers[j]])
        mine = {j: through(state, wire, packed.get(j)) for j, state in models.items()}
        arrived = _OnItsWay(self, arrivals, works, list(staged.values())).wait()
        return mine | {j: unpack(vector, like, wire) for j, vector in arrived.items()}

    def _living_at(self, rank: int) -> str:
        return _living_at(rank, self.home)

    def _staged(self, vectors: Iterable[Tensor]) -> dict[int, Tensor]:
        """id -> a copy from which the vector leaves: whoever handed it in may write to it again."""
        staged: dict[int, Tensor] = {}
        for vector in vectors:
            if id(vector) not in staged:
                staged[id(vector)] = self._empty(vector).copy_(vector, non_blocking=self.device.type == "cuda")
        if self.through_cpu and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the copies must be whole before they leave
        return staged

    def _start(self, receives: list[tuple[int, Tensor, str]],
               sends: list[tuple[int, Tensor, str]]) -> list[tuple[str, dist.Work]]:
        """Start (rank, vector, what is waited for) and return at once."""
        operations = [dist.P2POp(dist.irecv, vector, r) for r, vector, _ in receives]
        operations += [dist.P2POp(dist.isend, vector, r) for r, vector, _ in sends]
        all_of_them = f"the processes of agents {', '.join(sorted({self._living_at(r) for r, *_ in receives + sends}))}"
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise self._lost(all_of_them, error, waited=0) from None
        names = [name for *_, name in receives + sends]
        if len(works) != len(names):  # nccl makes one piece of work of them all
            names = [all_of_them] * len(works)
        return list(zip(names, works, strict=True))

    @contextlib.contextmanager
    def _everybody(self) -> Iterator[None]:
        """Around what all processes do together."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise self._lost("all other agents", error, time.monotonic() - began) from None

    def _empty(self, like: Tensor) -> Tensor:
        if not self.through_cpu:
            return torch.empty_like(like)
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self.device.type == "cuda")

    def _is_up(self, waited: float) -> bool:
        return waited >= self.timeout.total_seconds() - 0.1

    def _lost(self, what: str, error: Exception, waited: float) -> NeighbourLost:
        reason = _first_line(error)
        if self._is_up(waited):
            reason = f"nothing within --timeout {self.timeout.total_seconds():g} s, so one has stalled or is very slow"
        who = f"agent{'s' * (len(self.agents) > 1)} {self._living_at(self.rank)}"
        return NeighbourLost(f"{who} waited {waited:.1f} s for {what}: {reason}")

    def gather(self, things: Mapping[int, Any]) -> dict[int, Any]:
        everyone = [None] * dist.get_world_size() if self.is_writer else None
        with self._everybody():
            dist.gather_object(pickled(dict(things)), everyone, dst=0, group=self.control)
        return {i: thing for part in everyone or () for i, thing in pickle.loads(part).items()}

    def scatter(self, things: Mapping[int, Any] | None) -> dict[int, Any]:
        mine, everyone = [None], None
        if self.is_writer:
            everyone = [pickled({i: things[i] for i, r in self.home.items() if r == rank})
                        for rank in range(dist.get_world_size())]
        with self._everybody():
            dist.scatter_object_list(mine, everyone, src=0, group=self.control)
        return pickle.loads(mine[0])

    def agree(self, prepare: Callable[[], Any]) -> Any:
        result, failure = None, None
        try:
            result = prepare()
        except (ValueError, OSError) as error:
            failure = str(error) or type(error).__name__
        failures = [None] * dist.get_world_size()
        with self._everybody():
            dist.all_gather_object(failures, failure, group=self.control)
        if reason := next(filter(None, failures), None):
            raise Refused(reason)
        return result


class _Team:
    """All processes of a group, as a `merging.divided.Team`: what they add up goes over gloo."""

    def __init__(self, network: ManyProcesses) -> None:
        self.network, self.place, self.size = network, network.rank, dist.get_world_size()

    def everybody(self, thing: Any) -> list[Any]:
        things = [None] * self.size
        with self.network._everybody():
            dist.all_gather_object(things, pickled(thing), group=self.network.control)
        return [pickle.loads(one) for one in things]

    def first(self, tensor: Tensor) -> Tensor:
        found = tensor.cpu().clone()
        with self.network._everybody():
            dist.broadcast(found, src=0, group=self.network.control)
        return found.to(tensor.device)

    def total(self, tensor: Tensor) -> Tensor:
        found = tensor.cpu().clone()
        with self.network._everybody():
            dist.all_reduce(found, group=self.network.control)
        return found.to(tensor.device)


@dataclass(frozen=True)
class _OnItsWay:
    network: ManyProcesses
    arrivals: dict[int, Tensor]
    works: list[tuple[str, dist.Work]]
    staged: list[Tensor]  # kept until they have left

    def wait(self) -> dict[int, Tensor]:
        began, missing = time.monotonic(), []
        for k, (name, work) in enumerate(self.works):  # first what is to arrive
            if missing and k == len(self.arrivals):
                break  # gloo has given up what was to leave together with what didn't arrive
            left = self.network.timeout - timedelta(seconds=time.monotonic() - began)
            try:
                work.wait(max(left, timedelta(milliseconds=1)))
            except RuntimeError as error:
                missing.append(name)
                failure, waited = error, time.monotonic() - began
                if not self.network._is_up(waited):
                    break
        if missing:  # all that are silent are named: the first may itself be waiting for one of the others
            raise self.network._lost(", ".join(missing), failure, waited)
        if not self.network.through_cpu:
            return self.arrivals
        device = self.network.device
        return {j: v.to(device, non_blocking=device.type == "cuda") for j, v in self.arrivals.items()}


# Joining the other processes

STARTING = 30.0  # seconds that some may still be importing torch when others are done, whatever --timeout says
IN_SILENCE = 5.0  # seconds to wait for them without a word


def is_launched() -> bool:
    """Whether torchrun or torch.distributed.launch started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if is_launched() else 0


def group_size() -> int:
    """The processes of this group; 0 where nobody has launched one."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 0


NUMBERS = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")


def check_launcher() -> None:
    """Raises ValueError where the environment asks for a group, but doesn't say how to be one of it."""
    if not is_launched():
        return

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"the environment asks for a group of processes, but {what}: unset RANK and WORLD_SIZE to run "
                         "as one process, or let torchrun set all of them")

    for name in NUMBERS:
        if not re.fullmatch("[0-9]{1,9}", os.environ.get(name, "0")):
            refuse(f"{name}={os.environ[name]!r} is no whole number")
    if rank() >= group_size():
        refuse(f"RANK={rank()} is not below WORLD_SIZE={group_size()}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            refuse(f"{name}, where they meet, is missing")
    if int(os.environ["MASTER_PORT"]) > 65535:
        refuse(f"MASTER_PORT={os.environ['MASTER_PORT']} is no port (0 to 65535)")


def is_restart() -> bool:
    """Whether the launcher has started this group again after a failure (--max-restarts, on one machine)."""
    return is_launched() and _restarts() > 0


def _restarts() -> int:
    """On several machines each launcher counts for itself, so that the numbers say nothing."""
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if one_machine else 0


def launch() -> str:
    """A name for what this process's launcher does, the same through all its restarts."""
    return f"{os.getppid()}-{_start_time(os.getppid())}"


def local_device(name: str) -> str:
    """`--device` for this process: where every process gets a GPU of its own or, when they are few, shares one."""
    if not is_launched() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def _gpu(device: torch.device) -> str:
    """What tells this process's GPU from all others; 'none' where nccl can't use it."""
    if device.type != "cuda" or not dist.is_nccl_available():
        return "none"
    return f"{socket.gethostname()} {getattr(torch.cuda.get_device_properties(device), 'uuid', device.index)}"


def pick_backend(name: str, gpus: Sequence[str]) -> str:
    """nccl where every process has a GPU to itself, else gloo; all decide alike. ValueError where nccl can't be."""
    able = "none" not in gpus and len(set(gpus)) == len(gpus)
    if name == "nccl" and not able:
        raise ValueError("--backend nccl needs a GPU of its own for every process: use gloo")
    return "nccl" if able and name != "gloo" else "gloo"


@contextlib.contextmanager
def connect(num_agents: int, device: torch.device, backend: str, timeout: float, one_each: bool = False,
            one_user: bool = False) -> Iterator[Network]:
    """All agents in this process or, under a launcher, those of this rank; `timeout` in seconds. one_user: whoever
    started the processes may have every agent's model in each of them.

    Raises ValueError when there are more processes than agents (with `one_each`: not as many), or they can't find each
    other.
    """
    if not is_launched():
        if backend == "nccl":
            raise ValueError("--backend nccl is for launched processes: there is one here, which needs none")
        yield OneProcess(num_agents)
        return
    limit = timedelta(seconds=timeout)
    world = group_size()
    if world != num_agents and (one_each or world > num_agents):
        raise ValueError(f"{world} processes for --num_models {num_agents}: launch one for each agent "
                         f"(--nproc_per_node={num_agents}), or {'none' if one_each else 'fewer'}")
    file = _meeting_file()
    try:
        network = _join(num_agents, file, device, backend, limit, world, one_user)
        yield network
        dist.destroy_process_group()
    finally:
        if file and rank() == 0:
            file.unlink(missing_ok=True)


def _join(num_agents: int, file: Path | None, device: torch.device, backend: str, limit: timedelta,
          world: int, one_user: bool) -> ManyProcesses:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # nccl asks for it
    place = file or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, gpus = _meet(file, place, _gpu(device), homes(num_agents, world), max(limit.total_seconds(), STARTING))
        chosen = pick_backend(backend, gpus)
        dist.init_process_group(chosen, store=store, rank=rank(), world_size=world, timeout=limit)
        network = ManyProcesses(num_agents, device, limit, one_user)
        if chosen == "nccl":
            dist.barrier(device_ids=[device.index])  # nccl wants all ranks in a group's first call
        dist.barrier(group=network.control)
    except RuntimeError as error:  # torch's own DistNetworkError and the like are RuntimeErrors
        raise ValueError(f"the {world} processes did not find each other at {place}: {_first_line(error)}") from None
    if file and chosen == "gloo" and rank() == 0:
        file.unlink(missing_ok=True)  # only nccl comes back to it
    return network


def _meet(file: Path | None, place: Path | str, mine: str, home: Mapping[int, int],
          patience: float) -> tuple[dist.Store, list[str]]:
    """The store at `place`, once all processes are there, and what each of them has left, as this one does `mine`.

    Says after a while who is missing; after `patience` seconds that is a ValueError.
    """
    began, silent, store, world = time.monotonic(), True, None, group_size()
    missing, opening = list(range(world)), Future()

    def open_it() -> None:
        try:
            opening.set_result(_open_store(file, world, patience))
        except RuntimeError as error:
            opening.set_exception(error)

    # Beside this thread: where somebody listens but is mute, torch waits for longer than it is told.
    threading.Thread(target=open_it, daemon=True).start()
    while True:
        if store is None and opening.done() and (store := opening.result()):
            store.set(f"rank {rank()}", mine)
        if store is not None:
            missing = [r for r in missing if not store.check([f"rank {r}"])]
        if not missing:
            return store, [store.get(f"rank {r}").decode() for r in range(world)]
        absent = [0] if store is None else missing  # without a store one knows of nobody, and rank 0 keeps it
        who = ", ".join(_named(r, home) for r in absent[:3]) + ", ..." * (len(absent) > 3)
        waited = time.monotonic() - began
        if waited > patience:
            raise ValueError(f"{who} did not come to {place} within {patience:g} s")
        by_hand = "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
        if silent and waited > IN_SILENCE:
            silent = False
            if by_hand or rank() == min(set(range(world)) - set(missing), default=0):
                print(f"note: RANK={rank()}, WORLD_SIZE={world}: waiting for {who} at {place}"
                      + "; unset RANK and WORLD_SIZE to run as one process" * by_hand, file=sys.stderr, flush=True)
        time.sleep(0.05)


def _open_store(file: Path | None, world: int, patience: float) -> dist.Store | None:
    """Where the processes meet, once whoever keeps it can be reached; None where that takes too long."""
    if file:
        store = dist.FileStore(str(file), world)
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        keeper = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        until = time.monotonic() + patience
        while not keeper:
            try:  # torch would print its stack while nobody listens
                socket.create_connection((address, port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > until:
                    return None
                time.sleep(0.05)
        store = dist.TCPStore(address, port, is_master=keeper, wait_for_workers=False,
                              timeout=timedelta(seconds=patience))
    # A group that is started again meets at the same store, where it must not find the dead group's addresses.
    return dist.PrefixStore(f"restart {_restarts()}", store)


def _first_line(error: Exception) -> str:
    """What gloo has to say, without the place in its source and the advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+\] ", "", line).partition(". This is")[0]


def _meeting_file() -> Path | None:
    """Where the processes meet; None: where the launcher says.

    `torch.distributed.launch --master_port 0` tells its workers port 0, on which nobody can meet. They are children of
    one launcher then: a file that is named after it serves, as no other group of workers has the same.
    """
    if os.environ.get("MASTER_PORT") != "0":
        return None
    if os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]:
        raise ValueError("--master_port 0 works on one machine only: give the port on which several shall meet")
    home = Path(tempfile.gettempdir()) / f"dimat-{getattr(os, 'getuid', int)()}"
    home.mkdir(mode=0o700, exist_ok=True)
    return home / f"launcher-{launch()}-restart-{_restarts()}"


def _start_time(process: int) -> str:
    """Tells a process from an earlier one of the same number."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    with contextlib.suppress(OSError):
        printed = subprocess.run(["ps", "-o", "lstart=", "-p", str(process)], capture_output=True, text=True).stdout
        return "".join(c for c in printed if c.isalnum())
    return "0"


def leave(code: int, at_once: bool = False) -> None:
    """End a launched process (`at_once`: any) here and now; else just return.

    It would wait for messages that will never come, and torch's threads, when they are taken down at the end of a
    process that has done its work, may abort it.
    """
    if is_launched() or at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
