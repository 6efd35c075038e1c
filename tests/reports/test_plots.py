"""Reading metrics and drawing them."""

import csv
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

import demo
from experiments import steps
from experiments.merges import options_that_matter, settle_alignment
from experiments.options import base_lines_parser, main_parser
from merging import METHODS
from merging.drawing import groups_figure
from network.topology import make_topology
from reports import plots as run_plots
from reports.drawing import (
    accuracy_figure,
    accuracy_panel,
    lines_of,
    style,
    styles,
)
from reports.runs import Curve, accuracy_curve, find_runs, read_metrics, without_say
from tests.helpers import ROOT, script


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


# --------------------------------------------------------------------------------------------------------------------
# Run folders

COLUMNS = ("iteration", "phase", "agent", "test_accuracy", "consensus_distance", "bytes_sent")
CONFIG = {"opt": "DIMAT", "topology": "ring", "num_models": 3, "seed": 0, "dataset": "digits", "model": "resnet20",
          "data_dist": "iid", "alpha": None, "epochs": 2, "training": True, "randominit": True, "merg_itr": 2,
          "width_multiplier": 1, "bn_reset": "both", "match_samples": 500}


def write_run(folder, iterations=2, accuracy=lambda iteration, agent: 10.0 * iteration + agent, sent=1000, **options):
    """A run of merges, of a baseline with `num_epochs`: agent i sends (i + 1) * `sent` bytes in each iteration."""
    config = CONFIG | {"merg_itr": max(iterations, 1)} | options
    agents, baseline = config["num_models"], "num_epochs" in config
    (folder / "accuracy_matrix").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for k in range(iterations + 1):
            trains = ["trained"] if config["training"] and k < iterations else []
            for phase in ["initial"] if k == 0 else ["trained"] if baseline else ["merged", *trains]:
                exchanges = phase == ("trained" if baseline else "merged") and config["opt"] != "NONE"
                for i in range(agents):
                    writer.writerow([k, phase, i, accuracy(k, i) + 50 * (phase == "trained" and not baseline),
                                     10.0 / (k + 1), (i + 1) * sent * exchanges])
                header = ",".join(["agent", *(f"part_{j}" for j in range(agents)), "all"])
                rows = [",".join([str(i), *(f"{k + 10 * i + j:.4f}" for j in range(agents)), "99"])
                        for i in range(agents)]
                (folder / "accuracy_matrix" / f"iteration_{k:04d}_{phase}.csv").write_text("\n".join([header, *rows]))
    return folder


def write_stats(folder, rows):
    with (folder / "merge_stats.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "agent", "neighbour", "group", "units", "correlation", "moved"])
        writer.writerows(rows)


@pytest.fixture
def make(tmp_path):
    """make(**options): the run that `write_run` wrote somewhere of its own."""
    count = iter(range(1000))

    def write_and_read(**options):
        return find_runs([write_run(tmp_path / "results" / f"run_{next(count):03d}", **options)])[0][0]

    return write_and_read


def labels(runs):
    return [(line.label, [run.seed for run in line.runs]) for line in lines_of(runs)[0]]


def test_runs_are_found_once_wherever_they_are(tmp_path):
    a = write_run(tmp_path / "a" / "seed_0")
    b = write_run(tmp_path / "b" / "seed_0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(a)
    runs, notes = find_runs([tmp_path, a, b / "metrics.csv", tmp_path / "link"])
    assert [run.path for run in runs] == [a, b] and notes == []
    with pytest.raises(ValueError, match=r"no runs .* below .*empty"):
        find_runs([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_runs([tmp_path / "nowhere"])


@pytest.mark.parametrize("file, content, reason", [
    ("config.yaml", None, "no config.yaml beside it"),
    ("config.yaml", "opt: [", "config.yaml can't be read"),
    ("config.yaml", "opt: DIMAT", "config.yaml has no dataset"),
    ("metrics.csv", "iteration,phase\n", "no rows yet"),
    ("config.yaml", "{opt: 3}", "config.yaml says opt: 3"),
    ("metrics.csv", ",".join(COLUMNS) + "\n0,initial,0,nan,1,0\n", "not of a run: 0,initial,0,nan"),
    ("metrics.csv", ",".join(COLUMNS) + "\n0,initial,3,10,1,0\n", "not of a run: 0,initial,3"),
    ("metrics.csv", ",".join(COLUMNS) + "\n1,trained,0,10,1,0\n", "no rows of the phases initial and merged"),
])
def test_what_is_no_run_is_skipped_and_noted(tmp_path, file, content, reason):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    if content is None:
        (bad / file).unlink()
    else:
        (bad / file).write_text(content)
    runs, notes = find_runs([tmp_path])
    assert [run.path for run in runs] == [good]
    assert len(notes) == 1 and notes[0].startswith(f"skipped {bad}: ") and reason in notes[0]


def test_a_line_that_is_cut_short_is_not_yet_there(tmp_path):
    metrics = write_run(tmp_path / "run") / "metrics.csv"
    metrics.write_text(metrics.read_text() + "3,merged,0")
    (run,), notes = find_runs([tmp_path])
    assert run.last == 2 and notes == []


def test_scripts_and_pictures_agree_on_what_has_no_say():
    methods = [*METHODS, "NONE"]
    for opt, training, bn_reset in itertools.product(methods, ("True", "False"), ("none", "both")):
        o = vars(main_parser().parse_args([f"--opt={opt}", f"--training={training}", f"--bn_reset={bn_reset}",
                                           "--root=0"]))
        settle_alignment(o)
        matter = options_that_matter(o, {})
        given = {key for key, value in o.items() if value is not None}
        assert {key for key in given if matter[key] is None} == given & without_say(o), opt
    for eval_bn in ("running", "local"):
        o = vars(base_lines_parser().parse_args(["--randominit", f"--eval_bn={eval_bn}"]))
        *_, topology = steps.settle(o, range(o["num_models"]))
        *_, matter = steps.the_run(o, {}, topology)
        given = {key for key in matter if o.get(key) is not None} - {"epochs"}  # a run may be made longer
        assert {key for key in given if matter[key] is None} == given & without_say(o), eval_bn


def test_seeds_share_a_line_and_nothing_else_does(make):
    runs = [make(seed=3), make(seed=1), make(seed=1, match_samples=100), make(seed=0, opt="WA")]
    assert labels(runs) == [("DIMAT, match_samples=100", [1]), ("DIMAT, match_samples=500", [1, 3]), ("WA", [0])]


def test_options_without_a_say_make_no_difference(make):
    alone = [make(seed=k, opt="NONE", match_data=data) for k, data in enumerate(["all", "local"])]
    assert labels(alone) == [("agents alone", [0, 1])]
    assert len(labels([make(seed=k, opt="NONE", bn_reset=reset) for k, reset in enumerate(["none", "both"])])) == 2
    average = [make(seed=k, opt="WA", bn_reset="none", match_samples=k, match_at=("last", "all")[k]) for k in range(2)]
    assert labels(average) == [("WA", [0, 1])]
    assert len(labels([make(seed=k, opt="WA", match_samples=k) for k in range(2)])) == 2
    untrained = [make(seed=k, training=False, lr=0.1 * (k + 1)) for k in range(2)]
    assert labels(untrained) == [("DIMAT", [0, 1])]
    longer = [make(seed=k, opt="CDSGD", num_epochs=2, epochs=4 + 2 * k) for k in range(2)]
    assert labels(longer) == [("CDSGD", [0, 1])]
    elsewhere = [make(seed=k, device=f"cuda:{k}", ckp=f"there/random_seed_{k}", command=str(k)) for k in range(2)]
    assert labels(elsewhere) == [("DIMAT", [0, 1])]


def test_an_option_that_an_old_folder_lacks_has_its_reference_value(make):
    assert labels([make(seed=0), make(seed=1, match_at="last"), make(seed=2, match_at="all")]) == [
        ("DIMAT, match_at=last", [0, 1]), ("DIMAT, match_at=all", [2])]
    old = make(opt="WA")
    del old.config["bn_reset"]
    assert labels([old]) == [("WA", [0])]


def test_seeds_of_the_data_follow_the_run_or_stand_still(make):
    assert labels([make(seed=k, partition_seed=k) for k in range(3)]) == [("DIMAT", [0, 1, 2])]
    assert labels([make(seed=0, partition_seed=None), make(seed=1, partition_seed=1)]) == [("DIMAT", [0, 1])]
    assert labels([make(seed=k, partition_seed=7) for k in range(2)]) == [("DIMAT", [0, 1])]
    assert labels([make(seed=5, partition_seed=5), make(seed=6, partition_seed=7)]) == [
        ("DIMAT, partition_seed=7", [6]), ("DIMAT, partition_seed=SEED", [5])]


def test_the_start_tells_lines_apart(make):
    folder = "c/digits/resnet20/{}_initialization/models_no3/data_dist_iid/num_epochs_{}/{}random_seed_{}"

    def trained(seed, init="diff", epochs=20, unusual="", of=None):
        ckp = folder.format(init, epochs, unusual, seed if of is None else of)
        return make(seed=seed, randominit=False, ckp=ckp)

    assert labels([trained(0), trained(1)]) == [("DIMAT", [0, 1])]
    assert labels([trained(0), trained(1, of=0)]) == [("DIMAT", [0, 1])]
    assert [label for label, _ in labels([trained(0), trained(0, epochs=100)])] == [
        "DIMAT, pretrain_epochs=20", "DIMAT, pretrain_epochs=100"]
    assert [label for label, _ in labels([trained(0), trained(1, unusual="width=1,lr=0.1/")])] == [
        "DIMAT, pretrain_lr=0.001", "DIMAT, pretrain_lr=0.1"]
    assert [label for label, _ in labels([trained(0), trained(1, init="same")])] == [
        "DIMAT, pretrain_init=diff", "DIMAT, pretrain_init=same"]
    assert [label for label, _ in labels([make(diffinit=True), make(seed=1)])] == [
        "DIMAT, init=different_random", "DIMAT, init=same_random"]
    own = [make(seed=k, randominit=False, ckp=f"mine/{name}_2/seed_{k}") for k, name in enumerate("aab")]
    assert [seeds for _, seeds in labels(own)] == [[0, 1], [2]]


def test_none_is_a_value_where_an_option_has_a_say(make):
    runs = [make(opt="COMMON", root=None), make(opt="COMMON", root=0), make(opt="COMMON", root=0, seed=1)]
    assert labels(runs) == [("COMMON, root=0", [0, 1]), ("COMMON, root=None", [0])]
    assert len(labels([make(), make(seed=1, exchanged_by="folder")])) == 2


def test_unequal_data_or_epochs_are_named_across_methods_other_options_are_not(make):
    runs = [make(), make(opt="WA", test_samples=100, lr=0.1), make(opt="CDSGD", num_epochs=1, epochs=2)]
    assert [label for label, _ in labels(runs)] == [
        "DIMAT, 2 local epochs, test_samples=0", "WA, 2 local epochs, test_samples=100",
        "CDSGD, 1 local epoch, test_samples=0"]
    assert [label for label, _ in labels([make(), make(training=False)])] == ["DIMAT, 2 local epochs",
                                                                             "DIMAT, no training"]


def test_panels_are_by_topology_agents_and_data(make):
    runs = [make(data_dist="dirichlet", alpha=alpha) for alpha in (0.1, 0.5)]
    runs += [make(topology="my/graph.json", pi=np.full((3, 3), 1 / 3).tolist()), make(num_models=4)]
    lines, _ = lines_of(runs)
    assert [line.panel[2:] for line in lines] == [("graph", "3", "iid"), ("ring", "3", "dirichlet 0.1"),
                                                  ("ring", "3", "dirichlet 0.5"), ("ring", "4", "iid")]
    assert {line.label for line in lines} == {"DIMAT"}
    other = make(topology="your/graph.json", pi=np.eye(3).tolist())
    assert len({line.label for line in lines_of([runs[2], other])[0]}) == 2


def test_a_repeated_run_is_no_second_seed(make):
    short, long, again = make(iterations=1), make(iterations=3), make(iterations=3)
    (line,), notes = lines_of([short, long, again])
    assert [run.path for run in line.runs] == [long.path]
    assert notes == [f"left out {path}: it has the options and the seed of {long.path}"
                     for path in (short.path, again.path)]


def test_lines_are_ordered_as_in_a_legend(make):
    runs = [make(opt="NONE"), make(opt="SGP", num_epochs=2), make(opt="WA")]
    runs += [make(match_samples=samples) for samples in (1000, 20, 300)]
    assert [label for label, _ in labels(runs)] == [
        "DIMAT, match_samples=20", "DIMAT, match_samples=300", "DIMAT, match_samples=1000", "WA", "SGP", "agents alone"]
    runs = [make(match_prior=prior) for prior in ("identity", "none")]
    assert [label for label, _ in labels(runs)] == ["DIMAT, match_prior=none", "DIMAT, match_prior=identity"]


def test_twenty_lines_look_different_and_keep_the_methods_colours():
    looks = styles({f"DIMAT {k}": "DIMAT" for k in range(18)} | {"WA": "WA", "agents alone": "NONE"})
    assert len({(look["color"], look["marker"], look.get("linestyle", "-")) for look in looks.values()}) == 20
    assert looks["DIMAT 0"] == style("DIMAT") and looks["WA"] == style("WA") and looks["agents alone"] == style("NONE")
    assert len({(look["marker"], look.get("linestyle", "-")) for look in looks.values()}) > 12  # in grey print


# --------------------------------------------------------------------------------------------------------------------
# What the pictures show


def test_a_single_seed_has_the_agents_band_several_have_the_seeds(make):
    one, other = make(seed=0), make(seed=1, accuracy=lambda iteration, agent: 20.0 + 10 * iteration + agent)
    (line,), _ = lines_of([one])
    curve = run_plots.line_curve(line)
    assert curve.iterations.tolist() == [0, 1, 2]
    np.testing.assert_allclose([curve.mean, curve.low, curve.high], [[1, 11, 21], [0, 10, 20], [2, 12, 22]])
    (line,), _ = lines_of([one, other])
    curve = run_plots.line_curve(line)
    np.testing.assert_allclose([curve.mean, curve.low, curve.high], [[11, 21, 31], [1, 11, 21], [21, 31, 41]])
    assert "lowest to the highest agent" in run_plots.band_of(lines_of([one])[0])
    assert run_plots.band_of([line]).startswith("2 seeds") and "highest seed" in run_plots.band_of([line])


def test_seeds_are_averaged_where_all_have_been(make):
    (line,), notes = lines_of([make(seed=0, iterations=3), make(seed=1, iterations=1)])
    assert run_plots.line_curve(line).iterations.tolist() == [0, 1]
    assert len(notes) == 1 and "(0: 3, 1: 1)" in notes[0]


def test_bytes_add_up_to_each_point(make):
    merges = run_plots.bytes_so_far(make(sent=1000))
    assert merges.iterations.tolist() == [0, 1, 2]
    np.testing.assert_allclose([merges.mean, merges.low, merges.high],
                               [[0, 2000, 4000], [0, 1000, 2000], [0, 3000, 6000]])
    baseline = run_plots.bytes_so_far(make(opt="CDSGD", num_epochs=2, sent=5000))
    np.testing.assert_allclose(baseline.mean, [0, 10000, 20000])


def test_accuracy_against_gigabytes(make):
    runs = [make(sent=10**9), make(seed=1, sent=3 * 10**9), make(opt="NONE"), make(opt="WA", iterations=0)]
    dimat, average, alone = lines_of(runs)[0]
    drawn = run_plots.against_bytes(dimat)
    np.testing.assert_allclose(drawn.x, [0, 4, 8])
    np.testing.assert_allclose(drawn.curve.mean, [1, 11, 21])
    assert run_plots.against_bytes(alone).x is None
    notes = []
    (page,) = run_plots.accuracy_per_gigabyte([dimat, average, alone], notes.append)
    assert notes == ["accuracy per gigabyte: 1 of 3 lines are left out, for they have only begun"]
    curve, level = page().axes[0].lines
    np.testing.assert_allclose(curve.get_xdata(), [0, 4, 8])
    assert list(level.get_ydata()) == [21, 21]
    assert run_plots.accuracy_per_gigabyte([alone], notes.append) == []


def test_two_decades_make_the_gigabytes_logarithmic(make):
    assert not run_plots.spans_decades(np.array([0, 1, 100])) and run_plots.spans_decades(np.array([0, 1, 101]))
    lines, _ = lines_of([make(), make(opt="CDSGD", num_epochs=2, sent=10**6)])
    (page,) = run_plots.accuracy_per_gigabyte(lines, print)
    figure = page()
    assert figure.axes[0].get_xscale() == "log"
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [2e-6, 4e-6])  # the start is off a log axis
    assert "left of the logarithmic axis" in figure.get_supxlabel().replace("\n", " ")


def test_iterations_to_a_target_by_the_graph(make):
    def rising(slope):
        return lambda iteration, agent: min(90.0, slope * iteration) + (agent > 4) if iteration else 99.0

    runs = [make(topology=name, opt=opt, seed=seed, iterations=5, num_models=10, accuracy=rising(slope + 2 * seed))
            for name, opt, slope in (("ring", "DIMAT", 20), ("fully_connected", "DIMAT", 40), ("ring", "WA", 15))
            for seed in (0, 1)]
    notes = []
    (page,) = run_plots.iterations_to_target(lines_of(runs)[0], notes.append, 80.0)
    assert notes == ["not every seed of WA gets to 80 % (digits, resnet20, ring, 10, iid): no point"]
    figure = page()
    (line,) = figure.axes[0].lines
    np.testing.assert_allclose(line.get_xdata(), [1 - make_topology("ring", 10).second_eigenvalue, 1])
    np.testing.assert_allclose(line.get_ydata(), [4, 2])  # at 80 and 88, at 80 and 84 percent
    assert "ring 0.13, fully_connected 1.00" in figure.get_supxlabel().replace("\n", " ")
    assert "broken" not in figure.get_supxlabel()
    assert run_plots.iterations_to_target(lines_of(runs[-2:])[0], notes.append, 80.0) == []
    slow = [make(topology="exponential", iterations=5, num_models=10, accuracy=rising(15 + 2 * seed), seed=seed)
            for seed in (0, 1)]  # one of two gets there
    (page,) = run_plots.iterations_to_target(lines_of([*runs[:4], *slow])[0], notes.append, 80.0)
    (line,) = page().axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), [4, np.nan, 2])
    assert "A line is broken where a seed doesn't get there" in page().get_supxlabel().replace("\n", " ")
    lost = make(topology="gone.json", iterations=5, num_models=10, accuracy=rising(50))
    alone = make(topology="ring", opt="NONE", iterations=5, num_models=10, accuracy=rising(30))
    drawn = [make(topology="random", seed=seed, iterations=5, num_models=10, accuracy=rising(20)) for seed in (0, 1)]
    (page,) = run_plots.iterations_to_target(lines_of([lost, alone, *drawn])[0], notes.append, 80.0)
    assert notes[-1] == "topology file gone.json does not exist"
    random, level = page().axes[0].lines
    assert list(level.get_ydata()) == [3, 3]
    short = make(topology="star", opt="NONE", iterations=5, num_models=10, accuracy=rising(10))
    (page,) = run_plots.iterations_to_target(lines_of([alone, short, *drawn])[0], notes.append, 80.0)
    assert list(page().axes[0].lines[-1].get_ydata()) == [3, 3]
    gaps = [1 - make_topology("random", 10, seed).second_eigenvalue for seed in (0, 1)]
    np.testing.assert_allclose(random.get_xdata(), [np.mean(gaps)])


def test_bytes_per_epoch(make):
    assert run_plots.bytes_per_epoch(make(epochs=4)) == 500  # 2000 in an iteration of four epochs
    assert run_plots.bytes_per_epoch(make(opt="SGP", num_epochs=5, epochs=10)) == 400
    twice, last = make(epochs=0.5, iterations=4), make(epochs=0.5, iterations=4, last_merges=3, train_itr=1)
    assert run_plots.bytes_per_epoch(twice) == 4000 and run_plots.bytes_per_epoch(last) == 8000
    assert run_plots.bytes_per_epoch(make(training=False)) is None
    assert run_plots.bytes_per_epoch(make(iterations=0)) is None
    assert run_plots.bytes_per_epoch(make(opt="NONE")) == 0


def test_bars_for_what_is_sent(make):
    lines, _ = lines_of([make(), make(opt="NONE"), make(opt="WA", sent=3 * 10**6), make(opt="WM", training=False)])
    notes = []
    (page,) = run_plots.communication(lines, notes.append)
    assert notes == ["communication: 1 of 4 lines are left out, for they have trained no epoch"]
    axes = page().axes[0]
    assert axes.get_xscale() == "log"
    assert [bar.get_width() for bar in axes.patches] == [1000, 3 * 10**6, 0]
    assert [text.get_text() for text in axes.texts] == ["1 kB", "3 MB", "nothing"]
    assert len({bar.get_hatch() for bar in axes.patches}) == 3
    assert run_plots.communication([lines[-1]], print) == []


def test_consensus_is_logarithmic_and_says_where_agreement_is(make):
    lines, _ = lines_of([make()])
    (page,) = run_plots.consensus(lines, print)
    figure = page()
    assert figure.axes[0].get_yscale() == "log" and "agreement" not in figure.get_supxlabel()
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [10, 5, 10 / 3])
    for row in lines[0].runs[0].rows[3:]:
        row["consensus_distance"] = "0.0"
    (page,) = run_plots.consensus(lines, print)
    figure = page()
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [10, np.nan, np.nan])
    assert "exact agreement" in figure.get_supxlabel()
    for row in lines[0].runs[0].rows:
        row["consensus_distance"] = ""  # agents on their own
    notes = []
    assert run_plots.consensus(lines, notes.append) == [] and "nobody knew" in notes[0]


def test_iterations_of_the_heatmaps():
    assert run_plots.spread([1, 2, 3]) == [1, 2, 3]
    assert run_plots.spread(list(range(1, 101))) == [1, 34, 67, 100]
    assert run_plots.spread([4, 7], 2) == [4, 7] and run_plots.spread([]) == []


def test_heatmaps_share_a_scale_and_leave_out_the_whole_test_set(make):
    run = make(iterations=9)
    matrices = run_plots.accuracy_matrices(run)
    assert list(matrices) == [1, 4, 6, 9]
    np.testing.assert_allclose(matrices[4], [[4, 5, 6], [14, 15, 16], [24, 25, 26]])
    assert list(run_plots.accuracy_matrices(make(opt="SGP", num_epochs=2))) == [1, 2]
    lines, _ = lines_of([run])
    (page,) = run_plots.accuracy_matrix(lines, print)
    images = [image for axes in page().axes for image in axes.get_images()]
    np.testing.assert_allclose(images[1].get_array(), matrices[4])
    assert [image.get_clim() for image in images] == [(0, 40)] * 4  # 1 to 31, in whole tens


def test_a_broken_matrix_is_noted_and_the_others_drawn(make):
    runs = [make(), make(opt="WA")]
    file = runs[0].path / "accuracy_matrix" / "iteration_0002_merged.csv"
    file.write_text("agent,part_0\n0,half")
    notes = []
    (page,) = run_plots.accuracy_matrix(lines_of(runs)[0], notes.append)
    assert notes == [f"{file} is not an accuracy matrix of 3 agents"]
    assert sum(bool(axes.get_images()) for axes in page().axes) == 2


def test_many_runs_make_pages(make):
    lines, _ = lines_of([make(match_samples=k) for k in range(7)])
    pages = run_plots.accuracy_matrix(lines, print)
    assert [sum(bool(axes.get_images()) for axes in page().axes) for page in pages] == [12, 2]


def test_graphs_come_from_the_name_or_the_matrix_that_was_written_down(make):
    assert run_plots.topology_of(make(topology="star", num_models=4)).neighbours(1) == [0]
    seeded = run_plots.topology_of(make(topology="random", num_models=12, seed=3))
    assert np.array_equal(seeded.pi, make_topology("random", 12, 3).pi)
    pi = [[0.5, 0.5, 0], [0.5, 0.25, 0.25], [0, 0.25, 0.75]]
    graph = run_plots.topology_of(make(topology="gone.json", pi=pi))
    assert not graph.directed and run_plots.edges_of(graph) == [(0, 1, 0.5), (1, 2, 0.25)]
    turns = run_plots.topology_of(make(topology="gone", pi=[np.eye(3).tolist(), pi]))
    assert len(turns.schedule) == 2 and np.allclose(turns.pi, (np.eye(3) + pi) / 2) and turns.name == "gone"
    one_way = run_plots.topology_of(make(topology="gone.json", pi=[[0.5, 0, 0.4], [0.5, 0.5, 0.1], [0, 0.5, 0.5]]))
    assert one_way.directed and run_plots.edges_of(one_way) == [(2, 0, 0.4), (0, 1, 0.5), (1, 2, 0.3)]
    with pytest.raises(FileNotFoundError):
        run_plots.topology_of(make(topology="gone.json"))


def test_agents_are_coloured_by_their_last_accuracy(make):
    run = make()
    np.testing.assert_allclose(run_plots.final_accuracies(run), [20, 21, 22])
    assert run_plots.final_accuracies(make(opt="SGP", num_epochs=2)).tolist() == [20, 21, 22]
    missing = make(iterations=1)
    del missing.rows[3]  # agent 0 in the last merge
    np.testing.assert_array_equal(run_plots.final_accuracies(missing), [np.nan, 11, 12])
    notes = []
    pages = run_plots.topology(lines_of([run, make(opt="WA", topology="gone.json")])[0], notes.append)
    assert len(pages) == 1 and notes == ["topology file gone.json does not exist"]
    axes, bar = pages[0]().axes
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["0", "1", "2"]
    widths = [text.arrow_patch.get_linewidth() for text in axes.texts if getattr(text, "arrow_patch", None)]
    np.testing.assert_allclose(widths, [7 / 3] * 3)
    assert bar.get_ylim() == (10, 30)


def test_merge_statistics_are_means_at_the_first_and_last_merge(make):
    run = make()
    assert run_plots.merge_stats_of(run) is None
    write_stats(run.path, [(1, 0, 1, "z", 8, 0.2, 1.0), (1, 1, 0, "z", 8, 0.4, 0.5), (1, 0, 1, "a", 8, "", 0.25),
                           (2, 0, 1, "z", 8, 0.9, 0.9), (3, 0, 1, "z", 8, 0.6, 0.0), (3, 0, 1, "a", 8, "", 0.125)])
    stats = run_plots.merge_stats_of(run)
    assert stats.iterations == [1, 3] and stats.groups == ["z", "a"]
    np.testing.assert_allclose(stats.correlation, [[0.3, np.nan], [0.6, np.nan]])
    np.testing.assert_allclose(stats.moved, [[0.75, 0.25], [0, 0.125]])
    (page,) = run_plots.merge_stats(lines_of([run])[0], print)
    left, right = page().axes
    np.testing.assert_allclose(right.lines[1].get_ydata(), [0, 0.125])
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["z", "a"]


def test_merge_statistics_of_one_merge_and_without_correlations(make):
    run = make(opt="WM")
    write_stats(run.path, [(1, 0, 1, "a", 8, "", 0.5)])
    stats = run_plots.merge_stats_of(run)
    assert stats.iterations == [1] and np.isnan(stats.correlation).all() and stats.moved.tolist() == [[0.5]]
    (page,) = run_plots.merge_stats(lines_of([run])[0], print)
    assert [text.get_text() for text in page().axes[0].texts] == ["WM measures none"]
    write_stats(run.path, [("first", 0, 1, "a", 8, "", 0.5)])
    with pytest.raises(ValueError, match=r"merge_stats\.csv is not a table"):
        run_plots.merge_stats_of(run)


def test_titles_name_what_differs():
    ring, star = ("digits", "resnet20", "ring", "5", "iid"), ("digits", "vgg16", "star", "1", "dirichlet 0.1")
    assert run_plots.title_of(ring, [ring]) == "ring, 5 agents, iid"
    assert run_plots.title_of(star, [ring, star]) == "vgg16: star, 1 agent, dirichlet 0.1"


def test_the_legend_counts_seeds_only_where_they_differ(make):
    two = [make(seed=0), make(seed=1)]
    assert list(run_plots.names_of(lines_of(two)[0]).values()) == ["DIMAT"]
    lines, _ = lines_of([*two, make(opt="WA"), make(topology="star")])
    names = [name.replace("\N{NO-BREAK SPACE}", " ") for name in run_plots.names_of(lines).values()]
    assert names == ["DIMAT (1 or 2 seeds)", "WA (1 seed)", "DIMAT (1 or 2 seeds)"]


def test_a_label_looks_the_same_in_all_panels_and_stands_in_the_legend_once(make):
    runs = [make(opt=opt, topology=name) for name in ("ring", "star") for opt in ("DIMAT", "mine")]
    (page,) = run_plots.accuracy(lines_of([*runs, make(opt="other", topology="star")])[0], print)
    figure = page()
    left, right = figure.axes
    assert [line.get_color() for line in left.lines] == [line.get_color() for line in right.lines][:2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DIMAT", "mine", "other"]
    np.testing.assert_allclose(left.lines[0].get_ydata(), [1, 11, 21])
    assert left.get_ylim() == (0, 30)


def test_names_are_drawn_as_they_stand(tmp_path, capsys):
    """Whatever matplotlib makes of dollars, a terminal of line breaks and a file of half a character."""
    name = "a$b$c_{ $\\frac{1}$ \\$ \ud800 %d {x} #\ntwo"
    pi = [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    for k in range(2):
        run = write_run(tmp_path / "results" / str(k), opt=name, topology=name, dataset=name, model=name + "2" * k,
                        data_dist=name, match_prior=name, pi=pi)
    write_stats(run, [(1, 0, 1, name.replace("\ud800", "?"), 5, 0.5, 0.5)])
    command = [str(tmp_path / "results"), f"--out={tmp_path / 'out'}", "--format=svg", "--target=5"]
    assert run_plots.main(command) == 0
    assert len(capsys.readouterr().out.split()) == len([*(tmp_path / "out").iterdir()]) == 8


def test_a_dollar_is_a_dollar(tmp_path):
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        groups_figure({"g$1$": "(5)"}, ["l$2$"], [(0, 0)], [], tmp_path / "groups.svg", "t$3$")
        accuracy_figure({"p$4$": {"m$5$": curve(1, 2)}}, tmp_path / "curves.svg", "c$6$")
    drawn = (tmp_path / "groups.svg").read_text() + (tmp_path / "curves.svg").read_text()
    assert all(text in drawn for text in ("g$1$", "l$2$", "t$3$", "p$4$", "m$5$", "c$6$"))


@pytest.mark.parametrize("pi", ["much", {"a": 1}, [1, 2], [[1, 0], [0, 1]], [[float("nan")] * 3] * 3])
def test_weights_of_another_kind_are_noted(make, pi):
    notes = []
    assert run_plots.topology(lines_of([make(pi=pi)])[0], notes.append) == []
    assert len(notes) == 1 and notes[0].endswith("pi in config.yaml holds no weights of 3 agents")


def test_tables_that_hold_no_figures_are_noted(make):
    run, notes = make(), []
    write_stats(run.path, [(1, 0, 1, "g", 5, "inf", 0.5)])
    last = run.path / "accuracy_matrix" / "iteration_0002_merged.csv"
    last.write_text(last.read_text().replace("22.0000", "inf"))
    lines, _ = lines_of([run])
    assert run_plots.merge_stats(lines, notes.append) == run_plots.accuracy_matrix(lines, notes.append) == []
    assert notes == [f"{run.path / 'merge_stats.csv'} is not a table of merge statistics",
                     f"{last} is not an accuracy matrix of 3 agents"]


def test_an_agent_without_test_images_is_left_white(make):
    run = make()
    last = run.path / "accuracy_matrix" / "iteration_0002_merged.csv"
    last.write_text(last.read_text().replace("22.0000", "nan"))
    (page,) = run_plots.accuracy_matrix(lines_of([run])[0], pytest.fail)
    assert page().axes[0].images[0].norm.vmax <= 30


@pytest.mark.parametrize("agents, count", [(5, 1), pytest.param(20, 4, marks=pytest.mark.long)])
def test_words_stay_on_the_page_and_off_the_panels(make, agents, count, caplog):
    """Long names, many agents: headings, legends and captions."""
    name = "A_METHOD_WITH_A_NAME_OF_FORTY_CHARACTERS"
    runs = [make(num_models=agents, topology=topology, match_samples=k, iterations=4, opt=name, data_dist="dirichlet",
                 alpha=0.5) for k in (0, 100) for topology in ("ring", "exponential")][:count]
    for run in runs:
        write_stats(run.path, [(k, 0, 1, f"layer{g}.0.shortcut", 8, 0.5, 0.5) for k in (1, 2) for g in range(12)])
    for name, picture in run_plots.PICTURES.items():
        for page in picture(lines_of(runs)[0], print):
            figure = page()
            figure.draw_without_rendering()
            renderer = figure.canvas.get_renderer()
            words = [*figure.texts, *figure.legends]
            words += [text for axes in figure.axes for text in (*axes.texts, axes.title, axes.xaxis.label)]
            for box in (word.get_window_extent(renderer) for word in words if word.get_visible()):
                assert min(box.x0, box.y0) > -1, name
                assert box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1, name
            for axes in figure.axes if name == "topology" else []:
                circle = axes.transData.transform([(-1.1, -1.1), (1.1, 1.1)]) if not axes.axison else []
                assert all(axes.bbox.contains(*corner) for corner in circle)
            panels = [axes.get_tightbbox(renderer) for axes in figure.axes if axes.axison]
            assert figure._supxlabel.get_window_extent(renderer).y1 < min(box.y0 for box in panels) + 1, name
            for legend in figure.legends:
                assert legend.get_window_extent(renderer).y0 > max(box.y1 for box in panels) - 1, name
    assert caplog.messages == []  # matplotlib has nothing to complain about


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_all_pictures(tmp_path, capsys):
    for seed in range(2):
        write_run(tmp_path / "results" / f"dimat_{seed}", seed=seed)
    write_stats(tmp_path / "results" / "dimat_0", [(1, 0, 1, "conv1", 8, 0.5, 0.5)])
    write_run(tmp_path / "results" / "sgp", opt="SGP", num_epochs=2)
    out = tmp_path / "new" / "figures"
    assert run_plots.main([str(tmp_path / "results"), "--out", str(out)]) == 0
    names = ["accuracy", "accuracy_per_gigabyte", "accuracy_matrix", "topology", "communication", "consensus",
             "merge_stats"]
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(out / f"{name}.{kind}") for name in names for kind in ("png", "pdf")]
    assert said.err == ""
    assert len(list(out.iterdir())) == 2 * len(names)
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert b"/Type3" not in (out / "accuracy.pdf").read_bytes()


def test_pictures_without_data_are_not_drawn(tmp_path, capsys):
    write_run(tmp_path / "alone", opt="NONE")
    assert run_plots.main([str(tmp_path / "alone"), "--out", str(tmp_path / "figures"), "--format", "png"]) == 0
    assert sorted(file.stem for file in (tmp_path / "figures").iterdir()) == ["accuracy", "accuracy_matrix",
                                                                             "consensus", "topology"]


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    write_run(tmp_path / "run")
    out = tmp_path / "figures"
    out.mkdir()
    (out / "consensus.png").write_text("precious")
    command = [str(tmp_path / "run"), "--out", str(out), "--format", "png"]
    assert run_plots.main(command) == 2
    said = capsys.readouterr()
    assert said.err == f"error: {out / 'consensus.png'} exists: choose another --out, or --overwrite to replace\n"
    assert [file.name for file in out.iterdir()] == ["consensus.png"]
    assert (out / "consensus.png").read_text() == "precious"
    assert run_plots.main([*command, "--overwrite"]) == 0
    assert (out / "consensus.png").read_bytes().startswith(b"\x89PNG")
    first = (out / "accuracy.png").read_bytes()
    assert run_plots.main([*command, "--overwrite"]) == 0
    assert (out / "accuracy.png").read_bytes() == first


def test_errors_are_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for path, message in (("empty", "no runs (config.yaml beside metrics.csv) below"), ("nowhere", "does not exist")):
        assert run_plots.main([str(tmp_path / path), "--out", str(tmp_path / "figures")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "figures").exists()
    with pytest.raises(SystemExit) as stop:
        run_plots.main([str(tmp_path), "--format", "png,bmp"])
    assert stop.value.code == 2 and "'png,bmp' is not a list of png, pdf, svg" in capsys.readouterr().err


def test_runs_without_a_column_are_noted_and_the_rest_is_drawn(tmp_path, capsys):
    write_run(tmp_path / "good")
    metrics = write_run(tmp_path / "old", seed=1) / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("bytes_sent", "sent"))
    command = ["--out", str(tmp_path / "figures"), "--format", "png"]
    assert run_plots.main([str(tmp_path), *command]) == 0
    assert f"skipped {tmp_path / 'old'}: no column bytes_sent" in capsys.readouterr().err
    assert run_plots.main([str(tmp_path / "old"), *command]) == 2 and "nothing to draw" in capsys.readouterr().err


def test_unreadable_folders_are_noted_and_the_rest_is_drawn(tmp_path, capsys):
    write_run(tmp_path / "good")
    (write_run(tmp_path / "bad") / "config.yaml").write_text("opt: [")
    assert run_plots.main([str(tmp_path), "--out", str(tmp_path / "figures"), "--format", "pdf"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"note: skipped {tmp_path / 'bad'}: config.yaml can't be read")
    assert str(tmp_path / "figures" / "accuracy.pdf") in said.out.splitlines()


def test_the_module_is_a_command_and_imports_no_script():
    shown = script("reports.plots", "--help", cwd=ROOT)
    assert "python -m reports.plots results/ --out figures/" in shown.stdout
    assert all(name in shown.stdout for name in run_plots.PICTURES)
    code = ("import sys, json, reports.plots; loaded = [name.partition('.')[0] for name in sys.modules]; "
            "import reports.partitions; print(json.dumps(['matplotlib' in sys.modules, loaded]))")
    draws, loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    assert not draws
    assert "utils" in loaded
    assert not set(loaded) & {"matplotlib", "merging", "main", "train", "base_lines", "demo", "optimizers"}
