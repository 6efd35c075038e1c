"""Progress bars on long work, where somebody is looking."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(iterable: Iterable, desc: str, unit: str = "it") -> Iterable:
    """A bar on stderr while it is a terminal; of several launched processes only the first draws one."""
    seen = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" and not os.environ.get("TQDM_DISABLE")
    return tqdm(iterable, desc=desc, unit=unit, leave=False, disable=not seen)


def say(text: str) -> None:
    """A line on stdout, above the bars."""
    tqdm.write(text, file=sys.stdout)
