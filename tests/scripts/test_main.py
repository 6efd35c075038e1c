"""main.py as a user runs it: it continues, refuses, counts its passes and really learns."""

import contextlib
import csv
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from agents.local import LocalTrainer, ModelSettings, load_agents_data, new_model
from agents.run import Phase
from data.batches import Batches
from data.datasets import load_dataset
from experiments.options import main_parser
from experiments.settle import settle_options
from main import dimat
from merging.batch_norm import reestimate
from network.topology import make_topology
from reports.runs import comparable, read_run
from storage.files import claim, save_text
from tests.helpers import TINY, copied, equal, equal_runs, folder_of, home_of, process, rows_of, script

TRACED = 2 + 3 + 3 * 1  # the examples from which the permutation groups are derived, and the check of these
RUN = ["--dataset=digits", "--num_models=4", "--opt=DIMAT", "--exp=2", "--merg_itr=3", "--training", "--epochs=1"]


@pytest.fixture(scope="module")
def uninterrupted(checkpoints, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("main")
    return folder_of(script("main", *RUN, f"--ckp={checkpoints}", "--keep=all", cwd=home), home)


def test_a_run_folder_holds_what_it_should(uninterrupted):
    assert uninterrupted.as_posix().endswith(
        "results/digits/resnet20/iid/trained/DIMAT/ring_4/epochs_1/"
        "width=1,train_samples=200,match_samples=1000,match_augment=False,match_at=all,pretrain_epochs=2/seed_0")
    rows = rows_of(uninterrupted)
    phases = [(row["iteration"], row["phase"]) for row in rows[::4]]
    assert phases == [("0", "initial"), ("1", "merged"), ("1", "trained"), ("2", "merged"), ("2", "trained"),
                      ("3", "merged")]
    merged = [row for row in rows if row["phase"] == "merged"]
    assert all(row["train_accuracy"] == "" and int(row["bytes_sent"]) > 0 for row in merged)
    assert all(float(row["train_accuracy"]) > 0 for row in rows if row["phase"] == "trained")
    matrix = np.loadtxt(uninterrupted / "accuracy_matrix/iteration_0003_merged.csv", delimiter=",", skiprows=1)
    assert matrix.shape == (4, 1 + 4 + 1)
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(matrix[3, -1], abs=1e-3)
    # 50 images of each agent in every local epoch
    assert [row["samples"] for row in rows[::4]] == ["0", "0", "50", "50", "100", "100"]
    assert len(list(uninterrupted.glob("merged/*.pth"))) == len(list(uninterrupted.glob("trained/*.pth"))) == 4
    merges = list(csv.DictReader((uninterrupted / "merge_stats.csv").open()))
    assert len(merges) == 3 * 8 * 12  # iterations, ordered pairs of neighbours, groups
    assert {row["iteration"] for row in merges} == set("123") and merges[0]["group"] == "conv1"
    assert all(0 < float(row["correlation"]) <= 1 and 0 <= float(row["moved"]) <= 1 for row in merges)


def test_a_finished_run_says_so(uninterrupted, checkpoints, monkeypatch):
    home = home_of(uninterrupted)
    before = (uninterrupted / "state.pt").stat().st_mtime_ns
    monkeypatch.setattr("experiments.dealing.load_dataset", None)  # it is said before any image is read
    assert "finished before" in script("main", *RUN, f"--ckp={checkpoints}", cwd=home).stdout
    assert (uninterrupted / "state.pt").stat().st_mtime_ns == before


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_run_resumes_to_an_equal_one(uninterrupted, checkpoints, tmp_path, seed):
    command = [*RUN, f"--ckp={checkpoints}", "--keep=all"]
    running = process("main", *command, cwd=tmp_path)
    draw = random.Random(seed)
    lines, wanted = 0, 2 + draw.randrange(4)
    while lines < wanted:
        lines += running.stdout.readline().startswith("iteration")
    time.sleep(draw.random() * 0.3)
    running.kill()
    running.communicate()
    refused = script("main", *command, cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    equal_runs(uninterrupted, folder_of(script("main", *command, "--resume", cwd=tmp_path), tmp_path))


def test_a_finished_run_goes_on_as_if_it_had_never_stopped(uninterrupted, checkpoints, tmp_path):
    command = [*RUN, f"--ckp={checkpoints}", "--keep=all"]
    script("main", *command, "--merg_itr=1", cwd=tmp_path)
    equal_runs(uninterrupted, folder_of(script("main", *command, "--resume", cwd=tmp_path), tmp_path))


def test_merg_itr_init_starts_at_a_kept_iteration(uninterrupted, checkpoints, tmp_path):
    home = tmp_path / "home"
    copied(uninterrupted, home)
    command = [*RUN, f"--ckp={checkpoints}", "--keep=all"]
    equal_runs(uninterrupted, folder_of(script("main", *command, "--merg_itr_init=2", cwd=home), home))
    assert "iterations 2 to 3 are dropped" in script("main", *command, "--merg_itr_init=1", cwd=home).stdout
    result = script("main", *command, "--merg_itr_init=9", cwd=home, check=False)
    assert result.returncode == 2 and "--merg_itr_init 9" in result.stderr


def test_going_back_can_be_interrupted(uninterrupted, checkpoints, tmp_path, monkeypatch):
    home = tmp_path / "home"
    copied(uninterrupted, home)
    command = [*RUN, f"--ckp={checkpoints}", "--keep=all"]
    with monkeypatch.context() as patch:
        patch.setattr("os.truncate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = script("main", *command, "--merg_itr_init=2", cwd=home, check=False)
    assert stopped.returncode == 130 and "--resume" in stopped.stderr
    resumed = script("main", *command, "--merg_itr_init=2", "--resume", cwd=home)
    equal_runs(uninterrupted, folder_of(resumed, home))
    # and once it is past iteration 2, resuming doesn't go back there
    assert "finished before" in script("main", *command, "--merg_itr_init=2", "--resume", cwd=home).stdout


def test_what_lies_beyond_the_last_commit_is_dropped(uninterrupted, checkpoints, tmp_path):
    home = tmp_path / "home"
    folder = copied(uninterrupted, home)
    shutil.copy(folder / "states/iteration_0002.pt", folder / "state.pt")
    (folder / "accuracy_matrix/iteration_0007_merged.csv").write_text("of a run that was killed")
    equal_runs(uninterrupted, folder_of(script("main", *RUN, f"--ckp={checkpoints}", "--resume", cwd=home), home))


def test_a_shorter_run_in_a_longer_ones_folder_changes_nothing(uninterrupted, checkpoints):
    home, command = home_of(uninterrupted), [*RUN, f"--ckp={checkpoints}", "--merg_itr=2"]
    before = (uninterrupted / "config.yaml").read_bytes()
    assert "finished before" in script("main", *command, cwd=home).stdout
    assert "--merg_itr_init 2" in script("main", *command, "--merg_itr_init=2", cwd=home, check=False).stderr
    for flag in ("--resume", "--merg_itr_init=1"):
        assert "--overwrite" in script("main", *command, "--overwrite", flag, cwd=home, check=False).stderr
    assert before == (uninterrupted / "config.yaml").read_bytes()


def test_other_models_in_the_checkpoints_place_are_another_run(uninterrupted, checkpoints, tmp_path):
    other = broken(checkpoints, tmp_path, lambda copy, state: state["conv1.weight"].mul_(2))
    result = script("main", *RUN, f"--ckp={other}", cwd=home_of(uninterrupted), check=False)
    assert result.returncode == 2 and "first_models" in result.stderr


def test_options_without_effect_do_not_matter(checkpoints, tmp_path):
    command = [*RUN, f"--ckp={checkpoints}", "--merg_itr=1", "--opt=NONE"]
    script("main", *command, cwd=tmp_path)
    assert "finished before" in script("main", *command, "--match_data=local", cwd=tmp_path).stdout
    script("main", *command, "--bn_reset=none", cwd=tmp_path)
    assert "finished before" in script("main", *command, "--bn_reset=none", "--match_samples=5", cwd=tmp_path).stdout


def test_agents_alone_reestimate_batch_norm_on_their_own_images(checkpoints, tmp_path):
    command = [*RUN, f"--ckp={checkpoints}", "--merg_itr=1", "--opt=NONE", "--match_data=all"]
    folder = folder_of(script("main", *command, cwd=tmp_path), tmp_path)
    as_it_was = folder_of(script("main", *command, "--bn_reset=none", cwd=tmp_path), tmp_path)
    o = vars(main_parser().parse_args(command))
    settle_options(o, range(4))
    dataset, train_parts, _ = load_agents_data(o, torch.device("cpu"))
    for i in range(4):
        given = torch.load(checkpoints / f"model_{i}.pth", weights_only=True)
        images = Batches(dataset, dataset.train, train_parts[i], len(train_parts[i]))
        expected = reestimate(new_model(ModelSettings.of(o), dataset), given, images)
        now, before = (torch.load(f / f"merged/model_{i}.pth", weights_only=True) for f in (folder, as_it_was))
        equal(before, given)
        assert now.keys() == given.keys()
        assert all(torch.equal(now[key], given[key]) for key in now if "running" not in key and "tracked" not in key)
        # In batches of 20 the averages differ a little from those of all at once.
        torch.testing.assert_close(now["bn1.running_mean"], expected["bn1.running_mean"], atol=1e-6, rtol=0)
        assert not torch.equal(now["bn1.running_mean"], given["bn1.running_mean"])


def test_without_training_its_options_do_not_matter(checkpoints, tmp_path):
    flags = [flag for flag in RUN if flag not in ("--training", "--epochs=1")]
    command = [*flags, f"--ckp={checkpoints}", "--merg_itr=1"]
    script("main", *command, cwd=tmp_path)
    for flag in ("--epochs=3", "--lr=0.1"):
        assert "finished before" in script("main", *command, flag, cwd=tmp_path).stdout


def test_a_loss_that_is_not_finite_stops_the_run_with_the_agent_named(checkpoints, tmp_path):
    copy = broken(checkpoints, tmp_path, lambda _, state: state["linear.weight"].fill_(3e38))
    result = script("main", *RUN, f"--ckp={copy}", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "agent 1, iteration 0 (initial): the test loss is" in result.stderr
    diverging = script("main", *RUN, f"--ckp={checkpoints}", "--lr=1e30", cwd=tmp_path, check=False)
    assert diverging.returncode == 2 and "agent 0, iteration 1" in diverging.stderr


def test_half_precision_checkpoints_are_read(checkpoints, tmp_path):
    def halve(copy, state):
        state.update({k: t.half() if t.is_floating_point() else t for k, t in state.items()})

    script("main", *RUN, f"--ckp={broken(checkpoints, tmp_path, halve)}", "--merg_itr=1", cwd=tmp_path)


@pytest.mark.parametrize("text", ["a: [1", "- 1", "train_samples: abc"])
def test_a_broken_config_of_a_checkpoint_is_named(checkpoints, tmp_path, text):
    copy = broken(checkpoints, tmp_path, lambda *_: None)
    (copy / "config.yaml").write_text(text)
    result = script("main", *RUN, f"--ckp={copy}", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "config.yaml" in result.stderr and result.stderr.count("\n") == 1


def test_a_kept_iteration_outlives_a_truncated_state(uninterrupted, checkpoints, tmp_path):
    home = tmp_path / "home"
    state = copied(uninterrupted, home) / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    command = [*RUN, f"--ckp={checkpoints}", "--keep=all"]
    assert "state.pt" in script("main", *command, "--resume", cwd=home, check=False).stderr
    equal_runs(uninterrupted, folder_of(script("main", *command, "--merg_itr_init=2", cwd=home), home))


@pytest.mark.parametrize("change,word", [
    (lambda state: state["states"].pop(), "state.pt"), (lambda state: state["states"][0].popitem(), "agent 0's model"),
    (lambda state: state["states"][3].update({"conv1.weight": torch.zeros(2)}), "agent 3's model"),
    (lambda state: [state[key].pop() for key in ("agents", "samples", "steps", "orders", "states")], "holds 3 agents")])
def test_a_state_that_is_not_of_this_run_is_named(uninterrupted, checkpoints, tmp_path, change, word):
    home = tmp_path / "home"
    file = copied(uninterrupted, home) / "state.pt"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)
    command = [*RUN, f"--ckp={checkpoints}", "--keep=all", "--resume", "--merg_itr=4"]
    result = script("main", *command, cwd=home, check=False)
    assert result.returncode == 2 and word in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["epochs", "seed", "data_dist", "num_models"])
def test_a_checkpoints_config_leads_nowhere_outside(checkpoints, tmp_path, key):
    """It says where results are written and, with --overwrite, what is deleted."""
    victim = tmp_path / "victim" / "precious"
    save_text(victim, "mine")
    copy = broken(checkpoints, tmp_path, lambda *_: None)
    config = yaml.safe_load((copy / "config.yaml").read_text()) | {key: "x/../../../../../../../../../../victim"}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    before = sorted(tmp_path.rglob("*"))
    result = script("main", *RUN, f"--ckp={copy}", "--overwrite", cwd=tmp_path, check=False)
    assert result.returncode == 2 and f"says {key}" in result.stderr and result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and victim.read_text() == "mine"


def test_state_pt_alone_says_what_is_finished(uninterrupted, checkpoints, tmp_path):
    home = tmp_path / "home"
    folder = copied(uninterrupted, home)
    shutil.copy(folder / "states/iteration_0002.pt", folder / "state.pt")  # killed before 3 was committed
    command = [*RUN, f"--ckp={checkpoints}", "--keep=all", "--merg_itr=4"]
    assert "there is [1, 2]" in script("main", *command, "--merg_itr_init=3", cwd=home, check=False).stderr
    # and what a longer run had begun is dropped when a shorter one is called finished
    assert "finished before" in script("main", *command, "--merg_itr=2", "--resume", cwd=home).stdout
    assert [row["phase"] for row in rows_of(folder)][-1] == "trained" and rows_of(folder)[-1]["iteration"] == "2"


def test_random_models_learn_on_the_checkpoints_data(checkpoints, tmp_path):
    command = [*RUN, "--merg_itr=1", "--opt=NONE", "--randominit=True", f"--ckp={checkpoints}"]
    folder = folder_of(script("main", *command, cwd=tmp_path), tmp_path)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["train_samples"], config["width_multiplier"]) == (200, 1)


def test_two_processes_cannot_write_to_one_folder(uninterrupted, checkpoints):
    home = home_of(uninterrupted)
    with claim(uninterrupted):
        result = script("main", *RUN, f"--ckp={checkpoints}", "--overwrite", cwd=home, check=False)
    assert result.returncode == 2 and "another process" in result.stderr
    assert (uninterrupted / "state.pt").exists()


def test_a_changed_topology_file_is_another_run(checkpoints, tmp_path):
    flags = [flag for flag in RUN if not flag.startswith(("--exp", "--training"))]
    command = [*flags, f"--ckp={checkpoints}", "--merg_itr=1", "--topology=own.json"]
    (tmp_path / "own.json").write_text(make_topology("ring", 4).to_json())
    script("main", *command, cwd=tmp_path)
    (tmp_path / "own.json").write_text(make_topology("star", 4).to_json())
    result = script("main", *command, cwd=tmp_path, check=False)
    assert result.returncode == 2 and "pi=" in result.stderr
    script("main", *command, "--overwrite", cwd=tmp_path)


def broken(checkpoints: Path, home: Path, change) -> Path:
    copy = home / "random_seed_0"
    shutil.copytree(checkpoints, copy)
    state = torch.load(copy / "model_1.pth", weights_only=True)
    change(copy, state)
    if (copy / "model_1.pth").stat().st_size > 100:
        torch.save(state, copy / "model_1.pth")
    return copy


def _nan(copy, state):
    state["layer1.0.conv1.weight"][0, 0] = float("nan")


def _wider(copy, state):
    state["conv1.weight"] = torch.zeros(32, 1, 3, 3)


def _other(copy, state):
    state["fc.weight"] = state.pop("linear.weight")


def _truncated(copy, state):
    (copy / "model_1.pth").write_bytes((copy / "model_1.pth").read_bytes()[:50])


def _one_less(copy, state):
    (copy / "model_2.pth").unlink()


@pytest.mark.parametrize(("change", "word"), [(_nan, "layer1.0.conv1.weight"), (_wider, "conv1.weight"),
                                              (_other, "architecture"), (_truncated, "model_1.pth"),
                                              (_one_less, "--num_models")])
def test_bad_checkpoints_are_named_before_work(checkpoints, tmp_path, change, word):
    result = script("main", *RUN, f"--ckp={broken(checkpoints, tmp_path, change)}", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert word in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("flags", "word"), [
    (["--randominit", "--num_models=3"], "--num_models 3"), (["--ckp=nowhere"], "nowhere"),
    (["--dataset=mnist"], "--dataset mnist"), (["--model=vgg16"], "--model vgg16"),
    (["--data_dist=non-iid"], "--data_dist"), (["--topology=ring"], "--exp"),
    (["--diffinit=True"], "--diffinit"), (["--results_dir=/proc/nowhere"], "/proc/nowhere")])
def test_contradictions_are_named_before_work(checkpoints, tmp_path, flags, word):
    result = script("main", *RUN, f"--ckp={checkpoints}", *flags, cwd=tmp_path, check=False)
    assert result.returncode == 2 and word in result.stderr and "Traceback" not in result.stderr


def test_a_topology_of_another_size_is_an_error(checkpoints, tmp_path):
    file = tmp_path / "two.json"
    file.write_text('{"num_agents": 2, "connectivity": [[0, 1], [1, 0]], "pi": [[0.5, 0.5], [0.5, 0.5]]}')
    flags = [flag for flag in RUN if not flag.startswith("--exp")]
    result = script("main", *flags, f"--ckp={checkpoints}", f"--topology={file}", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "two.json" in result.stderr


def test_random_starts_are_the_same_for_all_or_different(tmp_path):
    flags = ["--dataset=digits", "--width_multiplier=1", "--num_models=2", "--merg_itr=1", "--randominit=True",
             "--opt=NONE", "--train_samples=100"]
    for different in (False, True):
        folder = folder_of(script("main", *flags, f"--diffinit={different}", cwd=tmp_path), tmp_path)
        a, b = (torch.load(folder / f"merged/model_{i}.pth", weights_only=True)["conv1.weight"] for i in range(2))
        assert torch.equal(a, b) is not different


@pytest.mark.long
def test_dimat_learns_on_digits(tmp_path):
    """On a ring of five: 42 % after the first merge, where plain averaging has 12, and above 90 after the sixth."""
    common = ["--dataset=digits", "--num_models=5", "--width_multiplier=1", "--batch_size=50"]
    out = script("train", *common, "--epochs=10", cwd=tmp_path).stdout
    ckp = out.splitlines()[-1].removeprefix("checkpoints: ")
    rows = rows_of(folder_of(script("main", *common, f"--ckp={ckp}", "--opt=DIMAT", "--exp=2", "--merg_itr=6",
                                    "--training", "--match_samples=300", cwd=tmp_path), tmp_path))
    first, last = ([float(row["test_accuracy"]) for row in rows if (row["iteration"], row["phase"]) == (when, "merged")]
                   for when in "16")
    assert len(first) == len(last) == 5 and np.mean(first) > 25 and np.mean(last) > 90


@contextlib.contextmanager
def counted_images():
    """A list that grows by the images that go through a network's first layer."""
    images: list[int] = []

    def count(module, inputs):
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 1:
            images.append(len(inputs[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield images
    finally:
        hook.remove()


def test_no_image_is_read_twice_for_nothing(checkpoints, tmp_path):
    """Every pass of a run, counted in images at the network's first layer."""
    with counted_images() as images:
        script("main", *RUN, f"--ckp={checkpoints}", "--merg_itr=2", "--bn_reset=both", cwd=tmp_path)
    agents, train, test = 4, 200, len(load_dataset("digits").test)
    merges = 2 * (2 * agents * train + agents * train)  # each agent's model twice, each merged one once
    evaluations = 4 * (agents + 1) * test  # before, merged, trained, merged; and the models' average
    probed = 2 * 2  # two images in each matching, which tell how much a slice of features takes
    assert sum(images) == merges + evaluations + train + TRACED + probed


def test_a_common_basis_costs_matching_once(checkpoints, tmp_path):
    with counted_images() as images:
        run = folder_of(script("main", *RUN, f"--ckp={checkpoints}", "--opt=COMMON", "--merg_itr=3", cwd=tmp_path),
                        tmp_path)
    agents, train, test = 4, 200, len(load_dataset("digits").test)
    # Before the first merge every model's BatchNorm; then 1 and 3 match agent 0, and 2 both of these.
    first = (agents + 2 + 2 + 3) * train
    evaluations = 6 * (agents + 1) * test
    probed = 3 * 2
    assert sum(images) == first + 3 * agents * train + evaluations + 2 * train + TRACED + probed
    stats = list(csv.DictReader((run / "merge_stats.csv").open()))
    assert {(row["iteration"], row["agent"], row["neighbour"]) for row in stats} == {
        ("1", "1", "0"), ("1", "3", "0"), ("1", "2", "1"), ("1", "2", "3")}


@pytest.mark.long  # in short, test_correction.py has one that corrects its drift
def test_a_common_basis_resumes_to_an_equal_run(checkpoints, tmp_path):
    flags = [*RUN, f"--ckp={checkpoints}", "--opt=COMMON", "--match_prior=identity"]
    whole = folder_of(script("main", *flags, "--merg_itr=3", cwd=tmp_path), tmp_path)
    assert whole.parent.name.endswith("match_prior=identity")
    home = tmp_path / "in_parts"
    home.mkdir()
    for length in (1, 2, 3):
        parts = folder_of(script("main", *flags, f"--merg_itr={length}", "--resume", cwd=home), home)
    equal_runs(whole, parts)


@pytest.mark.long
def test_a_run_from_when_there_were_more_options_goes_on_and_is_compared(checkpoints, tmp_path):
    """Its config.yaml names options that are gone, at the values that all runs have now."""
    flags = [*RUN, f"--ckp={checkpoints}", "--opt=COMMON"]
    now = folder_of(script("main", *flags, "--merg_itr=2", cwd=tmp_path), tmp_path)
    (home := tmp_path / "then").mkdir()
    then = folder_of(script("main", *flags, "--merg_itr=1", cwd=home), home)
    with (then / "config.yaml").open("a") as config:
        config.write("align: in_turn\nalign_every: 0\n")
    script("main", *flags, "--merg_itr=2", "--resume", cwd=home)
    equal_runs(now, then)
    config = yaml.safe_load((now / "config.yaml").read_text())
    gone = {"align": "in_turn", "align_every": 0}
    assert not config.keys() & gone.keys()
    assert comparable(config | gone) == comparable(config) != comparable(config | {"align_every": 2})
    ours, theirs = (read_run(folder).options for folder in (now, then))
    assert {key for key in ours if ours[key] != theirs[key]} == {"command"} and ours.keys() == theirs.keys()


def test_algorithm_1_merges_trains_and_ends_with_a_merge():
    class Agents:
        def merge(self, k):
            return {0: {"merged_with": f"in {k}"}}

        def train(self, k):
            return {0: {"stats": k}}

    merges = [Phase(k, "merged", {0: {"merged_with": f"in {k}"}}) for k in range(4)]
    trained = [Phase(k, "trained", {0: {"stats": k}}) for k in range(4)]
    assert [*dimat(Agents(), range(1, 4), trained=2)] == [merges[1], trained[1], merges[2], trained[2], merges[3]]
    assert [*dimat(Agents(), range(1, 4), trained=0)] == merges[1:]


def test_the_last_merges_follow_one_another(checkpoints, tmp_path):
    """As in a run that trains and then, without training, goes on; interrupted and made longer it is the same."""
    flags = [*RUN, f"--ckp={checkpoints}", "--opt=WA"]
    folder = folder_of(script("main", *flags, "--merg_itr=4", "--last_merges=3", cwd=tmp_path), tmp_path)
    assert "train_itr=1" in folder.parent.name
    phases = [(row["iteration"], row["phase"]) for row in rows_of(folder) if row["agent"] == "0"]
    assert phases == [("0", "initial"), ("1", "merged"), ("1", "trained"), *((k, "merged") for k in "234")]
    apart = [float(row["consensus_distance"]) for row in rows_of(folder) if row["agent"] == "0"]
    assert apart[2] > apart[3] > apart[4] > apart[5]
    (home := tmp_path / "in_parts").mkdir()
    for merges in (2, 3, 4):  # of which the last 1, 2 and 3 come without training: the same run, longer
        parts = folder_of(script("main", *flags, f"--merg_itr={merges}", f"--last_merges={merges - 1}", "--resume",
                                 cwd=home), home)
        if merges == 2:  # a run that trains up to the merge before the last, however long it is
            assert "train_itr" not in parts.parent.name
    equal_runs(folder, parts)
    longer = folder_of(script("main", *flags, "--merg_itr=5", "--last_merges=3", "--resume", cwd=home), home)
    assert "train_itr=2" in longer.parent.name  # it trains once more: another run


def test_the_parts_of_an_epoch_make_up_the_epoch(tmp_path):
    """Of agents alone, by an optimiser that remembers nothing; one of them has too few images for a step in each."""
    flags = [*TINY, "--num_models=3", "--randominit", "--diffinit", "--data_dist=exponential", "--size_ratio=10",
             "--training", "--batch_size=20", "--test_samples=50", "--opt=NONE", "--bn_reset=none", "--optim=sgd",
             "--lr=0.01", "--momentum=0"]
    states, samples = [], []
    for epochs, merges in (("1", 2), ("0.5", 3), ("0.3333", 4)):
        (home := tmp_path / epochs).mkdir()
        folder = folder_of(script("main", *flags, f"--epochs={epochs}", f"--merg_itr={merges}", cwd=home), home)
        states.append(torch.load(folder / "state.pt", weights_only=True)["states"])
        samples.append({(row["agent"], row["samples"]) for row in rows_of(folder) if row["iteration"] == str(merges)})
    assert folder.parent.parent.name == "epochs_0.333333" and read_run(folder).local_epochs == pytest.approx(1 / 3)
    assert {row["train_loss"] for row in rows_of(folder) if row["phase"] == "trained"} >= {""}  # nothing in this part
    assert samples[0] == samples[1] == samples[2]
    equal(states[0], states[1])
    equal(states[0], states[2])


@pytest.mark.parametrize("flags", [
    ["--opt=WA"], ["--opt=WA", "--epochs=0.25", "--merg_itr=3"],
    pytest.param(["--opt=COMMON", "--correction=LED", "--loss=adjusted", "--agent_failure=0.2",
                                "--workers=2"], marks=pytest.mark.long)], ids=" ".join)
def test_agents_that_train_at_once_come_to_the_same(flags, tmp_path):
    """Of unlike numbers of images. A few steps: later a ReLU whose input is 0 but for rounding may open or close."""
    flags = [*TINY, "--norm=group", "--num_models=5", "--randominit", "--diffinit", "--train_samples=93",
             "--data_dist=dirichlet", "--alpha=1", "--merg_itr=2", "--training", "--epochs=1", "--batch_size=10",
             "--test_samples=50", "--optim=sgd", "--lr=0.01", "--momentum=0.9", *flags]
    runs = {}
    for at_once in (1, 3):
        (home := tmp_path / str(at_once)).mkdir()
        runs[at_once] = folder_of(script("main", *flags, f"--train_at_once={at_once}", cwd=home), home)
    assert runs[1].relative_to(tmp_path / "1") == runs[3].relative_to(tmp_path / "3")
    alone, together = ([torch.load(folder / f"trained/model_{i}.pth", weights_only=True) for i in range(5)]
                       for folder in runs.values())
    for i in range(5):
        assert all(torch.allclose(t, together[i][name], rtol=0, atol=1e-5) for name, t in alone[i].items())
    counted = [[(row["samples"], row["steps"], row["took_part"]) for row in rows_of(folder)]
               for folder in runs.values()]
    assert counted[0] == counted[1]


@pytest.mark.parametrize("flags", [["--compile"], ["--amp=fp16"]])
def test_what_does_not_train_at_once_is_refused(flags, tmp_path):
    result = script("main", *TINY, "--num_models=2", "--randominit", "--merg_itr=2", "--training", "--train_at_once=2",
                    *flags, cwd=tmp_path, check=False)
    assert result.returncode and "leave one of them out" in result.stderr and not (tmp_path / "results").exists()


@pytest.mark.parametrize("flags,said", [
    (["--last_merges=2"], "no training anyway"), (["--last_merges=4", "--training"], "leaves no training between")])
def test_last_merges_that_leave_no_training_are_refused(flags, said, tmp_path):
    result = script("main", *TINY, "--num_models=2", "--randominit", "--merg_itr=4", *flags, cwd=tmp_path, check=False)
    assert result.returncode and said in result.stderr
    assert not (tmp_path / "results").exists()


def test_every_local_epoch_has_chances_of_its_own(checkpoints, tmp_path, monkeypatch):
    paths, epoch = [], LocalTrainer.epoch
    monkeypatch.setattr(LocalTrainer, "epoch", lambda self, part, path, *rest: paths.append(path) or epoch(
        self, part, path, *rest))
    script("main", *RUN, f"--ckp={checkpoints}", "--opt=WA", "--epochs=2", cwd=tmp_path)
    assert len(set(paths)) == len(paths) == 2 * 4 * 2  # trained twice, four agents, two epochs


def test_fully_connected_agents_share_one_merge(checkpoints, tmp_path):
    flags = [flag for flag in RUN if not flag.startswith(("--exp", "--training"))]
    once = [*flags, "--exp=1", "--merg_itr=1", f"--ckp={checkpoints}"]
    with counted_images() as images:
        shared = folder_of(script("main", *once, cwd=tmp_path), tmp_path)
    assert len({(shared / f"merged/model_{i}.pth").read_bytes() for i in range(4)}) == 1
    # one evaluation of the shared model is every agent's, and the average's
    assert sum(images) == (4 + 4 + 1) * 200 + (5 + 1) * len(load_dataset("digits").test) + TRACED + 2
    own = folder_of(script("main", *once, "--match_data=local", cwd=tmp_path), tmp_path)
    assert own != shared and len({(own / f"merged/model_{i}.pth").read_bytes() for i in range(4)}) == 4


def test_live_curves_or_a_word_on_what_is_missing(checkpoints, tmp_path, monkeypatch):
    command = [*RUN, f"--ckp={checkpoints}", "--opt=WA", "--merg_itr=1", "--tensorboard"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch.utils.tensorboard", None)
        result = script("main", *command, cwd=tmp_path, check=False)
        assert result.returncode == 2 and "pip install tensorboard" in result.stderr
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = folder_of(script("main", *command, cwd=tmp_path), tmp_path)
    script("main", *command, "--merg_itr=2", "--resume", cwd=tmp_path)
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("merged/test_accuracy")]
    rows = [row for row in rows_of(folder) if row["phase"] == "merged"]
    means = [np.mean([float(row["test_accuracy"]) for row in rows if row["iteration"] == str(k)]) for k in (1, 2)]
    assert points == [(1, pytest.approx(means[0], abs=1e-3)), (2, pytest.approx(means[1], abs=1e-3))]
