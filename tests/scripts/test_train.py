"""train.py as a user runs it."""

import csv
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import TINY, process, script

RUN = [*TINY, "--num_models=2", "--epochs=4"]


def folder_of(result, home: Path) -> Path:
    return home / result.stdout.splitlines()[-1].removeprefix("checkpoints: ")


def same_files(a: Path, b: Path, pattern: str) -> None:
    files = sorted(f.name for f in a.glob(pattern))
    assert files and files == sorted(f.name for f in b.glob(pattern))
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_checkpoints_lie_at_the_documented_path(checkpoints):
    assert checkpoints.as_posix().endswith(
        "checkpoint/digits/resnet20/diff_initialization/models_no4/data_dist_iid/num_epochs_2/"
        "width=1,train_samples=200/random_seed_0")
    rows = list(csv.DictReader((checkpoints / "model_accuracies.csv").open()))
    assert [row["agent"] for row in rows] == ["0", "1", "2", "3"]
    assert all(0 < float(row["train_accuracy"]) <= 100 for row in rows)
    states = [torch.load(checkpoints / f"model_{i}.pth", weights_only=True) for i in range(4)]
    assert not torch.equal(states[0]["conv1.weight"], states[1]["conv1.weight"])


def test_a_finished_run_does_nothing(checkpoints):
    home = checkpoints.parents[8]
    before = {f: f.stat().st_mtime_ns for f in checkpoints.iterdir()}
    out = script("train", *TINY, "--num_models=4", "--data_dist=iid", "--epochs=2", cwd=home).stdout
    assert "finished before" in out
    assert before == {f: f.stat().st_mtime_ns for f in checkpoints.iterdir()}


def test_the_same_initialisation_is_truly_the_same(tmp_path):
    result = script("train", *TINY, "--num_models=2", "--epochs=0", "--init_seed=True", cwd=tmp_path)
    folder = folder_of(result, tmp_path)
    assert "same_initialization" in str(folder)
    assert (folder / "model_0.pth").read_bytes() == (folder / "model_1.pth").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("epochs_before_the_kill", [1, 3, 6])
def test_a_killed_run_resumes_to_an_equal_one(tmp_path, epochs_before_the_kill):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    reference.mkdir(), killed.mkdir()
    expected = folder_of(script("train", *RUN, cwd=reference), reference)
    running = process("train", *RUN, cwd=killed)
    lines = 0
    while lines < epochs_before_the_kill:
        lines += " epoch " in running.stdout.readline()
    time.sleep(0.05)
    running.kill()
    running.communicate()
    out = script("train", *RUN, cwd=killed)
    found = folder_of(out, killed)
    same_files(expected, found, "model_*.pth")
    same_files(expected, found, "*.csv")
    assert not list(found.glob("partial*"))


@pytest.mark.parametrize(("flags", "word"), [
    (["--data_dist=iid", "--alpha=1"], "--alpha"),
    (["--optim=adam", "--momentum=0.9"], "--momentum"),
    (["--model=resnet21"], "resnet20"),
    (["--device=cuda:77"], "cuda:77"),
    (["--save_folder=/proc/nowhere"], "/proc/nowhere"),
])
def test_errors_come_before_work_in_one_line(tmp_path, flags, word):
    result = script("train", *RUN, *flags, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert word in result.stderr and "Traceback" not in result.stderr and result.stderr.count("\n") == 1


def test_divergence_stops_with_the_agent_named(tmp_path):
    result = script("train", *RUN, "--optim=sgd", "--lr=1e30", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "agent 0, epoch" in result.stderr


def test_other_options_in_the_same_folder_are_refused(tmp_path):
    script("train", *TINY, "--num_models=1", "--epochs=0", cwd=tmp_path)
    folder = next(tmp_path.glob("**/config.yaml"))
    folder.write_text(folder.read_text().replace("lr: 0.001", "lr: 0.01"))
    result = script("train", *TINY, "--num_models=1", "--epochs=0", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "--lr" in result.stderr
