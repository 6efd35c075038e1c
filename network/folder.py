"""Agents on their own: each a process somewhere, that leaves its models in a folder all of them see.

An agent speaks once in an iteration: it publishes its model, takes its neighbours' and goes on. So nothing is needed
but files, and whoever stops stops nobody else. Nor does what others leave there: nothing in it is believed unseen,
followed elsewhere or run.

A published model is a file of one length, known beforehand: a line of JSON, filled up with blanks to HEADER bytes, and
the bytes that `network.wire.pack` makes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import itertools
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from network.processes import Network, taken
from network.wire import State, pack, through, unpack, wire_bytes
from storage.files import claim, open_regular
from utils.progress import say

PATIENCE = 10.0  # seconds after which it is said what is waited for
PAUSE = 1.0  # the longest one between two looks, in seconds
SILENCE = 60.0  # seconds before it is said again that an agent's files are refused for the same reason
HEADER = 512  # bytes
SCHEMA = 1
NAMES = 10_000  # in a folder; an agent leaves far fewer
KEY_BYTES = (16, 4096)

Version = tuple[int, int, int]
"""Which file it is that has a name: inode, length, time of its last change."""


class Unsound(ValueError):
    """What another agent has left is of no use: `reason` is one of a few, whatever the particulars."""

    def __init__(self, reason: str, particulars: object = "") -> None:
        super().__init__(f"{reason}: {particulars}" if particulars != "" else reason)
        self.reason = reason


class Damaged(Unsound):
    """To find that out, all of the file was read."""


@dataclass(frozen=True)
class Received:
    state: State
    label: int
    digest: str


class SharedFolder(Network):
    """One agent, whose network is `folder/<run>/agent_<i>/iteration_<k>.model`.

    timeout: seconds to wait for the neighbours' models of an iteration (as many times more as there are others whose
    turn is before them); who hasn't published by then is left out, or with `staleness` stood in for by its last model
    if that is at most so many iterations old. Who was left out isn't waited for again until it publishes something.
    key: what models are signed with; those that aren't are refused then. Without it nobody publishes as an agent of
    this run. All agents share it, so whoever has it can publish as each of them.
    """

    may_miss = True

    def __init__(self, agent: int, folder: Path, timeout: float, staleness: int, key: bytes | None = None) -> None:
        self.agents = self.recorded = (agent,)
        self.agent, self.folder, self.timeout, self.staleness, self.key = agent, folder, timeout, staleness, key
        self.silent: dict[int, list[tuple]] = {}  # agent -> all it had published when it was waited for in vain
        self.missed: dict[int, bool] = {}  # the same agents -> whether an old model stood in
        self.readers: dict[int, list[int]] = {}  # iteration -> who takes our model of it
        self.sound: dict[tuple[int, int], Version] = {}  # agent, iteration -> the file that was looked at
        self.refused: dict[tuple[int, int], Version] = {}
        self.complaints: dict[tuple[int, str], tuple[float, int]] = {}  # agent, reason -> when said; how many since
        self.digests: dict[int, dict[str, int]] = {}  # agent -> a model's digest -> the first iteration it came for
        self.repeated: set[int] = set()
        self.alone = 0  # how many iterations a neighbour without a witness may still make this agent leave out
        super().__init__()

    def meet(self, run: str, neighbours: Collection[int], last: int, like: State, wire: str, fresh: bool,
             overwrite: bool) -> AbstractContextManager:
        """Take the agent's place in the run that `run` describes, until the context ends.

        last: the run's last iteration; like, wire: as in `share`; fresh: the agent begins, and what is there under its
        name is of another life; overwrite: nobody else may have begun. Raises ValueError where somebody has, where
        another process is in that place, or the place is somebody else's, a link, or can't be written to.
        """
        if not hasattr(os, "O_NOFOLLOW"):
            raise ValueError("agents on their own need a file system as POSIX describes it: --workers does without")
        self.run, self.neighbours, self.last = run_name(run), sorted(set(neighbours)), last
        self.like, self.wire, self.size = like, wire, wire_bytes(like, wire)
        self.alone = max(2, last // 10)
        if overwrite and (there := [j for j in neighbours if self._published(j)]):
            raise ValueError(f"--overwrite: {self.folder / self.run} holds models of {_names(there)}, which this agent "
                             "would take up: delete that folder first, or give another --exchange")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._opened(self.agent, make=True) as home:
                _check_that_it_is_ours(home)
                lock = claim(self._home(self.agent))
                for k in self._published(self.agent) if fresh or overwrite else ():
                    os.unlink(_file_name(k), dir_fd=home)
        except Unsound as error:
            raise ValueError(f"{self._home(self.agent)} is no place for this agent's models: {error}; delete it, or "
                             "give another --exchange") from None
        except OSError as error:
            raise ValueError(f"can't write to {self._home(self.agent)}: {error.strerror or error}") from None
        return lock

    def _home(self, agent: int) -> Path:
        return self.folder / self.run / f"agent_{agent}"

    @contextlib.contextmanager
    def _opened(self, agent: int, make: bool = False) -> Iterator[int]:
        """A descriptor of an agent's folder. Files are reached through it, so that no link leads elsewhere."""
        with contextlib.ExitStack() as stack:
            place = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # may be a link: the user's own
            stack.callback(os.close, place)
            for name in (self.run, f"agent_{agent}"):
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=place)
                place = _open_folder(name, place)
                stack.callback(os.close, place)
            yield place

    def _published(self, agent: int) -> dict[int, Version]:
        """Iteration -> the file, by their names."""
        found: dict[int, Version] = {}
        try:
            with self._opened(agent) as home, os.scandir(home) as entries:
                for entry in itertools.islice(entries, NAMES):
                    name = re.fullmatch(r"iteration_([0-9]{6,9})\.model", entry.name)
                    if name and entry.name == _file_name(k := int(name[1])) and k <= self.last:
                        with contextlib.suppress(FileNotFoundError):
                            found[k] = _version(entry.stat(follow_symlinks=False))
        except FileNotFoundError:
            pass  # it has published nothing yet
        except (Unsound, OSError) as error:
            self._complain(agent, self._home(agent), error)
        return found

    def _signs(self, agent: int) -> list[tuple]:
        """Of life: another list whenever it has published something that wasn't refused."""
        return sorted((k, version) for k, version in self._published(agent).items()
                      if self.refused.get((agent, k)) != version)

    def _newest(self, agent: int, above: int = 0) -> int:
        """The last iteration above this one that it has a sound model of; 0 if there is none."""
        newest = self._first_sound(agent, range(self.last, above, -1), again=False)
        return newest[0] if newest else 0

    def catch_up(self, iteration: int, weights: Callable[[int], np.ndarray]) -> int:
        """The first iteration from this one on that nobody has finished without the model he would have taken of us.

        A neighbour has finished those before its newest model that is sound (whole, of this run, its values possible,
        signed where there is a key): it publishes before it merges. One neighbour's word is not enough, or it could
        make everybody leave out the whole run: more than a third of them must have gone on without us, and at least
        two. Then an honest one is among them as long as no more than a third are not (of two: one). On the word of
        fewer, and so of an only neighbour, a sitting leaves out no more than a tenth of the run, or two iterations.
        Beyond that an agent lags behind, which costs time, but no training: it merges with the newer models.
        """
        begin = max(iteration, self._newest(self.agent) + 1)
        past = {j: max((t + 1 for t in range(begin, self._newest(j, above=begin)) if weights(t)[j, self.agent]),
                       default=iteration) for j in self.neighbours}
        claims = sorted(past.values(), reverse=True)
        needed = max(2, len(claims) // 3 + 1)
        agreed = claims[needed - 1] if len(claims) >= needed else iteration
        begin = min(max([agreed, *claims]), agreed + self.alone)
        self.alone -= begin - agreed
        if begin > iteration:
            say(f"agent {self.agent}: the others have merged without it: it goes on with iteration {begin} instead of "
                f"{iteration}")
        for j in self.neighbours:
            if past[j] > begin:
                self._complain(j, self._home(j), Unsound(
                    "it says to be far ahead", f"in iteration {past[j]}, but too few of the other neighbours say so "
                    f"too: this agent goes on with iteration {begin}"))
        return begin

    def share(self, iteration: int, models: Mapping[int, State], mixing: np.ndarray, wire: str, like: State,
              turn: int = 0, with_team: bool = False) -> dict[int, State]:
        takes = taken(mixing)
        state = models.get(self.agent)
        if readers := np.flatnonzero(takes[:, self.agent]).tolist():
            self.readers[iteration] = readers
            self._publish(iteration, pack(state, wire))
            self._prune(iteration, oldest=iteration - len(mixing) - self.staleness)
            self.sent[self.agent] += self.size * len(readers)
        found: dict[int, State] = {} if state is None else {self.agent: through(state, wire)}
        began, pause, said = time.monotonic(), 0.01, False
        timeout = (1 + turn) * self.timeout
        missing = np.flatnonzero(takes[self.agent]).tolist()
        self.old = {j: k for j, k in self.old.items() if j not in missing}
        while True:
            for j in list(missing):
                # What the others publish after this iteration is as good, if its own model is gone by now.
                if self._take(j, range(iteration, self.last + 1), iteration, found):
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
            recent = range(iteration - 1, max(0, iteration - 1 - self.staleness), -1)
            replaced = self._take(j, recent, iteration, found)
            if j in awaited or self.missed[j] != replaced:
                instead = f"its model of iteration {self.old[j]} stands in" if replaced else "merging without it"
                within = f" within --timeout {timeout:g} s" if j in awaited else ""
                say(f"warning: agent {self.agent}, iteration {iteration}: no model of agent {j}{within}: {instead}")
            self.silent[j], self.missed[j] = self._signs(j), replaced
        self.received[self.agent] += self.size * len(found.keys() - {self.agent})
        return found

    def _publish(self, iteration: int, vector: Tensor) -> None:
        """Under a temporary name and then, complete, under its own."""
        body = vector.cpu().contiguous().numpy().data
        header = self._header(self.agent, iteration, self.labels.get(self.agent, -1), hashlib.sha256(body).hexdigest())
        try:
            with self._opened(self.agent, make=True) as home, _temporary(home, 0o666) as (name, descriptor):
                with open(descriptor, "wb", closefd=False) as file:
                    file.writelines((header, body))
                os.fsync(descriptor)
                os.replace(name, _file_name(iteration), src_dir_fd=home, dst_dir_fd=home)
                os.fsync(home)
                self.sound[self.agent, iteration] = _version(os.fstat(descriptor))
        except (OSError, Unsound) as error:
            raise OSError(f"can't publish a model in {self._home(self.agent)}: "
                          f"{getattr(error, 'strerror', None) or error}") from None

    def _prune(self, iteration: int, oldest: int) -> None:
        """Delete our models that nobody needs any more: whoever takes one has published a later one, or is silent.

        On one-way edges an agent may be as many iterations ahead of a reader as there are agents; but before `oldest`
        nothing is kept, as a dead reader would let the folder grow for ever. A reader that leaves a name from the
        future there loses what it would have read, and nobody else does.
        """
        for k in self._published(self.agent):
            readers = [i for i in self.readers.get(k, self.neighbours) if i not in self.silent]
            done = k < iteration - self.staleness - 1 and all(max(self._published(i), default=0) > k for i in readers)
            if k < oldest or done:
                with contextlib.suppress(OSError, Unsound), self._opened(self.agent) as home:
                    os.unlink(_file_name(k), dir_fd=home)

    def _take(self, agent: int, iterations: range, iteration: int, found: dict[int, State]) -> bool:
        """The first of an agent's models, of these iterations, that is sound; into `found`. Whether there is one."""
        first = self._first_sound(agent, iterations)
        if first is None:
            return False
        k, received = first
        found[agent], self.labels[agent] = received.state, received.label
        if k != iteration:
            self.old[agent] = k
        earlier = self.digests.setdefault(agent, {}).setdefault(received.digest, k)
        if earlier != k and agent not in self.repeated:
            self.repeated.add(agent)
            say(f"warning: agent {self.agent}: agent {agent}'s model of iteration {k} is that of iteration {earlier} "
                "once more: either it has learnt nothing, or it only says that it has")
        return True

    def _first_sound(self, agent: int, iterations: range, again: bool = True) -> tuple[int, Received | None] | None:
        """The first of these iterations that there is a sound model of, and the model.

        What was refused isn't read before it changes; nor (`again`: but here) what was found sound.
        """
        versions = self._published(agent)
        for k in sorted((k for k in versions if k in iterations), reverse=iterations.step < 0):
            if self.refused.get((agent, k)) == versions[k]:
                continue
            if not again and self.sound.get((agent, k)) == versions[k]:
                return k, None
            try:
                received = self._read(agent, k)
            except FileNotFoundError:
                continue  # its owner has moved on
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                if isinstance(error, ValueError):  # the rest may pass
                    self.refused[agent, k] = versions[k]
                self._complain(agent, self._home(agent) / _file_name(k), error)
                if isinstance(error, Damaged):
                    return None  # one at a time: hundreds of them may lie there
                continue
            self.sound[agent, k] = versions[k]
            return k, received
        return None

    def _read(self, agent: int, iteration: int) -> Received:
        """The model that this agent published for this iteration. Raises Unsound for anything else."""
        name, length = _file_name(iteration), HEADER + self.size
        with self._opened(agent) as home:
            _check_length(os.stat(name, dir_fd=home, follow_symlinks=False), length)  # opening a device may do things
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=home)
        with open(descriptor, "rb") as file:
            _check_length(os.fstat(descriptor), length)
            label, digest = self._checked(file.read(HEADER), agent, iteration)
            body = bytearray(self.size)
            if file.readinto(body) != self.size or hashlib.sha256(body).hexdigest() != digest:
                raise Damaged("its checksum is wrong")
        vector = torch.frombuffer(body, dtype=torch.uint8).to(next(iter(self.like.values())).device)
        state = unpack(vector, self.like, self.wire)
        for key, value in state.items():
            if not value.isfinite().all():
                raise Damaged("it has NaN or infinite values", f"in {key}")
            if key.endswith(("running_var", "num_batches_tracked")) and (value < 0).any():
                raise Damaged("it has values that can't be", f"{key} below 0")
        return Received(state, label, digest)

    def _header(self, agent: int, iteration: int, label: int, digest: str) -> bytes:
        fields = {"schema": SCHEMA, "run": self.run, "agent": agent, "iteration": iteration, "label": label,
                  "wire": self.wire, "bytes": self.size, "sha256": digest}
        if self.key is not None:
            fields["hmac"] = hmac.new(self.key, json.dumps(fields).encode(), hashlib.sha256).hexdigest()
        return json.dumps(fields).encode().ljust(HEADER - 1) + b"\n"

    def _checked(self, header: bytes, agent: int, iteration: int) -> tuple[int, str]:
        """The label and the digest that a header names. Raises Unsound where `_header` would have made another."""
        try:
            fields = json.loads(header.decode("ascii"))
        except (ValueError, RecursionError):
            raise Unsound("it is not what an agent publishes") from None
        if not isinstance(fields, dict):
            raise Unsound("it is not what an agent publishes")
        for key, value in {"schema": SCHEMA, "run": self.run, "agent": agent, "iteration": iteration,
                           "wire": self.wire, "bytes": self.size}.items():
            if type(fields.get(key)) is not type(value) or fields[key] != value:
                raise Unsound(f"its {key} is another", f"{str(fields.get(key))[:40]!r}, not {value!r}")
        label, digest = fields.get("label"), fields.get("sha256")
        if type(label) is not int or not -1 <= label < 2**53:
            raise Unsound("its label is none", repr(str(label)[:40]))
        if type(digest) is not str or not re.fullmatch("[0-9a-f]{64}", digest):
            raise Unsound("its checksum is none")
        if not hmac.compare_digest(header, self._header(agent, iteration, label, digest)):
            raise Unsound("it is not signed with this --exchange_key" if self.key is not None else
                          "it is signed, and there is no --exchange_key here" if "hmac" in fields else
                          "it is not what an agent publishes")
        return label, digest

    def _complain(self, agent: int, path: Path, error: Exception) -> None:
        """Say that something of an agent's is refused: of the same kind once in a while, however much there is."""
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        said, more = self.complaints.get((agent, reason), (-math.inf, 0))
        if time.monotonic() - said < SILENCE:
            self.complaints[agent, reason] = said, more + 1
            return
        self.complaints[agent, reason] = time.monotonic(), 0
        text = str(error) if isinstance(error, Unsound) else reason
        text += f" ({more} more like this before)" if more else ""
        say(f"warning: agent {self.agent} ignores {path}: {text}")


def run_name(run: str) -> str:
    """The folder of the run that `run` describes: runs that differ in anything don't meet."""
    return hashlib.sha256(run.encode()).hexdigest()[:12]


def forget(folder: Path, run: str) -> None:
    """Delete everything of a run, and the folder itself if there is no other. Nothing that links lead to."""
    place = folder / run_name(run)
    with contextlib.suppress(OSError):
        place.unlink() if place.is_symlink() else shutil.rmtree(place, ignore_errors=True)
        folder.rmdir()


def read_key(file: Path) -> bytes:
    """The secret in a file, without blanks around it. Raises ValueError where others can read it, or it isn't one."""
    with open_regular(file) as opened:
        found = os.fstat(opened.fileno())
        key = opened.read(KEY_BYTES[1] + 1).strip()
    if not KEY_BYTES[0] <= len(key) <= KEY_BYTES[1]:
        raise ValueError(f"--exchange_key {file}: a key is a file of {KEY_BYTES[0]} to {KEY_BYTES[1]} bytes "
                         f"(head -c 32 /dev/urandom | base64 > {file})")
    if os.name == "posix" and found.st_mode & 0o006:
        raise ValueError(f"--exchange_key {file}: everybody on this machine can read or change it: chmod 600 {file}")
    return key


def _file_name(iteration: int) -> str:
    return f"iteration_{iteration:06d}.model"


def _version(found: os.stat_result) -> Version:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _check_length(found: os.stat_result, length: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Unsound("it is no regular file")
    if found.st_size != length:
        raise Unsound("its length is wrong", f"{found.st_size} bytes, where a model takes {length}")


@contextlib.contextmanager
def _temporary(home: int, mode: int) -> Iterator[tuple[str, int]]:
    """The name and descriptor of a new file in a folder, under a name that nobody could have taken beforehand."""
    name = f".{secrets.token_hex(16)}.tmp"
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=home)
    try:
        yield name, file
    finally:
        os.close(file)
        with contextlib.suppress(FileNotFoundError):  # it may have got another name
            os.unlink(name, dir_fd=home)


def _open_folder(name: str, inside: int) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Unsound(f"{name} is a link, or no folder") from None
        raise


def _check_that_it_is_ours(home: int) -> None:
    """Raises Unsound where an agent's folder, or its lock, is not the agent's own, and OSError where it can't write."""
    with _temporary(home, 0o600) as (_, file):
        # Network file systems number users in their own way: hence by the owner that a new file has.
        if os.fstat(file).st_uid != os.fstat(home).st_uid:
            raise Unsound("it belongs to another user")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(".lock", dir_fd=home, follow_symlinks=False).st_mode):
            raise Unsound("its .lock is a link, or no file")


def _names(agents: list[int]) -> str:
    return f"agent{'s' * (len(agents) > 1)} {', '.join(map(str, agents))}"
