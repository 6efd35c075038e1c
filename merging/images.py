"""Images in a folder, for a merge without an experiment. Needs pillow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")


@dataclass(frozen=True)
class Folder:
    """Batches (images, classes) of the image files below a folder, decoded anew in every pass.

    files, labels: of every image; where there are no classes, labels are -1. size: pixels on a side, to which images
    are scaled. mean, std: by channel, of pixels from 0 to 1; one of them each for grey images.
    """

    files: Sequence[Path]
    labels: Sequence[int]
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    batch_size: int = 100

    @property
    def has_classes(self) -> bool:
        return min(self.labels) >= 0

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.files), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield torch.stack([self._read(file) for file in self.files[part]]), torch.tensor(self.labels[part])

    def _read(self, file: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("L" if len(self.mean) == 1 else "RGB").resize(
                    (self.size, self.size), Image.Resampling.BILINEAR), dtype=np.float32)
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} can't be read as an image: {error}") from None
        pixels = torch.from_numpy(pixels.reshape(self.size, self.size, -1) / 255).permute(2, 0, 1)
        shape = (-1, 1, 1)
        return (pixels - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)


def folder(path: Path, size: int, mean: Sequence[float], std: Sequence[float], samples: int = 0) -> Folder:
    """The images below `path`. Its folders are the classes, 0, 1, ... in the order of their names, where every image
    is in one of them; samples: take only so many, evenly spread over all (0: all of them).

    Raises ValueError where there are none.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder of images")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
                   and not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise ValueError(f"{path} holds no image ({', '.join(SUFFIXES)})")
    if samples and samples < len(files):
        files = [files[k] for k in np.linspace(0, len(files) - 1, samples).round().astype(int)]
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    classes = {name: k for k, name in enumerate(names)}
    within = [file.relative_to(path).parts for file in files]
    labels = [classes[parts[0]] if len(parts) > 1 else -1 for parts in within]
    return Folder(files, labels if min(labels) >= 0 else [-1] * len(files), size, tuple(mean), tuple(std))
