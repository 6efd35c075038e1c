"""The rooms of the house: imports run down, and nobody imports a door."""

import ast
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


FILES = [file for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
         if file.parent.name != "tests" and not file.parent.name.startswith(".")]


def test_every_file_is_in_a_room():
    assert {room(file) for file in FILES} == LEVEL.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_down(file):
    own = room(file)
    for other in imports(file) & LEVEL.keys() - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}, which is not below it"
