"""base_lines.py as a user runs it: in one process and under the launchers, killed, stalled and wrong."""

import csv
import functools
import itertools
import os
import re
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.mixing import batch_stream, steps_of_an_epoch
from data.batches import Batches
from data.datasets import load_dataset
from experiments.options import base_lines_parser
from models import build_model, training
from network.topology import Topology, push_weights
from tests.helpers import (
    TINY,
    children,
    equal,
    equal_runs,
    folder_of,
    home_of,
    launched,
    process,
    rows_of,
    script,
    wait_for,
)

START = [*TINY, "--num_models=3", "--randominit=True", "--exp=2", "--num_epochs=1", "--batch_size=20"]
RUN = [*START, "--epochs=4"]


def finished(*launcher: str, arguments: list[str], home: Path) -> tuple[int, str]:
    with launched(*launcher, program="base_lines.py", arguments=arguments, home=home) as running:
        code = running.wait(timeout=120)
    return code, (home / "log").read_text()


torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=3")


# In one process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("baseline")
    return folder_of(script("base_lines", *RUN, "--opt=CDMSGD", cwd=home).stdout, home)


def test_a_run_folder_holds_what_it_should(uninterrupted):
    assert uninterrupted.as_posix().endswith(
        "results/digits/resnet20/iid/same_random/CDMSGD/ring_3/epochs_1/width=1,train_samples=200,batch_size=20/seed_0")
    rows = rows_of(uninterrupted)
    assert [(row["iteration"], row["phase"]) for row in rows[::3]] == [
        ("0", "initial"), *[(str(k), "trained") for k in range(1, 5)]]
    # 200 images, 3 agents, batches of 20: four steps in an epoch, to two neighbours in each
    state = torch.load(uninterrupted / "state.pt", weights_only=True)
    floats = sum(t.numel() for t in state["states"][0].values() if t.is_floating_point())
    assert [row["steps"] for row in rows[::3]] == ["0", "4", "8", "12", "16"]
    assert all(int(row["bytes_sent"]) == int(row["bytes_received"]) == 4 * 2 * 4 * floats for row in rows[3:])
    assert all(0 < float(row["train_accuracy"]) <= 100 for row in rows[3:])
    assert float(rows[3]["consensus_distance"]) > 0
    assert all(m["v"].abs().max() > 0 for m in state["memory"])


def test_a_finished_run_says_so_and_a_longer_one_goes_on(uninterrupted, tmp_path):
    home = home_of(uninterrupted)
    assert "finished before: 4 epochs" in script("base_lines", *RUN, "--opt=CDMSGD", cwd=home).stdout
    short = script("base_lines", *START, "--epochs=2", "--opt=CDMSGD", cwd=tmp_path)
    longer = script("base_lines", *RUN, "--opt=CDMSGD", "--resume", cwd=tmp_path)
    assert "continuing after epoch 2 of 4" in longer.stdout
    assert folder_of(short.stdout, tmp_path) == folder_of(longer.stdout, tmp_path)
    equal_runs(uninterrupted, folder_of(longer.stdout, tmp_path))


@pytest.mark.parametrize(("images", "samples", "batches"), [
    ("local", 50, 3), pytest.param("all", 0, 10, marks=pytest.mark.long)])  # of 67 and 200, by 20
def test_evaluating_with_fresh_statistics_leaves_training_alone(uninterrupted, tmp_path, images, samples, batches):
    command = [*START, "--opt=CDMSGD", f"--eval_bn={images}", f"--bn_samples={samples}"]
    script("base_lines", *command, "--epochs=2", cwd=tmp_path)
    folder = folder_of(script("base_lines", *command, "--epochs=4", "--resume", cwd=tmp_path).stdout, tmp_path)
    assert folder.parent.name.endswith(f",eval_bn={images}" + (f",bn_samples={samples}" if samples else ""))
    plain, evaluated = (torch.load(f / "state.pt", weights_only=True) for f in (uninterrupted, folder))
    equal(plain["states"], evaluated["states"])
    dataset = load_dataset("digits", train_samples=200)
    model = build_model("resnet20", 10, in_channels=1, width_multiplier=1)
    for row, own in zip(rows_of(folder)[-3:], evaluated["states"], strict=True):
        kept = torch.load(folder / f"trained/model_{row['agent']}.pth", weights_only=True)
        changed = {key for key, tensor in kept.items() if not torch.equal(tensor, own[key])}
        assert changed == {key for key in kept if "running_" in key or "num_batches" in key}
        assert kept["bn1.num_batches_tracked"] == batches
        model.load_state_dict(kept)
        test = training.evaluate(model, Batches(dataset, dataset.test, None, 500))
        assert float(row["test_accuracy"]) == pytest.approx(test.accuracy())


@pytest.mark.long
@pytest.mark.parametrize("opt", ["SGP", "CGA"])
def test_a_killed_run_resumes_to_an_equal_one(tmp_path, opt):
    (tmp_path / "killed").mkdir()
    expected = folder_of(script("base_lines", *RUN, f"--opt={opt}", cwd=tmp_path).stdout, tmp_path)
    with process("base_lines", *RUN, f"--opt={opt}", cwd=tmp_path / "killed") as run:
        for line in run.stdout:
            if line.startswith("iteration   2"):
                run.kill()
    refused = script("base_lines", *RUN, f"--opt={opt}", cwd=tmp_path / "killed", check=False)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    resumed = script("base_lines", *RUN, f"--opt={opt}", "--resume", cwd=tmp_path / "killed")
    equal_runs(expected, folder_of(resumed.stdout, tmp_path / "killed"))


FAULTS = ["--link_failure=0.3", "--agent_failure=0.3"]
# Four steps in an epoch: where a run stops, a round of three is not over
LOCAL = {opt: [f"--opt={opt}", f"--local_steps={1 if opt == 'D2' else 3}", *FAULTS]
         for opt in ("RELAYSGD", "LED", "KGT", "DSGT", "D2", "QGDSGDMN", "DFEDAVGM", "SGP")}


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory):
    """opt -> the run folder of two epochs with local steps and faults."""

    @functools.cache
    def of(opt: str) -> Path:
        home = tmp_path_factory.mktemp(opt)
        return folder_of(script("base_lines", *START, "--epochs=2", *LOCAL[opt], cwd=home), home)

    return of


@pytest.mark.parametrize("opt", [opt if opt == "RELAYSGD" else pytest.param(opt, marks=pytest.mark.long)
                                 for opt in LOCAL])
def test_local_steps_and_faults_go_on_where_they_were(with_faults, tmp_path, opt):
    expected = with_faults(opt)
    local = "" if opt == "D2" else ",local_steps=3"
    assert expected.parent.name.endswith(f"link_failure=0.3,agent_failure=0.3{local}")
    for epochs in (1, 2):
        done = script("base_lines", *START, f"--epochs={epochs}", *LOCAL[opt], "--resume", cwd=tmp_path)
    assert "continuing after epoch 1 of 2" in done.stdout
    equal_runs(expected, folder_of(done, tmp_path))
    steps = [int(row["steps"]) for row in rows_of(expected)[-3:]]
    assert len(set(steps)) > 1 and max(steps) <= 8  # some were absent more often than others


def test_a_round_goes_on_in_the_next_epoch(tmp_path):
    """Of four steps in an epoch the eighth is the first exchange."""
    folder = folder_of(script("base_lines", *START, "--epochs=2", "--local_steps=8", cwd=tmp_path), tmp_path)
    assert [int(row["bytes_sent"]) > 0 for row in rows_of(folder)] == 6 * [False] + 3 * [True]


def test_who_is_absent_for_a_whole_epoch_has_no_figures_of_it(tmp_path):
    done = script("base_lines", *START, "--epochs=1", "--agent_failure=1", cwd=tmp_path)
    for row in rows_of(folder_of(done, tmp_path))[-3:]:
        assert (row["train_loss"], row["steps"], row["bytes_sent"]) == ("", "0", "0")


def test_only_methods_that_can_take_local_steps_and_graphs(tmp_path):
    for flags, words in ((["--opt=D2", "--local_steps=2"], "--local_steps 2: D2"),
                         (["--opt=RELAYSGD", "--topology=random_matching"], "spanning tree")):
        flags = [flag for flag in RUN if not (flag.startswith("--exp") and "topology" in str(flags))] + flags
        refused = script("base_lines", *flags, cwd=tmp_path, check=False)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1
    lazy = script("base_lines", *START, "--num_models=4", "--epochs=1", "--opt=D2", cwd=tmp_path)
    assert "note: agents mix by (pi + I) / 2" in lazy.stdout


def test_agents_start_from_their_checkpoints(checkpoints, tmp_path):
    command = [f"--ckp={checkpoints}", "--data=digits", "--num_models=4", "--exp=1", "--epochs=1", "--num_epochs=1"]
    folder = folder_of(script("base_lines", *command, "--opt=DPSGD", cwd=tmp_path).stdout, tmp_path)
    assert "/iid/trained/DPSGD/fully_connected_4/" in folder.as_posix()
    assert "train_samples=200" in folder.as_posix()
    first = rows_of(folder)[:4]
    trained = list(csv.DictReader((checkpoints / "model_accuracies.csv").open()))
    assert [float(a["test_accuracy"]) for a in first] == [
        pytest.approx(float(b["all_classes_accuracy"])) for b in trained]


@pytest.mark.parametrize(("flags", "word"), [
    (["--momentum=0.5"], "--momentum 0.5"), (["--epochs=3", "--num_epochs=2"], "--num_epochs 2"),
    (["--topology=directed_ring", "--exp=2"], "--exp"), (["--amp=fp16"], "--amp"), (["--ckp=nowhere"], "nowhere"),
    (["--lr=1e30"], "agent 0"), (["--lr=1e30", "--opt=CGA"], "agent 0"), (["--cga_form=authors"], "--cga_form"),
    (["--backend=nccl"], "--backend nccl"), (["--lr_decay=1e300"], "--lr_decay 1e+300")])
def test_errors_are_one_line(tmp_path, flags, word):
    result = script("base_lines", *RUN, *flags, cwd=tmp_path, check=False)
    assert result.returncode == 2 and word in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_one_way_graphs_are_for_methods_that_can(tmp_path):
    graph = np.zeros((3, 3), dtype=bool)
    graph[[1, 2, 2, 0], [0, 0, 1, 2]] = True
    (tmp_path / "own.json").write_text(Topology("own", graph, push_weights(graph), directed=True).to_json())
    flags = [flag for flag in RUN if not flag.startswith("--exp")]
    for topology in ("own.json", "one_peer_exponential"):
        one_way = [*flags, f"--topology={topology}", "--epochs=1"]
        refused = script("base_lines", *one_way, "--opt=CDSGD", cwd=tmp_path, check=False)
        assert refused.returncode == 2 and "one-way" in refused.stderr and "SGP" in refused.stderr
        script("base_lines", *one_way, "--opt=SGP", cwd=tmp_path)
    dead_end = np.zeros((3, 3), dtype=bool)
    dead_end[1, 0] = dead_end[2, 1] = True
    (tmp_path / "own.json").write_text(Topology("own", dead_end, push_weights(dead_end), directed=True).to_json())
    result = script("base_lines", *flags, "--topology=own.json", "--opt=SGP", cwd=tmp_path, check=False)
    assert result.returncode == 2 and "reach every other" in result.stderr
    merging = [*TINY, "--num_models=3", "--randominit", "--merg_itr=1", "--topology=own.json"]
    assert "one-way" in script("main", *merging, cwd=tmp_path, check=False).stderr


def test_everybody_takes_the_same_steps_and_streams_go_on():
    parts = [np.arange(10), np.arange(35), np.arange(90)]
    assert steps_of_an_epoch(parts, 10) == 5  # 135 images in steps of 30
    assert steps_of_an_epoch([np.arange(10)], 100) == 1
    dataset = load_dataset("digits", train_samples=100)
    options = base_lines_parser().parse_args(["--batch_size=4"])
    whole = list(itertools.islice(batch_stream(options, dataset, np.arange(10), 1, 0), 9))
    assert [len(y) for _, y in whole] == [4, 4, 2] * 3
    for one in range(3):  # every pass shows each image once
        labels = torch.cat([y for _, y in whole[3 * one : 3 * one + 3]])
        assert torch.equal(labels.sort().values, dataset.train.labels[:10].sort().values)
    assert not torch.equal(whole[0][0], whole[3][0])
    for start in range(8):
        x, y = next(batch_stream(options, dataset, np.arange(10), 1, start))
        assert torch.equal(x, whole[start][0]) and torch.equal(y, whole[start][1])


# Launched


@pytest.mark.long
def test_the_documented_command_gives_one_processs_figures(uninterrupted, tmp_path):
    """torch.distributed.launch --master_port 0, which tells its workers a port on which nobody can meet."""
    launcher = ("torch.distributed.launch", "--master_port", "0", "--nnodes", "1", "--nproc_per_node=3")
    home = tmp_path / "with a space"  # where the processes meet, too
    home.mkdir()
    code, log = finished(*launcher, arguments=[*RUN, "--opt=CDMSGD"], home=home)
    assert code == 0, log
    equal_runs(uninterrupted, folder_of(log, home))
    assert not list(home.glob("dimat-*/*"))


@pytest.mark.long
def test_a_group_fails_and_relays_alike(with_faults, tmp_path):
    """Every process decides for itself who is up, and when to exchange."""
    code, log = finished(*torchrun, arguments=[*START, "--epochs=2", *LOCAL["RELAYSGD"]], home=tmp_path)
    assert code == 0, log
    equal_runs(with_faults("RELAYSGD"), folder_of(log, tmp_path))


@pytest.mark.long
def test_two_launchers_on_two_ports_of_one_machine(uninterrupted, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [flag for flag in RUN if not flag.startswith("--num_models")] + ["--num_models=4", "--epochs=1"]
    expected = folder_of(script("base_lines", *flags, cwd=tmp_path).stdout, tmp_path)
    node = ("torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_id=test",
            f"--rdzv_endpoint=127.0.0.1:{port}")
    arguments = [*flags, "--results_dir=two"]
    with launched(*node, program="base_lines.py", arguments=arguments, home=tmp_path) as one, launched(
            *node, program="base_lines.py", arguments=arguments, home=tmp_path) as other:
        assert one.wait(timeout=120) == other.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    equal_runs(expected, folder_of((tmp_path / "log").read_text(), tmp_path))


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_a_killed_agent_stops_the_others_and_a_restarted_group_resumes(uninterrupted, tmp_path):
    with launched(*torchrun, "--max-restarts=1", program="base_lines.py", arguments=[*RUN, "--opt=CDMSGD"],
                  home=tmp_path) as launcher:
        wait_for("iteration   2", tmp_path / "log")  # the first is committed after it has said its line
        os.kill(children(launcher.pid)[2], signal.SIGKILL)
        assert launcher.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "continuing after epoch" in log
    equal_runs(uninterrupted, folder_of(log, tmp_path))


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_nobody_waits_for_ever_for_a_stalled_agent(tmp_path):
    arguments = [*START, "--epochs=5000", "--num_epochs=5000", "--timeout=3"]  # in a step, not in an evaluation
    with launched(*torchrun, program="base_lines.py", arguments=arguments, home=tmp_path) as launcher:
        wait_for("iteration   0", tmp_path / "log")
        os.kill(children(launcher.pid)[2], signal.SIGSTOP)
        wait_for("has stalled", tmp_path / "log", seconds=20)
    # With agent 2 the other one may be silent, too, who is waiting for it.
    assert re.search(r"agent [01] waited 3\.\d s for .*agent 2's message.*: nothing within --timeout 3 s",
                     (tmp_path / "log").read_text())


@pytest.mark.long
@pytest.mark.parametrize(("flags", "message"), [
    (["--num_models=5"], "3 processes for --num_models 5"), (["--topology=nowhere.json"], "nowhere.json")])
def test_errors_before_the_start_are_said_once(tmp_path, flags, message):
    flags = [flag for flag in RUN if not flag.startswith("--exp")] + flags
    code, log = finished(*torchrun, arguments=flags, home=tmp_path)
    assert code != 0 and log.count("error: ") == 1 and message in log
