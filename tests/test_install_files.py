"""The ways to install agree, and the documented entry points are there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def requirements(path: Path) -> list[str]:
    """The packages that a requirements file asks for, files it includes left out."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r")]


def conda_requirements(path: Path) -> list[str]:
    """What the pip part of an environment file installs, with its `-r` files read from the file's folder."""
    pip = next(entry["pip"] for entry in yaml.safe_load(path.read_text())["dependencies"] if isinstance(entry, dict))
    result = []
    for entry in pip:
        result += requirements(path.parent / entry.removeprefix("-r").strip()) if entry.startswith("-r") else [entry]
    return result


def test_conda_and_pip_install_the_same():
    assert sorted(conda_requirements(ROOT / "environment.yml")) == sorted(requirements(ROOT / "requirements.txt"))
    assert yaml.safe_load((ROOT / "environment.yml").read_text())["name"] == "DIMAT"


def test_requirements_have_lower_bounds_only_and_include_each_other():
    for line in requirements(ROOT / "requirements.txt") + requirements(ROOT / "requirements-dev.txt"):
        assert re.fullmatch(r"[a-z0-9-]+(>=[\d.]+)?", line), line
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()


def test_every_third_party_import_is_required():
    """A package that a module of ours imports is in requirements.txt (tests may use requirements-dev.txt too)."""
    modules = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow"}
    ours = {path.name for path in ROOT.iterdir() if path.is_dir()} | {path.stem for path in ROOT.glob("*.py")}
    required = {re.split("[>=]", line)[0] for line in requirements(ROOT / "requirements.txt")}
    packages = ("benchmarks", "data", "merging", "models", "optimizers", "utils")
    files = [*ROOT.glob("*.py"), *(path for package in packages for path in (ROOT / package).rglob("*.py"))]
    assert files
    for file in files:
        for name in re.findall(r"^\s*(?:from|import) ([A-Za-z_]\w*)", file.read_text(), flags=re.MULTILINE):
            if name not in sys.stdlib_module_names and name not in ours:
                assert modules.get(name, name) in required, f"{file.relative_to(ROOT)} imports {name}"


def make(*arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("make is not installed")


def test_make_sets_up_once(tmp_path):
    """On a fresh machine `make test` installs both files; with the stamps in place it only runs the tests."""
    fresh = make("-n", "test", f"VENV={tmp_path}").stdout
    assert "-m venv" in fresh
    assert "-r requirements.txt" in fresh and "-r requirements-dev.txt" in fresh
    (tmp_path / ".installed").touch()
    (tmp_path / ".installed-dev").touch()
    again = make("-n", "test", f"VENV={tmp_path}").stdout
    assert "pip" not in again
    assert "-m pytest" in again


def test_make_installs_again_when_the_requirements_changed(tmp_path):
    for stamp in (".installed", ".installed-dev"):
        (tmp_path / stamp).touch()
        os.utime(tmp_path / stamp, (0, 0))
    assert "-r requirements.txt" in make("-n", "demo", f"VENV={tmp_path}").stdout


def test_make_refuses_an_old_python(tmp_path):
    """An interpreter below 3.10 is refused in one clear line, before anything is made."""
    old = tmp_path / "python3.9"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 9, 0)\n'\"$2\"\n")
    old.chmod(0o755)
    result = make("demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert result.returncode != 0
    assert f"DIMAT needs Python 3.10 or newer and {old} is 3.9" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_is_executable_and_strict():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize(("failing", "status"), [("nothing", 0), ("lint", 3), ("test", 3), ("test-long", 3)])
def test_ci_fails_with_any_of_its_parts_and_sums_each_up(tmp_path, failing, status):
    """A `make` that says what pytest would say stands in for the real one, which takes minutes."""
    stub = tmp_path / "make"
    stub.write_text(f'#!/bin/sh\necho "how $1 went"\necho "5 passed in 2 s"\n[ "$1" != {failing} ] || exit 3\n')
    stub.chmod(0o755)
    result = subprocess.run([ROOT / ".ci" / "run"], capture_output=True, text=True,
                            env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
    assert result.returncode == status
    if failing != "lint":
        assert "how test went" in result.stdout and "how test-long went" in result.stdout
        assert result.stdout.splitlines()[-2:] == ["make test: 5 passed in 2 s", "make test-long: 5 passed in 2 s"]


def test_the_long_tests_are_run_by_their_own_command_alone(tmp_path):
    (tmp_path / "test_two.py").write_text("import pytest\n\ndef test_quick(): pass\n\n"
                                          "@pytest.mark.long\ndef test_long(): pass\n")

    def run_by(*marks: str) -> list[str]:
        listed = subprocess.run(
            [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "--collect-only",
             *marks, tmp_path], cwd=ROOT, capture_output=True, text=True)
        return re.findall(r"::(\w+)", listed.stdout)

    assert run_by() == ["test_quick"]
    assert make("-n", "test-long").stdout.rstrip().endswith("-m long")
    assert run_by("-m", "long") == ["test_long"]
