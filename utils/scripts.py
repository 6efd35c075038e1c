"""What the scripts do when their work ends, well or badly."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from utils.training import Diverged


def run_script(work: Callable[[], Path], outcome: str, how_to_continue: str) -> int:
    """Do the work and print `outcome: <the folder it returns>`; the exit status.

    What a user can mend is one line on stderr and status 2 (with DIMAT_DEBUG set, a traceback); Ctrl-C, or a reader of
    the output that has gone, is status 130 and a line that says how to continue.
    """
    try:
        print(f"{outcome}: {work()}", flush=True)
        return 0
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        print(f"\nstopped; {how_to_continue} to continue", file=sys.stderr)
        if isinstance(stop, BrokenPipeError):  # or the interpreter would complain about the closed pipe as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 130
    except (ValueError, OSError, Diverged) as error:
        if os.environ.get("DIMAT_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
