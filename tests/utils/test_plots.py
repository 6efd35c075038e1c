"""Reading metrics and drawing them."""

import csv
import subprocess
import sys

import numpy as np
import pytest

import demo
from utils.plots import Curve, accuracy_curve, accuracy_figure, accuracy_panel, read_metrics, style


@pytest.fixture
def metrics(tmp_path):
    """A run of two agents: iteration 0 (initial), iterations 1 and 2 merged, iteration 1 trained."""
    rows = [("0", "initial", 0, 90), ("0", "initial", 1, 80), ("1", "merged", 0, 20), ("1", "merged", 1, 40)]
    rows += [("1", "trained", 0, 99), ("1", "trained", 1, 97), ("2", "merged", 0, 60), ("2", "merged", 1, 65)]
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "phase", "agent", "test_accuracy", "train_loss"])
        writer.writerows([*row, "" if row[1] != "trained" else 0.5] for row in rows)
    return tmp_path


def test_curve_is_the_mean_and_range_after_each_merge(metrics):
    curve = accuracy_curve(read_metrics(metrics))
    assert curve.iterations.tolist() == [0, 1, 2]
    np.testing.assert_allclose(curve.mean, [85, 30, 62.5])
    np.testing.assert_allclose(curve.low, [80, 20, 60])
    np.testing.assert_allclose(curve.high, [90, 40, 65])


def test_curve_of_another_column_and_phase_skips_empty_cells(metrics):
    rows = read_metrics(metrics / "metrics.csv")
    assert accuracy_curve(rows, phases=("trained",)).mean.tolist() == [98]
    assert accuracy_curve(rows, "train_loss", ("merged", "trained")).iterations.tolist() == [1]
    with pytest.raises(ValueError, match="no train_loss in the phases merged"):
        accuracy_curve(rows, "train_loss", ("merged",))


def test_missing_and_empty_metrics_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics at .*metrics\.csv"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.csv").write_text("iteration,phase,agent,test_accuracy\n")
    with pytest.raises(ValueError, match="no rows yet"):
        read_metrics(tmp_path)


def curve(*means: float) -> Curve:
    values = np.array(means, dtype=float)
    return Curve(np.arange(len(values)), values, values - 2, values + 1)


def test_panel_draws_a_line_per_method_and_a_band_except_for_agents_alone():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    accuracy_panel(axes, {"DIMAT": curve(90, 40, 95), "NONE": curve(90, 91, 92), "mine": curve(1, 2, 3)}, "IID")
    assert [line.get_label() for line in axes.lines] == ["DIMAT", "agents alone", "mine"]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [90, 40, 95])
    assert len(axes.collections) == 2
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == 38 and band.max() == 96
    assert axes.get_title() == "IID"


def test_methods_have_colours_of_their_own():
    colours = [style(method, k)["color"] for k, method in enumerate(("DIMAT", "WA", "WM", "NONE", "mine"))]
    assert len(set(colours)) == 5


def test_figure_is_written_whole(tmp_path):
    path = tmp_path / "new" / "picture.png"
    accuracy_figure({"IID": {"DIMAT": curve(90, 95)}, "Dirichlet": {"WA": curve(80, 85)}}, path, "caption")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 200_000
    assert [entry.name for entry in path.parent.iterdir()] == ["picture.png"]


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, utils.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_demo_says_plainly_who_is_ahead():
    iid = {"DIMAT": curve(90, 40, 95), "WA": curve(90, 20, 94.5), "NONE": curve(90, 91, 92)}
    other = {"DIMAT": curve(60, 70, 79), "WA": curve(60, 80, 92), "NONE": curve(60, 61, 62)}
    text = demo.table({"iid": iid, "dirichlet": other})
    assert "=> iid: DIMAT and WA are level (less than 1 point apart)." in text
    assert "=> dirichlet: WA is ahead, 13.0 points above DIMAT." in text
    assert "agents alone" in text and "93.0 to 96.0" in text


def test_the_demo_reads_the_folder_from_the_last_line(monkeypatch, capfd, tmp_path):
    (tmp_path / "step.py").write_text("print('working')\nprint('results: results/a b')\n")
    (tmp_path / "broken.py").write_text("raise SystemExit('error: no')\n")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    assert demo.run_script("step", ["--x=1"], "[iid] ") == "results/a b"
    shown = capfd.readouterr().out
    assert "[iid] $ python -m step --x=1\n[iid] working\n" in shown
    with pytest.raises(RuntimeError, match="python -m broken failed with status 1"):
        demo.run_script("broken", [], "")
