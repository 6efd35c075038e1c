import pytest
import torch

from utils.options import boolean, main_parser, parse, pick_device, train_parser

TRAIN = (["digits"], ["resnet20"], ["iid", "dirichlet"])
MAIN = (*TRAIN, ["DIMAT", "WA"], ["ring"], {1: "fully_connected", 2: "ring"}, ["none"], ["fp32"], ["auto"])


def main_options(*argv):
    return parse(main_parser(*MAIN), list(argv))


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
    assert parse(train_parser(*TRAIN), ["--opt=sgd", "--random_seed=3"]).optim == "sgd"
    assert parse(train_parser(*TRAIN), ["--seed=3"]).seed == 3


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
