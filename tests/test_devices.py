"""`device_cases.py` in a process of its own: a registered device stays, and torch.distributed minds it."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "device_cases.py"


@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_what_runs_on_a_device_that_is_not_there(which):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", which, str(CASES)]
    done = subprocess.run(command, cwd=CASES.parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "....." in done.stdout or "sssss" in done.stdout
