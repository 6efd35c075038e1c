"""Files that are damaged, of another kind, or that lie: whoever reads one says so in a line, or does as if it were whole.

Every file that a command reads is cut, flipped, overwritten, replaced by something else, or has anything in it replaced.
"""

import csv
import datetime
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager  # noqa: F401 - it looks for the machine's fonts, once
from PIL import Image

import train
from tests.fuzz.sealed import end_of
from tests.helpers import Result, script

TINY = ["--dataset=digits", "--num_models=2", "--train_samples=40", "--test_samples=20", "--batch_size=20"]
TRAIN = ["train", *TINY, "--width_multiplier=1", "--epochs=2"]
MERGE = ["main", *TINY, "--ckp=checkpoint", "--merg_itr=1", "--match_samples=20", "--workers=1"]
ALONE = [*MERGE[:-1], "--opt=DIMAT", "--match_data=local", "--exchange=folder:exchange", "--timeout=0"]

# What is read -> the files, and the command that reads them. Its kind is told by the file's name.
READ = {
    "checkpoint": ("checkpoint/*", [*MERGE, "--opt=WA", "--results_dir=other"]),
    "stopped training": ("stopped/**/*.*", [*TRAIN, "--save_folder=stopped"]),
    "run to continue": ("results/**/*.*", [*MERGE, "--opt=DIMAT", "--merg_itr=2", "--resume"]),
    "run to report": ("results/**/[mc]*.*", ["utils.report", "results"]),
    "run to draw": ("results/**/*.*", ["utils.run_plots", "results", "--out=pictures"]),
    "agents to collect": ("alone/**/agent_1/**/*.*", ["utils.collect", "alone/run"]),
    "neighbour": ("exchange/*/agent_1/*.pt", [*ALONE, "--results_dir=alone_again", "--agent=0"]),
    "sweep": ("a_sweep.yaml", ["utils.sweep", "a_sweep.yaml", "--dry_run"]),
    "topology": ("graph.json", [*MERGE, "--opt=WA", "--topology=graph.json", "--results_dir=other"]),
    "options": ("options.yaml", ["main", "--config=options.yaml"]),
    "images": ("images/**/*", ["train", "--dataset=tinyimgnt", "--imgntdir=images", "--width_multiplier=1", "--epochs=0",
                               "--num_models=1"]),
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


# ---- damage --------------------------------------------------------------------------------------


def _flip(content: bytes, at: float, bit: int) -> bytes:
    place = int(at * len(content))
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:] if content else content


def _insert(content: bytes, at: float, what: bytes) -> bytes:
    place = int(at * len(content))
    return content[:place] + what + content[place:]


def _overwrite(content: bytes, at: float, what: bytes) -> bytes:
    place = int(at * len(content))
    return content[:place] + what + content[place + len(what):]


@dataclass(frozen=True)
class Evil:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def _torch(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


OTHER_KINDS = {
    "nothing": b"", "a blank": b" ", "a NUL": b"\0", "a list": b"[]", "a mapping": b"{}", "a number": b"5", "null": b"null",
    "lines": b"one\ntwo\n", "a line of commas": b",,,\n,,,\n", "UTF-16": "a: 1\n".encode("utf-16"), "no UTF-8": b"\xff\xfe\xfa",
    "a byte-order mark": b"\xef\xbb\xbfa: 1\n", "CRLF": b"a: 1\r\nb: 2\r\n",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "deep lists": b"[" * 20000, "deep mappings": b"{a: " * 3000, "a web page": b"<!DOCTYPE html><html></html>",
    "an alias bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(ord("b"), ord("k"))),
    "YAML that builds an object": b"!!python/object/apply:os.mkdir [executed]\n", "a date": b"2020-01-01\n",
    "a key that is no text": b"{5: 6, null: 7, [1, 2]: 3, ? {a: 1} : 2}", "an anchor to itself": b"&a [*a]\n",
    "an empty zip": b"PK\x05\x06" + b"\0" * 18, "a tensor": _torch(torch.ones(3)), "torch's empty": _torch({}),
    "an object to unpickle": _torch(Evil()), "a list of torch's": _torch([1, 2]), "None of torch's": _torch(None),
    "an array": _npy(np.ones((2, 2))), "an array of objects": _npy(np.array([Evil()])), "an empty array": _npy(np.ones(0)),
    "an array of another type": _npy(np.full((8, 3, 16, 16), np.nan)),
    "an array of too few images": _npy(np.zeros((1, 3, 16, 16), np.uint8)), "labels": _npy(np.full(8, 10**6)),
    "negative labels": _npy(np.full(8, -1)), "an array that claims too much": _npy(np.zeros(8)).replace(
        b"(8,), }" + b" " * 10, b"(" + b"9" * 11 + b",), }"[:6]),
}


def _in_its_place(path: Path, what: str) -> None:
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a dangling link":
        path.symlink_to("nowhere")
    elif what == "a link to itself":
        path.symlink_to(path.name)
    elif what == "a link to a victim":
        path.symlink_to(next(p for p in path.parents if (p / "victim").is_dir()) / "victim" / "precious")
    elif what == "a pipe":
        os.mkfifo(path)


SPECIAL = ["nothing at all", "a folder", "a dangling link", "a link to itself", "a link to a victim", "a pipe"]
TRAVERSAL = "x" + "/.." * 30


# ---- structure -----------------------------------------------------------------------------------

GONE, RENAMED = object(), object()
WRONG = [None, True, False, "", "x", "5", " ", "a b", "maybe", "a\nb", "a\0b", "\udcff", "\x1b[31m", "$x^2$", "../victim",
         TRAVERSAL, "~", 0, -1, 1, 2, 7, 10**6, 10**30, -0.0, 1.5, 1e300, math.nan, math.inf, -math.inf, [], [1], [[]], ["x"],
         {}, {"a": 1}, {5: 6}, datetime.date(2020, 1, 1), b"bytes", "x" * 200_000, GONE, RENAMED]
OF_TENSORS: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t.double(), lambda t: t.bool(), lambda t: t.to(torch.complex64), lambda t: t.bfloat16(), lambda t: t.long(),
    lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: t[None], lambda t: t.flatten()[:0], lambda t: t.flatten(),
    lambda t: torch.tensor(1.0), lambda t: torch.full_like(t.float(), math.nan), lambda t: t.float() * math.inf,
    lambda t: torch.full_like(t, -1) if t.dtype != torch.bool else t, lambda t: t.float() * 1e30,
    lambda t: torch.zeros(1).expand(10**13), lambda t: torch.zeros(1, dtype=t.dtype).expand(t.shape or (1,)),
    lambda t: torch.zeros(1, dtype=t.dtype).expand((10**6, *t.shape)),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8), lambda t: nn_parameter(t),
    lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t, lambda t: t.mT if t.dim() > 1 else t,
    lambda t: {"weight": t}, lambda t: [t], lambda t: t.tolist(), lambda t: t.numpy().tobytes(),
]


def nn_parameter(t: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(t.float())


def replaced(content: Any, way: list[int], wrong: int) -> Any:
    """`content` with something else at the end of `way`, whose numbers choose a key or an entry at each level."""
    if way and isinstance(content, (dict, list, tuple)) and content:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = keys[way[0] % len(keys)]
        value = replaced(content[key], way[1:], wrong)
        if isinstance(content, dict):
            new = {("other" if k == key and value is RENAMED else k): v for k, v in content.items()}
            if value is RENAMED:
                return new
            return {k: value if k == key else v for k, v in content.items() if not (k == key and value is GONE)}
        changed = [value if k == key else v for k, v in enumerate(content) if not (k == key and value is GONE)]
        return type(content)(changed)
    if isinstance(content, torch.Tensor) and wrong % 2:
        return OF_TENSORS[wrong // 2 % len(OF_TENSORS)](content)
    return WRONG[wrong % len(WRONG)]


def _yaml(content: Any) -> bytes:
    return yaml.safe_dump(_plain(content), sort_keys=False).encode("utf-8", "surrogateescape")


def _plain(content: Any) -> Any:
    return None if content in (GONE, RENAMED) else content


def _csv(content: Any) -> bytes:
    if not isinstance(content, list):
        return str(content).encode("utf-8", "surrogateescape")
    lines = [",".join(map(str, row)) if isinstance(row, list) else str(row) for row in content]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


STRUCTURED: dict[str, tuple[Callable[[Path], Any], Callable[[Any], bytes]]] = {
    ".yaml": (lambda file: yaml.safe_load(file.read_text()), _yaml),
    ".json": (lambda file: json.loads(file.read_text()), lambda content: json.dumps(
        _plain(content), default=str).encode("utf-8", "surrogateescape")),
    ".csv": (lambda file: list(csv.reader(file.open())), _csv),
    ".txt": (lambda file: [line.split("\t") for line in file.read_text().splitlines()], _csv),
    ".pt": (lambda file: torch.load(file, weights_only=True), lambda content: _torch(_plain(content))),
    ".pth": (lambda file: torch.load(file, weights_only=True), lambda content: _torch(_plain(content))),
}

PARTS = st.floats(0, 1, exclude_max=True)
BLIND = st.one_of(st.tuples(st.just("cut"), PARTS), st.tuples(st.just("flip"), PARTS, st.integers(0, 7)),
                  st.tuples(st.just("insert"), PARTS, st.sampled_from([b"\0", b"x", b"\n", b"- ", b"\xff" * 9, b'"'])),
                  st.tuples(st.just("overwrite"), PARTS, st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\n\n"])))
OTHER = st.tuples(st.just("other"), st.sampled_from(sorted(OTHER_KINDS) + SPECIAL))
WITHIN = st.tuples(st.just("within"), st.lists(st.integers(0, 200), max_size=5), st.integers(0, 10_000))
DAMAGES = st.one_of(WITHIN, WITHIN, BLIND, OTHER)


def damage(file: Path, how: tuple) -> None:
    kind, *what = how
    if kind == "other" and what[0] in OTHER_KINDS:
        file.write_bytes(OTHER_KINDS[what[0]])
    elif kind == "other":
        _in_its_place(file, what[0])
    elif kind == "within":
        if file.suffix in STRUCTURED:
            load, dump = STRUCTURED[file.suffix]
            file.write_bytes(dump(replaced(load(file), *what)))
    else:
        content = file.read_bytes()
        way = {"cut": lambda c, at: c[:int(at * len(c))], "flip": _flip, "insert": _insert, "overwrite": _overwrite}[kind]
        file.write_bytes(way(content, *what))


# ---- the property --------------------------------------------------------------------------------


def files_of(what: str, here: Path) -> list[Path]:
    return sorted(file for file in here.glob(READ[what][0]) if file.is_file() and file.name != ".lock")


def outcome(here: Path) -> dict[str, str]:
    """What there is afterwards of models and figures, by its digest, the time that something took aside."""
    found = {}
    for file in sorted(here.rglob("*")):
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


def is_read_well(what: str, sound: Path, number: int, how: tuple, expected: list[dict[str, str]]) -> None:
    result, found, file = read_damaged(what, sound, number, how)
    blind = how[0] in ("cut", "flip", "insert", "overwrite") and file.suffix in (".pt", ".pth")
    if result.returncode == 0 and blind and what not in ("run to report", "run to draw"):
        of_others = {key: value for key, value in found.items() if not file.match(key)}
        wanted = [{key: value for key, value in one.items() if not file.match(key)} for one in expected]
        assert of_others in wanted, f"{what}: {file.name} {how}: other models or figures than from the sound file"
    assert what != "neighbour" or result.returncode == 0, f"{what}: {file.name} {how} ends others: {result.stderr[-300:]}"


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


@pytest.mark.parametrize("examples", [3, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("what", READ)
def test_a_damaged_file_is_read_as_if_whole_or_refused_in_a_line(what, examples, sound, expected):
    @settings(max_examples=examples)
    @given(st.integers(0, 100), DAMAGES)
    def holds(number, how):
        is_read_well(what, sound, number, how, expected(what))

    holds()
