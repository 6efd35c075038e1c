"""Command lines that nobody should type: every option of every command, with values it was not made for."""

import tempfile
from argparse import Action, ArgumentParser, _HelpAction
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.sealed import end_of

NUMBERS = ["", " ", " 5 ", "1_000", "\N{ARABIC-INDIC DIGIT ONE}", "\N{SUPERSCRIPT TWO}", "+1", "-1", "-0", "0", "1",
           "2", "3", "0x10", "1e3", "1e300", "-1e300", "1e-300", "5e-324", "1e309", "nan", "inf", "-inf", "0.1", "1.5",
           "2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551616", "100000", "1" + "0" * 30,
           "9" * 5000, "True", "Flase", "None"]
PATHS = [".", "..", "nowhere", "nowhere/deeper", "a_file", "a_file/below", "a_folder", "~", "~/x", "x" * 300,
         "x/" * 3000, "a\0b", "\udcff", "a\nb", "a\rb", "$HOME", "$x^2$", "\\", "\\alpha", "a b", "\N{SNOWMAN}", "-",
         "../beside", "a_file.json", "nowhere.json", "A.JSON", "a_folder.json", "out.xyz", "out.svg/"]
SNIPPETS = ["{}", "[]", "{a: 1}", "[width", "a: b: c", "=", "a=", "a=b", "a=b,c=d", "seed=0", "opt=WA,DIMAT", "%s",
            "%(prog)s", "{0}", "{x", "\x1b[31m", "'", '"', ",", ";", "folder:", "folder:x", "folder:a_file", "tv:",
            "tv:nope", "tv:../x", "vgg16", "nope:nope", "cpu", "cpu:7", "cuda", "cuda:99", "meta", "1 2", "iid iid",
            "digits,10", "at:5", "at:-1", "at:x", "to:nan", "to:80", "mean", "--", "--help", "-h"]
WORDS = st.sampled_from([*NUMBERS, *PATHS, *SNIPPETS]) | st.text(st.characters(exclude_characters="/"), max_size=8)

TINY = ["--dataset=digits", "--width_multiplier=1", "--num_models=2", "--train_samples=40", "--test_samples=20",
        "--batch_size=20"]
# What is typed first: sound, and done in a moment.
COMMANDS = {
    "train": ("train", [*TINY, "--epochs=0"]),
    "main": ("main", [*TINY, "--randominit", "--diffinit", "--opt=WA", "--merg_itr=1", "--match_samples=20",
                      "--epochs=1", "--workers=1"]),
    "base_lines": ("base_lines", [*TINY, "--randominit", "--epochs=1", "--num_epochs=1"]),
    "sweep a file": ("experiments.sweep", ["a_sweep.yaml", "--dry_run"]),
    "sweep train": ("experiments.sweep", ["train"]),
    "sweep main": ("experiments.sweep", ["main"]),
    "sweep base_lines": ("experiments.sweep", ["base_lines"]),
    "report": ("reports.tables", ["."]),
    "plots": ("reports.plots", ["."]),
    "partitions": ("reports.partitions", ["--num_models=3"]),
    "collect": ("experiments.collect", ["."]),
    "permutation": ("experiments.groups", ["resnet20", "--width_multiplier=1"]),
}
SLOW = {"plots": 5, "partitions": 5, "permutation": 3}  # so many times fewer examples
# Other values of these start processes, or take minutes to compile.
ONLY = {"workers": ["1", "0", "-1", "x", "", "nan", "1e3"], "compile": ["False", "x", "", "2"]}


@cache
def options_of(command: str) -> dict[str, list]:
    """Destination -> its action, out of the parser that the command uses."""

    class Parsing(BaseException):
        pass

    def give_away(parser, *_):
        raise Parsing(parser)

    module, sound = COMMANDS[command]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsing) as caught:
        patch.setattr(ArgumentParser, "parse_args", give_away)
        import_module(module).main(sound[:1] if "sweep" in command else [])
    return {action.dest: action for action in caught.value.args[0]._actions if not isinstance(action, _HelpAction)}


def words_for(action: Action) -> st.SearchStrategy[str]:
    """As often as not of the right kind: else nothing would get past the parser."""
    if action.dest in ONLY:
        return st.sampled_from(ONLY[action.dest])
    if action.choices:
        return st.sampled_from(sorted(map(str, action.choices))) | WORDS
    if action.type not in (None, str, Path):
        return st.sampled_from(NUMBERS) | WORDS
    return WORDS


@st.composite
def option(draw: st.DrawFn, command: str) -> list[str]:
    """One option as somebody may type it."""
    options = options_of(command)
    action = options[draw(st.sampled_from(sorted(options)))]
    word = draw(words_for(action))
    if not action.option_strings:
        return [word]
    name = draw(st.sampled_from(action.option_strings))
    odd = [] if action.dest in ONLY else [[name], [name[:-1], word]]
    return draw(st.sampled_from([[f"{name}={word}"]] * 8 + [[name, word]] * 4 + odd))


def command_lines(command: str) -> st.SearchStrategy[list[str]]:
    """What is typed first, and one option or two."""
    return st.lists(option(command), min_size=1, max_size=2).map(
        lambda options: [*COMMANDS[command][1], *chain.from_iterable(options)])


def furnish(home: Path) -> Path:
    """What the values name; the folder to be in."""
    cwd = home / "here"
    (cwd / "a_folder").mkdir(parents=True)
    (cwd / "a_file").write_text("a file\n")
    (cwd / "a_file.json").write_text('{"connectivity": [[0, 1], [1, 0]]}')
    (cwd / "a_sweep.yaml").write_text("train: {num_models: [2, 3], epochs: 0}\nmain: {opt: [WA, DIMAT]}\n")
    (cwd / "run").mkdir()
    (cwd / "run" / "config.yaml").write_text("{opt: WA, topology: ring, num_models: 1, seed: 0, merg_itr: 1, "
                                             "dataset: digits, model: resnet20, data_dist: iid, bn_reset: none}\n")
    (cwd / "run" / "metrics.csv").write_text(
        "iteration,phase,agent,test_accuracy,test_loss,consensus_distance,average_model_accuracy,bytes_sent\n"
        "0,initial,0,10.0,2.3,0.0,10.0,0\n1,merged,0,11.5,2.2,0.0,10.0,0\n")
    return cwd


def ends_well(command: str, arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as home:
        end_of(COMMANDS[command][0], arguments, Path(home), furnish(Path(home)), seconds=2 * SLOW.get(command, 1) ** 2)


@pytest.mark.parametrize("examples", [5, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_is_carried_out_or_refused_in_a_line(command, examples):
    @settings(max_examples=examples // SLOW.get(command, 1))
    @given(command_lines(command))
    def holds(arguments):
        ends_well(command, arguments)

    holds()


@pytest.mark.long
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"collect"}))
def test_what_is_typed_first_is_sound(command, tmp_path):
    """Or all of the above would be refused for the same reason."""
    module, sound = COMMANDS[command]
    assert not end_of(module, sound, tmp_path, furnish(tmp_path), seconds=60).returncode
