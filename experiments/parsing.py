"""How a command line is read: types of values, errors of one line, and options that come from a file."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import math
import os
import re
import reprlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from network.processes import check_launcher, rank
from storage.files import load_yaml
from utils.progress import one_line, print_anywhere

TRUE, FALSE = {"true", "1", "yes", "t", "y", "on"}, {"false", "0", "no", "f", "n", "off"}


def boolean(text: str) -> bool:
    """true/false, 1/0, yes/no in any case; `Flase`, as the published command spells it, counts as False."""
    word = str(text).strip().lower()
    if word == "flase":
        print(f"note: reading '{text}' as False", file=sys.stderr)
        return False
    if word not in TRUE | FALSE:
        raise argparse.ArgumentTypeError(f"'{text}' is not a boolean: use True or False")
    return word in TRUE


def path(text: str) -> str:
    """A path, with ~ for the home folder: in --option=~/x no shell expands it."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return os.path.expanduser(text)


def exchange(text: str) -> str:
    """The path in folder:PATH."""
    if not text.startswith("folder:") or text == "folder:":
        raise argparse.ArgumentTypeError(f"'{text}' is no place to exchange models: give folder:PATH")
    return path(text.removeprefix("folder:"))


def only_option(p: argparse.ArgumentParser, do: str, besides: str = "") -> None:
    """--only KEY=A,B ...: {key: values as they were written}."""

    class Wanted(argparse.Action):
        def __call__(self, parser, options, words, option_string=None) -> None:
            wanted = {key: [*values] for key, values in (getattr(options, self.dest) or {}).items()}
            for word in words:
                key, _, values = word.partition("=")
                if not key or not values:
                    parser.error(f"argument --only: '{word}' is not KEY=VALUE or KEY=VALUE,VALUE")
                wanted.setdefault(key.lstrip("-"), []).extend(values.split(","))
            setattr(options, self.dest, wanted)

    p.add_argument("--only", action=Wanted, nargs="+", metavar="KEY=A,B",
                   help=f"{do} that have one of these values of each of these options{besides}: "
                        "--only opt=DIMAT,WA seed=0")


FORMATS = ("png", "pdf", "svg")


def check_picture(option: str, file: str) -> None:
    """Raises ValueError where a picture would have a name that says no format."""
    if file.lower().rpartition(".")[2] not in FORMATS:
        raise ValueError(f"{option} {file}: give a name that ends in {', '.join(f'.{kind}' for kind in FORMATS)}")


# Python itself also takes 1_0, blanks and the digits of all scripts.
NUMBERS = {int: r"[+-]?\d{1,19}", float: r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf)"}


def number(kind: type, low: float, high: float = float("inf"), strict: bool = False):
    """An argparse type: a number of `kind` with low <= x <= high (low < x if `strict`)."""
    if kind is int:
        high = min(high, 2**62)

    def parse(text: str):
        if not re.fullmatch(NUMBERS[kind], text, re.ASCII):
            raise argparse.ArgumentTypeError(f"'{text[:50]}' is not a number of type {kind.__name__}")
        value = kind(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if not (low < value if strict else low <= value) or not value <= high:
            bound = f"{'>' if strict else '>='} {low}" + (f" and <= {high}" if high < 2**62 else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bound}")
        return value

    parse.kind = kind
    return parse


def local_epochs(text: str) -> int | float:
    """An argparse type: a whole number, or 1 by a whole number (0.5, 0.3333, 0.25, ...), as a decimal of six digits."""
    if re.fullmatch(NUMBERS[int], text, re.ASCII):
        return number(int, 0)(text)
    value = number(float, 0)(text)
    if value.is_integer():
        return number(int, 0)(f"{value:.0f}")
    parts = max(round(1 / number(float, 1e-4)(text)), 1)
    if abs(value * parts - 1) > 1e-3:
        raise argparse.ArgumentTypeError(f"{text} is neither a whole number of epochs nor a half, a third or another "
                                         f"whole part of one; such as {math.ceil(value) if value > 1 else 1 / parts:g}")
    return 1 if parts == 1 else float(f"{1 / parts:g}")  # 0.9999 is 1


local_epochs.kind = float


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults in the help, line breaks of the description kept; no '(default: None)'."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says in a line what is wrong, with the option that may have been meant, not below a screen of usage."""

    def parse_known_args(self, *arguments, **how):
        print_anywhere()  # every script comes by here before it prints
        return super().parse_known_args(*arguments, **how)

    def error(self, message: str) -> NoReturn:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        words = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized arguments") else []
        near = [name for word in words for name in difflib.get_close_matches(word, known, n=1, cutoff=0.7)]
        hint = f": did you mean {', '.join(near)}?" if near else ""
        self.exit(2, f"error: {one_line(message)}{hint} ({self.prog} --help explains)\n")


    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if arg_strings == ["--"]:  # argparse would take it for a separator, and make an empty list of --option=--
            raise argparse.ArgumentError(action, "'--' is no value")
        return super()._get_values(action, arg_strings)


class Help(argparse.Action):
    """--help shows what most need, --help all every option: those that have a `whole_help` besides."""

    def __call__(self, parser, options, word, option_string=None) -> NoReturn:
        hidden = [action for action in parser._actions if getattr(action, "whole_help", action.help) != action.help]
        if word:
            for action in hidden:
                action.help = action.whole_help
        elif hidden:
            parser.epilog = f"{len(hidden)} more options, for rarer needs: {parser.prog} --help all"
        parser.print_help()
        parser.exit()


def parser(prog: str, description: str, example: str, all_help: bool = False) -> argparse.ArgumentParser:
    """all_help: it has so many options that --help doesn't show them all."""
    p = Parser(
        prog=f"python -m {prog}", description=f"{description}\n\nexample:\n  {example}",
        formatter_class=Formatter, allow_abbrev=False, add_help=not all_help,
    )
    if all_help:
        p.add_argument("-h", "--help", action=Help, nargs="?", choices=["all"], default=argparse.SUPPRESS,
                       dest=argparse.SUPPRESS, help="explain the options, or all")
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse flags over the options of --config, which are checked as if they were typed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    pre = Parser(prog=p.prog, add_help=False, allow_abbrev=False)
    pre.add_argument("--config", type=path)
    config = pre.parse_known_args(argv)[0].config
    return p.parse_args(_config_arguments(p, config, argv) + argv if config else argv)


def parse_once(p: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """`parse`, but under a launcher only the first process says what is wrong with the command line."""
    try:
        check_launcher()
    except ValueError as error:
        p.exit(2, f"error: {error}\n")
    if rank() == 0:
        return parse(p, argv)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return parse(p, argv)
    except SystemExit:
        time.sleep(2)  # the launcher ends all when one ends: let the first one speak
        raise


def as_typed(p: argparse.ArgumentParser, content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`content`, with every option of `p` in it as if its value had been typed on the command line.

    So nothing that was read from a file becomes a path or a number that could not have been given. Raises ValueError,
    naming `source`, for a value that could not.
    """
    typed = dict(content)
    for action in p._actions:
        value = content.get(action.dest)
        if value is None:
            continue
        try:
            if not isinstance(value, str | int | float):
                raise argparse.ArgumentError(action, "")
            typed[action.dest] = p._get_values(action, [str(value)])
        except argparse.ArgumentError:
            raise ValueError(f"{source} says {action.dest}: {reprlib.repr(value)}, which is no value of "
                             f"--{action.dest}") from None
    return typed


def _config_arguments(p: argparse.ArgumentParser, path: str, argv: Sequence[str]) -> list[str]:
    try:
        if not Path(path).exists():
            raise ValueError("there is no such file")
        options = load_yaml(Path(path))
    except (OSError, ValueError) as error:
        p.error(f"--config {path}: {error}")
    known = {name for action in p._actions for name in action.option_strings}
    for key in options:
        if f"--{key}" not in known or key == "config":
            p.error(f"--config {path}: unknown option '{key}'")
    typed = {flag.partition("=")[0] for flag in argv}
    for flag, other in (("--exp", "topology"), ("--topology", "exp")):  # two names of one thing
        if flag in typed:
            options.pop(other, None)
    return [f"--{key}={value}" for key, value in options.items() if value is not None]


def pick_device(name: str) -> torch.device:
    """'auto' is the best there is; anything else must exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("choose auto, cpu, cuda, cuda:1 or mps")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} can't be used: {str(error).splitlines()[0]}") from None
    return device
