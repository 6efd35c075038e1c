"""Data sets: what is loaded, its cache, and errors that help."""

import gzip
import hashlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets as tv

from data import datasets
from data.datasets import DATASETS, ImageSet, cached, class_balanced, load_dataset, rank_in_class, some_images

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
    bunch = load_digits()
    for _ in range(2):
        images, labels = datasets._sklearn_digits()
        np.testing.assert_array_equal(images, bunch.images)
        np.testing.assert_array_equal(labels, bunch.target)
        monkeypatch.setattr(datasets, "find_spec", lambda _: None)  # wherever its file may lie


def test_a_start_imports_nothing_that_takes_seconds(tmp_path):
    code = """
import sys, base_lines, main, train, models, utils.sweep, data.datasets
data.datasets.load_dataset("digits", ".")
for name in ("resnet20", "vgg16"):
    models.build_model(name, 10, width_multiplier=1)
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


@pytest.mark.parametrize("damage", ["truncated", "missing", "left over from a killed build"])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.touch()
    cached(cache, "toy", lambda: [source], toy_arrays)
    (folder,) = cache.glob("toy-*")
    if damage == "truncated":
        os.truncate(folder / "test_images.npy", 140)
    elif damage == "missing":
        (folder / "test_images.npy").unlink()
    else:
        folder.rename(cache / "toy-tmp-abc")
    arrays = cached(cache, "toy", lambda: [source], toy_arrays)
    np.testing.assert_array_equal(arrays["test_images"], toy_arrays()["test_images"])
    assert list(cache.glob("toy-*")) == [folder]


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
