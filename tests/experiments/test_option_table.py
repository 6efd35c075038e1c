"""The one table of options: what follows from an entry, and that nothing else lists options."""

import dataclasses
import re

import pytest

from data.datasets import DATASETS
from experiments import options, sweep
from experiments.checkpoints import checkpoint_folder
from experiments.options import (
    BASE,
    MAIN,
    OPTIONS,
    SCRIPTS,
    TRAIN,
    Option,
    base_lines_parser,
    dealt,
    free,
    main_parser,
    names,
    silent,
    train_parser,
    usual,
    variant,
)
from experiments.run_folder import contradictions, run_folder
from experiments.sweep import Planner, plan_file
from experiments.trainings import fill_defaults
from merging import METHODS, Method
from reports.runs import comparable

PARSERS = {TRAIN: train_parser, MAIN: main_parser, BASE: base_lines_parser}


@pytest.fixture
def with_an_entry(monkeypatch):
    """An option that changes what is learnt, added as anybody would add one."""
    entry = Option("smoothing", "training", "label smoothing", options.number(float, 0, 1), 0.0, usual=0.0,
                   matters=options.trains)
    monkeypatch.setattr(options, "OPTIONS", (*OPTIONS, entry))


def given(script: str, *flags: str) -> dict:
    return vars(PARSERS[script]().parse_args([*flags]))


def test_an_entry_is_all_that_an_option_needs(with_an_entry, tmp_path, capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            PARSERS[script]().parse_args(["--help"])
        assert "--smoothing" in capsys.readouterr().out
    o = given(MAIN, "--smoothing=0.1", "--training", "--topology=ring") | {"data_dist": "iid"}
    assert "smoothing=0.1" in str(run_folder(o, o))
    trained = given(TRAIN, "--smoothing=0.1") | {"data_dist": "iid"}
    assert "smoothing=0.1" in str(checkpoint_folder(trained))
    assert contradictions(o, o | {"smoothing": 0.2}, silent(o)) == ["smoothing"]
    alone = o | {"training": False}  # then nothing is learnt
    assert contradictions(alone, alone | {"smoothing": 0.2}, silent(alone)) == []
    jobs = plan_file({"main": {"randominit": True, "training": True, "smoothing": [0, 0.1]}},
                     Planner(sweep.scripts_parsers()))
    assert [job.title for job in jobs] == ["smoothing=0", "smoothing=0.1"]
    assert [comparable(o | {"smoothing": value})["smoothing"] for value in (0.1, 0.2)] == [0.1, 0.2]
    old = {key: value for key, value in o.items() if key != "smoothing"}  # from before there was one
    assert comparable(old)["smoothing"] == 0.0


def test_every_entry_makes_sense():
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        assert option.group in options.GROUPS and option.scripts and set(option.scripts) <= set(SCRIPTS), option
        for field in dataclasses.fields(option):
            value = getattr(option, field.name)
            if isinstance(value, dict):
                assert set(option.scripts) <= value.keys(), f"{option.name} lacks {field.name} of some script"


@pytest.mark.parametrize("script,said", [
    (TRAIN, ""), (MAIN, "match_samples=1000,match_augment=False,match_at=all"), (BASE, "")])
def test_paths_say_where_the_defaults_are_not_the_papers(script, said):
    o = given(script)
    assert variant(o | dict.fromkeys(silent(o)), script) == said


def test_the_papers_values_are_frozen():
    """Another value here would give old folders a new meaning."""
    assert list(usual(MAIN).items()) == [
        ("width_multiplier", 8), ("train_samples", 0), ("test_samples", 0), ("image_size", 0),
        ("holdout", 0), ("alpha", None),
        ("classes_per_agent", None), ("min_images", 1), ("size_ratio", None), ("partition_file", None),
        ("feature_noise", 0.0), ("partition_seed", None), ("phase", None), ("imgntdir", "tiny-imagenet-200"),
        ("norm", "batch"), ("batch_size", 100),
        ("optim", "adam"), ("lr", 1e-3), ("momentum", 0.0), ("weight_decay", 0.0), ("amp", "none"),
        ("loss", "cross_entropy"), ("adjust_tau", 1.0),
        ("match_data", "all"), ("match_samples", 0), ("match_augment", True), ("match_at", "last"),
        ("bn_reset", "both"), ("pretrain_epochs", 100), ("pretrain_seed", None), ("pretrain_init", "diff"),
        ("pretrain_loss", None),
        ("wire", "fp32"), ("link_failure", 0.0), ("agent_failure", 0.0), ("exchanged_by", None), ("staleness", 0),
        ("match_prior", "none"), ("align", "in_turn"), ("align_every", 0), ("root", None), ("robust", "none"),
        ("max_distance", 10.0), ("correction", "none"), ("train_itr", None),
        ("average_last", 0.0)]
    of_steps = {"lr": 0.01, "momentum": 0.9, "lr_decay": 0.981, "local_steps": 1, "mix_buffers": True,
                "cga_form": "paper", "cga_scope": "model", "eval_bn": "running", "bn_samples": 0}
    assert usual(BASE) == {key: usual(MAIN)[key] for key in usual(BASE).keys() & usual(MAIN).keys()} | of_steps


@pytest.mark.parametrize("flags,idle", [
    (["--opt=DIMAT", "--training"], {"align", "align_every", "root", "adjust_tau"}),
    (["--opt=COMMON", "--training"], {"adjust_tau"}),
    (["--opt=COMMON", "--training", "--loss=adjusted"], set()),
    (["--opt=WA", "--training"], {"match_at", "match_prior", "align", "align_every", "root", "adjust_tau"}),
    (["--opt=WA", "--training", "--bn_reset=none"], {"match_at", "match_prior", "align", "align_every", "root",
                                                     "match_data", "match_samples", "match_augment", "adjust_tau"}),
    (["--opt=NONE", "--training"], {"match_at", "match_prior", "align", "align_every", "root", "match_data", "wire",
                                    "link_failure", "robust", "correction", "average_last", "adjust_tau"}),
    (["--opt=COMMON"], {"epochs", "optim", "lr", "momentum", "weight_decay", "amp", "loss", "adjust_tau",
                      "correction", "train_itr", "average_last"}),
])
def test_options_without_a_say(flags, idle):
    o = given(MAIN, *flags) | {"data_dist": "iid"}
    of_other_partitions = {"alpha", "classes_per_agent", "min_images", "size_ratio", "partition_file"}
    assert silent(o) == idle | of_other_partitions | {"partition_seed", "phase", "max_distance"}


@pytest.mark.parametrize("data_dist,asked", [
    ("iid", set()), ("non-iid", set()), ("dirichlet", {"alpha", "min_images"}), ("dirichlet-balanced", {"alpha"}),
    ("quantity", {"alpha", "min_images"}), ("classes", {"classes_per_agent"}), ("shards", {"classes_per_agent"}),
    ("exponential", {"size_ratio"}), ("file", {"partition_file"})])
def test_a_partition_has_the_options_that_it_asks_for(data_dist, asked):
    every = {"alpha", "classes_per_agent", "min_images", "size_ratio", "partition_file"}
    o = given(TRAIN, f"--data_dist={data_dist}")
    assert every - silent(o) == asked
    settled = dict(o)
    fill_defaults(settled)
    assert {key for key in every if settled[key] is not None} == asked - {"partition_file"}
    for key in every - asked:
        value = {"partition_file": "x.csv"}.get(key, 3)
        with pytest.raises(ValueError, match=rf"--{key} belongs to --data_dist=.*, not to {data_dist}"):
            fill_defaults(o | {key: value})


def test_what_is_dealt_is_said_where_it_is_not_plain():
    config = {"data_dist": "dirichlet", "alpha": 0.5, "min_images": 1}
    assert dealt(config) == "dirichlet 0.5" == dealt({"data_dist": "dirichlet", "alpha": 0.5})
    assert dealt(config | {"min_images": 10}) == "dirichlet 0.5, min_images=10"
    assert dealt({"data_dist": "classes", "classes_per_agent": 2, "alpha": None}) == "classes 2"
    assert dealt({"data_dist": "file", "partition_file": "a/mine.csv"}) == "file mine.csv"
    assert dealt({"data_dist": "iid"}) == "iid" and dealt({"data_dist": "of somebody"}) == "of somebody"
    trained = given(TRAIN, "--data_dist=file", "--partition_file=a/mine.csv", "--norm=group", "--feature_noise=0.1")
    path = str(checkpoint_folder(trained))
    assert "partition_file=mine.csv,feature_noise=0.1,norm=group" in path


def test_what_is_inherited_free_and_handed_on():
    assert set(names(lambda option: option.inherited)) == {
        "data_dist", "alpha", "classes_per_agent", "min_images", "size_ratio", "partition_file", "feature_noise",
        "partition_seed", "train_samples", "image_size", "holdout", "width_multiplier", "norm", "loss", "adjust_tau"}
    assert {"merg_itr", "device", "results_dir", "versions"} <= free()
    assert free() & usual(MAIN).keys() == {"imgntdir"}  # where it lies; its name is said


def test_a_registered_methods_options_are_in_the_folders_name(monkeypatch):
    """Two runs that differ in what their method reads never share a folder."""
    @dataclasses.dataclass(frozen=True)
    class Taste:
        prior: str = "none"

    for name, properties in {"TASTES": {"options": Taste}, "TASTELESS": {}}.items():
        monkeypatch.setitem(METHODS, name, Method(lambda *_, **__: {}, **properties))
        o = given(MAIN, f"--opt={name}", "--match_prior=identity", "--topology=ring") | {"data_dist": "iid"}
        said = "match_prior=identity" in str(run_folder(o, o | dict.fromkeys(silent(o))))
        assert said == (name == "TASTES")


def test_a_registered_data_set_gets_its_folder(monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", lambda *_: None)
    for dataset, folder in {"mine": "photos", "tinyimgnt": "photos", "digits": None}.items():
        o = given(TRAIN, f"--dataset={dataset}", "--imgntdir=photos")
        fill_defaults(o)
        assert o["imgntdir"] == folder
        assert ("imgntdir=photos" in str(checkpoint_folder(o))) == bool(folder)


def test_help_shows_what_most_need_and_help_all_the_rest(capsys):
    shown = {}
    for words in (["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit) as stop:
            main_parser().parse_args(words)
        assert stop.value.code == 0
        shown[len(words)] = capsys.readouterr().out
    rare = names(lambda option: option.rare and MAIN in option.scripts)
    few, every = (set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) for text in (shown[1], shown[2]))
    assert set(given(MAIN)) == {option.name for option in OPTIONS if MAIN in option.scripts and not option.derived}
    assert every - few == set(rare) and len(few) < 45
    assert f"{len(rare)} more options" in shown[1] and "more options" not in shown[2]
