"""What a run folder takes for its own, and what it names instead of falling over it."""

import copy
import functools

import pytest
import torch

from experiments.run_folder import METRICS, RunFolder, how_far
from storage.files import save_tensors, save_text, save_yaml

SOUND = {"iteration": 1, "phase": "trained", "agents": [0, 1], "samples": [5, 5], "steps": [1, 1], "orders": [-1, -1],
         "states": [{"w": torch.zeros(2)}, {"w": torch.ones(2)}], "metrics_bytes": 0}
CONFIG = {"merg_itr": 3, "num_threads": 1}


def opened(path, **how) -> RunFolder:
    return RunFolder(path, CONFIG, resume=True, start=0, overwrite=False, **how)


def folder_with(path, state, config=CONFIG):
    save_yaml(path / "config.yaml", config)
    save_text(path / "metrics.csv", ",".join(METRICS) + "\n")
    save_tensors(path / "state.pt", state)


def test_a_state_from_before_there_were_schemas_is_taken_up(tmp_path):
    folder_with(tmp_path, {key: value for key, value in SOUND.items() if key not in ("agents", "orders")})
    with opened(tmp_path) as folder:
        assert folder.load()["iteration"] == 1


@pytest.mark.parametrize("where,value", [
    ([], 5), ([], [SOUND]), (["iteration"], "1"), (["iteration"], -1), (["iteration"], True), (["phase"], "sideways"),
    (["metrics_bytes"], None), (["metrics_bytes"], -3), (["metrics_bytes"], 10**9), (["agents"], [0]),
    (["agents"], "01"), (["samples"], []), (["samples", 0], 1.5), (["steps", 1], -1), (["orders"], [0, 1, 2]),
    (["states"], {}), (["states"], []), (["states", 0], None), (["states", 0, "w"], 5), (["memory"], [5, 5]),
    (["victim"], 1), (["schema"], 99),
], ids=str)
def test_a_state_of_another_structure_is_named_and_left_alone(tmp_path, where, value):
    content = copy.deepcopy(SOUND)
    if where:
        functools.reduce(lambda inner, key: inner[key], where[:-1], content)[where[-1]] = value
    folder_with(tmp_path, content if where else value)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError, match=r"state\.pt|metrics\.csv is shorter"), opened(tmp_path) as folder:
        folder.load()
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.parametrize("config", [{"num_threads": 1}, CONFIG | {"merg_itr": "3"}, CONFIG | {"merg_itr": None}])
def test_a_config_that_is_not_of_a_run_is_named(tmp_path, config):
    folder_with(tmp_path, SOUND, config)
    with pytest.raises(ValueError, match=r"config\.yaml says merg_itr"):
        opened(tmp_path)


def test_a_table_with_other_columns_is_not_written_to(tmp_path):
    folder_with(tmp_path, SOUND)
    save_text(tmp_path / "metrics.csv", "a,b\n")
    with opened(tmp_path) as folder, pytest.raises(ValueError, match=r"metrics\.csv begins with another line"):
        folder.record(1, "merged", [], torch.zeros(0, 3).numpy())
    assert (tmp_path / "metrics.csv").read_text() == "a,b\n"


def test_stray_files_stay(tmp_path):
    folder_with(tmp_path, SOUND)
    mine = [tmp_path / name for name in ("iteration_9_notes.txt", "accuracy_matrix/iteration_x.csv",
                                         "states/iteration_.pt", "merge_stats.csv")]
    for file in mine:
        save_text(file, "agent\nmine\n")
    with opened(tmp_path) as folder:
        folder.load()
    assert all(file.exists() for file in mine[:3])


def test_a_look_at_what_is_finished_reads_no_tensors(tmp_path):
    """A sweep looks into hundreds of these; what it would resume is checked whole."""
    folder_with(tmp_path, SOUND | {"states": [{"w": torch.arange(10_000.0)}] * 2})
    data = bytearray((tmp_path / "state.pt").read_bytes())
    data[20_000] ^= 1
    (tmp_path / "state.pt").write_bytes(data)
    assert how_far(tmp_path) == (1, SOUND["metrics_bytes"])
    with pytest.raises(ValueError, match=r"state\.pt can't be read.*CRC"), opened(tmp_path) as folder:
        folder.load()


@pytest.mark.parametrize(("wrong", "said"), [({"schema": 99}, "schema 99"), ({"iteration": "1"}, "'iteration'"),
                                             ({"metrics_bytes": None}, "'metrics_bytes'")])
def test_a_look_refuses_what_a_resume_would(tmp_path, wrong, said):
    folder_with(tmp_path, SOUND | wrong)
    with pytest.raises(ValueError, match=rf"state\.pt is .*{said}"):
        how_far(tmp_path)
