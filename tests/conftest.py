"""Small real runs of the scripts that several tests look at, and how hypothesis draws its examples."""

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers import TINY, script

# The same examples in every run, nothing left behind, and no test that fails on a busy machine.
settings.register_profile("seeded", derandomize=True, database=None, deadline=None,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("seeded")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the processes of tests inherit it, and are sent Ctrl-C


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """Four briefly trained agents on digits, IID: the absolute path of their folder."""
    home = tmp_path_factory.mktemp("checkpoints")
    out = script("train", *TINY, "--num_models=4", "--data_dist=iid", "--epochs=2", cwd=home).stdout
    return home / out.splitlines()[-1].removeprefix("checkpoints: ")
