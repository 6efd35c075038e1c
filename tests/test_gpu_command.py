"""What `python -m benchmarks.gpu` does around its stages: what is done is kept, what is cut off is said."""

import argparse

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_stages import STAGES, Results, Target, apart, with_option
from benchmarks.processes import measure

OPTIONS = argparse.Namespace(width_multiplier=1, agents=3, data=None, train_samples=5)


def test_a_stage_that_is_done_is_known_and_a_line_that_was_cut_off_is_left_out(tmp_path):
    results = Results(tmp_path, "waits")
    assert gpu.read(tmp_path, "waits") == [] and not gpu.is_done(tmp_path, "waits")
    results.add(what="an iteration", seconds=1.5)
    with open(results.file, "a") as file:
        file.write('{"what": "do')
    assert gpu.read(tmp_path, "waits") == [{"what": "an iteration", "seconds": 1.5}]
    assert not gpu.is_done(tmp_path, "waits")
    results.file.write_text(results.file.read_text().rpartition("{")[0])
    results.add(what=gpu.DONE)
    assert gpu.is_done(tmp_path, "waits")


def test_the_report_has_each_stage_and_what_became_of_it(tmp_path):
    Results(tmp_path, "waits").add(what="a | b", seconds=1.23456)
    Results(tmp_path, "waits").add(what="stopped after its 5 s")
    gpu.report(tmp_path, OPTIONS, torch.device("cpu"))
    text = (tmp_path / "report.md").read_text()
    assert all(f"## {name}\n" in text for name in STAGES)
    assert "| a \\| b | 1.235 |" in text and "stopped after its 5 s" in text
    assert text.count("not begun") == len(STAGES) - 1


def test_a_stage_that_takes_too_long_ends_with_all_it_started_and_says_so(tmp_path):
    o = gpu.parser().parse_args(["--device=cpu", "--width_multiplier=1"])
    gpu.carry_out(STAGES["memory"], o, tmp_path, 0.3)
    assert "stopped after its 0 s" in gpu.read(tmp_path, "memory")[-1]["what"]
    assert not gpu.is_done(tmp_path, "memory")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_see_what_it_does(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "finds no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_models_are_compared_by_their_largest_entries():
    ours, theirs = ({0: {"w": torch.tensor(values)}} for values in ([1.0, 4.0], [2.0, 4.0]))
    assert apart(ours, theirs) == 0.25


def test_a_measured_run_has_seconds_of_each_phase():
    few = ["--dataset=digits", "--train_samples=40", "--test_samples=20", "--num_models=2", "--width_multiplier=1",
           "--epochs=1", "--batch_size=20", "--match_samples=20", "--workers=1"]
    assert all(measure(few, threads=1)[phase] > 0 for phase in ("trained", "merged", "whole"))


FEW = Target(torch.device("cpu"), 1, 2, 40, 20, None)


def test_training_with_an_option_is_compared_with_training_without():
    assert with_option()(FEW) == 0 and with_option("--lr=0.02")(FEW) > 0


def test_an_iteration_of_which_one_wants_to_know_what_it_waits_for_runs(tmp_path):
    STAGES["waits"].function(FEW, Results(tmp_path, "waits"), 60)
    rows = {row["what"]: row["seconds"] for row in gpu.read(tmp_path, "waits")}
    assert rows["an iteration"] > 0 and rows["CPU in operations"] > 0
