"""Data sets by what their name says: a folder of images, arrays in a file, torchvision's classification sets."""

from __future__ import annotations

import inspect
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data.images import CACHE, NoRoom, decode_all, decoding, pixels, rgb, room
from storage.files import open_regular
from utils.memory import usable_memory
from utils.progress import progress
from utils.seeds import generator

Arrays = dict[str, np.ndarray]
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
FOLDER, TV, NPZ = "folder:", "tv:", ".npz"
KINDS = f"{FOLDER}PATH, {TV}NAME, FILE{NPZ}"
PARTS = ("train", "test")


def is_elsewhere(name: str) -> bool:
    return name.startswith((FOLDER, TV)) or name.endswith(NPZ)


def source(name: str, data_dir: Path, download: bool, size: int) -> tuple[str, Callable, Callable[[], Arrays]]:
    """What `cached` wants of such a name: a name of its own, what lists the files, and what decodes them.

    size: pixels on a side, to which images are scaled and cropped (0: they are as they should be).
    Raises FileNotFoundError or ValueError for what can be known to be wrong before anything is decoded.
    """
    if name.startswith(TV):
        return f"tv-{name.removeprefix(TV)}-{size}", list, partial(_torchvision, name, data_dir, download, size)
    place = Path(name.removeprefix(FOLDER))
    own = f"{'folder' if name.startswith(FOLDER) else 'npz'}-{sha256(os.fsencode(place.resolve())).hexdigest()[:8]}"
    if name.startswith(FOLDER):
        lists = _listed(name, place)
        return f"{own}-{size}", lambda: [file for files, _ in lists.values() for file in files], partial(
            _decode_all, name, lists, size, data_dir / CACHE)
    if not place.is_file():
        raise FileNotFoundError(f"{name}: there is no such file")
    return own, lambda: [place], partial(_npz, name, place)


# A folder of images


def _listed(name: str, root: Path) -> dict[str, tuple[list[Path], list[int]]]:
    """Part -> its image files and their classes: train/<class>/* and val/<class>/* or test/<class>/*; where there is no
    such folder, <class>/*, of which a fifth of each class, drawn with seed 0, is for testing."""
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: there is no such folder")
    test = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if (root / "train").is_dir() and test is None:
        raise FileNotFoundError(f"{name}: beside {root / 'train'} there is neither a folder test nor val")
    if not (root / "train").is_dir():
        classes = _classes(name, root)
        files = [(file, k) for k, folder in enumerate(classes.values()) for file in _images(folder)]
        chance = torch.rand(len(files), generator=generator(0, purpose="folder")).tolist()
        rank = {}
        for k in range(len(classes)):
            of_class = sorted((chance[n], n) for n, (_, label) in enumerate(files) if label == k)
            rank |= {n: place < len(of_class) // 5 for place, (_, n) in enumerate(of_class)}
        return {part: ([file for n, (file, _) in enumerate(files) if rank[n] == (part == "test")],
                       [label for n, (_, label) in enumerate(files) if rank[n] == (part == "test")]) for part in PARTS}
    classes = list(_classes(name, root / "train"))
    lists = {}
    for part, folder in (("train", root / "train"), ("test", test)):
        found = _classes(name, folder)
        if odd := sorted(found.keys() ^ classes):
            raise ValueError(f"{name}: the class {odd[0]!r} is in only one of {root / 'train'} and {test}")
        pairs = [(file, k) for k, label in enumerate(classes) for file in _images(found[label])]
        lists[part] = [file for file, _ in pairs], [k for _, k in pairs]
    return lists


def _classes(name: str, root: Path) -> dict[str, Path]:
    """Class -> its folder, by name. Raises ValueError where one has no image, or there are fewer than two."""
    folders = {entry.name: entry for entry in sorted(root.iterdir()) if entry.is_dir() and entry.name[0] != "."}
    if len(folders) < 2:
        raise ValueError(f"{name}: {root} needs a folder of images for each of two or more classes; it has "
                         f"{', '.join(folders) or 'none'}")
    if empty := next((folder for folder in folders.values() if not _images(folder)), None):
        raise ValueError(f"{name}: there are no images in {empty} ({', '.join(SUFFIXES)})")
    return folders


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.name[0] != ".")


def _decode_all(name: str, lists: dict[str, tuple[list[Path], list[int]]], size: int, scratch: Path) -> Arrays:
    arrays, side = {}, size
    if not size:
        with decoding(name, lists["train"][0][0]) as image:
            side = min(image.size)
    for part, (files, labels) in lists.items():
        arrays |= {f"{part}_images": decode_all(files, side, part, partial(_decode, name, side, bool(size)), scratch),
                   f"{part}_labels": np.array(labels, np.int64)}
    return arrays


def _decode(name: str, side: int, scaled: bool, file: Path) -> np.ndarray:
    """uint8 (3, side, side)."""
    with decoding(name, file) as image:
        width, height = image.size
        if scaled or width == height == side:
            return _fitted(image, side)
    raise ValueError(f"{name}: {file} is {width}x{height}, another is {side} wide or high: give --image_size, to which "
                     "all are scaled and cropped")


def _fitted(image: Image.Image, side: int) -> np.ndarray:
    if image.size != (side, side):
        image = ImageOps.fit(rgb(image), (side, side), Image.Resampling.BILINEAR)
    return pixels(image)


# Arrays in a file


def _npz(name: str, file: Path) -> Arrays:
    """x_train, y_train, x_test and y_test: uint8 images (n, H, W), (n, H, W, C) or (n, C, H, W), and whole numbers.
    `flip` may lie beside them: see `are_mirrored`."""
    wanted = [f"{kind}_{part}" for part in PARTS for kind in "xy"]
    with open_regular(file) as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                _must_fit(name, sum(entry.file_size for entry in archive.infolist()))
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as content:
                if missing := [key for key in wanted if key not in content]:
                    raise ValueError(f"it has no {missing[0]}: it must hold {', '.join(wanted)}")
                found = {key: content[key] for key in wanted}
        except Exception as error:  # numpy and zipfile raise half a dozen types for a damaged file
            raise ValueError(f"{name} can't be read: {' '.join(str(error).split())}") from None
    arrays = {}
    for part in PARTS:
        images, labels = found[f"x_{part}"], found[f"y_{part}"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise ValueError(f"{name}: x_{part} is {images.dtype} of shape {images.shape}: give uint8 (n, H, W), "
                             "(n, H, W, C) or (n, C, H, W)")
        if labels.dtype.kind not in "iu" or labels.reshape(-1).shape != images.shape[:1] or not len(images):
            raise ValueError(f"{name}: y_{part} is {labels.dtype} of shape {labels.shape}: give a whole number for "
                             f"each of {len(images)} images, of which there must be one")
        images = images[:, None] if images.ndim == 3 else images
        if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        arrays |= {f"{part}_images": images, f"{part}_labels": labels.reshape(-1).astype(np.int64)}
    return arrays


def are_mirrored(name: str) -> bool:
    """Whether a mirrored image is still of its class: one of a folder, and one of a file that holds a true `flip`. What
    else there is may be read from left to right."""
    if not name.endswith(NPZ) or name.startswith((FOLDER, TV)):
        return name.startswith(FOLDER)
    with open_regular(Path(name)) as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                if "flip.npy" not in archive.namelist():
                    return False
                if archive.getinfo("flip.npy").file_size > 1000:
                    raise ValueError("flip is not one number")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as content:
                flip = content["flip"]
                if flip.size != 1 or flip.dtype.kind not in "biu":
                    raise ValueError(f"flip is {flip.dtype} of shape {flip.shape}: give True or False")
                return bool(flip.item())
        except Exception as error:  # see above
            raise ValueError(f"{name} can't be read: {' '.join(str(error).split())}") from None


# torchvision's


def tv_names() -> list[str]:
    """torchvision's image classification sets, as far as their signatures tell which images are for what."""
    from torchvision import datasets

    def told_alike(kind: type) -> bool:
        parameters = inspect.signature(kind).parameters
        required = [p for p in parameters.values() if p.default is p.empty
                    and p.name not in ("root", "split", "kwargs")]
        return ("train" in parameters or "split" in parameters) and not required

    kinds = {name: getattr(datasets, name) for name in datasets.__all__}
    return sorted(name for name, kind in kinds.items() if inspect.isclass(kind) and told_alike(kind)
                  and name not in NO_CLASSES and not kind.__module__.endswith(("_optical_flow", "_stereo_matching")))


# What the signatures don't tell: sets whose targets are boxes, masks, attributes, points or texts.
NO_CLASSES = {"CelebA", "Cityscapes", "CocoCaptions", "CocoDetection", "HMDB51", "Kitti", "Kinetics", "LFWPairs",
              "LFWPeople", "MovingMNIST", "PhotoTour", "Places365", "SBDataset", "SBU", "UCF101", "VOCDetection",
              "VOCSegmentation", "WIDERFace"}


def _torchvision(name: str, data_dir: Path, download: bool, size: int) -> Arrays:
    from torchvision import datasets

    if (kind := name.removeprefix(TV)) not in (able := tv_names()):
        raise ValueError(f"torchvision has no classification set {kind!r} that can be told: {', '.join(able)}")
    make = getattr(datasets, kind)
    parameters = inspect.signature(make).parameters
    arrays = {}
    for part in PARTS:
        ways = [{"split": word} for word in ((part,) if part == "train" else ("test", "val"))]
        if "train" in parameters:  # EMNIST has both: its `split` says of which classes
            ways = [{"train": part == "train"} | ({"split": "balanced"} if "split" in parameters else {})]
        try:
            arrays |= _stacked(part, _made(make, data_dir, ways, download and "download" in parameters), size,
                               data_dir / CACHE)
        except NoRoom:
            raise
        except Exception as error:  # torchvision raises a dozen types
            raise FileNotFoundError(f"{name}: not found or damaged in {data_dir}"
                                    f"{'' if download else ', and not downloaded'}: {' '.join(str(error).split())}"
                                    ) from None
    return arrays


def _made(make: type, data_dir: Path, ways: Sequence[dict], download: bool) -> Sequence:
    """The data set, in the first of these ways that works. What is there is not fetched."""
    failure: Exception | None = None
    for more in ({}, {"download": True}) if download else ({},):
        for chosen in ways:
            try:
                return make(str(data_dir), **chosen, **more)
            except Exception as error:
                failure = failure if isinstance(failure, RuntimeError) else error
    raise failure


def _stacked(part: str, images: Sequence, size: int, scratch: Path) -> Arrays:
    def pairs() -> Iterator[tuple[np.ndarray, int]]:
        for k in progress(range(len(images)), f"decoding {part} images", len(images), "image"):
            image, label = images[k]
            grey = image.mode == "L" and not size
            if not size and image.width != image.height:
                raise ValueError(f"image {k} of {part} is {image.width}x{image.height}: give --image_size")
            yield (np.asarray(image)[None] if grey else _fitted(image, size or image.width)), int(label)

    if not len(images):
        raise ValueError(f"there are no images of {part} in it")
    pixels, labels = np.empty(0), []
    for k, (image, label) in enumerate(pairs()):
        pixels = pixels if k else room((len(images), *image.shape), scratch)
        if image.shape != pixels.shape[1:]:
            raise ValueError("its images have several sizes: give --image_size, to which all are scaled and cropped")
        pixels[k] = image
        labels.append(label)
    return {f"{part}_images": pixels, f"{part}_labels": np.array(labels, np.int64)}


def _must_fit(name: str, size: int) -> None:
    if size > (there := usable_memory()) / 2:
        raise ValueError(f"{name}: decoded it takes {size / 2**30:,.1f} GiB, there are {there / 2**30:,.1f} of memory, "
                         "of which half is needed besides: give its images as a folder")
