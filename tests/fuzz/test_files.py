"""Files that are damaged, of another kind, or that lie: a command says so in a line, or does as with the whole file.

Each one that a command reads is cut, flipped, overwritten, replaced by something else, or has anything in it replaced.
"""

import csv
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import train
from tests.fuzz.damage import DAMAGES, damage
from tests.fuzz.sealed import end_of
from tests.helpers import Result, script

TINY = ["--dataset=digits", "--num_models=2", "--train_samples=40", "--test_samples=20", "--batch_size=20"]
TRAIN = ["train", *TINY, "--width_multiplier=1", "--epochs=2"]
MERGE = ["main", *TINY, "--ckp=checkpoint", "--merg_itr=1", "--match_samples=20", "--workers=1"]
ALONE = [*MERGE[:-1], "--opt=DIMAT", "--match_data=local", "--exchange=folder:exchange", "--timeout=0"]

# What is read -> patterns of its files, and the command that reads them.
READ = {
    "checkpoint": ("checkpoint/config.yaml checkpoint/*.pth", [*MERGE, "--opt=WA", "--results_dir=other"]),
    "stopped training": ("stopped/**/*.*", [*TRAIN, "--save_folder=stopped"]),
    "run to continue": ("results/**/state.pt results/**/config.yaml results/**/m*.csv",
                        [*MERGE, "--opt=DIMAT", "--merg_itr=2", "--resume"]),
    "run to report": ("results/**/metrics.csv results/**/config.yaml", ["reports.tables", "results"]),
    "run to draw": ("results/**/*.csv results/**/config.yaml", ["reports.plots", "results", "--out=pictures"]),
    "agents to collect": ("alone/**/agent_1/**/*.*", ["experiments.collect", "alone/run"]),
    "neighbour": ("exchange/*/agent_1/*.model", [*ALONE, "--results_dir=alone_again", "--agent=0"]),
    "sweep": ("a_sweep.yaml", ["experiments.sweep", "a_sweep.yaml", "--dry_run"]),
    "topology": ("graph.json", [*MERGE, "--opt=WA", "--topology=graph.json", "--results_dir=other"]),
    "options": ("options.yaml", ["main", "--config=options.yaml"]),
    "images": ("images/**/*", ["train", "--dataset=tinyimgnt", "--imgntdir=images", "--width_multiplier=1",
                               "--epochs=0", "--num_models=1"]),
    "image cache": ("datasets/.cache/**/*.npy", ["train", "--dataset=tinyimgnt", "--imgntdir=images", "--epochs=0",
                                                 "--width_multiplier=1", "--num_models=1"]),
}
SWEEP = """all: {dataset: digits, num_models: 2, seed: [0, 1], width_multiplier: 1}
train: [{epochs: 1, data_dist: dirichlet, alpha: [0.5, 1]}, {epochs: 2, data_dist: non-iid}]
main: {opt: [DIMAT, WA], exp: 2, merg_itr: 2, training: true, randominit: false}
base_lines: {opt: CDSGD, epochs: 2, num_epochs: 1, launch: false}
"""


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """A folder with one of each, which every command can read."""
    home = tmp_path_factory.mktemp("sound")
    here = home / "here"
    here.mkdir()
    out = script(*TRAIN, "--save_folder=made", cwd=here).stdout
    made = here / out.splitlines()[-1].removeprefix("checkpoints: ")
    shutil.copytree(made, here / "checkpoint")
    (here / "made").rename(here / "stopped")
    _stop_the_second_agent(here)
    script(*MERGE, "--opt=DIMAT", cwd=here)
    for agent in (0, 1):
        script(*ALONE, "--results_dir=alone", f"--agent={agent}", cwd=here)
    next(here.glob("alone/**/agent_0")).parent.rename(here / "alone" / "run")
    (here / "a_sweep.yaml").write_text(SWEEP)
    (here / "graph.json").write_text(json.dumps({"graph_type": "mine", "num_agents": 2, "directed": False,
                                                 "connectivity": [[0, 1], [1, 0]], "pi": [[0.75, 0.25], [0.25, 0.75]]}))
    (here / "options.yaml").write_text(yaml.safe_dump(dict(
        flag[2:].split("=") for flag in [*MERGE[1:], "--opt=WA", "--results_dir=other", "--lr=0.001"])))
    _draw_images(here / "images")
    (home / "victim").mkdir()
    (home / "victim" / "precious").write_text("not to be touched")
    return home


def _stop_the_second_agent(here: Path) -> None:
    """Leave its training as Ctrl-C in its second epoch leaves it."""
    folder = next(here.glob("stopped/**/config.yaml")).parent
    (folder / "model_1.pth").unlink()
    lines = (folder / train.TABLE).read_text().splitlines(keepends=True)
    (folder / train.TABLE).write_text("".join(lines[:2]))

    def and_stop(path, content):
        save(path, content)
        raise KeyboardInterrupt

    save = train.save_tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_tensors", and_stop)
        assert script(*TRAIN, "--save_folder=stopped", cwd=here, check=False).returncode == 130
    assert (folder / "partial_1.pt").exists()


def _draw_images(root: Path) -> None:
    """Tiny ImageNet's layout, four images of each of two classes, and their cache."""
    rng = np.random.default_rng(0)
    (root / "val" / "images").mkdir(parents=True)
    for name in ("n01", "n02"):
        (root / "train" / name / "images").mkdir(parents=True)
        for k in range(4):
            pixels = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
            pixels.save(root / "train" / name / "images" / f"{name}_{k}.png")
            pixels.save(root / "val" / "images" / f"{name}_{k}.png")
    (root / "wnids.txt").write_text("n01\nn02\n")
    (root / "val" / "val_annotations.txt").write_text("".join(
        f"{name}_{k}.png\t{name}\t0\t0\t9\t9\n" for name in ("n01", "n02") for k in range(4)))
    script(*READ["image cache"][1], "--save_folder=unused", cwd=root.parent)
    shutil.rmtree(root.parent / "unused")


# ---- the property --------------------------------------------------------------------------------


def files_of(what: str, here: Path) -> list[Path]:
    patterns = READ[what][0].split()
    return sorted(file for pattern in patterns for file in here.glob(pattern) if file.is_file())


def outcome(here: Path) -> dict[str, str]:
    """What there is afterwards of models and figures, by its digest, the time that something took aside."""
    found = {}
    for file in sorted(file for file in here.rglob("*") if file.is_file()):
        if file.suffix == ".pth":
            found[str(file.relative_to(here))] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name == "metrics.csv":
            text = file.read_text(errors="replace").replace("\0", "")
            rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(io.StringIO(text))]
            found[str(file.relative_to(here))] = hashlib.sha256(repr(rows).encode()).hexdigest()
    return found


def read_damaged(what: str, sound: Path, number: int, how: tuple | None) -> tuple[Result, dict[str, str], Path | None]:
    """The command's end, what it made, and the file that was damaged (none if `how` is None)."""
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        shutil.copytree(sound, home, dirs_exist_ok=True)
        here, file = home / "here", None
        if how:
            files = files_of(what, here)
            file = files[number % len(files)]
            damage(file, how)
        name, *arguments = READ[what][1]
        try:
            result = end_of(name, arguments, here, here, seconds=30)
            assert result.returncode != 130, "it hangs"
            assert not (here / "executed").exists(), "what a file holds was executed"
            return result, outcome(here), file
        except AssertionError as error:
            where = f"{file.relative_to(here)} {how}" if how else "sound"
            raise AssertionError(f"{what}: {where}: {error}") from None


def is_read_well(what: str, sound: Path, number: int, how: tuple,
                 expected: Callable[[str], list[dict[str, str]]]) -> None:
    result, found, file = read_damaged(what, sound, number, how)
    blind = how[0] in ("cut", "flip", "insert", "overwrite") and file.suffix in (".pt", ".pth", ".model")
    if result.returncode == 0 and blind and what not in ("run to report", "run to draw"):
        of_others = {key: value for key, value in found.items() if not file.match(key)}
        wanted = [{key: value for key, value in one.items() if not file.match(key)} for one in expected(what)]
        assert of_others in wanted, f"{what}: {file.name} {how}: other models or figures than from the sound file"
    assert what != "neighbour" or result.returncode == 0, f"{file.name} {how} ends others: {result.stderr[-300:]}"


@pytest.fixture(scope="module")
def expected(sound) -> Callable[[str], list[dict[str, str]]]:
    """What a command makes of sound files; of a neighbour's model, also what it makes without."""

    @cache
    def makes(what: str) -> list[dict[str, str]]:
        result, made, _ = read_damaged(what, sound, 0, None)
        assert result.returncode == 0, f"{what}: {result.stderr}"
        without = [read_damaged(what, sound, 0, ("other", "nothing at all"))[1]] if what == "neighbour" else []
        return [made, *without]

    return makes


def check(examples: int, whats: list[str], sound: Path, expected: Callable[[str], list[dict[str, str]]]) -> None:
    # A damage is as small as it gets.
    @settings(max_examples=examples, phases=[Phase.generate])
    @given(st.sampled_from(whats), st.integers(0, 100), DAMAGES)
    def holds(what, number, how):
        is_read_well(what, sound, number, how, expected)

    holds()


def test_some_damaged_files_are_read_as_if_whole_or_refused_in_a_line(sound, expected):
    check(10, sorted(READ.keys() - {"run to draw"}), sound, expected)


@pytest.mark.long
@pytest.mark.parametrize("what", READ)
def test_a_damaged_file_is_read_as_if_whole_or_refused_in_a_line(what, sound, expected):
    check(10 if what == "run to draw" else 60, [what], sound, expected)
    assert expected(what)
