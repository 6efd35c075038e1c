"""Data sets as uint8 tensors, decoded once.

The first load of a data set writes its arrays to `<data_dir>/.cache/`; later loads memory-map them. A cache belongs to
one state of the source files (their names, sizes and modification times) and is rebuilt when that changes.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import math
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from data import elsewhere
from data.images import CACHE, decode_all, decoding, pixels, room
from storage.files import lock, open_regular, read_text, save_text, write_atomically
from utils.seeds import generator


@dataclass(frozen=True)
class ImageSet:
    """Images (uint8, n x C x H x W) and their classes (int64, n)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, most: float = math.inf) -> ImageSet:
        """With the labels on the device and the images as well, unless they take more than so many bytes."""
        return ImageSet(self.images.to(device) if self.images.nbytes <= most else self.images, self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set with what training on it needs to know.

    mean, std: per channel, of images scaled to 0..1. flip: whether a mirrored image is still of its class.
    padding: pixels that a random crop may shift an image by (0: no crops).
    """

    name: str
    train: ImageSet
    test: ImageSet
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    padding: int

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        return self.train.images.shape[-1]

    def to(self, device: torch.device | str, most: float = math.inf) -> Dataset:
        """On the device, but for images of one kind that take more than so many bytes: these go there by batches."""
        return replace(self, train=self.train.to(device, most), test=self.test.to(device, most))

    def with_only(self, indices: np.ndarray, scratch: Path) -> Dataset:
        """With these of the training images and no others, in this order. scratch: see `room`."""
        return replace(self, train=_take(self.train, indices, scratch))


DATASETS: dict[str, Callable[[Path, Path | None, bool], Dataset]] = {}


READ_NO_FOLDER: set[str] = set()


def register_dataset(name: str, *, folder: bool = True) -> Callable:
    """Enter a loader (data_dir, imgntdir, download) -> Dataset in `DATASETS`. folder: it reads `imgntdir`."""

    def enter(loader: Callable[[Path, Path | None, bool], Dataset]) -> Callable:
        DATASETS[name] = loader
        (READ_NO_FOLDER.discard if folder else READ_NO_FOLDER.add)(name)
        return loader

    return enter


def load_dataset(
    name: str,
    data_dir: str | os.PathLike = "datasets",
    imgntdir: str | os.PathLike | None = None,
    train_samples: int = 0,
    holdout: int = 0,
    test_samples: int = 0,
    image_size: int = 0,
    download: bool = True,
) -> Dataset:
    """Load a data set by its name in `DATASETS`, or one of `data.elsewhere`: folder:PATH, tv:NAME, FILE.npz.

    imgntdir: the folder of a data set in Tiny ImageNet's layout (default `<data_dir>/tiny-imagenet-200`).
    train_samples: take only that many training images, the first of every class (0: all of them); a smaller slice is
    part of a larger one. holdout: that many training images, the last of every class, are kept from training and take
    the test set's place: what is chosen on them has not seen the test set. test_samples: like train_samples, for the
    test images. image_size: what images of a folder or of tv: are scaled and cropped to, 0 where they are of one
    size and square. download: whether a data set that is absent may be downloaded.
    Raises ValueError for an unknown name or a negative count, FileNotFoundError that says where to put what when the
    data is not to be had.
    """
    check_name(name)
    if image_size and not name.startswith((elsewhere.FOLDER, elsewhere.TV)):
        raise ValueError(f"--image_size {image_size} is for folder: and tv: data sets: {name} has the size that it has")
    if name in DATASETS:
        dataset = DATASETS[name](Path(data_dir), Path(imgntdir) if imgntdir else None, download)
    else:
        dataset = _from_elsewhere(name, Path(data_dir), download, image_size)
    scratch = Path(data_dir) / CACHE
    if holdout:
        dataset = _hold_out(dataset, holdout, scratch)
    for part, n in (("train", train_samples), ("test", test_samples)):
        if n:
            images = getattr(dataset, part)
            dataset = replace(dataset, **{part: _take(images, class_balanced(images.labels.numpy(), n), scratch)})
    return dataset


def check_name(name: str) -> str:
    """The name itself. Raises ValueError where it is none that `load_dataset` knows."""
    if name not in DATASETS and not elsewhere.is_elsewhere(name):
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(sorted(DATASETS))}, or give "
                         f"{elsewhere.KINDS}")
    return name


def _from_elsewhere(name: str, data_dir: Path, download: bool, size: int) -> Dataset:
    """Pixels are normalised by the training images' mean and deviation (of 10,000 at most, evenly spread). Crops move
    by an eighth of a side."""
    own, files, decode = elsewhere.source(name, data_dir, download, size)
    arrays = cached(data_dir / CACHE, own, files, decode)
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3] or images.shape[2] < 2:
            raise ValueError(f"{name}: {part} has images of shape {images.shape[1:]}, which should be square, with 1 "
                             "or 3 channels first or last")
        if images.shape[1:] != arrays["train_images"].shape[1:] or labels.min() < 0:
            raise ValueError(f"{name}: {part} has images of shape {images.shape[1:]}, train "
                             f"{arrays['train_images'].shape[1:]}, and classes from {labels.min()}: they begin with 0")
    parts, classes = _image_sets(arrays), int(max(arrays[f"{part}_labels"].max() for part in ("train", "test"))) + 1
    if classes > MOST_CLASSES:
        raise ValueError(f"{name}: its classes go up to {classes - 1}; at most {MOST_CLASSES} are known to make sense")
    mean, std = _mean_and_deviation(parts["train"].images[:: max(1, len(parts["train"]) // 10_000)])
    return Dataset(name, **parts, num_classes=classes, mean=tuple(mean.tolist()), std=tuple(std.tolist()),
                   flip=elsewhere.are_mirrored(name), padding=parts["train"].images.shape[-1] // 8)


MOST_CLASSES = 100_000


def _mean_and_deviation(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each channel of uint8 images (n, C, H, W), as if from 0 to 1, the deviation at least one step of 255.

    A part of the images at a time: as floating numbers all may be more than the memory holds.
    """
    count = images[:, 0].numel()
    total, squares = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in images.split(max(1, 2**22 // images[0].numel())):
        x = part.double()
        total += x.sum((0, 2, 3))  # whole numbers: exact
        squares += x.square().sum((0, 2, 3))
    deviation = ((squares - total.square() / count) / max(count - 1, 1)).clamp(min=0).sqrt()
    return total / count / 255, deviation.clamp(min=1) / 255


def _hold_out(dataset: Dataset, n: int, scratch: Path) -> Dataset:
    count = len(dataset.train)
    if n >= count:
        raise ValueError(f"cannot hold out {n} images: {dataset.name} has {count} to train on")
    held = np.zeros(count, dtype=bool)
    held[count - 1 - class_balanced(dataset.train.labels.numpy()[::-1], n)] = True
    return replace(dataset, train=_take(dataset.train, ~held, scratch),
                   test=_take(dataset.train, held, scratch))


def _take(images: ImageSet, chosen: np.ndarray, scratch: Path) -> ImageSet:
    """chosen: indices, or a truth value for each image. scratch: see `room`."""
    chosen = torch.from_numpy(np.flatnonzero(chosen) if chosen.dtype == bool else chosen)
    taken = torch.from_numpy(room((len(chosen), *images.images.shape[1:]), scratch))
    return ImageSet(torch.index_select(images.images, 0, chosen, out=taken), images.labels[chosen])


def class_balanced(labels: np.ndarray, n: int, seed: int | torch.Generator | None = None) -> np.ndarray:
    """Sorted indices of n samples (0, or more than there are: all), as many of each class as can be.

    seed: an int or a generator draws them at random; None takes the first of every class. Class counts differ by at
    most one unless a class runs out. Raises ValueError for a negative n.
    """
    labels = np.asarray(labels)
    if n < 0:
        raise ValueError(f"cannot take {n} samples: give a positive number, or 0 for all of them")
    if n == 0 or n >= len(labels):
        return np.arange(len(labels))
    if isinstance(seed, int):
        seed = generator(seed, purpose="class_balanced")
    order = np.arange(len(labels)) if seed is None else torch.randperm(len(labels), generator=seed).numpy()
    # Take every class's first sample, then every class's second, and so on until there are n.
    turn = np.lexsort((labels[order], rank_in_class(labels[order])))
    return np.sort(order[turn[:n]])


def rank_in_class(labels: np.ndarray) -> np.ndarray:
    """For every sample, how many of its class come before it."""
    by_class = np.argsort(labels, kind="stable")
    _, start, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - np.repeat(start, count)
    return ranks


def some_images(images: ImageSet, parts: Sequence[np.ndarray], agent: int | None, n: int,
                seed: torch.Generator) -> np.ndarray:
    """Indices of n (0, or more than there are: all) of an agent's images, or (None) of all agents' together.

    All agents' are drawn class-balanced; an agent's own simply at random, so that what is estimated on them is of the
    classes that it has, as often as it has them. `parts`: each agent's indices into `images`.
    """
    candidates = np.sort(np.concatenate(parts)) if agent is None else parts[agent]
    if not 0 < n < len(candidates):
        return candidates
    if agent is None:
        return candidates[class_balanced(images.labels[candidates].cpu().numpy(), n, seed)]
    return candidates[np.sort(torch.randperm(len(candidates), generator=seed)[:n].numpy())]


# ---- the cache -----------------------------------------------------------------------------------

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
DIGEST = "digest"  # of the arrays, in a file beside them
Arrays = dict[str, np.ndarray]
CACHE_FORMAT = 2  # part of every fingerprint: raise it when decoding changes


def fingerprint(files: Iterable[Path]) -> str:
    """A digest of the files' paths, sizes and modification times; raises FileNotFoundError when one is missing."""
    digest = hashlib.sha256(str(CACHE_FORMAT).encode())
    for file in files:
        stat = os.stat(file)
        digest.update(os.fsencode(file) + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def cached(cache: Path, name: str, files: Callable[[], list[Path]], decode: Callable[[], Arrays]) -> Arrays:
    """The arrays of `decode()`, memory-mapped from `<cache>/<name>-<fingerprint of files()>/` once they are there.

    files: lists the source files, or raises FileNotFoundError while `decode` has yet to fetch them.
    One process builds while the others wait for it. When nothing can be written, the arrays just stay in memory.
    """

    def key() -> str:
        return f"{name}-{fingerprint(files())}"

    with contextlib.suppress(OSError, ValueError):  # no source, no cache, or a damaged one: go the long way
        return _read(cache / key())
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(cache / f"{name}.lock"))
        except OSError as error:
            warnings.warn(f"{name}: decoded in memory, since {cache} cannot be written ({error})", stacklevel=2)
            return decode()
        found = None
        with contextlib.suppress(OSError, ValueError):
            found = key()  # before decoding: a source that changes meanwhile must not pass for the decoded one
            return _read(cache / found)  # another process has built it
        arrays = decode()
        try:
            found = found or key()
            _write(cache, name, found, arrays)
            return _read(cache / found)
        except (OSError, ValueError) as error:
            warnings.warn(f"{name}: kept in memory, since {cache} cannot be written ({error})", stacklevel=2)
            return arrays


def _read(folder: Path) -> Arrays:
    """The arrays in `folder`. Raises OSError or ValueError when they aren't what was written there."""
    try:
        arrays = {name: _map(folder / f"{name}.npy") for name in ARRAYS}
        sound = _digest(arrays) == read_text(folder / DIGEST)
    except Exception as error:  # numpy raises half a dozen types for a damaged file
        raise ValueError(f"{folder} is damaged: {error}") from error
    if not sound:
        raise ValueError(f"{folder} is damaged: its arrays aren't those that were written")
    return arrays


def _map(file: Path) -> np.ndarray:
    # Copy-on-write: pages are read when needed, and torch gets the writable memory that it asks for.
    open_regular(file).close()  # no pipe, which would be waited for
    return np.load(file, mmap_mode="c", allow_pickle=False)


def _digest(arrays: Arrays) -> str:
    """A digest of the arrays' types, shapes and labels. Pixels stay unread: a slice of the images is quick to load."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        if name.endswith("labels"):
            digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _write(cache: Path, name: str, key: str, arrays: Arrays) -> None:
    """Move a finished folder to `cache/key`, then drop what older sources or killed builds left. Needs the lock."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{name}-tmp-", dir=cache))
    try:
        for array_name in ARRAYS:
            write_atomically(temporary / f"{array_name}.npy",
                             lambda file, array=arrays[array_name]: np.save(file, array))
        save_text(temporary / DIGEST, _digest(arrays))
        temporary.chmod(0o755)  # mkdtemp's folders are private; the cache may serve a group
        shutil.rmtree(cache / key, ignore_errors=True)  # only there when it is damaged
        os.replace(temporary, cache / key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for other in cache.glob(f"{name}-*"):
        if other.name != key:
            shutil.rmtree(other, ignore_errors=True)


def _image_sets(arrays: Arrays) -> dict[str, ImageSet]:
    tensors = {name: torch.from_numpy(arrays[name]) for name in ARRAYS}
    return {
        "train": ImageSet(tensors["train_images"], tensors["train_labels"]),
        "test": ImageSet(tensors["test_images"], tensors["test_labels"]),
    }


@contextlib.contextmanager
def _impatient(seconds: float = 30) -> Iterator[None]:
    """Let a download give up where packets vanish; without this it hangs for minutes per address."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ---- the data sets -------------------------------------------------------------------------------


@register_dataset("digits", folder=False)
def digits(data_dir: Path, imgntdir: Path | None, download: bool) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; every fifth of each class is a test image."""
    pixels, classes = _sklearn_digits()
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(classes.astype(np.int64))
    test = torch.from_numpy(rank_in_class(classes) % 5 == 4)
    return Dataset(
        "digits",
        train=ImageSet(images[~test], labels[~test]),
        test=ImageSet(images[test], labels[test]),
        num_classes=10,
        mean=(0.305,),
        std=(0.376,),
        flip=False,
        padding=1,
    )


def _sklearn_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (n x 8 x 8, 0 to 16) and classes, from the file in the package: to import it would take seconds."""
    package = find_spec("sklearn")
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz" if package and package.origin else None
    if file is None or not file.is_file():
        from sklearn.datasets import load_digits

        bunch = load_digits()
        return bunch.images, bunch.target
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)


def _torchvision(kind: str) -> type:
    """torchvision's data set of that name, imported for those who want it: that takes longer than all the rest."""
    from torchvision import datasets

    return getattr(datasets, kind)


def _torchvision_arrays(
    name: str, kind: type, data_dir: Path, download: bool, folder: Path, files: list[str], archive: str
) -> Arrays:
    """Arrays of a torchvision data set whose `files` torchvision looks for in `folder`.

    torchvision unpickles CIFAR's files only once their md5 sums are right; MNIST's it takes as they are.
    """

    def read(part: str, **fetch: bool) -> Arrays:
        split = kind(str(data_dir), train=part == "train", **fetch)
        images, labels = np.asarray(split.data), np.asarray(split.targets, dtype=np.int64)
        # MNIST's kind is n x H x W, CIFAR's n x H x W x C.
        images = images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        if images.dtype != np.uint8 or images.shape[1:] not in ((1, 28, 28), (3, 32, 32)):
            raise ValueError(f"{part}: images of type {images.dtype} and shape {images.shape[1:]}")
        if not 0 < len(images) == len(labels):
            raise ValueError(f"{part}: {len(images)} images, but {len(labels)} labels")
        if labels.min() < 0 or labels.max() >= len(split.classes):
            raise ValueError(f"{part}: labels go from {labels.min()} to {labels.max()}")
        return {f"{part}_images": images, f"{part}_labels": labels}

    def read_or_fetch(part: str) -> Arrays:
        try:
            return read(part)
        except Exception as error:  # torchvision raises a dozen types for a damaged file
            reason = error
        if download:
            try:
                with _impatient():
                    return read(part, download=True)
            except Exception as error:
                reason = error
        raise FileNotFoundError(
            f"{name}: not found or damaged in {folder}, and {'the download failed' if download else 'not downloaded'}"
            f" ({' '.join(str(reason).split()) or type(reason).__name__}): put {', '.join(files)} there ({archive}), "
            "or name the folder above with --data_dir"
        )

    if not download and not folder.is_dir():
        read_or_fetch("train")  # says what is missing, before a cache folder is made
    return cached(data_dir / CACHE, name, lambda: [folder / file for file in files],
                  lambda: read_or_fetch("train") | read_or_fetch("test"))


def _mnist_arrays(name: str, data_dir: Path, download: bool) -> Arrays:
    kind = _torchvision({"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name])
    raw = data_dir / kind.__name__ / "raw"
    files = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    archive = f"from the .gz files of the same names, at {kind.mirrors[0]}"
    return _torchvision_arrays(name, kind, data_dir, download, raw, files, archive)


def _cifar_arrays(name: str, data_dir: Path, download: bool) -> Arrays:
    kind = _torchvision(name.upper())
    files = [file for file, _ in kind.train_list + kind.test_list] + [kind.meta["filename"]]
    archive = f"unpacked from {kind.url}"
    return _torchvision_arrays(name, kind, data_dir, download, data_dir / kind.base_folder, files, archive)


@register_dataset("mnist", folder=False)
def mnist(data_dir: Path, imgntdir: Path | None, download: bool) -> Dataset:
    """70,000 handwritten digits, 28x28 grey."""
    parts = _image_sets(_mnist_arrays("mnist", data_dir, download))
    return Dataset("mnist", **parts, num_classes=10, mean=(0.1307,), std=(0.3081,), flip=False, padding=2)


@register_dataset("fashion_mnist", folder=False)
def fashion_mnist(data_dir: Path, imgntdir: Path | None, download: bool) -> Dataset:
    """70,000 pieces of clothing, 28x28 grey."""
    parts = _image_sets(_mnist_arrays("fashion_mnist", data_dir, download))
    return Dataset("fashion_mnist", **parts, num_classes=10, mean=(0.2860,), std=(0.3530,), flip=True, padding=2)


@register_dataset("cifar10", folder=False)
def cifar10(data_dir: Path, imgntdir: Path | None, download: bool) -> Dataset:
    """60,000 images of 10 classes, 32x32 RGB."""
    parts = _image_sets(_cifar_arrays("cifar10", data_dir, download))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return Dataset("cifar10", **parts, num_classes=10, mean=mean, std=std, flip=True, padding=4)


@register_dataset("cifar100", folder=False)
def cifar100(data_dir: Path, imgntdir: Path | None, download: bool) -> Dataset:
    """60,000 images of 100 classes, 32x32 RGB."""
    parts = _image_sets(_cifar_arrays("cifar100", data_dir, download))
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    return Dataset("cifar100", **parts, num_classes=100, mean=mean, std=std, flip=True, padding=4)


TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@register_dataset("tinyimgnt")
def tinyimgnt(data_dir: Path, imgntdir: Path | None, download: bool) -> Dataset:
    """A folder in Tiny ImageNet's layout, with any number of classes and images of one size.

    `train/<class>/images/*`, `val/images/*` and `val/val_annotations.txt` (image, tab, class, tab, ...); the classes
    and their order come from `wnids.txt` (one a line) or, without it, are the sorted folders of `train`. Both files are
    UTF-8, or UTF-16 with its mark. Images become RGB: grey ones are repeated, transparency is dropped, 16 bits are
    scaled to 8. Hidden files (._x.png, .DS_Store) are passed over; whatever else is left out, a warning counts.
    Raises FileNotFoundError for what is missing, ValueError for what can't be read and for images of different sizes.
    """
    root = imgntdir or data_dir / "tiny-imagenet-200"
    if not root.exists():
        _fetch_tiny(root, download)

    def files() -> list[Path]:
        (train, _), (val, _) = _list_tiny(root)
        return [*root.glob("wnids.txt"), root / "val" / "val_annotations.txt", *train, *val]

    def decode() -> Arrays:
        arrays = {}
        train, val = _list_tiny(root)
        for part, (paths, labels) in (("train", train), ("test", val)):
            images = _decode_images(paths, train[0][0], part, data_dir / CACHE)
            arrays |= {f"{part}_images": images, f"{part}_labels": np.array(labels, np.int64)}
        return arrays

    # Folders of the same layout do not evict each other.
    name = "tinyimgnt-" + hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
    parts = _image_sets(cached(data_dir / CACHE, name, files, decode))
    classes = int(parts["train"].labels.max()) + 1
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    return Dataset("tinyimgnt", **parts, num_classes=classes, mean=mean, std=std, flip=True, padding=0)


def _list_tiny(root: Path) -> list[tuple[list[Path], list[int]]]:
    """Image paths and labels of the training and of the validation set; warns of what is left out."""
    wnids, annotations = root / "wnids.txt", root / "val" / "val_annotations.txt"
    for needed in (root / "train", annotations):
        if not needed.exists():
            raise FileNotFoundError(
                f"tinyimgnt: {needed} is missing: --imgntdir must be a folder in Tiny ImageNet's layout "
                "(train/<class>/images, val/images, val/val_annotations.txt)"
            )
    folders = [entry.name for entry in _visible(root / "train") if entry.is_dir()]
    listed = [line.strip() for line in _lines(wnids)] if wnids.exists() else folders
    label_of = {name: label for label, name in enumerate(dict.fromkeys(filter(None, listed)))}
    if not label_of:
        raise FileNotFoundError(f"tinyimgnt: no class in {wnids if wnids.exists() else root / 'train'}")

    train: tuple[list[Path], list[int]] = ([], [])
    no_images: list[Path] = []
    for name, label in label_of.items():
        folder = root / "train" / name / "images"
        entries = _visible(folder)
        paths = [entry for entry in entries if _is_image(entry)]
        if not paths:
            edit = f"edit {wnids}, which names one class a line" if wnids.exists() else "remove the folder"
            raise FileNotFoundError(f"tinyimgnt: no images of class {name} in {folder}: add them, or {edit}")
        train[0].extend(paths)
        train[1].extend([label] * len(paths))
        no_images.extend(entry for entry in entries if not _is_image(entry))

    class_of = _read_annotations(annotations, root / "val" / "images")
    val = {path: label_of[name] for path, name in class_of.items() if name in label_of}
    if not val:
        raise FileNotFoundError(f"tinyimgnt: {annotations} names no image of the classes in {root / 'train'}")

    for left_out, what in (
        ([root / "train" / name for name in folders if name not in label_of], f"classes that {wnids} doesn't name"),
        (no_images, f"training files that are not {', '.join(SUFFIXES)}"),
        ([path for path in class_of if path not in val], "validation images of other classes"),
        ([path for path in _visible(root / "val" / "images") if _is_image(path) and path not in class_of],
         f"validation images that {annotations} doesn't name"),
    ):
        if left_out:
            warnings.warn(f"tinyimgnt: left out {len(left_out)} {what}, such as {left_out[0]}", stacklevel=1)
    return [train, (list(val), list(val.values()))]


SUFFIXES = (".jpeg", ".jpg", ".png")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without what the desktops and editors of all systems hide there."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _lines(file: Path) -> list[str]:
    """The lines of a text in UTF-8, or in UTF-16 where its byte-order mark says so."""
    with open_regular(file) as opened:
        content = opened.read()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it has zero bytes")
    except ValueError as error:
        raise ValueError(f"tinyimgnt: {file} is no text in UTF-8 ({error}): save it as such") from None
    return text.splitlines()


def _read_annotations(file: Path, folder: Path) -> dict[Path, str]:
    """The class of each image of `folder`, from lines of image and class, split at tabs (or blanks, without a tab)."""
    class_of: dict[Path, str] = {}
    for number, line in enumerate(_lines(file), start=1):
        fields = [field.strip() for field in (line.split("\t") if "\t" in line else line.split())]
        if not any(fields):
            continue
        if len(fields) < 2 or not all(fields[:2]):
            raise ValueError(f"tinyimgnt: {file}, line {number}: {line.strip()!r} has no class beside its image")
        image, name = fields[:2]
        before = class_of.setdefault(folder / image, name)
        if before != name:
            raise ValueError(f"tinyimgnt: {file}, line {number}: {image!r} is of class {name}, but was of {before}")
    return class_of


def _decode_images(paths: list[Path], pattern: Path, part: str, scratch: Path) -> np.ndarray:
    """Images of the pattern's size as uint8 (n, 3, H, W)."""
    with decoding("tinyimgnt", pattern) as image:
        width, height = image.size
    if width != height:
        raise ValueError(f"tinyimgnt: {pattern} is {width}x{height}: make all images square")
    return decode_all(paths, width, part, partial(_decode, pattern=pattern, side=width), scratch)


def _decode(path: Path, pattern: Path, side: int) -> np.ndarray:
    """An image as uint8 (3, side, side)."""
    with decoding("tinyimgnt", path) as image:
        width, height = image.size
        if width == height == side:  # known before anything is decoded
            return pixels(image)
    raise ValueError(
        f"tinyimgnt: {path} is {width}x{height}, {pattern} is {side}x{side}: resize them to one size")


def _fetch_tiny(root: Path, download: bool) -> None:
    """Download Tiny ImageNet to the folder `root`, which appears when it is complete."""
    reason: Exception | str = "not downloaded"
    if download:
        from torchvision.datasets.utils import download_url, extract_archive  # as in _torchvision

        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            with lock(root.parent / f".{root.name}.lock"), _impatient():
                if root.exists():  # another process was faster
                    return
                download_url(TINY_URL, str(root.parent), md5=TINY_MD5)
                with tempfile.TemporaryDirectory(dir=root.parent) as temporary:
                    extract_archive(str(root.parent / Path(TINY_URL).name), temporary)
                    os.replace(Path(temporary) / "tiny-imagenet-200", root)
            return
        except (OSError, RuntimeError, HTTPException) as error:
            reason = f"the download failed: {error}"
    raise FileNotFoundError(
        f"tinyimgnt: no folder {root} ({reason}): unpack {TINY_URL} there, "
        "or name a folder in its layout with --imgntdir"
    )
