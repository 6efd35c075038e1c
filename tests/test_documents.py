"""The documents: links lead somewhere, commands parse, and the examples do what the text around them says."""

import argparse
import importlib
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.datasets import DATASETS, load_dataset
from data.partition import PARTITIONS, make_partition
from merging import METHODS, merge
from merging.averaging import weighted_average
from merging.permutation import derive_spec, permute, random_permutations
from models import MODELS, build_model
from network.processes import OneProcess
from network.topology import TOPOLOGIES, make_topology
from network.wire import WIRES, through, wire_bytes
from optimizers import BASELINES, Agent, FlatModel, Settings, neighbourhood, take_step
from optimizers.corrections import CORRECTIONS, OfMerge
from tests.helpers import TINY, folder_of, script

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "STUDY.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [file for kind in ("*.py", "*.sh", "Makefile", "configs/**/*.yaml", "*/*.py", "*/*/*.py")
           for file in sorted(ROOT.glob(kind))
           if not file.relative_to(ROOT).parts[0].startswith((".", "tests"))]
FENCED = re.compile(r"^( *)(~~~|```)(\w*)\n(.*?)^\1\2$", re.MULTILINE | re.DOTALL)


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def each(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("file", files, ids=name)


# --------------------------------------------------------------------------------------------------------------------
# Links and paths


def anchors(file: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", file.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each(DOCUMENTS)
def test_every_relative_link_leads_somewhere(file):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", file.read_text()))
    assert links
    for link in links:
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@each(DOCUMENTS)
def test_every_file_that_is_named_exists(file):
    rooms = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    ours = set(re.findall(rf"(?<![\w/<])(?:{rooms})/[\w/]+\.(?:py|yaml|md)\b", file.read_text())) - {"results/demo.png"}
    for path in ours:
        assert (ROOT / path).exists(), path


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1500


# --------------------------------------------------------------------------------------------------------------------
# Commands


def command_lines(file: Path) -> Iterator[str]:
    """Every line of the blocks that is a command, and the commands within the text."""
    text = file.read_text()
    for _, _, language, block in FENCED.findall(text):
        yield from () if language else block.splitlines()
    yield from re.findall(r"`((?:python|torchrun|make) [^`]+)`", " ".join(FENCED.sub("", text).split()))


def meant(line: str) -> tuple[str, list[str]] | None:
    """The module that a command line runs, and its arguments; None for a line that isn't a command of ours."""
    words = shlex.split(line, comments=True) if re.match(r"\s*([A-Z_]+=\S+ )*(python|torchrun|make|\./)", line) else []
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    if not words:
        return None
    if words[0].startswith("./"):
        return "experiments.sweep", [words[0][2:].removesuffix(".sh"), *words[1:]]
    if words[0] == "make":
        return "make", words[1:]
    if words[0] == "python" and "-m" in words[:3] and not words[words.index("-m") + 1].startswith("torch."):
        at = words.index("-m") + 1
        return words[at], words[at + 1:]
    at = next(k for k, word in enumerate(words) if word.endswith(".py"))  # what a launcher launches
    return words[at].removesuffix(".py"), words[at + 1:]


COMMANDS = list(dict.fromkeys((name(file), module, tuple(arguments)) for file in DOCUMENTS
                              for line in command_lines(file) if (found := meant(line))
                              for module, arguments in [found]))


class Parsed(BaseException):
    """Raised where a script would begin to work."""


def parses(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails unless `python -m module arguments` gets beyond its parser."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        real(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        package = (ROOT / module / "__main__.py").exists()
        importlib.import_module(f"{module}.__main__" if package else module).main()


@pytest.mark.parametrize("document, module, arguments", COMMANDS,
                         ids=[f"{document}-{k}-{module}" for k, (document, module, _) in enumerate(COMMANDS)])
def test_every_command_parses(document, module, arguments, monkeypatch):
    if module == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif "..." not in arguments and "--help" not in arguments:
        parses(module, list(arguments), monkeypatch)


def test_the_commands_are_found():
    """Of each kind one, as nothing is tested where nothing is found."""
    assert {module for _, module, _ in COMMANDS} >= {
        "make", "train", "main", "base_lines", "demo", "experiments.sweep", "experiments.groups", "experiments.collect",
        "reports.tables", "reports.plots", "reports.partitions", "benchmarks.scale"}


def test_a_command_with_an_unknown_option_does_not_parse(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parses("train", ["--no_such_option"], monkeypatch)


def test_every_module_that_a_source_says_to_run_exists():
    said = [(name(file), module) for file in SOURCES
            for module in re.findall(r"python (?:-u )?-m ([\w.]*\w)", file.read_text())]
    assert len(said) > 50
    others = ("pytest", "module", "torch.distributed.run")
    for file, module in said:
        path = ROOT.joinpath(*module.split("."))
        ours = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert ours or module in others, f"{file}: {module}"


@each([file for file in SOURCES if file.suffix == ".yaml"])
def test_the_commands_in_a_configuration_parse(file, monkeypatch):
    lines = [line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#   python")]
    assert lines
    for module, arguments in map(meant, lines):
        with monkeypatch.context() as patch:
            parses(module, arguments, patch)


# --------------------------------------------------------------------------------------------------------------------
# Examples


def examples(language: str) -> Iterator[tuple[str, str]]:
    """Every block in a language: its document and heading, and the block."""
    for file in DOCUMENTS:
        text = file.read_text()
        for block in FENCED.finditer(text):
            if block[3] == language:
                heading = re.findall(r"^#+ (.*)$", FENCED.sub("", text[: block.start()]), re.MULTILINE)[-1]
                yield f"{name(file)}: {heading}", block[4]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Executes an example in an empty folder, and gives its names; what it registers is forgotten afterwards."""
    tables = (MODELS, TOPOLOGIES, PARTITIONS, DATASETS, BASELINES, METHODS, CORRECTIONS, WIRES)
    before = [dict(table) for table in tables]
    monkeypatch.chdir(tmp_path)

    def execute(code: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "example"}
        exec(compile(code, "example", "exec"), names)
        return names

    yield execute
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def of_one_model(names: dict) -> None:
    states = [model.state_dict() for model in names["models"]]
    for key, value in states[0].items():
        assert torch.isfinite(value).all() and all(torch.equal(value, state[key]) for state in states), key
    assert (states[0]["1.running_var"] != 1).all()  # estimated anew


def same_function(names: dict) -> None:
    model, x = names["model"].double(), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    before = model(x)
    state = {key: value.double() for key, value in names["state"].items()}
    assert any(not torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.load_state_dict(state)
    assert torch.allclose(model(x), before, rtol=0, atol=1e-6)
    assert Path("groups.png").stat().st_size > 1000
    sizes = list(names["spec"].sizes.values())
    assert 12 in sizes and 8 in sizes and sizes.count(3) == 1, sizes


def by_hand(names: dict) -> None:
    assert list(names["spec"].sizes.values()) == [8] and names["error"] < 1e-9


def five_states(names: dict) -> None:
    merged = names["merged"]
    assert len(merged.states) == 5 and {(match.agent, match.neighbour) for match in merged.matches} >= {(0, 1), (4, 0)}
    for model, state in zip(names["models"], merged, strict=True):
        model.load_state_dict(state)


def a_model(names: dict) -> None:
    spec = derive_spec(build_model("mlp", 10, in_channels=1, image_size=8), torch.rand(2, 1, 8, 8))
    assert list(spec.sizes.values()) == [64]


def a_topology(names: dict) -> None:
    line = make_topology("line", 4)
    assert [line.neighbours(i) for i in range(4)] == [[1], [0, 2], [1, 3], [2]]
    assert line.is_doubly_stochastic and line.pi[0, 1] == pytest.approx(1 / 3)


def a_partition(names: dict) -> None:
    labels = np.random.default_rng(0).integers(0, 10, 100)
    train, test = make_partition("sorted", labels, labels[:50], 3, num_classes=10)
    for parts, of in ((train, labels), (test, labels[:50])):
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(of)))
        assert all((np.diff(part) > 0).all() for part in parts)
        assert all(of[one].max() <= of[other].min() for one, other in itertools.pairwise(parts))


def a_dataset(names: dict) -> None:
    bright, plain = load_dataset("bright_digits"), load_dataset("digits")
    assert torch.equal(bright.train.images, plain.train.images) and bright.mean == (0.0,) != plain.mean


def a_method(names: dict) -> None:
    models = [build_model("resnet20", 10, in_channels=1, image_size=8, width_multiplier=1, seed=k) for k in (0, 1)]
    spec = derive_spec(models[0], torch.rand(2, 1, 8, 8))
    merged = merge(models, [[0.5, 0.5], [0, 1]], method="RANDOM", spec=spec, bn_reset="none")
    one, other = (model.state_dict() for model in models)
    moved = permute(spec, random_permutations(spec, torch.Generator().manual_seed(0)), other)
    for key, value in weighted_average([one, moved], [0.5, 0.5]).items():
        assert torch.equal(value, merged[0][key]), key
    assert any(not torch.equal(moved[key], value) for key, value in other.items())


def steps(baseline: str, lr: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors (3, n) of three agents before and after some steps on a ring, and their gradients in the last."""
    pi, agents = make_topology("ring", 3).pi, {}
    for i in range(3):
        model = build_model("resnet20", 10, in_channels=1, image_size=8, width_multiplier=1, seed=i)
        draws = torch.Generator().manual_seed(i)
        batches = [(i + torch.rand(4, 1, 8, 8, generator=draws), torch.arange(4)) for _ in range(count)]
        agents[i] = Agent(i, FlatModel(model), iter(batches))
    before = torch.stack([agent.x.clone() for agent in agents.values()])
    for _ in range(count):
        take_step(BASELINES[baseline], agents, {i: neighbourhood(pi, i) for i in agents}, Settings(lr), OneProcess(3))
    size = agents[0].flat.num_parameters
    gradients = torch.stack([agent.flat.gradient.clone() for agent in agents.values()])
    after = torch.stack([agent.x for agent in agents.values()])
    if count == 1:
        mixed = torch.from_numpy(pi).float() @ before[:, :size]
        assert torch.allclose(after[:, :size], mixed - lr * gradients.sign(), atol=1e-6)
    return after[:, :size], after[:, size:]


def a_baseline(names: dict) -> None:
    steps("SIGN", lr=0.1, count=1)
    for ours, theirs in zip(steps("SIGN", lr=0.0, count=3), steps("CDSGD", lr=0.0, count=3), strict=True):
        assert torch.equal(ours, theirs)  # the models, and BatchNorm's statistics


def a_correction(names: dict) -> None:
    update = CORRECTIONS["HALF"].update
    assert float(update(torch.tensor(1.0), OfMerge(torch.tensor(4.0), torch.tensor(2.0)))) == 2.0


def a_wire(names: dict) -> None:
    state = {"w": torch.linspace(-2, 2, 64).view(8, 8), "b": torch.linspace(-2, 2, 8)}
    arrived = through(state, "fp8")
    assert wire_bytes(state, "fp8") == 64 + 8 * 4 and torch.equal(arrived["b"], state["b"])
    assert torch.allclose(arrived["w"], state["w"], rtol=2**-4) and not torch.equal(arrived["w"], state["w"])


CHECKS = {
    "README.md: Merge your own models": of_one_model,
    "README.md: Extend it": a_baseline,
    "docs/your-own-model.md: What runs": same_function,
    "docs/your-own-model.md: A spec by hand": by_hand,
    "docs/your-own-model.md: Merging it": five_states,
    "docs/extending.md: A model": a_model,
    "docs/extending.md: A topology": a_topology,
    "docs/extending.md: A partition": a_partition,
    "docs/extending.md: A data set": a_dataset,
    "docs/extending.md: A baseline": a_baseline,
    "docs/extending.md: A merging method": a_method,
    "docs/extending.md: A correction": a_correction,
    "docs/extending.md: A wire format": a_wire,
}


def test_every_example_is_checked():
    assert sorted(where for where, _ in examples("python")) == sorted(CHECKS)


@pytest.mark.parametrize("where", CHECKS)
def test_an_example_does_what_it_says(where, run):
    CHECKS[where](run(dict(examples("python"))[where]))


def test_the_command_lines_offer_what_the_examples_register(run, tmp_path):
    for where, code in examples("python"):
        if where.startswith("docs/extending.md"):
            run(code)
    options = [*TINY, "--dataset=bright_digits", "--model=mlp", "--data_dist=sorted", "--num_models=3",
               "--batch_size=50"]
    out = script("train", *options, "--epochs=1", cwd=tmp_path).stdout
    run_of = [*options, f"--ckp={out.splitlines()[-1].removeprefix('checkpoints: ')}", "--topology=line"]
    merged = script("main", *run_of, "--opt=RANDOM", "--merg_itr=2", "--training", "--epochs=1", "--correction=HALF",
                    "--wire=fp8", cwd=tmp_path)
    stepped = script("base_lines", *run_of, "--opt=SIGN", "--epochs=1", "--num_epochs=1", cwd=tmp_path)
    for result, method in ((merged, "RANDOM"), (stepped, "SIGN")):
        assert f"bright_digits/mlp/sorted/trained/{method}/line_3/" in folder_of(result, tmp_path).as_posix()


def test_the_table_of_the_options_deals_the_images(tmp_path):
    (where, content), = examples("csv")
    assert where == "docs/options.md: Partitions"
    (tmp_path / "mine.csv").write_text(content)
    labels = np.repeat(np.arange(4), 50)
    train, _ = make_partition("file", labels, labels, 4, num_classes=4, partition_file=str(tmp_path / "mine.csv"))
    assert [np.bincount(labels[part], minlength=4).tolist() for part in train] == [
        [25, 25, 0, 0], [25, 25, 0, 0], [0, 0, 45, 5], [0, 0, 5, 45]]


def test_the_graph_of_the_options_is_one(tmp_path):
    (where, content), = examples("json")
    assert where == "docs/options.md: Topologies"
    (tmp_path / "mine.json").write_text(content)
    mine = make_topology(tmp_path / "mine.json", 3)
    assert mine.is_doubly_stochastic and mine.pi.tolist() == json.loads(content)["pi"]
