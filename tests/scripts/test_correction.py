"""main.py --correction: exact on resume, the same in all kinds of processes, right when links and agents fail."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from network.wire import WIRES, wire_bytes
from optimizers.corrections import CORRECTIONS
from tests.helpers import TINY, equal, equal_runs, folder_of, process, rows_of, script
from tests.scripts.test_main_processes import same_but_for_what_nobody_knows

RUN = [*TINY, "--num_models=4", "--randominit", "--diffinit", "--train_samples=80", "--merg_itr=3", "--training",
       "--epochs=1", "--batch_size=20", "--test_samples=50", "--match_samples=50", "--data_dist=non-iid"]


def run(home: Path, *flags: str) -> Path:
    home.mkdir(exist_ok=True)
    return folder_of(script("main", *RUN, *graph(flags), *flags, cwd=home), home)


def graph(flags: Sequence[str]) -> list[str]:
    return [] if any(flag.startswith(("--exp", "--topology")) for flag in flags) else ["--exp=2"]


def corrections(folder: Path) -> list[dict[str, torch.Tensor]]:
    return torch.load(folder / "state.pt", weights_only=True)["correction"]


def adds_up_to(ys: list[dict[str, torch.Tensor]]) -> float:
    return max(float(sum(y[name].double() for y in ys).abs().max()) for name in ys[0])


@pytest.mark.parametrize("flags", [
    ["--opt=COMMON", "--correction=LED"],
    pytest.param(["--opt=DIMAT", "--correction=KGT", "--exp=1"], marks=pytest.mark.long)], ids=" ".join)
def test_a_corrected_run_resumes_to_an_equal_one(flags, tmp_path):
    whole = run(tmp_path / "whole", *flags)
    assert f"correction={flags[1].partition('=')[2]}" in whole.parent.name
    for length in (1, 3):
        parts = run(tmp_path / "in parts", *flags, f"--merg_itr={length}", "--resume")
    equal_runs(whole, parts)
    assert all(float(t.abs().max()) > 0 for y in corrections(whole) for t in list(y.values())[:1])


@pytest.mark.parametrize("correction", ["LED", pytest.param("KGT", marks=pytest.mark.long)])
def test_what_agents_correct_by_adds_up_to_nothing(correction, tmp_path):
    folder = run(tmp_path, "--opt=WA", "--merg_itr=6", "--topology=torus", "--link_failure=0.3", "--agent_failure=0.2",
                 "--wire=int8", f"--correction={correction}")
    assert {row["took_part"] for row in rows_of(folder)} == {"0", "1"}
    ys = corrections(folder)
    assert adds_up_to(ys) < 1e-5 < 1e-3 < max(float(t.abs().max()) for y in ys for t in y.values())


@pytest.mark.long
def test_a_graph_that_changes_and_agents_in_one_order_of_units(tmp_path):
    assert adds_up_to(corrections(run(tmp_path, "--opt=WA", "--exp=2", "--correction=LED"))) < 1e-5
    assert adds_up_to(corrections(run(tmp_path, "--opt=COMMON", "--correction=LED"))) < 1e-5
    moving = run(tmp_path, "--topology=random_matching", "--opt=WA", "--correction=KGT")
    assert adds_up_to(corrections(moving)) < 1e-5


@pytest.mark.parametrize("wire", ["fp32", *(pytest.param(wire, marks=pytest.mark.long) for wire in [*WIRES][1:])])
def test_only_a_walk_costs_bytes(wire, tmp_path):
    sent = {}
    for correction in ("none", *CORRECTIONS):
        folder = run(tmp_path, "--opt=WA", "--merg_itr=1", f"--wire={wire}", f"--correction={correction}")
        sent[correction] = {int(row["bytes_sent"]) for row in rows_of(folder) if row["phase"] == "merged"}
    model = torch.load(folder / "merged/model_0.pth", weights_only=True)
    parameters = {key: t for key, t in model.items() if "running" not in key and "tracked" not in key}
    assert sent["none"] == sent["LED"] == {2 * wire_bytes(model, wire)}
    assert sent["KGT"] == {2 * (wire_bytes(model, wire) + wire_bytes(parameters, wire))}


@pytest.mark.long
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_processes_of_all_kinds_give_one_processs_figures(correction, tmp_path):
    flags = ["--opt=COMMON", "--match_data=local", f"--correction={correction}"]
    one = run(tmp_path / "one", *flags)
    for kind in ("--workers=2", "--processes=4"):
        (home := tmp_path / kind).mkdir()
        running = process("main", *RUN, *graph(flags), *flags, kind, cwd=home)
        printed, _ = running.communicate(timeout=120)
        assert running.returncode == 0, printed
        (equal_runs if kind == "--workers=2" else same_but_for_what_nobody_knows)(one, folder_of(printed, home))


@pytest.mark.long
def test_agents_that_may_be_out_of_step_forget(tmp_path):
    """What is kept differs from the third merge on; until then the models are those of agents in step."""
    flags = ["--opt=WA", "--correction=LED"]
    one = run(tmp_path / "one", *flags)
    (home := tmp_path / "own").mkdir()
    running = process("main", *RUN, *graph(flags), *flags, "--processes=4", "--staleness=1", cwd=home)
    printed, _ = running.communicate(timeout=120)
    assert running.returncode == 0, printed
    own = folder_of(printed, home)
    for i, y in enumerate(corrections(one)):
        state = torch.load(own / f"agent_{i}/state.pt", weights_only=True)
        equal(state["states"][0], torch.load(one / "state.pt", weights_only=True)["states"][i])
        assert not any(torch.equal(t, state["correction"][0][name]) for name, t in y.items() if "conv" in name)


@pytest.mark.long
def test_the_first_merge_corrects_nothing(tmp_path):
    """What agents differ by before they have ever merged is no drift."""
    rows = {}
    for correction in ("none", "LED"):
        folder = run(tmp_path, "--opt=COMMON", "--merg_itr=3", f"--correction={correction}")
        rows[correction] = [row["test_loss"] for row in csv.DictReader((folder / "metrics.csv").open())]
    same = [a == b for a, b in zip(*rows.values(), strict=True)]
    assert same == [True] * 4 * 4 + [False] * 4 * 2  # initial, merged, trained, merged; then trained, merged


@pytest.mark.parametrize(("flags", "word"), [
    (["--training=False"], "add --training"), (["--opt=NONE"], "--opt=NONE"), (["--robust=clip"], "--robust clip"),
    (["--bn_reset=repair"], "--bn_reset repair")])
def test_what_has_no_plain_average_to_go_by_is_refused(flags, word, tmp_path):
    result = script("main", *RUN, "--exp=2", "--correction=LED", *flags, cwd=tmp_path, check=False)
    assert result.returncode == 2 and word in result.stderr and result.stderr.count("\n") == 1
