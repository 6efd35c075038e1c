"""main.py over several processes: launched, as workers, and as agents on their own that die and come back."""

import csv
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from experiments import options
from merging.permutation import derive_spec, permute, random_permutations
from models import build_model
from network import processes
from network.wire import wire_bytes
from tests.helpers import (
    TINY,
    children,
    equal_runs,
    folder_of,
    launched,
    process,
    rows_of,
    script,
    wait_for,
    wait_until_gone,
)
from tests.scripts.merge_worker import AGENTS, CASES, arguments, results_dir

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
torchrun = ("torch.distributed.run", "--standalone")
RUN = [*TINY, "--num_models=3", "--randominit", "--diffinit", "--exp=2", "--opt=WA", "--merg_itr=4", "--training",
       "--epochs=1", "--batch_size=20", "--test_samples=100"]


def run_below(folder: Path) -> Path:
    found, = (file.parent for file in folder.rglob("metrics.csv") if not file.parent.name.startswith("agent_"))
    return found


# A launched group


@pytest.fixture(scope="module")
def one_process(checkpoints, tmp_path_factory) -> Callable[[str], Path]:
    """A case's run with all agents in one process, made once."""
    folder = tmp_path_factory.mktemp("one_process")

    @functools.cache
    def run(case: str) -> Path:
        script("main", *arguments(checkpoints, folder, case), cwd=folder)
        return run_below(results_dir(folder, case))

    return run


def in_group(processes: int, checkpoints: Path, home: Path, cases: Sequence[str], *extra: str) -> list[dict]:
    """What each of the processes says it did."""
    with launched(*torchrun, f"--nproc_per_node={processes}", program="tests/scripts/merge_worker.py",
                  arguments=[str(checkpoints), str(home), ",".join(cases), *extra], home=home) as running:
        assert running.wait(timeout=300) == 0, (home / "log").read_text()
    return [torch.load(home / f"process_{r}.pt", weights_only=False) for r in range(processes)]


@pytest.mark.long
def test_a_group_gives_one_processs_figures_and_sends_no_more_than_it_must(one_process, checkpoints, tmp_path):
    parts = in_group(2, checkpoints, tmp_path, list(CASES))
    home = {i: r for r, part in enumerate(parts) for i in part["agents"]}
    assert home == {0: 0, 1: 0, 2: 1, 3: 1} and len(home) == AGENTS
    for case in CASES:
        one, many = one_process(case), run_below(results_dir(tmp_path, case))
        equal_runs(one, many)
        # An agent's model goes once to each process that has a neighbour of it: no more crosses, and to nobody else.
        model = torch.load(many / "merged/model_0.pth", weights_only=True)
        size = wire_bytes(model, next((flag[7:] for flag in CASES[case] if flag.startswith("--wire=")), "fp32"))
        expected = {r: {} for r in range(2)}
        for row in rows_of(many):
            if row["phase"] == "merged":
                sources = list(map(int, row["merged_with"].split()))
                assert int(row["bytes_received"]) == size * len(sources)
                for j in sources:
                    key = (row["iteration"], j, home[int(row["agent"])])
                    expected[home[j]][key] = size
        for r, part in enumerate(parts):
            cross = [bytes_ for (_, _, to), bytes_ in expected[r].items() if to != r]
            assert sum(v for (_, what), v in part["sent"][case].items() if what == "bytes") == sum(cross)
            assert sum(v for (_, what), v in part["sent"][case].items() if what == "messages") == len(cross)


@pytest.mark.long
def test_local_matching_reads_no_image_of_another_process(one_process, checkpoints, tmp_path):
    cases = ("DIMAT ring local", "DIMAT ring all")
    in_group(2, checkpoints, tmp_path, cases, "poison")
    of = {case: [one_process(case), run_below(results_dir(tmp_path, case))] for case in cases}
    equal_runs(*of["DIMAT ring local"])
    one, poisoned = (rows_of(run) for run in of["DIMAT ring all"])  # which does read them
    assert one != poisoned


def test_bytes_are_degree_times_model(one_process):
    for case, degrees in {"WA star all": [3, 1, 1, 1], "COMMON ring local": [2] * 4, "alone": [0] * 4}.items():
        run = one_process(case)
        size = sum(t.numel() * t.element_size()
                   for t in torch.load(run / "merged/model_0.pth", weights_only=True).values())
        merged = [row for row in rows_of(run) if row["phase"] == "merged"]
        for key in ("bytes_sent", "bytes_received"):
            assert [int(row[key]) for row in merged] == 2 * [degree * size for degree in degrees]


def test_who_took_part_is_written_down(one_process):
    rows = rows_of(one_process("WA faults all"))
    assert {row["took_part"] for row in rows if row["phase"] == "initial"} == {"1"}
    absent = [row for row in rows if row["took_part"] == "0"]
    assert absent and len(absent) < len(rows) / 2
    for row in absent:
        assert row["merged_with"] == "" and row["train_loss"] == "" and row["bytes_sent"] == "0"
        before = max(k for k, other in enumerate(rows) if other["agent"] == row["agent"] and k < rows.index(row))
        assert rows[before]["test_loss"] == row["test_loss"]  # it keeps its model
    for a in rows:  # a link that fails does so for both
        for b in rows:
            if (a["iteration"], a["phase"]) == (b["iteration"], b["phase"]):
                assert (a["agent"] in b["merged_with"].split()) == (b["agent"] in a["merged_with"].split())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("uninterrupted")
    return folder_of(script("main", *RUN, cwd=home).stdout, home)


@linux
@pytest.mark.long
def test_a_restarted_group_resumes_by_itself(uninterrupted, tmp_path):
    with launched(*torchrun, "--nproc_per_node=2", "--max-restarts=1", program="main.py", arguments=RUN,
                  home=tmp_path) as launcher:
        wait_for("iteration   2 merged", tmp_path / "log")
        os.kill(children(launcher.pid)[1], signal.SIGKILL)
        assert launcher.wait(timeout=120) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    done = int(re.search(r"continuing after iteration (\d)", log).group(1))
    assert done in (1, 2), log  # the last that was finished
    equal_runs(uninterrupted, folder_of(log, tmp_path))


@linux
@pytest.mark.long
def test_nobody_waits_longer_than_timeout_for_a_stalled_process(tmp_path):
    with launched(*torchrun, "--nproc_per_node=2", program="main.py", arguments=[*RUN, "--merg_itr=500", "--timeout=3"],
                  home=tmp_path) as launcher:
        wait_for("iteration   1 trained", tmp_path / "log")
        os.kill(children(launcher.pid)[1], signal.SIGSTOP)
        stopped = time.monotonic()
        wait_for("has stalled", tmp_path / "log", seconds=20)
    assert time.monotonic() - stopped < 10
    assert re.search(r"agent 0 waited 3\.\d s for .*nothing within --timeout 3 s", (tmp_path / "log").read_text())


@linux
@pytest.mark.long
def test_a_process_that_hangs_before_it_has_joined_is_named(tmp_path):
    with launched(*torchrun, "--nproc_per_node=2", program="main.py", arguments=[*RUN, "--timeout=3"],
                  home=tmp_path) as launcher:
        while len(children(launcher.pid)) < 2:
            time.sleep(0.01)
        os.kill(children(launcher.pid)[1], signal.SIGSTOP)
        wait_for("error: rank 1 (agents 1, 2) did not come to ", tmp_path / "log", seconds=120)
    assert "note: RANK=0, WORLD_SIZE=2: waiting for rank 1 (agents 1, 2) at " in (tmp_path / "log").read_text()


# How a group is asked for


def asks_for_a_group(monkeypatch, **variables: str | None) -> None:
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | variables
    for name, value in group.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["main", "base_lines"])
@pytest.mark.parametrize(("variables", "word"), [
    ({"RANK": ""}, "RANK=''"), ({"RANK": "x"}, "RANK='x'"), ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ({"RANK": "-1"}, "RANK='-1'"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"), ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
    ({"MASTER_PORT": None}, "MASTER_PORT"), ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536"), ({"MASTER_ADDR": None}, "MASTER_ADDR"),
    ({"LOCAL_RANK": "gpu"}, "LOCAL_RANK='gpu'"), ({"TORCHELASTIC_RESTART_COUNT": ""}, "TORCHELASTIC_RESTART_COUNT=''")])
def test_a_group_that_makes_no_sense_is_a_sentence(tmp_path, monkeypatch, name, variables, word):
    asks_for_a_group(monkeypatch, **variables)
    result = script(name, "--randominit", cwd=tmp_path, check=False)
    assert result.returncode == 2 and word in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "missing", "mute"), [
    ("0", "rank 1 (agents 2, 3, 4)", False), ("1", "rank 0 (agents 0, 1)", False),
    ("1", "rank 0 (agents 0, 1)", True)])  # it listens, but is stopped
def test_who_waits_says_for_whom_and_which_variables_ask_for_it(monkeypatch, capfd, rank, missing, mute):
    threads, listening = threading.active_count(), socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    if not mute:
        listening.close()
    asks_for_a_group(monkeypatch, RANK=rank, MASTER_PORT=str(port))
    monkeypatch.setattr(processes, "IN_SILENCE", 0.2)
    monkeypatch.setattr(processes, "STARTING", 0.5)
    place = f"127.0.0.1:{port}"
    with pytest.raises(ValueError, match=re.escape(f"{missing} did not come to {place} within 0.5 s")), \
            processes.connect(5, torch.device("cpu"), "auto", timeout=0.1):
        pass
    assert capfd.readouterr().err == (f"note: RANK={rank}, WORLD_SIZE=2: waiting for {missing} at {place}; "
                                      "unset RANK and WORLD_SIZE to run as one process\n")
    listening.close()
    while threading.active_count() > threads:  # torch has more to say of a listener that goes
        time.sleep(0.01)


def test_a_launched_group_has_an_agent_for_each_process_unless_it_is_told(monkeypatch):
    def agents(name: str, *flags: str) -> int:
        return getattr(options, f"{name}_parser")().parse_args(list(flags)).num_models

    scripts = ("train", "main", "base_lines")
    assert [agents(name) for name in scripts] == [5, 5, 5]
    asks_for_a_group(monkeypatch, WORLD_SIZE="3")
    assert [agents(name) for name in scripts] == [5, 3, 3]
    assert [agents(name, "--num_models=4") for name in scripts] == [4, 4, 4]
    monkeypatch.setenv("DIMAT_PARENT", "1")  # a worker, of which there may be fewer than agents
    assert agents("main") == 5


# Workers


@pytest.mark.slow
def test_workers_give_one_processs_figures(checkpoints, tmp_path):
    """They go through the matching images together."""
    command = ["--num_models=4", f"--ckp={checkpoints}", "--exp=2", "--merg_itr=2", "--training", "--epochs=1",
               "--match_samples=100"]
    (home := tmp_path / "alone").mkdir()
    alone = folder_of(script("main", *command, cwd=home), home)
    running = process("main", *command, "--workers=2", cwd=tmp_path)
    printed, _ = running.communicate(timeout=120)
    assert running.returncode == 0
    equal_runs(alone, folder_of(printed, tmp_path))


@linux
@pytest.mark.long
@pytest.mark.parametrize(("victim", "sent"), [
    ("worker", signal.SIGKILL), ("first", signal.SIGKILL),
    *(pytest.param("first", sent, marks=pytest.mark.long) for sent in (signal.SIGTERM, signal.SIGINT))])
def test_no_worker_and_no_file_is_left_behind(tmp_path, victim, sent):
    running = process("main", *RUN, "--merg_itr=500", "--workers=2", cwd=tmp_path, stderr=subprocess.PIPE)
    while not running.stdout.readline().startswith("iteration   1 trained"):
        pass
    worker, = children(running.pid)
    os.kill(worker if victim == "worker" else running.pid, sent)
    _, said = running.communicate(timeout=60)
    assert running.returncode == (2 if victim == "worker" else 130 if sent == signal.SIGINT else -sent)
    assert ("error: agent 0 waited" in said) == (victim == "worker")
    wait_until_gone([worker])
    assert not list(tmp_path.glob("dimat-*"))  # where temporary files go


# Agents on their own


def same_but_for_what_nobody_knows(one: Path, collected: Path) -> None:
    unknown = ("consensus_distance", "average_model_accuracy")
    rows = [[{k: v for k, v in row.items() if k not in unknown} for row in rows_of(run)] for run in (one, collected)]
    assert rows[0] == rows[1]
    for file in (*one.glob("*/model_*.pth"), *one.glob("accuracy_matrix/*.csv")):
        assert file.read_bytes() == (collected / file.relative_to(one)).read_bytes(), file


@pytest.mark.long
def test_with_nobody_failing_agents_on_their_own_give_one_processs_figures(uninterrupted, tmp_path):
    running = process("main", *RUN, "--processes=3", "--timeout=60", cwd=tmp_path)
    printed, _ = running.communicate(timeout=120)
    assert running.returncode == 0, printed
    run = folder_of(printed, tmp_path)
    same_but_for_what_nobody_knows(uninterrupted, run)
    assert not (run / "exchange").exists()
    again = script("main", *RUN, "--agent=1", "--exchange=folder:elsewhere", cwd=tmp_path)
    assert "finished before: 4" in again.stdout


def agent(i: int, home: Path, *flags: str) -> subprocess.Popen:
    with open(home / f"log_{i}", "a") as log:
        return process("main", *RUN, f"--agent={i}", "--exchange=folder:meeting", *flags, cwd=home, stdout=log,
                       stderr=subprocess.STDOUT)


def wait_for_file(pattern: str, home: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not list(home.glob(pattern)):
        assert time.monotonic() < end, {log.name: log.read_text() for log in home.glob("log_*")}
        time.sleep(0.01)


@pytest.mark.long
def test_an_agent_that_is_killed_and_comes_back_in_time_changes_nothing(uninterrupted, tmp_path):
    agents = {i: agent(i, tmp_path, "--timeout=90") for i in range(3)}
    try:
        wait_for("iteration   1 merged", tmp_path / "log_2")  # it trains now
        agents[2].kill()
        agents[2].wait()
        agents[2] = agent(2, tmp_path, "--timeout=90")
        assert [running.wait(timeout=120) for running in agents.values()] == [0, 0, 0]
    finally:
        for running in agents.values():
            running.kill()
            running.wait()
    run = next(tmp_path.glob("results/**/agent_0")).parent
    script("experiments.collect", str(run), cwd=tmp_path)
    same_but_for_what_nobody_knows(uninterrupted, run)


@pytest.mark.long
@pytest.mark.parametrize("correction", ["none", "KGT"])
def test_the_others_go_on_without_a_dead_agent_which_finds_back_to_them(correction, tmp_path):
    flags = ("--timeout=6", "--merg_itr=6", f"--correction={correction}")
    agents = {i: agent(i, tmp_path, *flags) for i in range(3)}
    try:
        wait_for_file("meeting/*/agent_2/iteration_000002.model", tmp_path)  # a model is published before the merge
        agents[2].kill()
        agents[2].wait()
        assert [agents[i].wait(timeout=120) for i in (0, 1)] == [0, 0]
        agents[2] = agent(2, tmp_path, *flags)
        assert agents[2].wait(timeout=60) == 0
    finally:
        for running in agents.values():
            running.kill()
            running.wait()
    log = (tmp_path / "log_0").read_text()
    assert log.count("no model of agent 2 within --timeout 6 s: merging without it") == 1  # waited for once
    assert "it goes on with iteration 6" in (tmp_path / "log_2").read_text()
    run = next(tmp_path.glob("results/**/agent_0")).parent
    merged = [{row["iteration"]: row["merged_with"] for row in rows_of(run / f"agent_{i}")
               if row["phase"] == "merged"} for i in range(3)]
    assert merged[0] | {"1": "", "2": ""} == {"1": "", "2": "", "3": "1", "4": "1", "5": "1", "6": "1"}
    assert merged[0]["1"] == merged[0]["2"] == "1 2"
    assert merged[2]["6"] == "0 1" and "5" not in merged[2]
    script("experiments.collect", str(run), cwd=tmp_path)
    assert len(list(csv.DictReader((run / "accuracy_matrix/iteration_0006_merged.csv").open()))) == 3


@pytest.mark.long
def test_who_comes_late_takes_the_others_order_of_units_before_it_gives(tmp_path):
    flags = ("--opt=COMMON", "--merg_itr=3", "--timeout=3", "--match_data=local")
    for together in ((0, 1), (2,)):
        agents = [agent(i, tmp_path, *flags) for i in together]
        try:
            assert [running.wait(timeout=120) for running in agents] == [0] * len(agents)
        finally:
            for running in agents:
                running.kill()
                running.wait()
    assert "it goes on with iteration 3" in (tmp_path / "log_2").read_text()
    run = next(tmp_path.glob("results/**/agent_0")).parent
    stats = {i: list(csv.DictReader((run / f"agent_{i}/merge_stats.csv").open())) for i in (1, 2)}
    assert {(row["iteration"], row["neighbour"]) for row in stats[1]} == {("1", "0")}
    assert {(row["iteration"], row["neighbour"]) for row in stats[2]} == {("3", "0"), ("3", "1")}
    assert any(float(row["moved"]) > 0 for row in stats[2])


@pytest.mark.long
def test_whoever_is_missing_models_in_different_orders_are_never_averaged(checkpoints, tmp_path):
    """All agents have the same model in different orders of units, so that every right merge leaves it as it is."""
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / "config.yaml").write_bytes((checkpoints / "config.yaml").read_bytes())
    model = build_model("resnet20", 10, in_channels=1, image_size=8, width_multiplier=1)
    spec = derive_spec(model, torch.zeros(1, 1, 8, 8))
    state = torch.load(checkpoints / "model_0.pth", weights_only=True)
    for i in range(4):
        order = random_permutations(spec, torch.Generator().manual_seed(i))
        torch.save(permute(spec, order, state), copies / f"model_{i}.pth")
    flags = ["--dataset=digits", "--num_models=4", "--opt=COMMON", "--exp=2", "--bn_reset=none", "--merg_itr=5",
             f"--ckp={copies}", "--exchange=folder:meeting", "--timeout=2"]
    for together in ((1, 2, 3), (0,)):  # the root comes when the others have finished
        running = [process("main", *flags, f"--agent={i}", cwd=tmp_path) for i in together]
        printed = [one.communicate(timeout=200)[0] for one in running]
        assert [one.returncode for one in running] == [0] * len(together), printed
    run = next(tmp_path.glob("results/**/agent_0")).parent
    loss = {i: {float(row["test_loss"]) for row in rows_of(run / f"agent_{i}")} for i in range(4)}
    expected = max(loss[0])
    assert all(abs(value - expected) < 1e-3 for values in loss.values() for value in values), loss
    merged = [row for row in rows_of(run / "agent_2") if row["phase"] == "merged"]
    assert [row["merged_with"] for row in merged] == ["1 3"] * 5
    stats = {i: list(csv.DictReader((run / f"agent_{i}/merge_stats.csv").open())) for i in (1, 2)}
    assert ("1", "2") in {(row["iteration"], row["neighbour"]) for row in stats[1]}  # matched as in DIMAT
    assert max(int(row["iteration"]) for row in stats[2]) < 5  # by then they have one order, and nothing is matched


def test_an_agent_that_died_before_it_wrote_down_its_order_does_not_claim_it(checkpoints, tmp_path, monkeypatch):
    flags = ["--dataset=digits", "--num_models=4", "--opt=COMMON", "--exp=2", "--bn_reset=none", "--match_samples=50",
             f"--ckp={checkpoints}", "--exchange=folder:meeting", "--timeout=0", "--merg_itr=3"]
    label = {}

    def others(iterations):
        for i in (0, 1, 3):  # each finds what those before it have published
            script("main", *flags, f"--agent={i}", f"--merg_itr={iterations}", cwd=tmp_path)

    def lend(iteration):
        with open(next(tmp_path.glob(f"meeting/*/agent_2/iteration_{iteration:06d}.model")), "rb") as file:
            return json.loads(file.readline())["label"]

    with monkeypatch.context() as dies:
        others(1)
        dies.setattr("experiments.run_folder.RunFolder.commit", lambda *_, **__: sys.exit("dies"))
        script("main", *flags, "--agent=2", cwd=tmp_path, check=False)
        label["aligned"] = lend(1)
    others(3)
    said = script("main", *flags, "--agent=2", cwd=tmp_path).stdout
    label["as it was"] = lend(3)
    assert "goes on with iteration 3" in said and label == {"aligned": 0, "as it was": -1}
    rows = list(csv.DictReader((next(tmp_path.glob("results/**/agent_2")) / "merge_stats.csv").open()))
    assert {(row["iteration"], row["agent"], row["neighbour"]) for row in rows} == {("3", "2", "1"), ("3", "2", "3")}


@pytest.mark.parametrize(("flags", "word"), [
    (["--opt=COMMON", "--root=3"], "0 to 2"),
    (["--agent=3", "--exchange=folder:x"], "0 to 2"), (["--agent=1"], "--exchange"), (["--processes=2"], "give 3"),
    (["--staleness=2"], "--agent or --processes"), (["--agent=0", "--exchange=folder:x", "--workers=2"], "--workers"),
    (["--agent=0", "--exchange=tcp:x"], "folder:PATH"), (["--exchange=folder:x"], "--agent or --processes"),
    (["--max_distance=3"], "--agent or --processes"), (["--exchange_key=x"], "--agent or --processes"),
    (["--processes=3", "--exchange_key=no_such_key"], "no_such_key"),
    (["--robust=clip", "--bn_reset=repair"], "--robust clip"), (["--topology=directed.json"], "don't sum to 1")])
def test_contradictions_are_named_before_work(tmp_path, flags, word):
    (tmp_path / "directed.json").write_text(
        '{"directed": true, "connectivity": [[0, 0, 0], [1, 0, 0], [1, 1, 0]]}')
    command = [flag for flag in RUN if not flag.startswith("--exp")]
    result = script("main", *command, *flags, cwd=tmp_path, check=False)
    assert result.returncode == 2 and word in result.stderr
    assert not (tmp_path / "results").exists()


def test_an_agent_without_its_model_is_told(checkpoints, tmp_path):
    alone = tmp_path / "mine"
    alone.mkdir()
    (alone / "model_1.pth").write_bytes((checkpoints / "model_1.pth").read_bytes())
    (alone / "config.yaml").write_bytes((checkpoints / "config.yaml").read_bytes())
    flags = ["--dataset=digits", "--num_models=4", "--opt=WA", "--merg_itr=1", "--exp=2", f"--ckp={alone}",
             "--exchange=folder:meeting", "--timeout=0"]
    done = script("main", *flags, "--agent=1", cwd=tmp_path)  # its own model is enough
    assert "merging without it" in done.stdout and "results: " in done.stdout
    assert "1 finished models" in script("main", *flags, "--agent=2", cwd=tmp_path, check=False).stderr
