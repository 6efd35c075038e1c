"""Further processes of this very command on this machine: the workers of one run, or agents that live on their own."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from utils.distributed import check_launcher, group_size, leave

PARENT = "DIMAT_PARENT"  # in a sibling's environment: the number of the process that started it
FOLLOWS = {"DIMAT_FOLLOWS": "stdin"}  # in the environment of those who end with the pipe on their standard input


def start(script: Path, argv: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    """`python script argv` with these variables besides ours; it ends when this process does."""
    return subprocess.Popen([sys.executable, str(script), *argv], stdin=subprocess.PIPE,
                            env=os.environ | environment | FOLLOWS | {PARENT: str(os.getpid())})


def is_sibling() -> bool:
    """Whether another process of this command has started this one."""
    return PARENT in os.environ


def launched_agents() -> int:
    """How many agents a launched group has of which nobody says it: one for each process. 0 where none is launched."""
    try:
        check_launcher()
        return 0 if is_sibling() else group_size()
    except ValueError:  # which is said elsewhere
        return 0


def follow_parent() -> None:
    """From now on, end this process when the one that started it to be followed is gone, however that ended.

    A launcher's workers share its standard input, so that they follow whoever has started the launcher.
    """
    if FOLLOWS.items() <= os.environ.items() and stat.S_ISFIFO(os.fstat(0).st_mode):
        def watch() -> None:
            os.read(0, 1)  # nothing ever comes but the end of the pipe, when nobody holds its other end any more
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


Asking = tuple[Callable[[subprocess.Popen], object], float]


def end_by(processes: Sequence[subprocess.Popen], asking: Sequence[Asking]) -> None:
    """Ask those that still run, wait so many seconds, and ask the rest in the next way."""
    for ask, patience in asking:
        for process in processes:
            if process.poll() is None:
                ask(process)
        until = time.monotonic() + patience
        while any(process.poll() is None for process in processes) and time.monotonic() < until:
            time.sleep(0.05)


def end(processes: Sequence[subprocess.Popen], patience: float) -> None:
    """Wait so many seconds for them to end by themselves, then end them."""
    end_by(processes, [(lambda process: None, patience), (subprocess.Popen.terminate, 3.0),
                       (subprocess.Popen.kill, 3.0)])


def wait_for_all(processes: Sequence[subprocess.Popen], say: Callable[[int, int], None]) -> list[int]:
    """Their exit statuses; `say(number, status)` as soon as one has failed."""
    said: set[int] = set()
    while any(process.poll() is None for process in processes):
        for k, process in enumerate(processes):
            if process.poll() and k not in said:
                said.add(k)
                say(k, process.returncode)
        time.sleep(0.2)
    return [process.returncode for process in processes]


def threads_each(count: int) -> int:
    """An even share of this process's threads."""
    return max(1, torch.get_num_threads() // count)


def with_workers(count: int, script: Path, argv: Sequence[str], work: Callable[[], Path]) -> Path:
    """`work()`, a script's, as the first of `count` launched processes; the others are started from its command line.

    When it fails, or another process does and `work` can't notice, all of them end.
    """
    before, threads = dict(os.environ), torch.get_num_threads()
    # They meet at a store of this process, as at a launcher's: it leaves nothing behind, and only this machine sees it.
    listening = socket.create_server(("127.0.0.1", 0))
    address, port = listening.getsockname()
    store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": address,
             "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
             "OMP_NUM_THREADS": str(threads_each(count))}
    others: list[subprocess.Popen] = []
    done, patience = threading.Event(), 0.0

    def watch() -> None:
        while not done.wait(0.5):
            codes = [process.poll() for process in others]
            # One that is gone breaks a connection, which `work` notices, unless there is none yet.
            if any(codes) and not done.wait(10):
                rank, code = next((r, code) for r, code in enumerate(codes, start=1) if code)
                print(f"error: worker {rank} of {count} ended with status {code}", file=sys.stderr, flush=True)
                end(others, 0)
                leave(2, at_once=True)

    try:
        os.environ.update(group, RANK="0", LOCAL_RANK="0")
        others += [start(script, argv, {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(1, count)]
        torch.set_num_threads(threads_each(count))
        threading.Thread(target=watch, daemon=True).start()
        outcome = work()
        patience = 30.0
    finally:
        done.set()
        end(others, patience)
        del store
        torch.set_num_threads(threads)
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)
    return outcome
