"""Tables of run folders: what is averaged, what is kept apart, what is said."""

import csv
import importlib
import io
import os
import subprocess
import sys

import pytest
import yaml

from reports.tables import MISSING, main
from tests.helpers import ROOT, script
from utils.progress import print_anywhere

MERGE = {
    "opt": "DIMAT", "topology": "ring", "exp": 2, "merg_itr": 2, "training": True, "ckp": None, "randominit": True,
    "seed": 0, "dataset": "digits", "num_models": 2, "data_dist": "iid", "alpha": None, "partition_seed": None,
    "model": "resnet20", "epochs": 2, "lr": 0.001, "momentum": 0.0, "match_samples": 0, "device": "auto",
    "command": "main.py", "versions": {"torch": "2"}, "initial_models": "abc", "num_threads": 1,
}
BASELINE = {key: value for key, value in MERGE.items() if key != "match_samples"} | {
    "opt": "CDSGD", "epochs": 4, "num_epochs": 2, "momentum": None, "launch": "17-4",
    "memory_layout": "torch.contiguous_format"}
COLUMNS = ("iteration", "phase", "agent", "test_accuracy", "train_accuracy", "consensus_distance")


@pytest.fixture
def add(tmp_path):
    """add(name, means, **options): the folder of a run of two agents, with the agents' mean after each iteration."""

    def add(name, means, base=MERGE, phase="merged", **options):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(base | options, sort_keys=False))
        rows = [(0, "initial", agent, 99.0, "", 1.0) for agent in range(2)]
        for k, mean in enumerate(means, 1):
            train = "" if phase == "merged" else mean + 5
            rows += [(k, phase, agent, mean + sign, train, 1 / k) for agent, sign in enumerate((-3, 3))]
            if phase == "merged" and k < len(means):
                rows += [(k, "trained", agent, mean + 20, mean + 30, 2) for agent in range(2)]
        with (folder / "metrics.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        return folder

    return add


@pytest.fixture
def report(tmp_path, capsys):
    """report(*flags): the table's lines as lists of cells, all that is printed, and the notes."""

    def report(*flags):
        status = main([str(tmp_path / "results"), *flags])
        out, err = capsys.readouterr()
        assert status == 0, err
        table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in out.splitlines()
                 if line.startswith("| ") and not line.startswith("| -")]
        return table, out, err

    return report


@pytest.fixture
def error(tmp_path, capsys):
    """error(*flags): the one line on stderr of a command that fails."""

    def error(*flags, path=None):
        assert main([str(path or tmp_path / "results"), *flags]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    return error


def test_seeds_are_averaged_with_the_sample_standard_deviation(add, report):
    for seed, mean in enumerate((60, 62, 67)):
        add(f"a{seed}", [10, mean], seed=seed, initial_models=f"m{seed}", num_threads=seed, command=f"run {seed}")
    add("b", [10, 50.126], opt="WA")
    table, out, err = report("--cols", "data_dist,topology")
    assert table == [["opt", "test_accuracy"], ["DIMAT", "63.00 ± 3.61 (3)"], ["WA", "50.13 (1)"]]
    assert "everywhere: data_dist=iid, topology=ring\n" in out
    assert "fewer seeds than 3: WA: test_accuracy (seeds 0)" in out
    assert err == ""


def test_rows_and_columns_are_options_in_natural_order(add, report):
    for n, topology in ((10, "ring"), (2, "ring"), (2, "full")):
        # Two agents have rows: what config.yaml says of their number is checked elsewhere.
        add(f"{n}{topology}", [10, n + 50], match_samples=n, topology=topology)
    table, out, _ = report("--rows", "match_samples, opt", "--cols", "topology")
    assert table == [["match_samples", "full", "ring"], ["2", "52.00 (1)", "52.00 (1)"], ["10", MISSING, "60.00 (1)"]]
    assert "everywhere: opt=DIMAT\n" in out
    assert "missing: 10: full\n" in out
    table, out, _ = report("--rows", "topology", "--cols", "opt,match_samples")
    assert table[0] == ["topology", "2", "10"]


def test_fractions_go_by_size(add, report):
    for lr in (0.1, 1e-05, 0.05, 0.2):
        add(str(lr), [40, 50], lr=lr)
    assert [row[0] for row in report("--rows=lr")[0][1:]] == ["1e-05", "0.05", "0.1", "0.2"]


def test_the_only_row_keeps_its_name(add, report):
    add("a", [10, 50])
    table, out, _ = report()
    assert table == [["opt", "test_accuracy"], ["DIMAT", "50.00 (1)"]]
    assert "everywhere: topology=ring, data_dist=iid\n" in out


def test_metric_picks_the_iteration(add, report):
    add("a", [70, 50, 60], merg_itr=3)
    assert report()[0][1][1] == "60.00 (1)"
    assert report("--metric=best")[0][1][1] == "70.00 (1)"  # the accuracy of 99 at the start is no result
    assert report("--metric=at:2")[0][1][1] == "50.00 (1)"
    assert report("--metric=at:0")[0][1][1] == "99.00 (1)"
    assert report("--phase=trained")[0][1][1] == "70.00 (1)"  # after the second merge: the last is followed by none
    assert report("--phase=trained", "--column=train_accuracy")[0][1][1] == "80.00 (1)"
    assert report("--column=consensus_distance", "--metric=best")[0][1][1] == "0.3333 (1)"


def test_iterations_to_a_target(add, report):
    add("a", [50, 80, 79, 90], merg_itr=4)
    add("b", [50, 60, 79.9, 80], merg_itr=4, seed=1)
    add("c", [50, 60, 70, 79.9], merg_itr=4, seed=2)
    table, _, noted = report("--metric=to:80")
    assert table[1] == ["DIMAT", "3.0000 ± 1.4142 (2)"] and "c: test_accuracy never gets to 80" in noted
    # 1 / iteration, in these runs
    assert report("--metric=to:0.4", "--column=consensus_distance")[0][1] == ["DIMAT", "3.0000 ± 0.0000 (3)"]


def test_the_mean_over_the_merges_is_the_area_under_the_curve(add, report):
    add("a", [30, 50, 70.5], merg_itr=3)
    assert report("--metric=mean")[0][1][1] == "50.17 (1)"  # the accuracy of 99 at the start is no result


def test_only_some_runs_count(add, report, error):
    for seed in range(3):
        add(f"a{seed}", [40, 50 + seed], seed=seed)
    add("b", [40, 60], opt="WA", lr=0.01)
    assert report("--only", "opt=DIMAT", "seed=1,2")[0][1:] == [["DIMAT", "51.50 ± 0.71 (2)"]]
    assert report("--only", "lr=1e-2")[0][1:] == [["WA", "60.00 (1)"]]  # a number, however it is written
    assert report("--only", "training=true", "opt=WA", "random_seed=0")[0][1:] == [["WA", "60.00 (1)"]]
    assert report("--only", "opt=DIMAT", "--only", "seed=1", "seed=2")[0][1:] == [["DIMAT", "51.50 ± 0.71 (2)"]]
    assert "--only opt=WO: no run has that; there are opt=DIMAT,WA" in error("--only", "opt=WA,WO")
    assert "--only colour: no run has such an option" in error("--only", "colour=red")


def test_baselines_are_read_after_training(add, report):
    add("a", [50, 60], base=BASELINE, phase="trained")
    add("b", [50, 70])
    table, out, _ = report()
    assert table[1:] == [["CDSGD", "60.00 (1)"], ["DIMAT", "70.00 (1)"]]
    assert out.startswith("test_accuracy, final, merged or trained: ")


def test_runs_that_differ_are_never_averaged(add, report):
    for i, (seed, samples, lr) in enumerate([(0, 0, 0.1), (1, 0, 0.1), (0, 1000, 0.1), (1, 1000, 0.02)]):
        add(str(i), [10, 50 + 10 * i], seed=seed, match_samples=samples, lr=lr)
    table, _, err = report()
    assert table[1:] == [
        ["DIMAT (lr=0.02, match_samples=1000)", "80.00 (1)"],
        ["DIMAT (lr=0.1, match_samples=0)", "55.00 ± 7.07 (2)"],
        ["DIMAT (lr=0.1, match_samples=1000)", "70.00 (1)"],
    ]
    assert err == ""


@pytest.mark.parametrize(("option", "values", "label"), [
    ("merg_itr", (2, 1), "DIMAT (merg_itr=2)"),
    ("test_samples", (None, 100), "DIMAT"),
    ("imgntdir", ("/here/birds", "/there/cats"), "DIMAT (imgntdir=birds)"),
    ("pi", ([[1, 0], [0, 1]], [[0.5, 0.5], [0.5, 0.5]]), "DIMAT (pi=#"),
    ("partition_seed", (20, 21), "DIMAT (partition_seed=20)"),
    ("option_of_tomorrow", (1, 2), "DIMAT (option_of_tomorrow=1)"),
])
def test_every_option_that_matters_splits(add, report, option, values, label):
    for seed, value in enumerate(values):
        add(str(seed), [40, 50], seed=seed, **{option: value})
    table = report()[0][1:]
    assert len(table) == 2 and any(row[0].startswith(label) for row in table)


@pytest.mark.parametrize(("option", "values"), [
    ("imgntdir", ("/here/birds", "/there/birds")), ("imgntdir", (None, "/data/tiny-imagenet-200")),
    ("topology", ("/here/mine.json", "/there/mine.json")), ("device", ("cpu", "cuda")), ("memory_layout", ("a", "b")),
    ("partition_seed", (None, 1)), ("partition_seed", (0, 1)), ("partition_seed", (7, 7)), ("partition_seed", (0, 0)),
])
def test_what_changes_no_figure_or_follows_the_seed_does_not_split(add, report, option, values):
    for seed, value in enumerate(values):
        add(str(seed), [40, 50], seed=seed, **{option: value})
    assert report()[0][1:] == [["DIMAT", "50.00 ± 0.00 (2)"]]


def test_partitions_that_follow_the_seed_and_one_that_stays_are_two_experiments(add, report):
    for seed, partition in ((0, 0), (1, 1), (2, 2), (1, 5), (2, 5)):
        add(f"{seed}_{partition}", [40, 50 + partition], seed=seed, partition_seed=partition)
    assert report()[0][1:] == [["DIMAT (partition_seed=5)", "55.00 ± 0.00 (2)"],
                               ["DIMAT (partition_seed=SEED)", "51.00 ± 1.00 (3)"]]


LAYOUT = "checkpoint/digits/resnet20/diff_initialization/models_no2/data_dist_iid/num_epochs_{}/{}random_seed_{}"


def test_checkpoints_of_the_seed_are_one_experiment(add, report):
    for seed in range(3):
        add(str(seed), [40, 50], seed=seed, randominit=False, ckp=f"/host{seed}/{LAYOUT.format(20, 'width=1/', seed)}")
    assert report()[0][1:] == [["DIMAT", "50.00 ± 0.00 (3)"]]


def test_one_checkpoint_for_all_seeds_is_one_experiment_beside_random_starts(add, report):
    """As the paper's scripts do: all seeds from the checkpoints of seed 0, on their partition."""
    for seed in range(3):
        add(f"a{seed}", [40, 50], seed=seed, randominit=False, ckp=LAYOUT.format(20, "", 0), partition_seed=0)
        add(f"b{seed}", [40, 60], seed=seed, ckp=None)
    assert report()[0][1:] == [["DIMAT (randominit=False)", "50.00 ± 0.00 (3)"],
                               ["DIMAT (randominit=True)", "60.00 ± 0.00 (3)"]]


@pytest.mark.parametrize(("one", "other", "label"), [
    (LAYOUT.format(20, "", 0), LAYOUT.format(100, "", 1), "DIMAT (pretrain_epochs=100)"),
    (LAYOUT.format(20, "", 0), LAYOUT.format(20, "width=1,lr=0.1/", 1), "DIMAT (pretrain_lr=0.1)"),
    (LAYOUT.format(20, "", 0), LAYOUT.format(20, "", 1).replace("diff", "same"), "DIMAT (pretrain_init=same)"),
    (LAYOUT.format(20, "", 0), LAYOUT.format(20, "", 5), "DIMAT (pretrain_seed=5)"),
    ("/data/seed03", "/data/seed13", "DIMAT (pretrain_folder=/data/seed13)"),
    ("/data/good/seed0", "/data/bad/seed1", "DIMAT (pretrain_folder=/data/bad/seedSEED)"),
])
def test_other_pretraining_splits(add, report, one, other, label):
    add("a", [40, 50], randominit=False, ckp=one)
    add("b", [40, 60], randominit=False, ckp=other, seed=1)
    table = report()[0][1:]
    assert len(table) == 2 and label in [row[0] for row in table]


def test_options_without_a_say_do_not_split(add, report):
    add("a", [40, 50], opt="NONE", match_data="all")
    add("b", [40, 52], opt="NONE", match_data="local", seed=1)
    add("c", [40, 60], training=False, lr=0.1)
    add("d", [40, 62], training=False, lr=0.2, seed=1)
    for seed in range(2):  # of these checkpoints only the data count
        add(f"e{seed}", [40, 70], opt="WA", seed=seed, randominit=True, ckp=LAYOUT.format(20 + seed, "", 0))
    assert report()[0][1:] == [["DIMAT", "61.00 ± 1.41 (2)"], ["NONE", "51.00 ± 1.41 (2)"],
                               ["WA", "70.00 ± 0.00 (2)"]]


def test_methods_in_one_cell_are_told_apart_without_listing_their_own_options(add, report):
    add("a", [40, 50])
    add("b", [40, 60], match_samples=9)
    add("c", [40, 70], base=BASELINE, phase="trained", epochs=4)
    table = report("--rows=model", "--cols=data_dist")[0]
    assert [row[0] for row in table[1:]] == ["resnet20 (opt=CDSGD, epochs=4)",
                                             "resnet20 (opt=DIMAT, epochs=2, match_samples=0)",
                                             "resnet20 (opt=DIMAT, epochs=2, match_samples=9)"]


def test_on_the_way_the_length_of_a_run_does_not_matter(add, report):
    add("a", [40, 50], merg_itr=2)
    add("b", [42, 50, 60], merg_itr=3, seed=1)
    add("c", [40, 50], base=BASELINE, phase="trained", epochs=4)
    add("d", [42, 50, 60], base=BASELINE, phase="trained", epochs=6, merg_itr=3, seed=1)
    assert [row[0] for row in report()[0][1:]] == ["CDSGD (epochs=4)", "CDSGD (epochs=6)", "DIMAT (merg_itr=2)",
                                                   "DIMAT (merg_itr=3)"]
    assert report("--metric=at:1")[0][1:] == [["CDSGD", "41.00 ± 1.41 (2)"], ["DIMAT", "41.00 ± 1.41 (2)"]]


def test_a_row_that_is_not_alike_says_so(add, report):
    add("a", [40, 50])
    add("b", [40, 60], data_dist="dirichlet", alpha=0.5, match_samples=7, partition_seed=3)
    table, out, _ = report()
    assert table[1] == ["DIMAT", "60.00 (1)", "50.00 (1)"]
    assert out.endswith("\nnot alike along the row: DIMAT: match_samples\n")


def test_duplicated_folders_count_once(add, report):
    first = add("a", [40, 50])
    copy = add("b", [40, 50], command="again", device="cuda")
    add("c", [40, 60], seed=1)
    table, _, err = report()
    assert table[1] == ["DIMAT", "55.00 ± 7.07 (2)"]
    assert err == f"note: counted once: {first} and {copy} have the same options and seed\n"


def test_duplicated_folders_with_other_values_are_named(add, report):
    add("a", [40, 50])
    add("b", [40, 51])
    table, _, err = report()
    assert table[1] == ["DIMAT", "50.00 (1)"]
    assert "but not the same value (50.0, which counts, and 51.0)" in err


def test_a_folder_reached_twice_is_one_run(add, report, tmp_path):
    folder = add("a", [40, 50])
    table, _, err = report(str(folder), str(tmp_path / "results" / ".." / "results"))
    assert table[1] == ["DIMAT", "50.00 (1)"] and err == ""


def test_unfinished_runs_count_only_on_the_way(add, report, error):
    folder = add("a", [40, 50], merg_itr=5)
    assert error() == ("error: no run has test_accuracy for --metric final; not counted: "
                       f"{folder}: unfinished: 2 of 5 iterations are done\n")
    add("b", [40, 60], seed=1)
    for metric in ("final", "best"):
        table, _, err = report(f"--metric={metric}")
        assert table[1] == ["DIMAT", "60.00 (1)"]
        assert err == f"note: not counted: {folder}: unfinished: 2 of 5 iterations are done\n"
    assert report("--metric=at:2")[0][1] == ["DIMAT", "55.00 ± 7.07 (2)"]


@pytest.mark.parametrize("damage", [
    lambda lines: lines[:-1],  # agent 1 is missing
    lambda lines: [*lines[:-1], lines[-1].rpartition(",")[0]],  # its line is cut short
    lambda lines: [*lines[:-1], lines[-2]],  # agent 0 is there twice
    lambda lines: [*lines, lines[-1]],
])
def test_an_iteration_counts_when_every_agent_has_one_row(add, error, damage):
    metrics = add("a", [40, 50]) / "metrics.csv"
    metrics.write_text("\n".join(damage(metrics.read_text().splitlines())))
    assert "unfinished: 1 of 2" in error()


@pytest.mark.parametrize(("file", "content", "reason"), [
    ("config.yaml", "opt: [", "config.yaml can't be read"),
    ("config.yaml", "- a list", "expected 'option: value' lines"),
    ("config.yaml", "opt: DIMAT", "config.yaml has no dataset"),
    ("config.yaml", "{opt: DIMAT, topology: ring, num_models: two}", "num_models: 'two'"),
    ("metrics.csv", "", "no rows yet"),
    ("metrics.csv", "a,b\n1,2\n", "metrics.csv has no column agent, iteration, phase"),
    ("metrics.csv", "iteration,phase,agent\none,merged,0\n", "not of a run: one,merged,0"),
    ("metrics.csv", b"\xff\xfe", "can't decode"),
])
def test_unreadable_folders_are_named(add, report, error, file, content, reason):
    folder = add("a", [40, 50])
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reason in error()
    add("b", [40, 60])
    table, _, err = report()
    assert table[1] == ["DIMAT", "60.00 (1)"]
    assert err.startswith(f"note: skipped {folder}: ") and reason in err


def test_values_that_are_no_numbers_are_named(add, report):
    metrics = add("a", [40, 50]) / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("merged,1,53", "merged,1,soon"))
    add("b", [40, 60], seed=1)
    table, _, err = report()
    assert table[1] == ["DIMAT", "60.00 (1)"] and "soon" in err


def test_folders_of_checkpoints_are_no_runs(add, report, tmp_path):
    add("a", [40, 50])
    add("checkpoint", [40, 60], opt="adam").joinpath("metrics.csv").unlink()
    table, _, err = report()
    assert table[1:] == [["DIMAT", "50.00 (1)"]] and err == ""


def test_errors_are_one_line(add, error, tmp_path):
    assert "nowhere does not exist" in error(path="nowhere")
    (tmp_path / "empty").mkdir()
    assert "no runs (config.yaml beside metrics.csv) below" in error(path=tmp_path / "empty")
    add("a", [40, 50])
    add("b", [40, 50], lr=0.5)
    assert "--rows colour: no run has such an option; they differ in lr" in error("--rows=opt,colour")
    assert "--cols colour:" in error("--cols=colour")
    assert "one that is no column's too" in error("--cols=opt")
    assert "rows need an option" in error("--rows=,")
    assert "--metric last: give final, best, mean, at:K" in error("--metric=last")
    assert "--metric to:: give" in error("--metric=to:")
    assert "never gets to 99" in error("--metric=to:99")
    assert "nothing at iteration 9: the last one is 2" in error("--metric=at:9")
    assert "there are test_accuracy, train_accuracy, consensus_distance" in error("--column=agent")
    assert "no train_accuracy in the phases merged" in error("--column=train_accuracy")


def test_a_reader_may_leave_early(add, tmp_path):
    add("a", [40, 50], opt="long " * 50_000)  # more than a pipe holds
    command = [sys.executable, "-m", "reports.tables", str(tmp_path / "results")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


def test_csv_has_a_line_for_each_cell(add, report, tmp_path):
    for seed in (1, 0, 2):
        add(f"a{9 - seed}", [40, 50.5 + seed], seed=seed)
    add("b", [40, 60], opt="WA", topology="full")
    file = tmp_path / "new" / "table.csv"
    report("--csv", str(file))
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert rows[0] == {"data_dist": "iid", "opt": "DIMAT", "topology": "ring", "mean": "51.5", "std": "1.0",
                       "seeds": "0 1 2", "values": "50.5 51.5 52.5"}
    assert rows[1] == {"data_dist": "iid", "opt": "WA", "topology": "full", "mean": "60.0", "std": "", "seeds": "0",
                       "values": "60.0"}
    assert len(rows) == 2
    assert [entry.name for entry in file.parent.iterdir()] == ["table.csv"]


def test_latex_is_a_booktabs_tabular(add, report, tmp_path):
    add("a", [40, 50], opt="A_&%$#{}~^\\B")
    add("b", [40, 51], opt="A_&%$#{}~^\\B", seed=1)
    add("c", [40, 60], opt="WA", topology="fully_connected")
    file = tmp_path / "table.tex"
    report("--latex", str(file))
    name = r"A\_\&\%\$\#\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}B"
    assert file.read_text().splitlines() == [
        r"\begin{tabular}{lcc}", r"\toprule", r"opt & fully\_connected & ring \\", r"\midrule",
        rf"{name} & -- & 50.50 $\pm$ 0.71 (2) \\", r"WA & 60.00 (1) & -- \\", r"\bottomrule", r"\end{tabular}"]


@pytest.mark.parametrize("flag", ["--csv", "--latex"])
def test_existing_files_stay_unless_told_otherwise(add, report, error, tmp_path, flag):
    add("a", [40, 50])
    file = tmp_path / "table"
    file.write_text("precious")
    assert f"{file} exists: give another name, or --overwrite" in error(flag, str(file))
    assert file.read_text() == "precious"
    report(flag, str(file), "--overwrite")
    assert "DIMAT" in file.read_text()


def test_bars_in_names_do_not_break_the_table(add, report):
    add("a", [40, 50], opt="a|b")
    assert r"| a\|b | 50.00 (1)     |" in report()[1]


def test_large_and_small_figures_are_readable(add, report):
    add("a", [40, 3e6])
    assert report()[0][1][1] == "3000000 (1)"
    assert report("--column=consensus_distance")[0][1][1] == "0.5000 (1)"


def test_the_command_runs_and_its_help_teaches(add, tmp_path):
    add("a", [40, 50])
    command = [sys.executable, "-m", "reports.tables"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and "| DIMAT | 50.00 (1)" in done.stdout
    help_ = script("reports.tables", "-h", cwd=tmp_path).stdout
    assert "example:\n  python -m reports.tables results/" in help_
    assert "of the runs that get there) (default: final)" in " ".join(help_.split())


def test_a_run_that_is_older_than_an_option_had_its_usual_value(add, report):
    add("older", [10, 60])
    add("newer", [10, 62], seed=1, wire="fp32", link_failure=0.0, agent_failure=0.0, staleness=0, first_models="x")
    add("failing", [10, 50], wire="fp32", link_failure=0.2, agent_failure=0.0, staleness=0)
    table, _, _ = report("--cols", "data_dist")
    assert [(row[0].replace(" ", ""), row[1][:5]) for row in table[1:]] == [
        ("DIMAT(link_failure=0.0)", "61.00"), ("DIMAT(link_failure=0.2)", "50.00")]


def in_ascii(*command, **how):
    """What a command prints where the terminal knows nothing but ASCII."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", *command], env=os.environ | plain, capture_output=True, **how)


def test_a_table_can_be_printed_in_ascii(add, tmp_path):
    for seed, opt in ((0, "Müller"), (1, "Müller"), (0, "WA")):
        add(f"{opt.encode().hex()}{seed}", [40, 50 + seed], opt=opt, seed=seed,
            topology="ring" if opt == "WA" else "star")
    done = in_ascii("reports.tables", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    assert rb"| M\xfcller | -        | 50.50 +- 0.71 (2) |" in done.stdout.replace(b"  |", b" |"), done.stdout.decode()


@pytest.mark.parametrize("script", ["train", "main", "base_lines", "experiments.sweep", "reports.tables",
                                    "reports.plots", "reports.partitions", "experiments.collect",
                                    "experiments.groups"])
def test_help_can_be_printed_in_ascii(script, monkeypatch):
    """In this process: importing torch eight times takes too long."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    module = importlib.import_module("reports.plots" if script == "reports.plots" else script)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    out.flush()
    assert stop.value.code == 0 and b"--help" in out.buffer.getvalue()


def test_what_is_no_text_is_printed_as_it_came(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    print_anywhere()
    print("é\udce9 \ud800", flush=True)
    assert out.buffer.getvalue() == b"\xc3\xa9\xe9 \\ud800\n"


@pytest.mark.parametrize(("options", "reason"), [
    ({"merg_itr": "two"}, "config.yaml says merg_itr: 'two'"),
    ({"merg_itr": True}, "config.yaml says merg_itr: True"),
    ({"merg_itr": -1}, "config.yaml says merg_itr: -1"),
    ({"num_models": 10**30}, "config.yaml says num_models: 1000"),
    ({"seed": 10**30}, "config.yaml says seed: 1000"),
    ({"epochs": "2"}, "config.yaml says epochs: '2'"),
    ({"num_epochs": [1]}, "config.yaml says num_epochs: [1]"),
    ({"data_dist": "dirichlet", "alpha": "much"}, "config.yaml says alpha: 'much'"),
])
def test_options_of_the_wrong_type_are_named(add, report, options, reason):
    folder = add("a", [40, 50], **options)
    add("b", [40, 60])
    assert report()[2].startswith(f"note: skipped {folder}: {reason}")


@pytest.mark.parametrize("key", ["merg_itr", "topology", "seed"])
def test_an_option_that_is_missing_is_named(add, report, key):
    folder = add("a", [40, 50])
    config = {name: value for name, value in MERGE.items() if name != key}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    add("b", [40, 60])
    assert report()[2] == f"note: skipped {folder}: config.yaml has no {key}\n"


@pytest.mark.parametrize(("change", "reason"), [
    (lambda text: "\n".join(",".join(line.split(",")[:2] + line.split(",")[3:]) for line in text.splitlines()),
     "metrics.csv has no column agent"),
    (lambda text: text + "1,merged," + "0" * 140_000, "metrics.csv can't be read: field larger than"),
    (lambda text: text + f"{10**30},merged,0,50,,1", "not of a run: 1000"),
    (lambda text: text.replace("53", ""), "not of a run: 1,merged"),
])
def test_tables_of_other_kinds_are_named(add, report, change, reason):
    folder = add("a", [53, 53])
    metrics = folder / "metrics.csv"
    metrics.write_text(change(metrics.read_text().replace("50,", "53,")))
    add("b", [40, 60])
    assert reason in report()[2]


def test_options_of_other_kinds_do_no_harm(add, report):
    odd = {"ckp": 5, "imgntdir": 7, "partition_seed": "x", "bn_reset": [1], "lr": {"a": 1}, "training": "maybe",
           "eval_bn": None, "match_samples": 10**400, "wire": "\ud800"}
    for n, (key, value) in enumerate(odd.items()):
        add(str(n), [40, 50], seed=n, randominit=False, **{key: value})
    assert len(report()[0]) > 2
    assert len(report("--only", "match_samples=0")[0]) > 1


def test_names_keep_to_their_line(add, report):
    add("a", [40, 50], opt="two\nlines\x1b[31m")
    assert report()[0][1] == [r"two\nlines\x1b[31m", "50.00 (1)"]
