"""Data sets: what is loaded, its cache, and errors that help."""

import gzip
import hashlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets as tv

from data import datasets
from data.datasets import DATASETS, ImageSet, cached, class_balanced, load_dataset, rank_in_class, some_images
from tests.helpers import script

ROOT = Path(__file__).parents[2]


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


# ---- slices --------------------------------------------------------------------------------------


def test_rank_in_class_counts_earlier_samples_of_the_class():
    labels = np.array([2, 0, 2, 2, 0, 5])
    np.testing.assert_array_equal(rank_in_class(labels), [0, 0, 1, 2, 1, 0])


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("n", [1, 7, 10, 33])
def test_class_balanced_takes_as_many_of_each_class(n, seed):
    labels = np.random.default_rng(0).integers(0, 5, 200)
    chosen = class_balanced(labels, n, seed)
    assert len(chosen) == n and (np.diff(chosen) > 0).all()
    assert np.ptp(np.bincount(labels[chosen], minlength=5)) <= 1
    np.testing.assert_array_equal(chosen, class_balanced(labels, n, seed))


def test_some_of_an_agents_own_images_are_of_its_classes_as_often_as_it_has_them():
    labels = np.repeat([0, 1, 2, 0, 1, 2], [900, 100, 0, 0, 100, 900])
    images = ImageSet(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), torch.from_numpy(labels))
    parts = [np.arange(1000), np.arange(1000, 2000)]

    def shares(agent, n):
        chosen = some_images(images, parts, agent, n, torch.Generator().manual_seed(0))
        assert len(np.unique(chosen)) == n and (np.diff(chosen) > 0).all()
        assert agent is None or np.isin(chosen, parts[agent]).all()
        return np.bincount(labels[chosen], minlength=3) / n

    np.testing.assert_allclose(shares(0, 400), [0.9, 0.1, 0], atol=0.05)
    np.testing.assert_allclose(shares(1, 400), [0, 0.1, 0.9], atol=0.05)
    np.testing.assert_allclose(shares(None, 300), [1 / 3] * 3)  # everybody's: of each class alike
    for n in (0, 1000, 2500):
        np.testing.assert_array_equal(some_images(images, parts, 1, n, torch.Generator()), parts[1])
    for n in (0, 2000):
        np.testing.assert_array_equal(some_images(images, parts, None, n, torch.Generator()), np.arange(2000))


def test_class_balanced_without_a_seed_takes_the_first_and_nests():
    labels = np.array([0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(class_balanced(labels, 4), [0, 1, 3, 4])
    assert set(class_balanced(labels, 3)) < set(class_balanced(labels, 4))


def test_class_balanced_fills_up_when_a_class_runs_out_and_knows_all_of_them():
    labels = np.array([0] * 10 + [1])
    np.testing.assert_array_equal(np.bincount(labels[class_balanced(labels, 6)]), [5, 1])
    for n in (0, 11, 99):
        np.testing.assert_array_equal(class_balanced(labels, n), np.arange(11))
    with pytest.raises(ValueError, match="-1 samples"):
        class_balanced(labels, -1)


# ---- digits --------------------------------------------------------------------------------------


def test_the_digits_are_scikit_learns(monkeypatch):
    from sklearn.datasets import load_digits  # takes 3 s, in each process that collects tests

    bunch = load_digits()
    for _ in range(2):
        images, labels = datasets._sklearn_digits()
        np.testing.assert_array_equal(images, bunch.images)
        np.testing.assert_array_equal(labels, bunch.target)
        monkeypatch.setattr(datasets, "find_spec", lambda _: None)  # wherever its file may lie


def test_a_start_imports_nothing_that_takes_seconds(tmp_path):
    code = """
import sys, base_lines, main, train, models, models.training, experiments.sweep, data.datasets
data.datasets.load_dataset("digits", ".")
for name in ("resnet20", "vgg16"):
    model = models.build_model(name, 10, width_multiplier=1)
for name in ("adam", "sgd"):
    optimizer = models.training.make_optimizer(model, name, 0.1, 0.9, 0)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print(*({"sklearn", "torchvision", "torch._dynamo", "matplotlib"} & sys.modules.keys()))"""
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True, check=True)
    assert found.stdout == "\n"


def test_digits_need_no_files(tmp_path):
    dataset = load_dataset("digits", tmp_path)
    assert dataset.train.images.shape[1:] == (1, 8, 8) and (dataset.in_channels, dataset.image_size) == (1, 8)
    assert dataset.train.images.dtype == torch.uint8 and int(dataset.train.images.max()) == 255
    assert dataset.train.labels.dtype == torch.int64 and not dataset.flip
    assert len(dataset.train) + len(dataset.test) == 1797 and 350 <= len(dataset.test) <= 360
    assert np.ptp(np.bincount(dataset.test.labels)) <= 2
    pixels = dataset.train.images / 255
    assert pixels.mean().item() == pytest.approx(dataset.mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(dataset.std[0], abs=1e-3)
    assert not list(tmp_path.iterdir())


def test_train_samples_takes_a_balanced_slice_of_the_training_images_only(tmp_path):
    whole, part = load_dataset("digits", tmp_path), load_dataset("digits", tmp_path, train_samples=50)
    assert np.bincount(part.train.labels).tolist() == [5] * 10
    assert len(part.test) == len(whole.test)
    chosen = class_balanced(whole.train.labels.numpy(), 50)
    assert torch.equal(part.train.images, whole.train.images[chosen])
    held = load_dataset("digits", tmp_path, train_samples=50, holdout=100)
    assert torch.equal(held.train.images, part.train.images)  # the slice stays the same: the others are held out
    assert held.test.labels.bincount().tolist() == [10] * 10
    rest = load_dataset("digits", tmp_path, holdout=100).train
    assert len(rest) == len(whole.train) - 100
    known = {image.numpy().tobytes() for image in whole.train.images}
    kept = {image.numpy().tobytes() for image in rest.images}
    held_out = {image.numpy().tobytes() for image in held.test.images}
    assert held_out <= known and not held_out & kept
    with pytest.raises(ValueError, match="hold out"):
        load_dataset("digits", tmp_path, holdout=len(whole.train))
    assert len(load_dataset("digits", tmp_path, train_samples=10**6).train) == len(whole.train)
    few = load_dataset("digits", tmp_path, test_samples=40)
    assert len(few.train) == len(whole.train) and few.test.labels.bincount().tolist() == [4] * 10


def test_a_data_set_moves_as_a_whole(tmp_path):
    moved = load_dataset("digits", tmp_path).to("meta")
    tensors = (moved.train.images, moved.train.labels, moved.test.images, moved.test.labels)
    assert all(tensor.is_meta for tensor in tensors)


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="choose from cifar10, cifar100, digits, fashion_mnist, mnist, tinyimgnt"):
        load_dataset("imagenet")


# ---- torchvision's -------------------------------------------------------------------------------


def write_cifar(monkeypatch, data_dir, kind, seed=0):
    """A small archive in CIFAR's own format, with its checksums entered where torchvision looks."""
    random = np.random.default_rng(seed)
    folder = data_dir / kind.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    key = "fine_labels" if kind is tv.CIFAR100 else "labels"

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    written = {}
    for what in ("train_list", "test_list"):
        written[what], sums = [], []
        for name, _ in getattr(kind, what):
            content = {"data": random.integers(0, 256, (20, 3072), dtype=np.uint8), key: list(range(20))}
            written[what].append(content["data"])
            sums.append([name, write(name, content)])
        monkeypatch.setattr(kind, what, sums)
    meta = {**kind.meta, "md5": write(kind.meta["filename"], {kind.meta["key"]: ["a"] * 100})}
    monkeypatch.setattr(kind, "meta", meta)
    return {what: np.concatenate(parts).reshape(-1, 3, 32, 32) for what, parts in written.items()}


@pytest.mark.parametrize("name, kind, classes", [("cifar10", tv.CIFAR10, 10), ("cifar100", tv.CIFAR100, 100)])
def test_cifar_comes_out_as_it_is_in_the_archive(monkeypatch, tmp_path, offline, name, kind, classes):
    written = write_cifar(monkeypatch, tmp_path, kind)
    for _ in ("decoded", "from the cache"):
        dataset = load_dataset(name, tmp_path)
        np.testing.assert_array_equal(dataset.train.images, written["train_list"])
        np.testing.assert_array_equal(dataset.test.images, written["test_list"])
        assert dataset.train.labels[:20].tolist() == list(range(20))
        assert dataset.num_classes == classes and dataset.flip and dataset.padding == 4
        # the next load must not touch torchvision
        monkeypatch.setattr(kind, "__init__", lambda *args, **kwargs: pytest.fail("decoded twice"))


def test_a_changed_source_rebuilds_the_cache_and_drops_the_old_one(monkeypatch, tmp_path, offline):
    write_cifar(monkeypatch, tmp_path, tv.CIFAR100)
    before = load_dataset("cifar100", tmp_path).train.images.clone()
    written = write_cifar(monkeypatch, tmp_path, tv.CIFAR100, seed=1)
    after = load_dataset("cifar100", tmp_path).train.images
    assert not torch.equal(before, after)
    np.testing.assert_array_equal(after, written["train_list"])
    assert len(list((tmp_path / ".cache").glob("cifar100-*"))) == 1


def test_a_damaged_archive_is_refused(monkeypatch, tmp_path, offline):
    write_cifar(monkeypatch, tmp_path, tv.CIFAR100)
    with open(tmp_path / "cifar-100-python" / "train", "ab") as file:
        file.write(b"!")
    with pytest.raises(FileNotFoundError, match="damaged"):
        load_dataset("cifar100", tmp_path)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_nothing_is_unpickled_whose_checksum_is_wrong(monkeypatch, tmp_path, offline, file):
    write_cifar(monkeypatch, tmp_path, tv.CIFAR10)
    harm, archive = tmp_path / "harm", tmp_path / tv.CIFAR10.base_folder
    (archive / file).write_bytes(pickle.dumps(Trap(harm)))
    for download in (False, True):
        with pytest.raises(FileNotFoundError, match="not found or damaged"):
            load_dataset("cifar10", tmp_path, download=download)
    assert not harm.exists()
    pickle.loads((archive / file).read_bytes())
    assert harm.exists()  # the trap works


@pytest.mark.parametrize(
    "content, message",
    [
        ({"labels": [0] * 20}, "data"),
        ({"data": np.zeros((20, 3072), np.uint8)}, "fine_labels"),
        ({"data": np.zeros((20, 3072), np.uint8), "labels": [0] * 19}, "train: 100 images, but 99 labels"),
        ({"data": np.zeros((20, 3072), np.uint8), "labels": [-1] * 20}, "train: labels go from -1 to 19"),
        ({"data": np.zeros((20, 3072)), "labels": [0] * 20}, "float64"),
        ({"data": np.zeros((20, 3071), np.uint8), "labels": [0] * 20}, "dimension"),
        ({"data": np.zeros((20, 3072), np.uint8), "labels": ["cat"] * 20}, "cat"),
        (5, "int"),
        (None, "invalid load key"),
    ],
)
def test_batches_of_another_kind_are_named(monkeypatch, tmp_path, offline, content, message):
    write_cifar(monkeypatch, tmp_path, tv.CIFAR10)
    data = b"no pickle" if content is None else pickle.dumps(content)
    (tmp_path / tv.CIFAR10.base_folder / "data_batch_1").write_bytes(data)
    checksums = [["data_batch_1", hashlib.md5(data).hexdigest()], *tv.CIFAR10.train_list[1:]]
    monkeypatch.setattr(tv.CIFAR10, "train_list", checksums)
    with pytest.raises(FileNotFoundError, match=f"cifar10: not found or damaged in .*{message}"):
        load_dataset("cifar10", tmp_path)


def idx(array, kind=8):
    """An array in MNIST's format."""
    return np.array([256 * kind + array.ndim, *array.shape], ">i4").tobytes() + array.astype(np.uint8).tobytes()


MNIST_DAMAGES = {
    "an image too few": ("images-idx3", idx(np.zeros((29, 28, 28))), "train: 29 images, but 30 labels"),
    "a label too many": ("labels-idx1", idx(np.zeros(31)), "train: 30 images, but 31 labels"),
    "no label": ("labels-idx1", idx(np.zeros(0)), "buffer length"),
    "a label out of range": ("labels-idx1", idx(np.full(30, 10)), "train: labels go from 10 to 10"),
    "not square": ("images-idx3", idx(np.zeros((30, 28, 29))), r"train: .*\(1, 28, 29\)"),
    "truncated": ("images-idx3", idx(np.zeros((30, 28, 28)))[:-1], "invalid for input of size"),
    "empty": ("images-idx3", b"", "invalid literal"),
    "of another type": ("images-idx3", idx(np.zeros((30, 28, 28)), kind=9), "int8"),
    "of no type": ("images-idx3", idx(np.zeros((30, 28, 28)), kind=10), "10"),
}


@pytest.mark.parametrize("damage", MNIST_DAMAGES)
@pytest.mark.parametrize("download", [True, False])
def test_damaged_mnist_files_are_named(monkeypatch, tmp_path, offline, download, damage):
    what, content, message = MNIST_DAMAGES[damage]
    write_mnist(monkeypatch, tmp_path, tv.MNIST)
    for packed in (tmp_path / "MNIST" / "raw").glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    (tmp_path / "MNIST" / "raw" / f"train-{what}-ubyte").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=f"mnist: not found or damaged in .*raw.*{message}") as error:
        load_dataset("mnist", tmp_path, download=download)
    assert "\n" not in str(error.value)


def write_mnist(monkeypatch, data_dir, kind):
    """The four gzip files, as downloaded."""
    raw = data_dir / kind.__name__ / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    resources, images = [], {}
    for part, n in (("train", 30), ("t10k", 10)):
        images[part] = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        content = {
            f"{part}-images-idx3-ubyte.gz": np.array([2051, n, 28, 28], ">i4").tobytes() + images[part].tobytes(),
            f"{part}-labels-idx1-ubyte.gz": np.array([2049, n], ">i4").tobytes() + bytes(i % 10 for i in range(n)),
        }
        for name, data in content.items():
            (raw / name).write_bytes(gzip.compress(data))
            resources.append((name, hashlib.md5((raw / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(kind, "resources", resources)
    return images


@pytest.mark.parametrize("name, kind, flip", [("mnist", tv.MNIST, False), ("fashion_mnist", tv.FashionMNIST, True)])
def test_mnist_and_its_kind_load_from_their_gzip_files(monkeypatch, tmp_path, offline, name, kind, flip):
    images = write_mnist(monkeypatch, tmp_path, kind)
    dataset = load_dataset(name, tmp_path)
    np.testing.assert_array_equal(dataset.train.images, images["train"][:, None])
    np.testing.assert_array_equal(dataset.test.images, images["t10k"][:, None])
    assert dataset.test.labels.tolist() == list(range(10)) and dataset.flip is flip


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize(
    "name, where",
    [
        ("mnist", "MNIST/raw.*train-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw.*t10k-labels-idx1-ubyte"),
        ("cifar10", "cifar-10-batches-py.*data_batch_5.*cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.*train, test, meta.*cifar-100-python.tar.gz"),
        ("tinyimgnt", "tiny-imagenet-200.*--imgntdir"),
    ],
)
def test_absent_data_says_where_to_put_what(tmp_path, offline, name, where, download):
    with pytest.raises(FileNotFoundError, match=where) as error:
        load_dataset(name, tmp_path / "datasets", download=download)
    assert "\n" not in str(error.value)
    if download:
        assert "no network in tests" in str(error.value)
    else:
        assert not (tmp_path / "datasets").exists()


# ---- Tiny ImageNet -------------------------------------------------------------------------------

CLASSES = ("n03", "n01", "n02")  # not in alphabetical order
COLOURS = {"n01": (250, 10, 10), "n02": (10, 250, 10), "n03": (10, 10, 250)}


def write_tiny(root, wnids=True, size=16):
    """Three classes with 3, 2 and 1 images, one of them grey, and a validation image of each."""
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for i, name in enumerate(CLASSES):
        (root / "train" / name / "images").mkdir(parents=True)
        for k in range(3 - i):
            grey = (name, k) == ("n01", 1)
            image = Image.new("L", (size, size), 77) if grey else Image.new("RGB", (size, size), COLOURS[name])
            image.save(root / "train" / name / "images" / f"{name}_{k}.JPEG", quality=95)
        (root / "train" / name / f"{name}_boxes.txt").touch()
        Image.new("RGB", (size, size), COLOURS[name]).save(root / "val" / "images" / f"val_{i}.JPEG", quality=95)
        lines.append(f"val_{i}.JPEG\t{name}\t0\t1\t2\t3\n")
    lines.reverse()
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    if wnids:
        (root / "wnids.txt").write_text("\n".join(CLASSES))
    return root


@pytest.mark.parametrize("wnids", [True, False])
def test_tiny_imagenet_of_any_size(tmp_path, wnids):
    root = write_tiny(tmp_path / "mine", wnids)
    order = CLASSES if wnids else sorted(CLASSES)
    dataset = load_dataset("tinyimgnt", tmp_path, root)
    assert dataset.train.images.shape == (6, 3, 16, 16) and dataset.test.images.shape == (3, 3, 16, 16)
    assert dataset.num_classes == 3 and dataset.padding == 0 and dataset.flip
    assert dataset.train.labels.bincount().tolist() == [3 - CLASSES.index(name) for name in order]
    greys = 0
    for part in (dataset.train, dataset.test):
        for image, label in zip(part.images, part.labels, strict=True):
            colour = image.float().mean((1, 2))
            if (colour - 77).abs().max() < 2:
                greys += 1
                assert order[label] == "n01"
            else:
                torch.testing.assert_close(colour, torch.tensor(COLOURS[order[label]]).float(), atol=6, rtol=0)
    assert greys == 1


def test_folders_of_the_same_layout_keep_their_own_cache(tmp_path):
    roots = [write_tiny(tmp_path / "small"), write_tiny(tmp_path / "large", size=32)]
    for _ in range(2):
        assert [load_dataset("tinyimgnt", tmp_path, root).image_size for root in roots] == [16, 32]
    assert len(list((tmp_path / ".cache").glob("*-*-*"))) == 2


def test_an_image_more_rebuilds_the_cache(tmp_path):
    root = write_tiny(tmp_path / "mine")
    assert len(load_dataset("tinyimgnt", tmp_path, root).train) == 6
    Image.new("RGB", (16, 16)).save(root / "train" / "n02" / "images" / "new.png")
    assert len(load_dataset("tinyimgnt", tmp_path, root).train) == 7


def test_tiny_imagenet_errors_name_the_file(tmp_path):
    root = write_tiny(tmp_path / "mine")
    odd = root / "train" / "n02" / "images" / "odd.JPEG"
    Image.new("RGB", (8, 8)).save(odd)
    with pytest.raises(ValueError, match=r"odd.JPEG is 8x8, .* is 16x16"):
        load_dataset("tinyimgnt", tmp_path, root)
    odd.write_bytes(odd.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"odd.JPEG can't be decoded"):
        load_dataset("tinyimgnt", tmp_path, root)
    odd.unlink()
    annotations = root / "val" / "val_annotations.txt"
    before = annotations.read_text()
    annotations.write_text(before + "lonely.JPEG\n")
    with pytest.raises(ValueError, match=r"val_annotations.txt, line \d+: 'lonely.JPEG' has no class"):
        load_dataset("tinyimgnt", tmp_path, root)
    annotations.write_text(before)
    (root / "wnids.txt").write_text("n03\nn01\nn02\nn44")
    with pytest.raises(FileNotFoundError, match="no images of class n44"):
        load_dataset("tinyimgnt", tmp_path, root)
    (root / "wnids.txt").unlink()
    (root / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_1.JPEG"):
        load_dataset("tinyimgnt", tmp_path, root)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val_annotations.txt is missing.*layout"):
        load_dataset("tinyimgnt", tmp_path, root)


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path / "mine")


def load_tiny(root):
    """The data set and what was warned of while it was loaded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        dataset = load_dataset("tinyimgnt", root.parent, root)
    return dataset, [str(warning.message) for warning in caught]


def image_file(root, name="n01", file="n01_0.JPEG"):
    return root / "train" / name / "images" / file


def annotate(root, *lines):
    with open(root / "val" / "val_annotations.txt", "a") as file:
        file.writelines(f"{line}\n" for line in lines)


def test_names_of_classes_and_images_may_have_blanks(tmp_path):
    root = tmp_path / "mine"
    (root / "val" / "images").mkdir(parents=True)
    for colour, name in ((9, "pear"), (200, "green apple")):
        image_file(root, name).parent.mkdir(parents=True)
        for file in (image_file(root, name, "an image.png"), root / "val" / "images" / f"a {name}.png"):
            Image.new("RGB", (8, 8), (colour,) * 3).save(file)
        annotate(root, f"a {name}.png\t{name}\t0\t0\t7\t7")
    for wnids, labels in ((None, [1, 0]), ("pear\ngreen apple\n", [0, 1])):
        if wnids:
            (root / "wnids.txt").write_text(wnids)
        dataset, said = load_tiny(root)
        assert dataset.test.labels.tolist() == labels and dataset.num_classes == 2 and not said
        assert dataset.test.images[:, 0, 0, 0].tolist() == [9, 200]
        assert dataset.train.images[dataset.train.labels == labels[1], 0, 0, 0].tolist() == [200]


@pytest.mark.parametrize("encoding, mark", [("utf-8", b""), ("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe"),
                                            ("utf-16-be", b"\xfe\xff")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_as_editors_of_all_systems_save_them(tiny, encoding, mark, end):
    before = load_tiny(tiny)[0].test
    image_file(tiny).parent.parent.rename(tiny / "train" / "né")
    for file in (tiny / "wnids.txt", tiny / "val" / "val_annotations.txt"):
        text = file.read_text().replace("n01", "né") + "\n"
        file.write_bytes(mark + text.replace("\n", end).encode(encoding))
    dataset, said = load_tiny(tiny)
    assert torch.equal(dataset.test.images, before.images) and torch.equal(dataset.test.labels, before.labels)
    assert len(dataset.train) == 6 and not said


def test_annotations_without_tabs_are_split_at_blanks(tiny):
    file = tiny / "val" / "val_annotations.txt"
    file.write_text("\n" + file.read_text().replace("\t", "  "))
    assert len(load_tiny(tiny)[0].test) == 3


def test_whatever_is_left_out_is_counted_and_said_once(tiny):
    annotate(tiny, "val_8.JPEG\tn98\t0\t0\t1\t1", "val_9.JPEG\tn99\t0\t0\t1\t1")
    Image.new("RGB", (16, 16)).save(tiny / "val" / "images" / "forgotten.png")
    Image.new("RGB", (16, 16)).save(image_file(tiny, file="other.bmp"))
    (tiny / "train" / "n04" / "images").mkdir(parents=True)
    for source in ("decoded", "from the cache"):
        dataset, said = load_tiny(tiny)
        assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (6, 3, 3)
        assert [line.removeprefix("tinyimgnt: left out ").replace(str(tiny), "ROOT") for line in said] == [
            "1 classes that ROOT/wnids.txt doesn't name, such as ROOT/train/n04",
            "1 training files that are not .jpeg, .jpg, .png, such as ROOT/train/n01/images/other.bmp",
            "2 validation images of other classes, such as ROOT/val/images/val_8.JPEG",
            "1 validation images that ROOT/val/val_annotations.txt doesn't name, such as "
            "ROOT/val/images/forgotten.png",
        ], source


def test_what_desktops_and_editors_hide_is_passed_over(tiny):
    (tiny / "wnids.txt").unlink()
    for folder in (image_file(tiny).parent, tiny / "val" / "images", tiny / "train"):
        (folder / "._x.png").write_bytes(b"\0\5\x16\7")
        (folder / ".DS_Store").touch()
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "x-checkpoint.png").touch()
    dataset, said = load_tiny(tiny)
    assert (len(dataset.train), len(dataset.test), dataset.num_classes) == (6, 3, 3) and not said


def test_what_is_listed_twice_counts_once(tiny):
    (tiny / "wnids.txt").write_text("n03\nn01\nn03\n\nn02\n")
    annotate(tiny, "val_0.JPEG\tn03\t5\t5\t6\t6")
    dataset, _ = load_tiny(tiny)
    assert dataset.num_classes == 3 and dataset.train.labels.bincount().tolist() == [3, 2, 1]
    assert dataset.test.labels.tolist() == [2, 1, 0]


IMAGES = {  # how an image of one colour is stored -> its pixels in RGB
    "CMYK.jpg": (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), (254, 0, 0)),
    "P.png": (Image.new("RGB", (16, 16), (9, 200, 30)).quantize(), (9, 200, 30)),
    "RGBA.png": (Image.new("RGBA", (16, 16), (9, 200, 30, 0)), (9, 200, 30)),
    "LA.png": (Image.new("LA", (16, 16), (77, 128)), (77, 77, 77)),
    "1.png": (Image.new("1", (16, 16), 1), (255, 255, 255)),
    "16 bits.png": (Image.fromarray(np.full((16, 16), 77 * 256 + 200, np.uint16)), (77, 77, 77)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_all_kinds_become_rgb(tiny, name):
    image, colour = IMAGES[name]
    image.save(image_file(tiny, file=name))
    (alone,) = [i for i, path in enumerate(sorted(image_file(tiny).parent.iterdir())) if path.name == name]
    dataset, said = load_tiny(tiny)
    pixels = dataset.train.images[dataset.train.labels == 1][alone].float()
    torch.testing.assert_close(pixels, torch.tensor(colour).float()[:, None, None].expand(3, 16, 16), atol=1.5, rtol=0)
    assert not said


DAMAGES = {  # what is done to a folder -> the error
    "truncated": (lambda r: os.truncate(image_file(r), 300), "n01_0.JPEG can't be decoded"),
    "empty": (lambda r: os.truncate(image_file(r), 0), "n01_0.JPEG can't be decoded"),
    "32 bits": (lambda r: Image.new("F", (16, 16)).save(image_file(r), "tiff"), "n01_0.JPEG can't be decoded.*32 bits"),
    "of another size": (lambda r: Image.new("RGB", (8, 12)).save(image_file(r)), "n01_0.JPEG is 8x12, .* is 16x16"),
    "not square": (lambda r: Image.new("RGB", (9, 8)).save(image_file(r, "n03", "n03_0.JPEG")), "is 9x8: .* square"),
    "val of another size": (lambda r: Image.new("RGB", (8, 8)).save(r / "val" / "images" / "val_2.JPEG"),
                            "val_2.JPEG is 8x8, .*n03_0.JPEG is 16x16"),
    "a folder": (lambda r: image_file(r, file="x.png").mkdir(), "x.png is a folder"),
    "a link to nothing": (lambda r: image_file(r, file="x.png").symlink_to("y"), "No such file.*x.png"),
    "an image missing": (lambda r: (r / "val" / "images" / "val_1.JPEG").unlink(), "No such file.*val_1.JPEG"),
    "no images folder": (lambda r: shutil.rmtree(r / "val" / "images"), "No such file.*val_2.JPEG"),
    "an empty class": (lambda r: [f.unlink() for f in image_file(r).parent.iterdir()], "no images of class n01 in"),
    "an empty class without a list": (lambda r: ((r / "wnids.txt").unlink(), (r / "train" / "n04").mkdir()),
                                      "no images of class n04 in .* remove the folder"),
    "no class": (lambda r: (r / "wnids.txt").write_text("\n"), "no class in .*wnids.txt"),
    "two classes on a line": (lambda r: (r / "wnids.txt").write_text("n01 n02"), "class n01 n02 in .* a line"),
    "two classes": (lambda r: annotate(r, "", "val_0.JPEG\tn01"), "line 5: 'val_0.JPEG' is of .* n01, but was of n03"),
    "two classes, one unknown": (lambda r: annotate(r, "val_0.JPEG\tn99"), "line 4: 'val_0.JPEG' is of class n99"),
    "no class beside it": (lambda r: annotate(r, "", "a b.JPEG\t \t0"), "line 5: 'a b.JPEG.*' has no class"),
    "no image beside it": (lambda r: annotate(r, "\tn01"), "line 4: 'n01' has no class"),
    "UTF-16 without a mark": (lambda r: (r / "wnids.txt").write_bytes("n01".encode("utf-16-le")), "wnids.txt .*UTF-8"),
    "Latin-1": (lambda r: (r / "val" / "val_annotations.txt").write_bytes(b"\xe9\tn01\n"), "annotations.txt .*UTF-8"),
    "a folder for a list": (lambda r: ((r / "wnids.txt").unlink(), (r / "wnids.txt").mkdir()), "wnids.txt is a folder"),
    "no known class": (lambda r: (r / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn9"), "names no image of"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_named_in_a_line(tiny, damage):
    harm, message = DAMAGES[damage]
    load_tiny(tiny)
    harm(tiny)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_tiny(tiny)
    assert str(tiny) in str(error.value) and "\n" not in str(error.value)


def test_a_bomb_among_the_images_is_not_decoded(tiny):
    bomb = image_file(tiny, file="bomb.png")
    Image.new("L", (16, 16)).save(bomb)
    data = bytearray(bomb.read_bytes())
    data[16:24] = (2**16 - 1).to_bytes(4, "big") * 2  # the size in a PNG's header
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    bomb.write_bytes(data)
    with pytest.raises(ValueError, match=r"bomb.png can't be decoded: .* decompression bomb"):
        load_tiny(tiny)


@pytest.mark.parametrize("place", ["train/n03/images/a.png", "wnids.txt", "val/val_annotations.txt",
                                   ".cache/train_images.npy", ".cache/digest"])
def test_nobody_waits_for_a_pipe(tiny, place):
    load_tiny(tiny)
    if place.startswith(".cache"):
        (folder,) = (tiny.parent / ".cache").glob("tinyimgnt-*-*")
        file = folder / place.removeprefix(".cache/")
    else:
        file = tiny / place
    file.unlink(missing_ok=True)
    os.mkfifo(file)

    def too_long(*_):
        pytest.exit(f"{file} is waited for")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    try:
        if place.startswith(".cache"):
            assert len(load_tiny(tiny)[0].train) == 6 and file.is_file()
        else:
            with pytest.raises(ValueError, match="is not a regular file"):
                load_tiny(tiny)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_text_in_this_locale(tiny):
    odd = os.fsencode(tiny.with_name("m")) + b"\xe9"
    os.rename(tiny, odd)
    tiny = Path(os.fsdecode(odd))
    image_file(tiny).rename(image_file(tiny, file=os.fsdecode(b"\xe9.JPEG")))
    for _ in ("decoded", "from the cache"):
        dataset, said = load_tiny(tiny)
        assert len(dataset.train) == 6 and not said


def test_the_scripts_say_it_in_lines(monkeypatch, tiny):
    annotate(tiny, "val_9.JPEG\tn99")
    train = ["--dataset=tinyimgnt", f"--imgntdir={tiny}", f"--data_dir={tiny.parent}", "--num_models=1000"]
    result = script("train", *train, cwd=tiny.parent, check=False)
    warning, error = result.stderr.splitlines()
    assert warning.startswith("warning: tinyimgnt: left out 1 validation images") and warning.endswith("val_9.JPEG")
    assert error == "error: 1000 agents cannot share 6 training images: use fewer agents" and result.returncode == 2
    monkeypatch.setenv("RANK", "1")  # of several processes the first one says it
    assert "warning" not in script("train", *train, cwd=tiny.parent, check=False).stderr


@pytest.mark.parametrize("examples", [25, pytest.param(2000, marks=pytest.mark.long)])
def test_mutated_folders_load_or_are_named(tiny, examples):
    """A few bytes of an image, a list or an array in the cache are changed, or it is cut off."""

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(st.data())
    def mutate(data):
        load_tiny(tiny)
        kept = (".lock", "_boxes.txt")
        files = sorted(f for f in tiny.parent.glob("**/*") if f.is_file() and not f.name.endswith(kept))
        file = data.draw(st.sampled_from(files))
        before, stat = file.read_bytes(), file.stat()
        content = bytearray(before)
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(content)))
            content[place:place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        file.write_bytes(content[:data.draw(st.none() | st.integers(0, len(content)))])
        try:
            dataset, _ = load_tiny(tiny)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and str(tiny) in str(error)
        else:
            for images in (dataset.train, dataset.test):
                assert len(images) and images.images.shape == (len(images), 3, 16, 16)
                assert images.images.dtype == torch.uint8 and images.labels.min() >= 0
                assert images.labels.max() < dataset.num_classes <= 4
        finally:
            if tiny in file.parents:
                file.write_bytes(before)
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            else:
                shutil.rmtree(file.parent, ignore_errors=True)

    mutate()


# ---- the cache -----------------------------------------------------------------------------------


def toy_arrays():
    images = np.arange(48, dtype=np.uint8).reshape(4, 3, 2, 2)
    labels = np.arange(4)
    return {"train_images": images, "train_labels": labels, "test_images": images + 1, "test_labels": labels}


def test_the_cache_is_memory_mapped_without_a_copy(tmp_path):
    source = tmp_path / "source"
    source.touch()
    arrays = cached(tmp_path / "cache", "toy", lambda: [source], toy_arrays)
    assert isinstance(arrays["train_images"], np.memmap)
    tensor = torch.from_numpy(arrays["train_images"])
    assert tensor.data_ptr() == arrays["train_images"].ctypes.data
    np.testing.assert_array_equal(tensor, toy_arrays()["train_images"])


def put(name, change):
    return lambda folder: np.save(folder / f"{name}.npy", change(np.load(folder / f"{name}.npy")))


def put_archive(folder):
    with open(folder / "test_images.npy", "wb") as file:
        np.savez(file, **toy_arrays())


def drop_from_both(folder):
    for name in ("test_images", "test_labels"):
        put(name, lambda array: array[:-1])(folder)


CACHE_DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / "test_images.npy", 140),
    "empty": lambda folder: os.truncate(folder / "test_images.npy", 0),
    "missing": lambda folder: (folder / "test_images.npy").unlink(),
    "a folder": lambda folder: ((folder / "test_images.npy").unlink(), (folder / "test_images.npy").mkdir()),
    "left over from a killed build": lambda folder: folder.rename(folder.with_name("toy-tmp-abc")),
    "too few images": put("test_images", lambda images: images[:-1]),
    "too few images and labels": drop_from_both,
    "none at all": put("test_images", lambda images: images[:0]),
    "of another shape": put("test_images", lambda images: images[..., None]),
    "of another type": put("test_images", lambda images: images.astype(np.float32)),
    "of another byte order": put("test_labels", lambda labels: labels.astype(">i8")),
    "a label out of range": put("test_labels", lambda labels: labels + 96),
    "another label": put("train_labels", lambda labels: labels[::-1]),
    "objects": put("test_images", lambda images: images.astype(object)),
    "a pickle": lambda folder: (folder / "test_images.npy").write_bytes(pickle.dumps(Trap(folder / "harm"))),
    "an archive": put_archive,
    "text": lambda folder: (folder / "test_images.npy").write_text("<html>"),
    "a header that lies": lambda folder: (folder / "test_images.npy").write_bytes(
        (folder / "test_images.npy").read_bytes().replace(b"(4, 3, 2, 2)", b"(9**99, 3,2)")),
    "no digest": lambda folder: (folder / "digest").unlink(),
    "a damaged digest": lambda folder: (folder / "digest").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", CACHE_DAMAGES)
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.touch()
    cached(cache, "toy", lambda: [source], toy_arrays)
    (folder,) = cache.glob("toy-*")
    CACHE_DAMAGES[damage](folder)
    for decode in (toy_arrays, lambda: pytest.fail("built twice")):
        arrays = cached(cache, "toy", lambda: [source], decode)
        for name, array in toy_arrays().items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].dtype == array.dtype
    assert list(cache.glob("toy-*")) == [folder] and not (folder / "harm").exists()


def test_an_unwritable_cache_folder_means_decoding_in_memory(tmp_path):
    (tmp_path / ".cache").write_text("in the way")
    root = write_tiny(tmp_path / "mine")
    with pytest.warns(UserWarning, match="cannot be written"):
        dataset = load_dataset("tinyimgnt", tmp_path, root)
    assert len(dataset.train) == 6


def test_a_full_disk_means_keeping_the_decoded_arrays(monkeypatch, tmp_path):
    source = tmp_path / "source"
    source.touch()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="No space left"):
        arrays = cached(tmp_path / "cache", "toy", lambda: [source], toy_arrays)
    np.testing.assert_array_equal(arrays["test_images"], toy_arrays()["test_images"])
    assert not list((tmp_path / "cache").glob("toy-*"))


def test_an_error_while_decoding_is_not_swallowed(tmp_path):
    def broken():
        raise FileNotFoundError("no such image")

    with pytest.raises(FileNotFoundError, match="no such image"):
        cached(tmp_path / "cache", "toy", lambda: [tmp_path / "absent"], broken)


def build(folder, barrier, answers):
    """One of two processes that build the same cache; decoding takes long enough for them to meet."""

    def slow():
        (folder / f"decoded by {os.getpid()}").touch()
        time.sleep(0.5)
        return toy_arrays()

    barrier.wait()
    arrays = cached(folder / "cache", "toy", lambda: [folder / "source"], slow)
    answers.put(all(np.array_equal(arrays[name], array) for name, array in toy_arrays().items()))


def test_two_processes_that_build_at_once_decode_once(tmp_path):
    (tmp_path / "source").touch()
    # forked, where that is safe: a spawned process imports torch first, which takes seconds
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [context.Process(target=build, args=(tmp_path, barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [True, True]
    for process in processes:
        process.join(timeout=60)
    assert len(list(tmp_path.glob("decoded by *"))) == 1


# ---- the real ones, where they are ---------------------------------------------------------------


def test_the_real_cifar10():
    if not (ROOT / "datasets" / tv.CIFAR10.base_folder).is_dir():
        pytest.skip("CIFAR-10 is not in datasets/")
    dataset = load_dataset("cifar10", ROOT / "datasets", download=False)
    assert dataset.train.images.shape == (50_000, 3, 32, 32) and len(dataset.test) == 10_000
    pixels = dataset.train.images.float().div_(255)
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(dataset.mean, abs=1e-3)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(dataset.std, abs=1e-3)


def test_the_real_tiny_imagenet():
    roots = [path for path in (ROOT / "datasets").glob("tiny-imagenet-*") if path.is_dir()]
    if not roots:
        pytest.skip("no tiny-imagenet-* folder in datasets/")
    dataset = load_dataset("tinyimgnt", ROOT / "datasets", roots[0])
    assert dataset.image_size == 64 and dataset.test.labels.bincount().min() > 0


def test_every_loader_is_entered_under_its_own_name():
    assert all(getattr(datasets, name) is loader for name, loader in DATASETS.items())
