"""Pictures of who has what."""

import argparse

import numpy as np
import pytest

import demo
from data.datasets import load_dataset
from data.partition import make_partition
from reports import partitions
from reports.partitions import class_counts, counts_of, partition_figure, settings_of
from tests.helpers import TINY, folder_of, script


def circles(axes) -> dict[tuple[int, int], float]:
    """(agent, class) -> area."""
    (drawn,) = axes.collections
    return {tuple(place): area for place, area in zip(drawn.get_offsets().astype(int).tolist(), drawn.get_sizes(),
                                                      strict=True)}


def test_counts_are_of_each_agent_and_class():
    counts = class_counts([np.array([0, 1, 2]), np.array([], int), np.array([4])], np.array([2, 0, 2, 1, 0]), 4)
    assert counts.tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


def test_a_bubble_is_as_large_as_the_number_of_images_in_all_panels():
    one, other = np.array([[8, 0, 2], [0, 4, 1]]), np.array([[16, 0, 0]])
    figure = partition_figure({"one": one, "other": other})
    first, second = figure.axes
    for axes, counts in ((first, one), (second, other)):
        drawn = circles(axes)
        assert drawn.keys() == {tuple(place) for place in np.argwhere(counts).tolist()}
        for place, area in drawn.items():
            assert area == pytest.approx(circles(second)[0, 0] * counts[place] / 16)
    assert [axes.get_title() for axes in figure.axes] == ["one", "other"]
    assert first.get_xlabel() == "agent, with 5 to 10 images" and "at most 16" in figure.get_supxlabel()


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (300, 10)])
def test_bubbles_do_not_overlap_however_many_there_are(shape):
    figure = partition_figure({"all": np.full(shape, 7)})
    figure.canvas.draw()
    (axes,) = figure.axes
    diameter = max(circles(axes).values()) ** 0.5
    corners = axes.transData.transform([(0, 0), (1, 1)])
    assert diameter <= 1.3 * (corners[1] - corners[0]).min() * 72 / figure.dpi
    assert max(figure.get_size_inches()) < 20


def test_what_is_drawn_is_what_the_partition_deals():
    title, counts = counts_of({"num_models": 4, "data_dist": "dirichlet", "alpha": 0.1, "seed": 3})
    digits = load_dataset("digits")
    labels = digits.train.labels.numpy()
    parts, _ = make_partition("dirichlet", labels, digits.test.labels.numpy(), 4, num_classes=10, alpha=0.1, seed=3)
    assert title == "digits, 4 agents, dirichlet 0.1"
    np.testing.assert_array_equal(counts, class_counts(parts, labels, 10))


def test_a_checkpoint_and_its_run_show_the_same(tmp_path, monkeypatch):
    options = [*TINY, "--num_models=3", "--data_dist=classes", "--classes_per_agent=4", "--random_seed=2"]
    trained = script("train", *options, "--epochs=0", cwd=tmp_path).stdout.splitlines()[-1].partition(": ")[2]
    merged = script("main", *TINY, "--num_models=3", f"--ckp={trained}", "--opt=WA", "--merg_itr=1", "--seed=5",
                    "--bn_reset=none", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    of_run = settings_of(folder_of(merged, tmp_path))
    assert of_run["seed"] == 5 and of_run["partition_seed"] == 2
    expected = counts_of({"num_models": 3, "data_dist": "classes", "classes_per_agent": 4, "seed": 2,
                          "train_samples": 200})
    for title, counts in (counts_of(settings_of(tmp_path / trained)), counts_of(of_run)):
        assert title == expected[0] == "digits, 3 agents, classes 4"
        np.testing.assert_array_equal(counts, expected[1])
    script("reports.partitions", trained, "--out=who.png", cwd=tmp_path)
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")


def test_errors_are_a_line(tmp_path):
    def said(*arguments: str) -> str:
        result = script("reports.partitions", *arguments, cwd=tmp_path, check=False)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        return result.stderr

    (tmp_path / "empty").mkdir()
    (tmp_path / "there.png").touch()
    assert "empty doesn't say its dataset" in said("empty")
    assert "nowhere is not a folder" in said("nowhere")
    assert "--alpha: empty says how its data is dealt" in said("empty", "--alpha=2")
    assert "there.png exists" in said("--out=there.png")
    assert "--out x.gif: give a name that ends in .png, .pdf, .svg" in said("--out=x.gif")
    assert "--alpha belongs to" in said("--alpha=2")
    assert "5 agents with 1 classes" in said("--data_dist=classes", "--classes_per_agent=1")
    assert not list(tmp_path.glob("partition*"))


def test_the_demo_draws_its_data(tmp_path, monkeypatch):
    panels = {}
    monkeypatch.setattr(demo, "partition_figure", lambda given: panels.update(given) or partition_figure(given))
    path = demo.data_figure(argparse.Namespace(out=tmp_path / "short.png", agents=5, seed=1))
    assert path == tmp_path / "short_data.png" and path.stat().st_size > 1000
    assert list(panels) == ["digits, 5 agents, iid", "digits, 5 agents, dirichlet 0.5"]
    assert all(counts.sum() == 1442 for counts in panels.values())


def test_folder_options_are_those_of_the_data():
    assert {"dataset", "num_models", "data_dist", "alpha", "classes_per_agent", "train_samples", "holdout",
            "partition_seed", "phase", "seed"} <= partitions.OF_DATA
    assert not {"model", "epochs", "lr"} & partitions.OF_DATA
