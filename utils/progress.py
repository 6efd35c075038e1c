"""Progress bars that fall silent when nobody is looking."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm


def say(text: str) -> None:
    """Print a line, above the bars where there are any."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def progress(iterable: Iterable, desc: str, total: int | None = None, unit: str = "it") -> Iterable:
    """Wrap `iterable` in a transient tqdm bar on stderr; no bar when stderr is not a terminal.

    Of several launched processes only the first draws bars, and none does where TQDM_DISABLE is set.
    """
    seen = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" and not os.environ.get("TQDM_DISABLE")
    return tqdm(iterable, desc=desc, total=total, unit=unit, leave=False, disable=not seen)
