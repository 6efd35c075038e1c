"""Run a script on what nobody should type or leave lying about, where it can do no harm, and judge how it ends."""

import contextlib
import errno
import importlib
import io
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401 - what is imported only where it is needed may not be interrupted
import torchvision.datasets  # noqa: F401
from matplotlib import font_manager  # noqa: F401 - looks for the machine's fonts, once

from tests.helpers import ROOT, Result

LONGEST = 2000  # characters of a line that says what is wrong
MEMORY = 3 * 2**30  # bytes beyond what the process has already: a request for more is refused, as on a small machine
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2,
           "os.truncate": 1, "os.chmod": 1, "shutil.rmtree": 1}  # event -> how many of its arguments are paths
BARRED = {"subprocess.Popen": errno.EAGAIN, "os.fork": errno.EAGAIN, "socket.connect": errno.ENETUNREACH,
          "socket.getaddrinfo": errno.ENETUNREACH}

_inside: Path | None = None  # where the sealed code may write; None: nobody is sealed
_outside: list[str] = []  # what it tried to change elsewhere


def _watch(event: str, arguments: tuple) -> None:
    """Python tells its audit hooks of everything that touches the world; an error that they raise stops it."""
    if _inside is None:
        return
    if event in BARRED:
        raise OSError(BARRED[event], os.strerror(BARRED[event]))
    changed = arguments[:CHANGES.get(event, 0)]
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        changed = arguments[:1]
    for path in changed:
        if isinstance(path, (str, bytes, os.PathLike)):
            path = Path(os.fsdecode(path))
            # What is opened is the end of a link, what is removed the link itself.
            real = Path(os.path.realpath(path if event == "open" else path.parent))
            if not real.is_relative_to(_inside) and real != Path(os.devnull) and "__pycache__" not in real.parts:
                _outside.append(f"{event} {path}")
                raise PermissionError(errno.EPERM, "outside of the folder", str(path))


sys.addaudithook(_watch)  # for good: there is no way to take it off


@contextlib.contextmanager
def sealed(home: Path, cwd: Path, seconds: float) -> Iterator[None]:
    """Nothing in here changes a file outside `home`, starts a process or reaches a network: each fails as it may.

    Nor has it more than MEMORY, and somebody presses Ctrl-C when it has worked for so many seconds, or done nothing for
    long.
    """
    global _inside

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before, (soft, hard) = Path.cwd(), resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(cwd))
        patch.setattr(tempfile, "tempdir", str(home))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(home))  # torch makes it where it is imported in full
        os.chdir(cwd)
        handlers = {number: signal.signal(number, stop) for number in (signal.SIGVTALRM, signal.SIGALRM)}
        try:
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
            _outside.clear()
            _inside = home.resolve()
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 10)
            signal.setitimer(signal.ITIMER_REAL, 20 * seconds, 10)
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _inside = None
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.chdir(before)


def end_of(name: str, arguments: list[str], home: Path, cwd: Path, seconds: float = 2.0) -> Result:
    """How `python -m name arguments` ends in `cwd`; it may write in `home` alone.

    AssertionError, unless it ends well: with status 0, stopped by Ctrl-C, or with one line of bounded length that says
    what is wrong.
    """
    def fails(how: str) -> None:
        raise AssertionError(f"{name}: {how}\n    arguments: {arguments}")

    # As real streams are, which refuse half a character on stdout.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    try:
        main = importlib.import_module(name).main
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), sealed(home, cwd, seconds):
            code = main(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        ours = [at for at in traceback.extract_tb(error.__traceback__) if Path(at.filename).is_relative_to(ROOT)
                and "tests" not in Path(at.filename).parts]
        place = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "?"
        fails(f"{type(error).__name__} at {place}: {str(error)[:200]}")
    for stream in (out, err):
        stream.flush()
    result = Result(code or 0, *(stream.buffer.getvalue().decode() for stream in (out, err)))
    lines = result.stderr.splitlines() or [""]
    if _outside:
        fails(f"changes what is not its own: {_outside[0][:300]}")
    if result.returncode not in (0, 1, 2, 130):
        fails(f"exit status {result.returncode!r}")
    if result.returncode in (1, 2) and not lines[-1].startswith("error: "):
        fails(f"status {result.returncode}, but its last line is no error: {lines[-1][:200]!r}")
    if result.returncode in (1, 2) and not len(lines[-1]) <= LONGEST:
        fails(f"an error of {len(lines[-1])} characters: {lines[-1][:200]!r}")
    return result
