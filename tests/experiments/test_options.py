import pytest
import torch

from experiments.options import main_parser, train_parser
from experiments.parsing import as_typed, boolean, parse, pick_device


def main_options(*argv):
    return parse(main_parser(), list(argv))


@pytest.mark.parametrize("text,value", [("True", True), ("YES", True), ("1", True), ("fAlse", False), ("no", False)])
def test_booleans_in_any_case(text, value):
    assert boolean(text) is value


def test_the_published_spelling_of_false_is_noted(capsys):
    assert boolean("Flase") is False
    assert capsys.readouterr().err.count("\n") == 1


def test_other_words_are_errors_that_name_the_option(capsys):
    with pytest.raises(SystemExit):
        main_options("--randominit=maybe")
    assert "--randominit" in capsys.readouterr().err


def test_the_documented_command_parses():
    o = main_options("--dataset=digits", "--model=resnet20", "--num_models=5", "--ckp=x", "--opt=DIMAT",
                     "--merg_itr=100", "--merg_itr_init=0", "--training", "--randominit=Flase", "--diffinit=False",
                     "--epochs=2", "--exp=1", "--seed=0")
    assert (o.training, o.randominit, o.diffinit, o.epochs, o.exp) == (True, False, False, 2, 1)


@pytest.mark.parametrize("flag", ["--num_models=0", "--lr=0", "--lr=inf", "--match_memory=inf",
                                  "--lr=-1", "--epochs=x", "--opt=FOO", "--exp=9"])
def test_values_out_of_range_name_the_option(flag, capsys):
    with pytest.raises(SystemExit):
        main_options(flag)
    assert flag.split("=")[0] in capsys.readouterr().err


def test_unknown_choices_list_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main_options("--opt=FOO")
    assert "DIMAT" in capsys.readouterr().err


def test_flags_override_the_config_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 7\nlr: 0.5\ntraining: true\n")
    o = main_options(f"--config={file}", "--lr=0.25")
    assert (o.epochs, o.lr, o.training) == (7, 0.25, True)


def test_a_topology_on_the_command_line_overrides_the_files_number(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("exp: 2\n")
    assert main_options(f"--config={file}").exp == 2
    o = main_options(f"--config={file}", "--topology=ring")
    assert (o.exp, o.topology) == (None, "ring")


@pytest.mark.parametrize("text", [b"epoch: 7", b"- 1", b"[]", b"config: other.yaml", b"epochs: [", b"epochs: many",
                                  b"lr: \xff"])
def test_a_faulty_config_file_is_an_error(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_bytes(text)
    with pytest.raises(SystemExit):
        main_options(f"--config={file}")


def test_opt_is_the_optimiser_in_train():
    assert parse(train_parser(), ["--opt=sgd", "--random_seed=3"]).optim == "sgd"
    assert parse(train_parser(), ["--seed=3"]).seed == 3


def test_a_device_that_is_not_there_is_named():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:77", "meta"):
        with pytest.raises(ValueError, match=name):
            pick_device(name)


def test_an_unknown_option_is_said_in_a_line_with_what_may_have_been_meant(capsys):
    with pytest.raises(SystemExit) as stop:
        main_options("--merge_itr=3", "--xyz")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: unrecognized arguments: --merge_itr=3 --xyz")
    assert said.endswith(": did you mean --merg_itr? (python -m main --help explains)\n") and said.count("\n") == 1


@pytest.mark.parametrize("text", ["1_000", "\u0661", " 5 ", "5 ", "0x10", "1e3", "", "9" * 23, "9" * 9999, "nan", "--",
                                  "5\n", "a\nb"])
def test_whole_numbers_are_ascii_digits_and_no_more_than_can_be_meant(text, capsys):
    with pytest.raises(SystemExit):
        main_options(f"--seed={text}")
    said = capsys.readouterr().err
    assert said.startswith("error: argument --seed") and said.count("\n") == 1 and len(said) < 700


@pytest.mark.parametrize("text,value", [("1e-05", 1e-5), (".5", 0.5), ("3.", 3.0), ("+2", 2.0)])
def test_numbers_as_people_write_them(text, value):
    assert main_options(f"--lr={text}").lr == value


@pytest.mark.parametrize(("text", "value"), [
    ("0", 0), ("2", 2), ("1.0", 1), ("2.0", 2), ("0.0", 0), ("0.5", 0.5), (".25", 0.25), ("0.3333", 0.333333),
    ("0.333333333", 0.333333)])
def test_local_epochs_are_whole_or_a_whole_part_of_one(text, value):
    epochs = main_options(f"--epochs={text}").epochs
    assert epochs == value and type(epochs) is type(value)


@pytest.mark.parametrize(("text", "said"), [
    ("0.3", "such as 0.333333"), ("0.7", "such as 1"), ("2.5", "such as 3"), ("1e-9", "must be >= 0.0001"),
    ("-1", "must be >= 0"), ("nan", "not a finite number"), ("half", "not a number")])
def test_other_local_epochs_are_refused(text, said, capsys):
    with pytest.raises(SystemExit):
        main_options(f"--epochs={text}")
    assert "--epochs" in (error := capsys.readouterr().err) and said in error


@pytest.mark.parametrize("text", ["1_0.5", "1.\u0665", " 0.5", "inf", "1e400", "0x1p3"])
def test_other_numbers_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        main_options(f"--lr={text}")
    assert "--lr" in capsys.readouterr().err


def test_more_agents_than_a_matrix_can_hold_are_refused(capsys):
    for count in (20_001, 99999999999999999999999):
        with pytest.raises(SystemExit):
            main_options(f"--num_models={count}")
        assert "--num_models" in capsys.readouterr().err


def test_the_home_folder_can_be_meant_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("data_dir: ~/images\n")
    flags = ["ckp", "results_dir", "imgntdir", "topology"]
    o = main_options("--config=~/c.yaml", "--exchange=folder:~/x", *(f"--{flag}=~/x" for flag in flags))
    assert {getattr(o, flag) for flag in (*flags, "exchange")} == {f"{tmp_path}/x"}
    assert o.data_dir == f"{tmp_path}/images"
    assert parse(train_parser(), ["--save_folder=~/x"]).save_folder == f"{tmp_path}/x"


def test_options_from_a_file_are_typed_as_if_they_had_been_given():
    parser = train_parser()
    said = {"alpha": "1e-05", "seed": "3", "init_seed": True, "holdout": None, "versions": {"torch": "2"}, "lr": 1}
    typed = as_typed(parser, said, "x.yaml")
    assert typed == said | {"alpha": 1e-5, "seed": 3, "lr": 1.0} and type(typed["seed"]) is int


@pytest.mark.parametrize("key,value", [
    ("seed", "x/../../victim"), ("epochs", "../3"), ("data_dist", "x/.."), ("dataset", "/etc"), ("holdout", [1]),
    ("width_multiplier", 1.5), ("train_samples", True), ("alpha", {"a": 1}), ("seed", -1), ("init_seed", "maybe"),
    ("data_dist", "--"),
    ("model", [5]), ("partition_seed", float("nan")),
])
def test_what_could_not_have_been_given_is_refused(key, value):
    with pytest.raises(ValueError, match=rf"x\.yaml says {key}: "):
        as_typed(train_parser(), {key: value}, "x.yaml")
