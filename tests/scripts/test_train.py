"""train.py as a user runs it."""

import copy
import csv
import functools
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from agents.local import LocalTrainer, TrainSettings
from data.datasets import load_dataset
from experiments.options import train_parser
from models import build_model
from storage.files import save_tensors
from tests.helpers import TINY, home_of, process, script

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
    home = home_of(checkpoints)
    before = {f: f.stat().st_mtime_ns for f in checkpoints.iterdir()}
    out = script("train", *TINY, "--num_models=4", "--data_dist=iid", "--epochs=2", cwd=home).stdout
    assert "finished before" in out
    assert before == {f: f.stat().st_mtime_ns for f in checkpoints.iterdir()}


def test_a_folder_from_before_an_option_existed_is_finished_too(tmp_path):
    run = [*TINY, "--num_models=2", "--epochs=0"]
    config = folder_of(script("train", *run, cwd=tmp_path), tmp_path) / "config.yaml"
    younger = ("norm", "min_images", "classes_per_agent", "size_ratio", "partition_file", "feature_noise")
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if not line.startswith(younger)))
    assert len(config.read_text().splitlines()) == len(lines) - len(younger)
    assert "finished before" in script("train", *run, cwd=tmp_path).stdout
    assert "finished before" not in script("train", *run, "--norm=group", cwd=tmp_path).stdout
    merged = script("main", *TINY, "--num_models=2", f"--ckp={config.parent}", "--opt=WA", "--merg_itr=1", cwd=tmp_path)
    assert "norm" not in merged.stdout


def test_a_partition_from_a_file_holds_from_the_first_epoch_to_the_last(tmp_path):
    def write(numbers: np.ndarray) -> None:
        np.savetxt(tmp_path / "mine.csv", numbers, delimiter=",")

    shares = np.full((2, 10), 0.5)
    data = [*TINY, "--num_models=2", "--batch_size=50"]
    write(shares)
    run = [*data, "--data_dist=file", "--partition_file=mine.csv", "--epochs=1"]
    folder = folder_of(script("train", *run, cwd=tmp_path), tmp_path)
    assert "partition_file=mine.csv" in str(folder)
    main = [*data, f"--ckp={folder}", "--opt=WA", "--merg_itr=2", "--match_samples=50"]
    script("main", *main, cwd=tmp_path)
    shares[:, 0] = 1, 0
    write(shares)
    for name, arguments in (("train", run), ("main", [*main, "--resume"]), ("main", [*main, "--seed=1"])):
        refused = script(name, *arguments, cwd=tmp_path, check=False)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert "partition_digest" in refused.stderr or "mine.csv has changed since" in refused.stderr
    (tmp_path / "mine.csv").unlink()
    assert "mine.csv" in script("main", *main, cwd=tmp_path, check=False).stderr


@pytest.mark.parametrize("norm", ["evonorm", pytest.param("group", marks=pytest.mark.long)])
def test_models_without_batch_norm_are_trained_merged_and_mixed(tmp_path, norm):
    data = [*TINY, "--num_models=2", "--batch_size=50"]
    trained = script("train", *data, "--data_dist=classes", "--classes_per_agent=5", f"--norm={norm}", "--epochs=1",
                     cwd=tmp_path)
    folder = folder_of(trained, tmp_path)
    assert f"classes_per_agent=5,norm={norm}" in str(folder)
    state = torch.load(folder / "model_0.pth", weights_only=True)
    assert not any("running" in key for key in state) and ("bn1.v" in state) == (norm == "evonorm")
    for name, flags in (("main", ["--opt=DIMAT", "--merg_itr=2", "--training", "--epochs=1", "--bn_reset=both"]),
                        ("base_lines", ["--opt=CDSGD", "--epochs=1", "--num_epochs=1"])):
        result = script(name, *data, f"--ckp={folder}", *flags, cwd=tmp_path)
        assert f"norm={norm}" in result.stdout
    refused = script("main", *data, f"--ckp={folder}", "--norm=batch", "--merg_itr=1", cwd=tmp_path, check=False)
    assert f"--norm batch contradicts --ckp {folder}, which was made with norm={norm}" in refused.stderr


def test_the_same_initialisation_is_truly_the_same(tmp_path):
    result = script("train", *TINY, "--num_models=2", "--epochs=0", "--init_seed=True", cwd=tmp_path)
    folder = folder_of(result, tmp_path)
    assert "same_initialization" in str(folder)
    assert (folder / "model_0.pth").read_bytes() == (folder / "model_1.pth").read_bytes()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A home, and what partial_0.pt holds after the first of two epochs."""
    home = tmp_path_factory.mktemp("interrupted")
    folder = folder_of(script("train", *TINY, "--num_models=1", "--epochs=2", cwd=home), home)
    trainer = SimpleNamespace(model=build_model("resnet20", 10, in_channels=1, image_size=8, width_multiplier=1))
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=1e-3)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return home, folder, {"epoch": 1, "model": trainer.model.state_dict(), "optimizer": optimizer.state_dict(),
                          "scaler": None}


@pytest.mark.parametrize("where,value", [
    ([], [1]), (["epoch"], "1"), (["epoch"], 3), (["epoch"], -1), (["model"], {}), (["model", "conv1.weight"], 5),
    (["model", "conv1.weight"], torch.zeros(3)), (["optimizer"], None), (["optimizer", "state"], [1]),
    (["optimizer", "param_groups"], []), (["optimizer", "param_groups", 0, "lr"], "0.1"),
    (["optimizer", "param_groups", 0, "params"], [0]), (["optimizer", "state", 0], {}),
    (["optimizer", "state", 0, "exp_avg"], torch.zeros(2)), (["optimizer", "state", 999], {}), (["scaler"], 5),
], ids=str)
def test_a_partial_training_of_another_structure_is_named(interrupted, where, value):
    home, folder, sound = interrupted
    for file in ("model_0.pth", "model_accuracies.csv"):
        (folder / file).unlink(missing_ok=True)
    content = copy.deepcopy(sound)
    if not where:
        content = value
    else:
        inside = functools.reduce(lambda inner, key: inner[key], where[:-1], content)
        inside[where[-1]] = value
    save_tensors(folder / "partial_0.pt", content)
    before = (folder / "partial_0.pt").read_bytes()
    result = script("train", *TINY, "--num_models=1", "--epochs=2", cwd=home, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "partial_0.pt" in result.stderr
    assert (folder / "partial_0.pt").read_bytes() == before and not (folder / "model_0.pth").exists()


def test_a_partial_training_goes_on(interrupted):
    home, folder, sound = interrupted
    for file in ("model_0.pth", "model_accuracies.csv"):
        (folder / file).unlink(missing_ok=True)
    save_tensors(folder / "partial_0.pt", sound)
    assert "continuing after epoch 1" in script("train", *TINY, "--num_models=1", "--epochs=2", cwd=home).stdout


def test_a_width_that_no_memory_holds_is_said_at_once(tmp_path):
    result = script("train", "--dataset=digits", "--num_models=1", "--width_multiplier=100000", cwd=tmp_path,
                    check=False)
    assert result.returncode == 2 and "GiB, there are" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.long
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


def test_a_model_that_only_answers_nan_is_not_kept(tmp_path):
    """After the last step nothing looks at the training loss again."""
    flags = ["--lr=1e30", "--epochs=1", "--batch_size=1000"]
    result = script("train", *RUN, *flags, cwd=tmp_path, check=False)
    assert result.returncode == 2 and "agent 0" in result.stderr
    assert not list(tmp_path.glob("**/model_*.pth"))


def test_options_without_effect_do_not_matter(tmp_path):
    folders = [folder_of(script("train", *TINY, "--num_models=1", "--epochs=0", *flags, cwd=tmp_path), tmp_path)
               for flags in ([], ["--phase=finetune"], ["--partition_seed=0"])]
    assert len(set(folders)) == 1


def test_wrecked_models_are_not_kept(tmp_path):
    """One step, after which nothing looks at the loss again."""
    flags = ["--optim=sgd", "--lr=1e38", "--weight_decay=1e38", "--epochs=1", "--batch_size=1000"]
    result = script("train", *RUN, *flags, cwd=tmp_path, check=False)
    assert result.returncode == 2 and "agent 0, epoch 1" in result.stderr
    assert not list(tmp_path.glob("**/model_*.pth"))


def test_a_deleted_model_is_trained_again(tmp_path):
    folder = folder_of(script("train", *RUN, cwd=tmp_path), tmp_path)
    before, table = (folder / "model_1.pth").read_bytes(), (folder / "model_accuracies.csv").read_text()
    (folder / "model_1.pth").unlink()
    out = script("train", *RUN, cwd=tmp_path).stdout
    assert "agent 1 epoch 4/4" in out and "agent 0 epoch" not in out
    assert (folder / "model_1.pth").read_bytes() == before
    assert (folder / "model_accuracies.csv").read_text() == table


def test_dropout_depends_on_the_seed_alone(tmp_path):
    options = train_parser().parse_args(["--train_samples=100"])
    dataset = load_dataset("digits", train_samples=100)

    def weights(seed_path) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))
        trainer = LocalTrainer(model, dataset, TrainSettings.of(vars(options)), torch.device("cpu"))
        torch.rand(weights.calls)  # what came before must not matter
        weights.calls += 1
        trainer.epoch(np.arange(100), seed_path, *trainer.fresh_optimizer())
        return model[2].weight

    weights.calls = 1
    assert torch.equal(weights((0, 1, "epoch")), weights((0, 1, "epoch")))
    assert not torch.equal(weights((0, 1, "epoch")), weights((0, 2, "epoch")))


def test_an_agent_that_batch_norm_cannot_be_trained_on_is_named(tmp_path):
    flags = ["--dataset=digits", "--model=tv:resnet18", "--num_models=1", "--epochs=1", "--train_samples=20"]
    result = script("train", *flags, "--batch_size=1", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "agent 0 (20 training images, --batch_size 1)" in result.stderr


def test_other_options_in_the_same_folder_are_refused(tmp_path):
    script("train", *TINY, "--num_models=1", "--epochs=0", cwd=tmp_path)
    folder = next(tmp_path.glob("**/config.yaml"))
    folder.write_text(folder.read_text().replace("lr: 0.001", "lr: 0.01"))
    result = script("train", *TINY, "--num_models=1", "--epochs=0", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "--lr" in result.stderr
