"""What is shown while work goes on, and silence when nobody is looking."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm


def say(text: str) -> None:
    """Print a line, above the bars where there are any."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def piped(main: Callable[..., int]) -> Callable[..., int]:
    """A command whose reader may leave before the end, as `head` does: then it ends as well, and says nothing."""

    @functools.wraps(main)
    def until_closed(argv: Sequence[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it ends
            return 141  # as a shell says of a process that SIGPIPE ended

    return until_closed


def progress(iterable: Iterable, desc: str, total: int | None = None, unit: str = "it") -> Iterable:
    """Wrap `iterable` in a transient tqdm bar on stderr; no bar when stderr is not a terminal.

    Of several launched processes only the first draws bars, and none does where TQDM_DISABLE is set.
    """
    seen = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" and not os.environ.get("TQDM_DISABLE")
    return tqdm(iterable, desc=desc, total=total, unit=unit, leave=False, disable=not seen)
