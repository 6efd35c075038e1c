"""Image files to pixels, for every data set that decodes them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from storage.files import open_regular
from utils.memory import usable_memory
from utils.progress import progress

CACHE = ".cache"  # the folder in the data's for what was decoded


@contextlib.contextmanager
def decoding(name: str, file: Path) -> Iterator[Image.Image]:
    """The image in a file of data set `name`; what fails while it is open is a ValueError that names both."""
    with open_regular(file) as opened:
        try:
            with Image.open(opened) as image:
                yield image
        except Exception as error:  # Pillow raises half a dozen types for a broken file
            raise ValueError(f"{name}: {file} can't be decoded: {' '.join(str(error).split())}") from None


def rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel: grey images are repeated, transparency is dropped, 16 bits are scaled."""
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts everything above 255 off
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel: convert it to 8")
    return image.convert("RGB")


def pixels(image: Image.Image) -> np.ndarray:
    """uint8 (3, H, W)."""
    return np.asarray(rgb(image)).transpose(2, 0, 1)


def decode_all(files: Sequence[Path], side: int, part: str, decode: Callable[[Path], np.ndarray],
               scratch: Path) -> np.ndarray:
    """uint8 (n, 3, side, side), on a few threads: Pillow decodes outside the lock. scratch: see `room`."""
    images = room((len(files), 3, side, side), scratch)

    def put(k: int) -> None:  # by the thread that decoded it: others would run ahead of one that waits for a disk
        images[k] = decode(files[k])

    with ThreadPoolExecutor() as pool:
        for _ in progress(pool.map(put, range(len(files))), f"decoding {part} images", len(files), "image"):
            pass
    return images


class NoRoom(ValueError):
    """There is neither memory nor disk for the images."""


def room(shape: tuple[int, ...], scratch: Path) -> np.ndarray:
    """uint8, for images: in memory or, where they would take more than half of that, in a file in the folder `scratch`
    that has no name and is gone with the array.

    Raises NoRoom where neither has room for it.
    """
    size, there = math.prod(shape), usable_memory()
    if size <= there / 2:
        return np.empty(shape, np.uint8)
    said = f"decoded they take {size / 2**30:,.1f} GiB, there are {there / 2**30:,.1f} of memory"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=scratch) as file:
            # All of it at once: written page by page, a full disk would kill the process.
            getattr(os, "posix_fallocate", lambda number, start, length: os.ftruncate(number, length))(
                file.fileno(), 0, size)
            return np.memmap(file, np.uint8, "r+", shape=shape)
    except OSError as error:
        raise NoRoom(f"{said}, and {scratch} has no room for it ({error.strerror or error})") from error


def will_read(tensor: torch.Tensor, rows: torch.Tensor) -> None:
    """Ask the system to fetch these rows of a contiguous tensor, which lies in a mapped file, in the background.

    Without that they come page by page, each when it is touched: 44,000 images of 48 KiB, of which half lay in memory,
    took 250 s in random order on a disk, and 5 s so. Does nothing where the system can't be asked.
    """
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    advise, size = ctypes.CDLL(None).madvise, tensor[0].nbytes
    for row in rows.tolist():
        start = tensor.data_ptr() + row * size
        begin = start // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(start + size - begin), mmap.MADV_WILLNEED)
