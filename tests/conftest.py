"""Small real runs of the scripts that several tests look at."""

from pathlib import Path

import pytest

from tests.helpers import TINY, script


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """Four briefly trained agents on digits, IID: the absolute path of their folder."""
    home = tmp_path_factory.mktemp("checkpoints")
    out = script("train", *TINY, "--num_models=4", "--data_dist=iid", "--epochs=2", cwd=home).stdout
    return home / out.splitlines()[-1].removeprefix("checkpoints: ")
