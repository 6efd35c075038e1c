"""How the scripts end: what a user can mend is one line, whatever it was."""

from pathlib import Path

import pytest
import torch

from utils.progress import command, one_line
from utils.scripts import run_script


def failing(error: BaseException):
    def work() -> Path:
        raise error

    return work


def too_large() -> Path:
    torch.empty(1 << 50)
    return Path()


@pytest.mark.parametrize("work,said", [
    (failing(ValueError("--lr 0: no")), "error: --lr 0: no"),
    (failing(OSError(28, "No space left on device", "run/state.pt")), "error: run/state.pt: No space left on device"),
    (failing(ValueError("a\nb\x1b[31m" + "x" * 9999)), "error: a b"),
    (failing(MemoryError()), "error: there is not enough memory"), (too_large, "error: there is not enough memory"),
], ids=["value", "system", "lines", "memory", "torch"])
@pytest.mark.parametrize("run", [lambda work: run_script(work, "results", "again"),
                                 lambda work: command(lambda argv: work())([])], ids=["script", "command"])
def test_errors_are_one_line(work, said, run, capsys):
    assert run(work) == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1 and len(err) < 700 and "\x1b" not in err


@pytest.mark.parametrize("run", [lambda work: run_script(work, "results", "give it again"),
                                 lambda work: command(lambda argv: work())([])], ids=["script", "command"])
def test_ctrl_c_is_no_traceback_and_a_bug_is_one(run, capsys):
    assert run(failing(KeyboardInterrupt())) == 130
    assert "stopped" in capsys.readouterr().err
    for bug in (KeyError("x"), TypeError("x")):
        with pytest.raises(type(bug)):
            run(failing(bug))


def test_a_line_stays_one():
    assert one_line("a\tb\r\nc\0d\u2028e") == "a b  c\\x00d e"
    assert len(one_line("x" * 5000)) < 620
