"""`merging` alone: what is installed of the house, and its command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from merging.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
USE = """
import pkgutil, runpy, sys, torch
from torch import nn
import merging
assert sys.argv[1] in merging.__file__, merging.__file__
for module in pkgutil.walk_packages(merging.__path__, "merging."):
    __import__(module.name)
models = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2)]
merged = merging.merge(models, [[0.5, 0.5]] * 2, "DIMAT", [torch.rand(9, 4)])
assert len(merged) == 2 and merged.matches[0].units == 6
sys.argv[1:] = ["mine:small", "--image_size", "6", "--in_channels", "1"]
runpy.run_module("merging", run_name="__main__", alter_sys=True)
"""
NETWORK = """
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 2))
def broken():
    raise RuntimeError("no such luck")
number = 3
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds what `pip install .` puts into site-packages."""
    copy = tmp_path_factory.mktemp("checkout")  # a build leaves files in the folder it is given
    for file in (ROOT / "pyproject.toml", ROOT / "LICENSE"):
        shutil.copy(file, copy)
    for room in ROOT.glob("*/__init__.py"):
        shutil.copytree(room.parent, copy / room.parent.name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation",
                    "--target", folder, copy], check=True, cwd=copy)
    return folder


def test_merging_is_all_that_is_installed(installed):
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"merging"}
    (metadata,) = installed.glob("*.dist-info/METADATA")
    needed = [line.split(": ")[1] for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist: ")]
    assert [line for line in needed if "extra" not in line] == ["torch>=2.4", "numpy", "scipy", "tqdm", "safetensors"]


def test_it_works_without_the_house(installed, tmp_path):
    """In a process that has nothing of the checkout on its path; then `python -m merging` in the same one."""
    (tmp_path / "mine.py").write_text(NETWORK)
    done = subprocess.run([sys.executable, "-c", USE, installed], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(installed)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "0: 5 units" and "1 groups, 5 units" in done.stdout


def test_the_command_prints_and_draws(tmp_path, capsys):
    file = tmp_path / "groups.png"
    assert main(["torchvision:squeezenet1_1", "--image_size=32", f"--plot={file}"]) == 0
    assert "groups, " in capsys.readouterr().out and file.stat().st_size > 0


@pytest.mark.parametrize(("arguments", "message"), [
    (["mine"], "'mine': give torchvision:NAME, timm:NAME, FILE.py:FUNCTION or package.module:FUNCTION"),
    (["nobodys.module:net"], "nobodys.module can't be imported: No module named 'nobodys'"),
    (["..mine:small"], "..mine can't be imported"),
    (["mine:large"], "mine has no function 'large'"),
    (["mine:number"], "mine has no function 'number'"),
    (["mine:broken"], "calling it without arguments fails: no such luck"),
    (["torchvision:resnet"], "has no function 'resnet'"),
    (["os:getcwd"], "returns a str, not an nn.Module"),
    (["mine:small", "--image_size=0"], "--image_size 0"),
    (["mine:small", "--image_size=5"], "Sequential fails on"),
])
def test_the_command_says_what_is_wrong_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
