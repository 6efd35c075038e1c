"""Agents on their own: each a process somewhere, that leaves its models in a folder all of them see.

An agent speaks once in an iteration: it publishes its model, takes its neighbours' and goes on. So nothing is needed
but files, and whoever stops stops nobody else.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.checkpoint import State
from utils.distributed import Network, taken
from utils.files import claim, load_tensors, save_tensors
from utils.progress import say
from utils.wire import pack, through, unpack, wire_bytes

PATIENCE = 10.0  # seconds after which it is said what is waited for
PAUSE = 1.0  # the longest one between two looks, in seconds


class SharedFolder(Network):
    """One agent, whose network is `folder/<run>/agent_<i>/iteration_<k>.pt`.

    timeout: seconds to wait for the neighbours' models of an iteration (as many times more as there are others whose
    turn is before them); who hasn't published by then is left out, or with `staleness` stood in for by its last model
    if that is at most so many iterations old. Who was left out isn't waited for again until it publishes something.
    """

    may_miss = True

    def __init__(self, agent: int, folder: Path, timeout: float, staleness: int) -> None:
        self.agents = self.recorded = (agent,)
        self.agent, self.folder, self.timeout, self.staleness = agent, folder, timeout, staleness
        self.silent: dict[int, list[tuple]] = {}  # agent -> all it had published when it was waited for in vain
        self.missed: dict[int, bool] = {}  # the same agents -> whether an old model stood in
        self.readers: dict[int, list[int]] = {}  # iteration -> who takes our model of it
        self.warned: set[tuple[Path, int]] = set()
        super().__init__()

    def meet(self, run: str, neighbours: Collection[int], last: int, fresh: bool,
             overwrite: bool) -> AbstractContextManager:
        """Take the agent's place in the run that `run` describes, until the context ends.

        last: the run's last iteration; fresh: the agent begins, and what is there under its name is of another life;
        overwrite: nobody else may have begun. Raises ValueError where somebody has, where another process is in that
        place, or the folder can't be written to.
        """
        self.run, self.neighbours, self.last = run_name(run), neighbours, last
        if overwrite and (there := [j for j in neighbours if self._published(j)]):
            raise ValueError(f"--overwrite: {self.folder / self.run} holds models of {_names(there)}, which this agent "
                             "would take up: delete that folder first, or give another --exchange")
        lock = claim(self._home(self.agent))
        if fresh or overwrite:
            for file in self._published(self.agent).values():
                file.unlink()
        return lock

    def _home(self, agent: int) -> Path:
        return self.folder / self.run / f"agent_{agent}"

    def _published(self, agent: int) -> dict[int, Path]:
        """Iteration -> file, by their names."""
        found = ((re.fullmatch(r"iteration_(\d+)\.pt", file.name), file) for file in self._home(agent).glob("*.pt"))
        return {int(name[1]): file for name, file in found if name and int(name[1]) <= self.last}

    def _signs(self, agent: int) -> list[tuple]:
        """Of life: another list whenever it has published something."""
        signs = []
        for file in self._published(agent).values():
            with contextlib.suppress(OSError):
                signs.append((file.name, file.stat().st_mtime_ns))
        return sorted(signs)

    def _newest(self, agent: int, above: int = 0) -> int:
        """The last iteration above this one that it has a sound model of; 0 if there is none."""
        later = sorted((k for k in self._published(agent) if k > above), reverse=True)
        return next((k for k in later if self._load(agent, k) is not None), 0)

    def turn(self, iteration: int, weights: Callable[[int], np.ndarray]) -> int:
        """The first iteration from this one on that nobody has finished without the model he would have taken of us."""
        begin, published = iteration, self._newest(self.agent)
        for j in self.neighbours:
            # It publishes after it has merged.
            for t in range(max(begin, published + 1), self._newest(j, above=max(begin, published + 1))):
                if weights(t)[j, self.agent]:
                    begin = t + 1
        if begin > iteration:
            say(f"agent {self.agent}: the others have merged without it: it goes on with iteration {begin} instead of "
                f"{iteration}")
        return begin

    def share(self, iteration: int, models: Mapping[int, State], mixing: np.ndarray, wire: str, like: State,
              turn: int = 0) -> dict[int, State]:
        takes, size = taken(mixing), wire_bytes(like, wire)
        state = models.get(self.agent)
        if readers := np.flatnonzero(takes[:, self.agent]).tolist():
            self.readers[iteration] = readers
            self._publish(iteration, pack(state, wire))
            self._prune(iteration, oldest=iteration - len(mixing) - self.staleness)
            self.sent[self.agent] += size * len(readers)
        found: dict[int, State] = {} if state is None else {self.agent: through(state, wire)}
        began, pause, said = time.monotonic(), 0.01, False
        timeout = (1 + turn) * self.timeout
        missing = np.flatnonzero(takes[self.agent]).tolist()
        self.old = {j: k for j, k in self.old.items() if j not in missing}
        while True:
            for j in list(missing):
                # What the others publish after this iteration is as good, if its own model is gone by now.
                if self._take(j, sorted(k for k in self._published(j) if k >= iteration), iteration, wire, like, found):
                    missing.remove(j)
            awaited = [j for j in missing if self.silent.get(j) != self._signs(j)]
            waited = time.monotonic() - began
            if not awaited or waited >= timeout:
                break
            if waited > PATIENCE and not said:
                said = True
                say(f"agent {self.agent}, iteration {iteration}: waiting for {_names(awaited)}, {timeout:g} s at "
                    "most (--timeout)")
            time.sleep(min(pause, timeout - waited))
            pause = min(PAUSE, 1.3 * pause)
        for j in missing:
            oldest = iteration - self.staleness
            recent = sorted((k for k in self._published(j) if oldest <= k < iteration), reverse=True)
            replaced = self._take(j, recent, iteration, wire, like, found)
            if j in awaited or self.missed[j] != replaced:
                instead = f"its model of iteration {self.old[j]} stands in" if replaced else "merging without it"
                within = f" within --timeout {timeout:g} s" if j in awaited else ""
                say(f"warning: agent {self.agent}, iteration {iteration}: no model of agent {j}{within}: {instead}")
            self.silent[j], self.missed[j] = self._signs(j), replaced
        self.received[self.agent] += size * len(found.keys() - {self.agent})
        return found

    def _publish(self, iteration: int, vector: Tensor) -> None:
        vector = vector.cpu()
        save_tensors(self._home(self.agent) / f"iteration_{iteration:06d}.pt", {
            "run": self.run, "agent": self.agent, "iteration": iteration, "label": self.labels.get(self.agent, -1),
            "sha256": _checksum(vector), "model": vector})

    def _prune(self, iteration: int, oldest: int) -> None:
        """Delete our models that nobody needs any more: whoever takes one has published a later one, or is silent.

        On one-way edges an agent may be as many iterations ahead of a reader as there are agents; but before `oldest`
        nothing is kept, as a dead reader would let the folder grow for ever.
        """
        for k, file in self._published(self.agent).items():
            readers = [i for i in self.readers.get(k, self.neighbours) if i not in self.silent]
            done = k < iteration - self.staleness - 1 and all(max(self._published(i), default=0) > k for i in readers)
            if k < oldest or done:
                with contextlib.suppress(OSError):
                    file.unlink()

    def _take(self, agent: int, candidates: list[int], iteration: int, wire: str, like: State,
              found: dict[int, State]) -> bool:
        """The first of an agent's models, of these iterations, that is sound; into `found`. Whether there is one."""
        for k in candidates:
            state = self._read(agent, k, wire, like)
            if state is not None:
                found[agent] = state
                if k != iteration:
                    self.old[agent] = k
                return True
        return False

    def _read(self, agent: int, iteration: int, wire: str, like: State) -> State | None:
        """The model that this agent published for this iteration; None, with a warning, for anything else."""

        def model(content: dict[str, Any]) -> State:
            state = unpack(content["model"].to(next(iter(like.values())).device), like, wire)
            if not all(bool(t.isfinite().all()) for t in state.values()):
                raise ValueError("it has NaN or infinite values")
            self.labels[agent] = content["label"]
            return state

        return self._load(agent, iteration, model)

    def _load(self, agent: int, iteration: int, use: Callable[[dict[str, Any]], Any] = lambda content: content) -> Any:
        """`use` of what is in that file, if it is whole and ours."""
        file, version = self._home(agent) / f"iteration_{iteration:06d}.pt", 0
        try:
            version = file.stat().st_mtime_ns
            return use(self._checked(load_tensors(file), agent, iteration))
        except FileNotFoundError:
            return None  # its owner has moved on
        except (ValueError, OSError) as error:
            if (file, version) not in self.warned:
                self.warned.add((file, version))
                say(f"warning: agent {self.agent} ignores {file}: {error}")
            return None

    def _checked(self, content: object, agent: int, iteration: int) -> dict[str, Any]:
        """What `_publish` wrote. ValueError for anything else."""
        keys = {"run", "agent", "iteration", "label", "sha256", "model"}
        if not isinstance(content, dict) or content.keys() != keys:
            raise ValueError("it is not what an agent publishes")
        for key, value in {"run": self.run, "agent": agent, "iteration": iteration}.items():
            if content[key] != value:
                raise ValueError(f"its {key} is {content[key]!r}, not {value!r}")
        vector = content["model"]
        if not isinstance(vector, Tensor) or vector.dtype != torch.uint8 or _checksum(vector) != content["sha256"]:
            raise ValueError("its checksum is wrong")
        if not isinstance(content["label"], int):
            raise ValueError(f"its label is {content['label']!r}")
        return content


def run_name(run: str) -> str:
    """The folder of the run that `run` describes: runs that differ in anything don't meet."""
    return hashlib.sha256(run.encode()).hexdigest()[:12]


def forget(folder: Path, run: str) -> None:
    """Delete everything of a run, and the folder itself if there is no other."""
    shutil.rmtree(folder / run_name(run), ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _checksum(vector: Tensor) -> str:
    return hashlib.sha256(vector.contiguous().numpy().data).hexdigest()


def _names(agents: list[int]) -> str:
    return f"agent{'s' * (len(agents) > 1)} {', '.join(map(str, agents))}"
