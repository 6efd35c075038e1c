"""What is shown while work goes on, and silence when nobody is looking."""

from __future__ import annotations

import codecs
import functools
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

PLAIN = {"\N{PLUS-MINUS SIGN}": b"+-", "\N{EN DASH}": b"-"}


def print_anywhere() -> None:
    """Characters that stdout's encoding lacks are printed in others (\\xe9), or a name would end a program in ASCII."""
    codecs.register_error("plain", _plain)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="plain")


def _plain(error: UnicodeEncodeError) -> tuple[bytes, int]:
    def one(c: str) -> bytes:
        if "\udc80" <= c <= "\udcff":  # a byte of a file's name that is no text goes out as it came
            return c.encode("ascii", "surrogateescape")
        return PLAIN.get(c) or c.encode("ascii", "backslashreplace")

    return b"".join(map(one, error.object[error.start : error.end])), error.end


def say(text: str) -> None:
    """Print a line, above the bars where there are any."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def fall_silent() -> None:
    """Once the reader of the output has gone: or the interpreter would complain about the closed pipe as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(text: str, most: int = 600) -> str:
    """`text` without line breaks and other control characters, cut in its middle where it is longer than `most`."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def sentence(error: BaseException) -> str:
    """What an error says, in a line for a user."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(str(error).strip()) or type(error).__name__


def mendable(error: Exception, *kinds: type[Exception]) -> str | None:
    """The line for what a user can mend: wrong values, the system's refusals, memory that can't be had, and `kinds`.

    None for anything else: that is a bug, and its traceback is wanted.
    """
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return f"there is not enough memory for this: {sentence(error)[:200]}"
    return sentence(error) if isinstance(error, (ValueError, OSError, *kinds)) else None


def command(main: Callable[..., int]) -> Callable[..., int]:
    """A command's main(argv), whose errors are one line on stderr and status 2 where a user can mend them.

    With DIMAT_DEBUG set they are a traceback. A reader of its output that leaves, as `head` does, ends it in silence.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            fall_silent()
            return 141  # as a shell says of a process that SIGPIPE ended
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            return 130
        except Exception as error:
            line = mendable(error)
            if line is None or os.environ.get("DIMAT_DEBUG"):
                raise
            print(f"error: {line}", file=sys.stderr)
            return 2

    return guarded


def progress(iterable: Iterable, desc: str, total: int | None = None, unit: str = "it") -> Iterable:
    """Wrap `iterable` in a transient tqdm bar on stderr; no bar when stderr is not a terminal.

    Of several launched processes only the first draws bars, and none does where TQDM_DISABLE is set.
    """
    seen = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" and not os.environ.get("TQDM_DISABLE")
    return tqdm(iterable, desc=desc, total=total, unit=unit, leave=False, disable=not seen)
