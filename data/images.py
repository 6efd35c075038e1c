"""Image files to pixels, for every data set that decodes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from storage.files import open_regular
from utils.progress import progress


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


def decode_all(files: Sequence[Path], side: int, part: str, decode: Callable[[Path], np.ndarray]) -> np.ndarray:
    """uint8 (n, 3, side, side), on a few threads: Pillow decodes outside the lock."""
    images = np.empty((len(files), 3, side, side), dtype=np.uint8)
    with ThreadPoolExecutor() as pool:
        for k, image in enumerate(progress(pool.map(decode, files), f"decoding {part} images", len(files), "image")):
            images[k] = image
    return images
