"""The rooms of the house: imports run down, nobody imports a door, and a door is short."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top floor down: a room imports only from those below it, and from itself.
FLOORS = [{"train", "main", "base_lines", "demo", "benchmarks"}, {"agents"}, {"reports"}, {"experiments"},
          {"optimizers"}, {"network"}, {"data", "models"}, {"storage"}, {"merging", "utils"}]
LEVEL = {room: len(FLOORS) - k for k, floor in enumerate(FLOORS) for room in floor}


def imports(file: Path) -> set[str]:
    """The first names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute here"
            found.add(node.module.partition(".")[0])
    return found


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [file for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")])
         if room(file) != "tests" and not room(file).startswith(".")]


def test_every_file_is_in_a_room():
    assert {room(file) for file in FILES} == LEVEL.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_down(file):
    own = room(file)
    for other in imports(file) & LEVEL.keys() - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}, which is not below it"


def test_no_package_is_a_quarter_of_the_code_and_utils_is_small():
    lines = Counter()
    for file in FILES:
        lines[str(file.parent.relative_to(ROOT))] += len(file.read_text().splitlines())
    assert max(lines.values()) <= lines.total() / 4 and lines["utils"] <= 200, lines


def test_deriving_groups_needs_nothing_else_of_merging():
    for file in (ROOT / "merging" / "tracing").glob("*.py"):
        assert not re.search(r"^from merging(?!\.tracing)", file.read_text(), re.MULTILINE), file


@pytest.mark.parametrize("door", ["train", "main", "base_lines"])
def test_doors_are_short(door):
    assert len((ROOT / f"{door}.py").read_text().splitlines()) <= 150


# These read command lines.
COMMANDS = ("__main__.py", "experiments/parsing.py", "experiments/sweep.py", "reports/tables.py")


@pytest.mark.parametrize("file", [file for file in FILES if LEVEL[room(file)] < len(FLOORS)
                                  and not str(file).endswith(COMMANDS)], ids=lambda file: str(file.relative_to(ROOT)))
def test_what_agents_do_is_not_told_by_a_namespace(file):
    """Below the doors, settings are dataclasses that say what is in them."""
    assert not re.search(r"\bNamespace\b", file.read_text())


def test_no_two_classes_have_one_name():
    """A reader who meets a name knows which one it is."""
    homes: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
