"""Sweeps: the right commands, as many at a time as allowed, and nothing lost when something fails or is stopped."""

import contextlib
import datetime
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from experiments import sweep
from experiments.sweep import Job, Planner, grid, plan_file, run_jobs, scripts_parsers
from tests.helpers import ROOT, descendants, process, rows_of, wait_until_gone


def shell(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(ROOT / f"{name}.sh"), *arguments], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})


def planned(name: str, *arguments: str, capsys) -> list[list[str]]:
    assert sweep.main([name, *arguments]) == 0
    *commands, last = capsys.readouterr().out.splitlines()
    assert last.startswith(f"# {len(commands)} commands; --run_python true runs them")
    return [shlex.split(command) for command in commands]


DOCUMENTED = [
    ("train", '--nums_models "5 10" --data_dists "iid" --datasets_nums_classes "cifar100,100" --models "resnet20" '
              '--random_seeds "0 1 2 3 4" --num_parallel 10', 10),
    ("main", '--nums_models "5 10" --data_dists "iid" --datasets_nums_classes "cifar100,100" --models "resnet20" '
             '--random_seeds "0 1 2 3 4" --epochs "2" --opts "DIMAT WA" --num_parallel 10', 20),
    ("base_lines", '--nums_models "5" --exps "1 2"  --data_dists "non-iid iid" --datasets_nums_classes "cifar100,100" '
                   '--models "resnet20" --random_seeds "0 1 2 3 4" --nums_epochs "2" --opts "CDSGD SGP" '
                   '--num_parallel 1 --randominits False --diffinits False', 40),
]


@pytest.mark.parametrize(("name", "flags", "count"), DOCUMENTED)
def test_the_documented_sweeps_are_the_documented_commands(name, flags, count, capsys):
    commands = planned(name, *shlex.split(flags), capsys=capsys)
    assert len(commands) == count == len(set(map(tuple, commands)))
    path = "checkpoint/cifar100/resnet20/diff_initialization/models_no5/data_dist_iid/num_epochs_100/random_seed_3"
    if name == "train":
        assert sum("--num_models=10" in command for command in commands) == 5
    else:
        from_there = [command for command in commands if f"--ckp={path}" in command]
        assert len(from_there) == {"main": 2, "base_lines": 4}[name]
        assert all("--seed=3" in command and "--resume" in command for command in from_there)
    if name == "base_lines":
        assert all("--nproc_per_node=5" in command and "--epochs=200" in command for command in commands)
    if name == "main":
        assert all("--training=True" in command for command in commands)


def test_values_survive_the_shell_and_further_flags_reach_the_scripts_that_know_them(capsys):
    flags = ["--datasets_nums_classes", "digits", "--random_seeds", "4 5", "--checkpoint_seed", "0",
             "--pretrain_epochs", "3", "--", "--data_dir=my data's", "--width_multiplier", "1", "--match_at=last"]
    commands = planned("main", *flags, capsys=capsys)
    path = "checkpoint/digits/resnet20/diff_initialization/models_no5/data_dist_iid/num_epochs_3/width=1/random_seed_0"
    for command in commands:
        assert f"--ckp={path}" in command and "--data_dir=my data's" in command and "--match_at=last" in command


def refused(*arguments: str, capsys) -> str:
    """What a sweep says that can't be: a line."""
    try:
        code = sweep.main(list(arguments))
    except SystemExit as stop:  # the parser's
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(("flags", "message"), [
    (["--opts", "FOO"], "invalid choice: 'FOO'"), (["--", "--nonsense=1"], "--nonsense=1"),
    (["--random_seeds", ""], "--random_seeds: an empty list leaves nothing to run"),
    (["--models", "  "], "--models: an empty list"), (["--nums_models", "a b"], "--num_models: 'a'"),
    (["--randominits", "maybe"], "randominit: 'maybe' is not a boolean"), (["--datasets_nums_classes", ",10"], "''")])
def test_flags_that_make_no_sense_are_a_sentence(flags, message, capsys):
    assert message in refused("main", *flags, capsys=capsys)


HUGE = "9" * 400


@pytest.mark.parametrize(("content", "message"), [
    ("all: 5", "all: 5 is no grid"), ("all: {5: 6}", "all: 5 is no option's name"), ("all: [{}, {}]", "all: there are"),
    ("main: [[1]]", "main: [1] is no grid"), ("main: text", "main: 'text' is no grid"), ("train: 0", "train: 0 is no"),
    ("main: {randominit: maybe}", "randominit: 'maybe' is not a boolean"),
    ("main: {seed: []}", "main: seed is an empty list"),
    ("base_lines: {randominit: true, launch: maybe}", "launch: 'maybe' is not a boolean"),
    ("main: {seed: {0: 1}}", "main: seed: {0: 1} is neither text nor a number"),
    ("all: {seed: [[0]]}", "all: seed: [0] is neither"),
    ("train: {epochs: 2020-01-01}", "train: epochs: datetime.date(2020, 1, 1) is neither"),
    ("train: {lr: .nan}", "train: argument --lr: nan is not"), ("train: {alpha: .inf}", "inf is not a finite number"),
    (f"train: {{alpha: {HUGE}}}", "train: argument --alpha"), (f"{{5: 1, main: {{seed: {HUGE}}}}}", "option: value"),
    ("main: {randominit: true, num_models: many}", "main: argument --num_models: 'many'"), ("[]", "option: value"),
    ("train: {seed: 2020-13-45}", "month must be"), (f"train: {{seed: {HUGE * 20}}}", "digits")])
def test_a_sweep_file_that_makes_no_sense_is_a_sentence(content, message, tmp_path, capsys):
    (tmp_path / "odd.yaml").write_text(content)
    said = refused(str(tmp_path / "odd.yaml"), "--dry_run", capsys=capsys)
    assert f"{tmp_path / 'odd.yaml'}" in said and message in said


def test_whatever_is_in_a_sweep_file_a_plan_or_a_sentence_is_all_that_comes_of_it():
    odd = [0, -1, int(HUGE), 99999999999999999999999, 1e308, float("nan"), True, False, None, "digits", "resnet20",
           "vgg16", "tv:nothing", "iid", "dirichlet", "maybe", "", " ", "\0", "1_000", "~/x", "DIMAT", "CDSGD", "ring",
           "--help", "a=b", datetime.date(2020, 1, 1), b"x", {1, 2}]
    keys = ["dataset", "data", "model", "num_models", "data_dist", "alpha", "seed", "random_seed", "epochs", "lr",
            "randominit", "diffinit", "opt", "launch", "topology", "exp", "config", "ckp", "width_multiplier", "resume",
            "results_dir", "workers", "merg_itr", "--seed", "a b", "", "=", 5, None, True, (1, 2)]
    draw, parsers, planned = random.Random(0), scripts_parsers(), 0

    def some(kind):
        return [kind() for _ in range(draw.randrange(4))]

    def value():
        return draw.choice([lambda: draw.choice(odd)] * 8 + [lambda: some(value), options])()

    def options():
        return {draw.choice(keys): value() for _ in range(draw.randrange(4))}

    for _ in range(500):
        content = {part: draw.choice([options, options, lambda: some(options), value])()
                   for part in draw.sample(["all", "train", "main", "base_lines"], draw.randrange(1, 5))}
        try:
            plan_file(content, Planner(parsers))
            planned += 1
        except ValueError as error:
            assert str(error)
    assert 20 < planned < 480


def test_the_scripts_keep_their_line_ends_wherever_they_are_checked_out(tmp_path):
    scripts = [*(f"{name}.sh" for name, *_ in DOCUMENTED), ".ci/run"]
    for file in [*scripts, ".gitattributes"]:
        assert b"\r" not in (ROOT / file).read_bytes()
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "core.autocrlf=true", *words], cwd=tmp_path, check=True, capture_output=True)

    if not shutil.which("git"):
        pytest.skip("git is not installed")
    git("init")
    git("add", ".")
    for file in scripts:
        (tmp_path / file).unlink()
    git("checkout", "--", ".")  # as on a machine that turns line ends into its own
    assert not any(b"\r" in (tmp_path / file).read_bytes() for file in scripts)


@pytest.mark.long
def test_the_shell_scripts_run_from_anywhere(tmp_path):
    home = tmp_path / "a folder"
    home.mkdir()
    for name, flags, count in DOCUMENTED:
        result = shell(name, *shlex.split(flags), cwd=home)
        assert result.returncode == 0 and f"# {count} commands" in result.stdout, result.stderr
    assert not list(home.iterdir())


def test_shellcheck_has_nothing_to_say():
    checker = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if not checker:
        pytest.skip("shellcheck is not installed")
    subprocess.run([checker, *(ROOT / f"{name}.sh" for name, *_ in DOCUMENTED), ROOT / ".ci" / "run"], check=True)


SWEEP = {
    "all": {"dataset": "digits", "width_multiplier": 1, "num_models": 3, "train_samples": 200, "seed": [0, 1]},
    "train": {"data_dist": ["iid", "non-iid"], "epochs": 1, "lr": 0.002},
    "main": [{"opt": ["DIMAT", "WA"], "topology": "ring", "merg_itr": 2, "epochs": 1}],
    "base_lines": {"opt": "CDSGD", "exp": 2, "epochs": 2, "num_epochs": 1, "launch": False},
}


def test_a_sweep_file_is_a_grid_that_waits_for_its_checkpoints():
    jobs = plan_file(SWEEP, Planner(scripts_parsers()))
    assert [sum(job.script == script for job in jobs) for script in ("train", "main", "base_lines")] == [4, 8, 4]
    for job in jobs:
        if job.script != "train":
            (training,) = job.after
            ckp = Path(next(word for word in job.command if word.startswith("--ckp=")).partition("=")[2])
            seed = next(word for word in training.command if word.startswith("--seed="))
            assert seed in job.command and ckp.name == f"random_seed_{seed[-1]}"
            assert next(w for w in training.command if w.startswith("--data_dist=")) in job.command
            assert "--lr=0.002" not in job.command  # the pre-training's
    assert len({job.log for job in jobs}) == len(jobs)
    assert list(grid({"a": [1, 2], "b": 3})) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]
    with pytest.raises(ValueError, match="unknown part 'mian'"):
        plan_file({"mian": {}}, Planner(scripts_parsers()))
    with pytest.raises(ValueError, match="main: unrecognized arguments: --topolgy=ring"):
        plan_file({"main": {"topolgy": "ring"}}, Planner(scripts_parsers()))
    with pytest.raises(ValueError, match="train: argument --epochs"):
        plan_file({"train": {"epochs": "many"}}, Planner(scripts_parsers()))


def test_runs_start_from_the_pretrainings_that_they_name():
    several = {
        "all": {"dataset": "digits", "width_multiplier": 1, "seed": [0, 1]},
        "train": [{"data_dist": "iid", "num_models": [3, 4]},
                  {"data_dist": "dirichlet", "alpha": 0.1, "num_models": 4}],
        "main": [{"opt": "WA", "num_models": [4]}, {"opt": "NONE", "data_dist": "iid"}],
    }
    jobs = plan_file(several, Planner(scripts_parsers()))
    runs = [job.command for job in jobs if job.script == "main"]
    assert sum(job.script == "train" for job in jobs) == 6
    found = sorted(tuple(word.partition("=")[2] for word in sorted(run) if word.startswith((
        "--opt=", "--num_models", "--data_dist", "--alpha"))) for run in runs)
    once = [("0.1", "dirichlet", "4", "WA"), ("iid", "3", "NONE"), ("iid", "4", "NONE"), ("iid", "4", "WA")]
    assert found == [run for run in once for _ in range(2)]
    with pytest.raises(ValueError, match="main: no pre-training has num_models=5"):
        plan_file(several | {"main": {"num_models": [4, 5]}}, Planner(scripts_parsers()))
    with pytest.raises(ValueError, match="main: no pre-training has model=vgg16"):
        plan_file(several | {"main": {"model": "vgg16"}}, Planner(scripts_parsers()))
    with pytest.raises(ValueError, match="'foo' is no grid"):
        plan_file(several | {"train": "foo"}, Planner(scripts_parsers()))
    # However a number is written.
    one = {"all": several["all"], "train": {"data_dist": "dirichlet", "alpha": 1}, "main": {"alpha": [1, "1e0"]}}
    assert sum(job.script == "main" for job in plan_file(one, Planner(scripts_parsers()))) == 4


def test_a_part_of_a_sweep(tmp_path, capsys):
    planner = Planner(scripts_parsers())
    jobs = plan_file(SWEEP, planner)

    def of(**wanted):
        return [job for job in sweep.only(jobs, {key: value.split(",") for key, value in wanted.items()}, planner)]

    def count(chosen):
        return [sum(job.script == script for job in chosen) for script in ("train", "main", "base_lines")]

    assert of() == jobs
    assert count(of(opt="DIMAT")) == [4, 4, 0] and count(of(opt="DIMAT,CDSGD")) == [4, 4, 4]
    assert count(of(seed="1", data_dist="iid")) == [1, 2, 1]
    assert count(of(random_seed="01")) == [2, 4, 2]  # an alias, and a value as the script reads it
    assert count(of(merg_itr="2", opt="CDSGD")) == [0, 0, 0]
    assert count(of(pretrain_epochs="1")) == count(jobs) and count(of(pretrain_seed="1", opt="WA")) == [2, 2, 0]
    assert count(of(lr="0.002", seed="0")) == [2, 0, 0]  # only pre-trainings have that
    for job in of(opt="WA", seed="0"):
        assert job.script == "train" or ("--opt=WA" in job.command and "--seed=0" in job.command)
        assert all(other in jobs for other in job.after)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    command = [str(tmp_path / "sweep.yaml"), "--dry_run", "--only"]
    assert sweep.main([*command, "opt=WA", "seed=0"]) == 0
    assert "# 4 commands" in capsys.readouterr().out
    assert sweep.main([*command, "opt=WA", "--only", "seed=0", "width_multiplier=1"]) == 0
    assert "# 4 commands" in capsys.readouterr().out
    for wrong in ("opt=WO,WA", "opt=WO", "help=1", "colour=red"):
        assert sweep.main([*command, wrong]) == 2 and "no job has that" in capsys.readouterr().err
    assert sweep.main([*command, "opt=WA", "cga_form=paper"]) == 2 and "no job has" in capsys.readouterr().err
    content = SWEEP | {"all": SWEEP["all"] | {"width_multiplier": None}}
    jobs = plan_file(content, planner := Planner(scripts_parsers()))
    assert len(sweep.only(jobs, {"width_multiplier": ["8"]}, planner)) == len(jobs)  # the pre-training's
    with pytest.raises(SystemExit):
        sweep.main([*command, "opt"])
    assert "'opt' is not KEY=VALUE" in capsys.readouterr().err


def test_what_starts_from_random_models_needs_no_pretraining():
    trained = {"train": [{"data_dist": "iid", "epochs": 1}, {"data_dist": "dirichlet", "alpha": 0.1, "epochs": 1}]}
    everywhere = {"dataset": "digits", "width_multiplier": 1, "num_models": 4}

    def runs(main, train=trained, **everywhere_too):
        jobs = plan_file({"all": everywhere | everywhere_too, "main": main} | train, Planner(scripts_parsers()))
        runs = [job for job in jobs if job.script == "main"]
        assert not any(job.after or any("--ckp" in word for word in job.command) for job in runs)
        return [{word for word in job.command if word.startswith(("--alpha", "--data_dist", "--num_m"))}
                for job in runs]

    iid, dirichlet = {"--data_dist=iid"}, {"--data_dist=dirichlet", "--alpha=0.1"}
    four, seven = {"--num_models=4"}, {"--num_models=7"}
    assert runs({"randominit": True}) == [iid | four, dirichlet | four]
    assert runs({"randominit": True, "data_dist": "iid"}) == [iid | four]
    assert runs({"randominit": True, "num_models": 7}) == runs({"randominit": True, "num_models": 7}, {}) == [seven]
    assert runs({"num_models": 7}, randominit=True) == [seven]


def python(code: str, title: str, after=()) -> Job:
    return Job("test", title, [sys.executable, "-c", code], list(after))


def test_as_many_jobs_at_a_time_as_allowed_and_failures_stop_only_what_waits_for_them(tmp_path, capsys):
    note = "import sys, time; print('start', time.time(), flush=True); time.sleep({}); print('end', time.time())"
    long = python(note.format(1.5), "long")
    short = [python(note.format(0.4), f"short {n}") for n in range(3)]
    failing = python("print('error: no such thing'); raise SystemExit(3)", "failing")
    waiting = python("print('never')", "waiting", [failing])
    last = python("print('last')", "last", [short[2]])
    jobs = [long, *short, failing, waiting, last]
    run_jobs(jobs, 2, [], tmp_path)
    assert [job.state for job in jobs] == ["done"] * 4 + ["failed", "skipped", "done"]
    spans = []
    for job in [long, *short]:
        words = (tmp_path / job.log).read_text().split()
        spans.append((float(words[words.index("start") + 1]), float(words[words.index("end") + 1])))
    overlaps = max(sum(a <= start < b for a, b in spans) for start, _ in spans)
    assert overlaps == 2 and spans[-1][0] < spans[0][1]  # the short ones pass through while the long one runs
    assert "exit 3" in capsys.readouterr().out and sweep.last_words(tmp_path / failing.log) == "error: no such thing"
    assert not (tmp_path / waiting.log).exists()
    before = (tmp_path / long.log).read_text()
    run_jobs([python(note.format(1.5), "long")], 2, [], tmp_path)
    assert (tmp_path / long.log).read_text().startswith(before)  # logs are added to


def test_gpus_are_dealt_out_and_the_cores_shared(tmp_path):
    code = ("import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('OMP_NUM_THREADS')); "
            "time.sleep(0.5)")
    jobs = [python(code, str(n)) for n in range(4)]
    run_jobs(jobs, 4, ["0", "3"], tmp_path)
    seen = [(tmp_path / job.log).read_text().split()[-2] for job in jobs]
    assert sorted(seen) == ["0", "0", "3", "3"]
    assert sweep.environment(1, None).get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [[signal.SIGINT], *(pytest.param(sent, marks=pytest.mark.long) for sent in (
    [signal.SIGTERM], [signal.SIGINT, signal.SIGINT]))])
def test_stopping_a_sweep_ends_what_it_started_and_nothing_else(tmp_path, sent):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from experiments import sweep; "
            f"sweep.PATIENCE = {[1.0, 600.0][len(sent) - 1]}\n"
            "from pathlib import Path\n"
            "stubborn = 'import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)'\n"
            "polite = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
            "jobs = [sweep.Job('test', t, [sys.executable, '-c', c]) for t, c in (('a', stubborn), ('b', polite))]\n"
            "sweep.run_jobs(jobs, 2, [], Path(sys.argv[2]))")
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(tmp_path)], stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 60
        while sum(log.read_text().strip()[-1:].isdigit() and len(log.read_text().splitlines()) > 2
                  for log in tmp_path.glob("*.log")) < 2:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        pids = [int(log.read_text().split()[-1]) for log in sorted(tmp_path.glob("*.log"))]
        for one in sent:
            process.send_signal(one)
            wait_until_gone(pids[1:])  # the polite one goes at once
        assert process.wait(timeout=30) != 0
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert bystander.poll() is None
    finally:
        for one in (process, bystander):
            one.kill()
            one.wait()


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_jobs_end_with_their_sweep_however_that_ends(tmp_path):
    endless = {"all": SWEEP["all"] | {"num_models": 2, "seed": 0, "randominit": True, "merg_itr": 10 ** 6},
               "train": {"epochs": 10 ** 6}, "main": {"opt": "WA", "exp": 1, "training": True, "workers": 2},
               "base_lines": {"opt": "CDSGD", "exp": 1, "epochs": 10 ** 6, "num_epochs": 1}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(endless))
    running = process("experiments.sweep", "sweep.yaml", "--num_parallel=3", cwd=tmp_path)
    try:
        end = time.monotonic() + 120
        while len([*tmp_path.glob("results/**/metrics.csv"), *tmp_path.glob("checkpoint/**/config.yaml")]) < 3:
            assert time.monotonic() < end and running.poll() is None
            time.sleep(0.05)
    finally:
        started = descendants(running.pid)
        running.kill()
        running.wait()
    try:
        assert len(started) == 6, started  # a pre-training, a run with its worker, a launcher with its two
        wait_until_gone(started)
    finally:
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_sweep_runs_and_is_finished_the_second_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one = SWEEP | {"train": {"epochs": 1}, "all": SWEEP["all"] | {"seed": 0}, "main": {"opt": "WA", "merg_itr": 1}}
    Path("sweep.yaml").write_text(yaml.safe_dump(one))
    assert sweep.main(["sweep.yaml", "--num_parallel", "2"]) == 0
    assert "3 of 3 done" in capsys.readouterr().out
    results = {folder: rows_of(folder) for folder in (file.parent for file in Path("results").glob("**/metrics.csv"))}
    logs = {log: log.read_text() for log in Path("runs").glob("*.log")}
    assert len(results) == 2 and len(logs) == 3
    assert sweep.main(["sweep.yaml"]) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    assert logs == {log: log.read_text() for log in Path("runs").glob("*.log")}
    assert results == {folder: rows_of(folder) for folder in results}


@pytest.mark.long
def test_a_sweep_starts_again_whatever_is_not_as_it_would_make_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [{"opt": ["WA", "COMMON"], "merg_itr": 1}, {"opt": "WA", "merg_itr": 1, "randominit": True}]
    small = SWEEP | {"train": {"epochs": 1}, "all": SWEEP["all"] | {"seed": 0}, "main": runs}
    Path("sweep.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert sweep.main(["sweep.yaml", "--num_parallel", "2"]) == 0
    assert "5 of 5 done" in capsys.readouterr().out
    folders = sorted(file.parent for file in Path("results").glob("**/metrics.csv"))
    logs = {log: log.read_text() for log in sorted(Path("runs").glob("*.log"))}
    assert len(folders) == 4 and len(logs) == 5
    rows = [rows_of(folder) for folder in folders]

    def started() -> list[str]:
        """What the same sweep starts."""
        sweep.main(["sweep.yaml"])
        before = logs.copy()
        logs.update({log: log.read_text() for log in Path("runs").glob("*.log")})
        return sorted(log.name.partition("_")[0] for log in logs if logs[log] != before.get(log))

    assert started() == [] and capsys.readouterr().out.count("finished before") == 5
    Path("sweep.yaml").write_text(yaml.safe_dump(small | {"all": small["all"] | {"resume": True}}))
    assert started() == []  # a script agrees: an option that changes no result
    metrics = folders[0] / "metrics.csv"
    whole = metrics.read_text()
    metrics.write_text(whole[:-50])
    assert len(started()) == 1
    metrics.write_text(whole)
    random = next(folder for folder in folders if "same_random" in folder.parts) / "config.yaml"
    config = random.read_text()
    random.write_text(re.sub(r"torch: .*", "torch: 1.0", config))
    assert started() == ["main"]
    random.write_text(config)
    assert rows == [rows_of(folder) for folder in folders]
    model = next(Path("checkpoint").glob("**/model_0.pth"))
    model.rename("elsewhere")
    assert started() == ["train"]  # to the same model again
    state = torch.load(model)
    torch.save({key: tensor + 1 for key, tensor in state.items()}, model)
    assert started() == ["base", "main", "main"] and "first_models" in capsys.readouterr().err
    Path("elsewhere").rename(model)
    longer = [{"opt": ["WA", "COMMON"], "merg_itr": 2}, {"opt": "WA", "merg_itr": 1, "randominit": True}]
    Path("sweep.yaml").write_text(yaml.safe_dump(small | {"main": longer}))
    assert started() == ["main", "main"] and started() == []
    shutil.rmtree("checkpoint")
    Path("checkpoint").write_text("in the way")
    assert sweep.main(["sweep.yaml"]) == 1
    captured = capsys.readouterr()
    assert "failed: train" in captured.err and "not run: main" in captured.err and "log: runs/" in captured.err


def test_errors(tmp_path, capsys):
    assert sweep.main([str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml does not exist" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("[")
    assert sweep.main([str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml can't be read" in capsys.readouterr().err
