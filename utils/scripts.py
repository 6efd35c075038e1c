"""What the scripts do when their work ends, well or badly."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.distributed import NeighbourLost, Refused
from utils.progress import fall_silent, mendable
from utils.training import Diverged


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings look like errors; of several launched processes only the first one gives them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr, flush=True)
        if os.environ.get("RANK", "0") != "0":
            warnings.simplefilter("ignore")
        yield


def run_script(work: Callable[[], Path], outcome: str, how_to_continue: str, rank: int = 0) -> int:
    """Do the work and print `outcome: <the folder it returns>`; the exit status.

    What a user can mend is one line on stderr and status 2 (with DIMAT_DEBUG set, a traceback); Ctrl-C, or a reader of
    the output that has gone, is status 130 and a line that says how to continue.
    rank: of this process among those that do the work together. What all of them know the first one says, and the
    others wait for it to have spoken: their launcher ends all of them when it sees one end.
    """
    try:
        with _warnings_as_lines():
            folder = work()
        if rank == 0:
            print(f"{outcome}: {folder}", flush=True)
        return 0
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        if rank == 0:
            print(f"\nstopped; {how_to_continue} to continue", file=sys.stderr)
        if isinstance(stop, BrokenPipeError):
            fall_silent()
        return 130
    except Exception as error:
        line = mendable(error, Diverged, NeighbourLost)
        if line is None or (os.environ.get("DIMAT_DEBUG") and not isinstance(error, Refused)):
            raise
        if rank and isinstance(error, (ValueError, OSError)):
            time.sleep(3)  # most likely every process fails alike
        if not (rank and isinstance(error, Refused)):
            print(f"error: {line}", file=sys.stderr, flush=True)
        return 2
