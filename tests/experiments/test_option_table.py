"""The one table of options: what follows from an entry, and that nothing else lists options."""

import dataclasses

import pytest

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
        ("width_multiplier", 8), ("train_samples", 0), ("test_samples", 0), ("holdout", 0), ("alpha", None),
        ("partition_seed", None), ("phase", None), ("imgntdir", "tiny-imagenet-200"), ("batch_size", 100),
        ("optim", "adam"), ("lr", 1e-3), ("momentum", 0.0), ("weight_decay", 0.0), ("amp", "none"),
        ("match_data", "all"), ("match_samples", 0), ("match_augment", True), ("match_at", "last"),
        ("bn_reset", "both"), ("pretrain_epochs", 100), ("pretrain_seed", None), ("pretrain_init", "diff"),
        ("wire", "fp32"), ("link_failure", 0.0), ("agent_failure", 0.0), ("exchanged_by", None), ("staleness", 0),
        ("match_prior", "none"), ("align", "in_turn"), ("align_every", 0), ("root", None), ("robust", "none"),
        ("max_distance", 10.0)]
    of_steps = {"lr": 0.01, "momentum": 0.9, "lr_decay": 0.981, "local_steps": 1, "mix_buffers": True,
                "cga_form": "paper", "cga_scope": "model", "eval_bn": "running", "bn_samples": 0}
    assert usual(BASE) == {key: usual(MAIN)[key] for key in usual(BASE).keys() & usual(MAIN).keys()} | of_steps


@pytest.mark.parametrize("flags,idle", [
    (["--opt=DIMAT", "--training"], {"align", "align_every", "root"}),
    (["--opt=COMMON", "--training"], set()),
    (["--opt=WA", "--training"], {"match_at", "match_prior", "align", "align_every", "root"}),
    (["--opt=WA", "--training", "--bn_reset=none"], {"match_at", "match_prior", "align", "align_every", "root",
                                                     "match_data", "match_samples", "match_augment"}),
    (["--opt=NONE", "--training"], {"match_at", "match_prior", "align", "align_every", "root", "match_data", "wire",
                                    "link_failure", "robust"}),
    (["--opt=COMMON"], {"epochs", "optim", "lr", "momentum", "weight_decay", "amp"}),
])
def test_options_without_a_say(flags, idle):
    o = given(MAIN, *flags) | {"data_dist": "iid"}
    assert silent(o) == idle | {"partition_seed", "phase", "max_distance"}


def test_what_is_inherited_free_and_handed_on():
    assert set(names(lambda option: option.inherited)) == {
        "data_dist", "alpha", "partition_seed", "train_samples", "holdout", "width_multiplier"}
    assert {"merg_itr", "device", "results_dir", "versions"} <= free()
    assert free() & usual(MAIN).keys() == {"imgntdir"}  # where it lies; its name is said
