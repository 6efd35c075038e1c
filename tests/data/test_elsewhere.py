"""Data sets by what their name says: a folder, arrays in a file, one of torchvision's."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import datasets, images
from data.datasets import load_dataset
from data.elsewhere import tv_names
from data.noise import with_feature_noise
from tests.helpers import TINY, folder_of, rows_of, script


def colours(n, side=(9, 7), seed=0):
    """n images, of which each has a colour of its own all over."""
    values = np.random.default_rng(seed).integers(0, 256, (n, 3)).astype(np.uint8)
    return values, [Image.fromarray(np.broadcast_to(value, (*side, 3)).copy()) for value in values]


def write(root, counts, **how):
    """root/<class>/<k>.png, so many of each class; what colours they have."""
    found = {}
    for label, n in counts.items():
        (root / label).mkdir(parents=True)
        values, images = colours(n, seed=n, **how)
        for k, (value, image) in enumerate(zip(values, images, strict=True)):
            image.save(root / label / f"{k}.png")
            found[tuple(value.tolist())] = label
    return found


def class_of_each(part, classes):
    return {tuple(image[:, 0, 0].tolist()): classes[label] for image, label in zip(part.images, part.labels.tolist(),
                                                                                  strict=True)}


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_of_training_and_test_images(tmp_path, test):
    train, held = write(tmp_path / "set/train", {"b": 4, "a": 7}), write(tmp_path / "set" / test, {"a": 2, "b": 3})
    (tmp_path / "set/train/a/notes.txt").write_text("no image")
    (tmp_path / "set/train/a/._0.png").write_text("a Mac's")
    for _ in range(2):  # the second time from the cache
        found = load_dataset(f"folder:{tmp_path / 'set'}", tmp_path, image_size=6)
        assert found.train.images.shape == (11, 3, 6, 6) and found.num_classes == 2 and found.flip
        assert class_of_each(found.train, "ab") == train and class_of_each(found.test, "ab") == held
    pixels = found.train.images.double() / 255
    assert torch.tensor(found.mean) == pytest.approx(pixels.mean((0, 2, 3)).numpy(), abs=1e-6)
    assert load_dataset(f"folder:{tmp_path / 'set'}", tmp_path, image_size=5).image_size == 5
    write(tmp_path / "set/train/a", {"more": 1})  # the cache is of another state of the folder
    assert len(load_dataset(f"folder:{tmp_path / 'set'}", tmp_path, image_size=6).train) == 12


def test_a_folder_larger_than_memory_is_decoded_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "usable_memory", lambda: 200.0)
    usual, files = np.memmap, []
    monkeypatch.setattr(np, "memmap", lambda file, *rest, **how: files.append(file.name) or usual(file, *rest, **how))
    train = write(tmp_path / "set/train", {"b": 4, "a": 7})
    write(tmp_path / "set/test", {"a": 2, "b": 3})
    found = load_dataset(f"folder:{tmp_path / 'set'}", tmp_path, image_size=6)
    assert class_of_each(found.train, "ab") == train and len(files) >= 2
    assert not [entry for entry in (tmp_path / ".cache").iterdir() if "folder" not in entry.name]


def test_parts_of_a_set_larger_than_memory_are_in_files_too(tmp_path, monkeypatch):
    """A slice, images held out, an agent's own and those with noise are the same as where there is room."""
    write(tmp_path / "set", {"a": 40, "b": 30})
    rows, files, usual = np.array([5, 3, 9]), [], np.memmap

    def parts(home):
        found = load_dataset(f"folder:{tmp_path / 'set'}", home, image_size=6, train_samples=40, holdout=6)
        noisy = with_feature_noise(found, {0: rows}, 2, 0.5, 0, home)
        return [each.images for one in (found, found.with_only(rows, home), noisy) for each in (one.train, one.test)]

    expected = parts(tmp_path / "one")
    monkeypatch.setattr(images, "usable_memory", lambda: 200.0)
    monkeypatch.setattr(np, "memmap", lambda file, *rest, **how: files.append(file.name) or usual(file, *rest, **how))
    assert all(torch.equal(a, b) for a, b in zip(parts(tmp_path / "other"), expected, strict=True))
    assert len(set(files)) >= 6 and len(expected[0]) == 40


def test_the_mean_is_that_of_all_whatever_part_is_looked_at_at_a_time():
    found = torch.randint(256, (700, 3, 90, 90), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, deviation = datasets._mean_and_deviation(found)
    exact = found.double() / 255
    assert torch.allclose(mean, exact.mean((0, 2, 3)), rtol=1e-12, atol=0)
    assert torch.allclose(deviation, exact.std((0, 2, 3)), rtol=1e-10, atol=0)
    flat = datasets._mean_and_deviation(torch.full((5, 1, 4, 4), 7, dtype=torch.uint8))
    assert flat[0].item() == pytest.approx(7 / 255) and flat[1].item() == pytest.approx(1 / 255)


def test_a_disk_without_room_for_a_large_folder_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "usable_memory", lambda: 200.0)
    monkeypatch.setattr(images.os, "posix_fallocate", full, raising=False)
    for part in ("train", "test"):
        write(tmp_path / "set" / part, {"a": 4, "b": 4})
    with pytest.raises(ValueError, match=r"take 0.0 GiB, there are 0.0 of memory, .*no room .*No space"):
        load_dataset(f"folder:{tmp_path / 'set'}", tmp_path, image_size=6)


def test_one_folder_is_split_and_always_alike(tmp_path):
    everything = write(tmp_path / "set", {"a": 10, "b": 15}, side=(4, 4))
    one, other = (load_dataset(f"folder:{tmp_path / 'set'}", tmp_path / cache) for cache in ("one", "other"))
    assert torch.equal(one.test.images, other.test.images) and one.image_size == 4
    assert class_of_each(one.train, "ab") | class_of_each(one.test, "ab") == everything
    assert torch.bincount(one.test.labels).tolist() == [2, 3]


def npz(file, **arrays):
    rng = np.random.default_rng(0)
    usual = {"x_train": rng.integers(0, 256, (6, 4, 4, 3)).astype(np.uint8), "y_train": np.arange(6) % 3,
             "x_test": rng.integers(0, 256, (2, 4, 4, 3)).astype(np.uint8), "y_test": np.array([[2], [0]])}
    np.savez(file, **{key: value for key, value in (usual | arrays).items() if value is not None})
    return usual


@pytest.mark.parametrize(("said", "mirrored"), [(None, False), (False, False), (np.True_, True)])
def test_arrays_may_say_that_they_are_mirrored(tmp_path, said, mirrored):
    npz(tmp_path / "set.npz", flip=said)
    for _ in range(2):  # the second time from the cache
        assert load_dataset(str(tmp_path / "set.npz"), tmp_path).flip is mirrored


@pytest.mark.parametrize("odd", [np.zeros(2000), np.array(["a", "b"]), "False", np.nan])
def test_an_odd_flip_is_said(tmp_path, odd):
    npz(tmp_path / "set.npz", flip=odd)
    with pytest.raises(ValueError, match=r"set\.npz can't be read"):
        load_dataset(str(tmp_path / "set.npz"), tmp_path)


@pytest.mark.parametrize("layout", ["n h w c", "n c h w", "n h w"])
def test_arrays_in_a_file(tmp_path, layout):
    usual = npz(tmp_path / "set.npz")
    changes = {"n h w c": lambda x: x, "n c h w": lambda x: x.transpose(0, 3, 1, 2), "n h w": lambda x: x[..., 0]}
    npz(tmp_path / "set.npz", **{key: changes[layout](usual[key]) for key in ("x_train", "x_test")})
    found = load_dataset(str(tmp_path / "set.npz"), tmp_path)
    expected = usual["x_train"].transpose(0, 3, 1, 2)[:, : found.in_channels]
    np.testing.assert_array_equal(found.train.images, expected)
    assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2] and found.test.labels.tolist() == [2, 0]
    assert found.in_channels == (1 if layout == "n h w" else 3) and not found.flip


@pytest.mark.parametrize(("arrays", "message"), [
    ({"x_test": None}, "it has no x_test"), ({"x_train": np.zeros((6, 4, 4, 3))}, "x_train is float64"),
    ({"y_train": np.zeros(6)}, "y_train is float64"), ({"y_test": np.zeros(3, int)}, "y_test is int64 of shape"),
    ({"x_train": np.zeros((6, 4, 5, 3), np.uint8)}, "should be square"),
    ({"y_test": np.array([-1, 0])}, "begin with 0"),
    ({"y_test": np.array([10**9, 0])}, "classes go up to"), ({"x_test": np.zeros((2, 5, 5, 3), np.uint8)}, "train"),
    ({"y_train": np.array([None] * 6)}, "can't be read: .*pickle"),
    ({"x_train": np.zeros((0, 4, 4, 3), np.uint8), "y_train": np.zeros(0, int)}, "there must be one"),
])
def test_arrays_that_are_no_images_are_named(tmp_path, arrays, message):
    npz(tmp_path / "set.npz", **arrays)
    with pytest.raises(ValueError, match=rf"set\.npz.*{message}"):
        load_dataset(str(tmp_path / "set.npz"), tmp_path)


def test_a_damaged_file_of_arrays_is_named(tmp_path):
    npz(tmp_path / "set.npz")
    whole = (tmp_path / "set.npz").read_bytes()
    for content in (b"", whole[:200], whole[:300] + b"\0" + whole[301:], b"PK"):
        (tmp_path / "set.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"set\.npz can't be read"):
            load_dataset(str(tmp_path / "set.npz"), tmp_path)


@pytest.mark.parametrize(("make", "message"), [
    (lambda root: None, "there is no such folder"), (lambda root: root.mkdir(), "it has none"),
    (lambda root: write(root, {"a": 3}), "it has a"),
    (lambda root: write(root / "train", {"a": 3, "b": 1}), "neither a folder test nor val"),
    (lambda root: [write(root / part, {"a": 2, part: 2}) for part in ("train", "test")], "'test' is in only one of"),
    (lambda root: (root / "c").mkdir(parents=True) or write(root, {"a": 2}), "there are no images in"),
    (lambda root: [write(root, {"a": 6}, side=(4, 4)), write(root, {"b": 6}, side=(5, 5))], "give --image_size"),
    (lambda root: [write(root, {"a": 6, "b": 6}, side=(4, 4)), (root / "a/0.png").write_text("no")],
     "0.png can't be decoded"),
])
def test_folders_that_are_no_data_set_are_named(tmp_path, make, message):
    make(tmp_path / "set")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refused:
        load_dataset(f"folder:{tmp_path / 'set'}", tmp_path)
    assert f"folder:{tmp_path / 'set'}" in str(refused.value) and "\n" not in str(refused.value)


def test_other_sets_have_the_size_that_they_have(tmp_path):
    npz(tmp_path / "set.npz")
    for name in ("digits", str(tmp_path / "set.npz")):
        with pytest.raises(ValueError, match="--image_size 7 is for folder: and tv:"):
            load_dataset(name, tmp_path, image_size=7)


def test_torchvisions_sets_by_name(tmp_path, monkeypatch):
    """USPS: two files of text."""
    import bz2

    from torchvision.datasets import USPS

    rng = np.random.default_rng(0)
    pixels = {part: rng.integers(0, 256, (n, 256)) for part, n in (("train", 12), ("test", 5))}
    labels = {part: np.arange(len(pixels[part])) % 10 for part in pixels}
    for part, (_, name, _) in USPS.split_list.items():
        lines = "".join(f"{label + 1} " + " ".join(f"{k + 1}:{2 * p / 255 - 1:.6f}" for k, p in enumerate(row)) + "\n"
                        for label, row in zip(labels[part], pixels[part], strict=True))
        (tmp_path / name).write_bytes(bz2.compress(lines.encode()))
    monkeypatch.setattr(USPS, "split_list", {
        part: [url, name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
        for part, (url, name, _) in USPS.split_list.items()})
    found = load_dataset("tv:USPS", tmp_path, download=False)
    assert found.train.images.shape == (12, 1, 16, 16) and found.train.labels.tolist() == labels["train"].tolist()
    assert np.abs(found.test.images.numpy().reshape(5, 256).astype(int) - pixels["test"]).max() <= 1
    assert load_dataset("tv:USPS", tmp_path, image_size=8).train.images.shape == (12, 3, 8, 8)


def test_torchvisions_other_sets_are_refused_with_a_list(tmp_path):
    assert {"SVHN", "EMNIST", "STL10", "Imagenette", "KMNIST", "USPS"} <= set(tv_names())
    for name in ("CocoDetection", "KittiFlow", "Nothing"):
        with pytest.raises(ValueError, match=r"no classification set.*SVHN"):
            load_dataset(f"tv:{name}", tmp_path)
    with pytest.raises(FileNotFoundError, match="tv:SVHN: not found or damaged in"):
        load_dataset("tv:SVHN", tmp_path, download=False)


NETWORK = """
from torch import nn

def small(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, num_classes))

def wrong(num_classes):
    return nn.Flatten()

def needs(what):
    return nn.Flatten()
"""


def test_ones_own_data_and_network_from_training_to_tables(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NETWORK)
    write(tmp_path / "photos", {"a": 20, "b": 20})
    command = ["--dataset=folder:photos", "--image_size=6", "--model=net.py:small", "--num_models=2", "--batch_size=8"]
    checkpoints = folder_of(script("train", *command, "--epochs=1", "--data_dist=iid", cwd=tmp_path).stdout.replace(
        "checkpoints: ", "results: "), tmp_path)
    assert checkpoints.as_posix().startswith(f"{tmp_path}/checkpoint/folder_photos/net.py_small/")
    run = folder_of(script("main", *command, f"--ckp={checkpoints}", "--merg_itr=1", cwd=tmp_path), tmp_path)
    assert len(rows_of(run)) == 4
    assert "image_size=6" in run.as_posix() and "DIMAT" in script("reports.tables", "results", cwd=tmp_path).stdout
    refused = script("main", *command[:1], *command[2:], f"--ckp={checkpoints}", "--image_size=7", cwd=tmp_path,
                     check=False)
    assert refused.returncode == 2 and "--image_size 7 contradicts" in refused.stderr


@pytest.mark.parametrize(("model", "message"), [
    ("net.py:wrong", r"makes \(2, 64\) of 2 images, not \(2, 10\)"), ("net.py:needs", "it must take num_classes"),
    ("net.py:nothing", "has no function 'nothing'"), ("nowhere.py:small", "nowhere.py does not exist"),
    ("timm:no_such_net", "timm"), ("nothing", "choose one of"),
])
def test_models_that_cannot_be_are_named(tmp_path, model, message, monkeypatch):
    import re

    (tmp_path / "net.py").write_text(NETWORK)
    refused = script("train", *TINY, f"--model={model}", "--num_models=2", "--epochs=1", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and re.search(message, refused.stderr) and refused.stderr.count("\n") == 1
    assert not (tmp_path / "checkpoint").exists()
