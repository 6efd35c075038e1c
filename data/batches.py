"""Batches of normalised images, augmented a whole batch at a time where the images live."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.functional import pad

from data.datasets import Dataset, ImageSet
from data.images import will_read
from utils.memory import memory_format, usable_memory

WHOLE = (0, 1)  # the part of a pass that is all of it


class Batches:
    """Batches (x, y) of some images, on the device of their labels: x float32 (B, C, H, W), normalised by the data
    set's mean and std, y int64 (B,).

    x has the memory layout in which its device is fastest. Can be iterated many times. Every pass takes a fresh
    generator from `make_generator`, which decides the order (`shuffle`) and the augmentation (`augment`: each sample
    its own flip and crop, as far as the data set allows them), so that all passes are the same if all generators are.

    images: the data set's `train` or `test`; indices: which of them, in this order (None: all). The last batch may be
    smaller; a single image left over joins the batch before, as BatchNorm can't be trained on one. part: (k, h), of a
    pass only the k-th (0, ..., h - 1) of h runs of batches, as long as can be alike. Raises ValueError for a batch size
    below 1, no images, or chance without a generator.
    """

    def __init__(
        self,
        dataset: Dataset,
        images: ImageSet,
        indices: np.ndarray | torch.Tensor | None,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        make_generator: Callable[[], torch.Generator] | None = None,
        part: tuple[int, int] = WHOLE,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: it must be at least 1")
        if (shuffle or augment) and make_generator is None:
            raise ValueError("shuffling and augmentation need make_generator")
        device = images.labels.device
        self.images = images
        self.indices = (
            torch.arange(len(images), device=device) if indices is None else torch.as_tensor(indices, device=device)
        )
        if len(self.indices) == 0:
            raise ValueError("no images to make batches of")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment and (dataset.flip or dataset.padding > 0)
        self.flip, self.padding = dataset.flip, dataset.padding
        self.make_generator = make_generator
        self.part = part
        # (x / 255 - mean) / std as one product and one sum
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    @property
    def num_samples(self) -> int:
        return len(self.indices)

    def _bounds(self) -> list[int]:
        """Where this part's batches begin and end in the order of a pass."""
        bounds = [*range(0, self.num_samples, self.batch_size), self.num_samples]
        if len(bounds) > 2 and self.num_samples % self.batch_size == 1:
            del bounds[-2]
        (k, h), count = self.part, len(bounds) - 1
        return bounds[k * count // h : (k + 1) * count // h + 1]

    def __len__(self) -> int:
        return len(self._bounds()) - 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # All of a pass's chances are drawn at once, on the CPU: a pass on a GPU is the same, and copies once.
        n, device, far = self.num_samples, self.indices.device, self.images.images.device != self.indices.device
        generator = self.make_generator() if self.make_generator else None
        order = self.indices
        if self.shuffle:
            order = order[torch.randperm(n, generator=generator).to(device)]
        where = order.cpu() if far else order
        pixels = self.images.images
        mapped = pixels.device.type == "cpu" and pixels.is_contiguous() and pixels.nbytes > usable_memory() / 2
        if self.augment:
            offsets = torch.randint(2 * self.padding + 1, (n, 2), generator=generator).to(device)
            flips = torch.randint(1 + self.flip, (n,), generator=generator).bool().to(device)
        batches = [*itertools.starmap(slice, itertools.pairwise(self._bounds()))]
        for k, batch in enumerate(batches):
            for soon in batches[k + (k > 0) : k + 2] if mapped else ():  # the next one, while this is used
                will_read(pixels, where[soon])
            # index_select copies whole images, about ten times as fast on a CPU as images[chosen]
            x, y = pixels.index_select(0, where[batch]), self.images.labels.index_select(0, order[batch])
            if far:
                x = (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
            if self.augment:
                x = crop_and_flip(x, offsets[batch], flips[batch], self.padding)
            x = x.to(torch.float32, memory_format=memory_format(device))
            yield x.mul_(self.scale).add_(self.shift), y


def crop_and_flip(images: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor, padding: int) -> torch.Tensor:
    """Cut a window of the original size out of each black-padded image, and mirror some: one gather for the batch.

    images: (B, C, H, W); offsets: (B, 2), a window's first row and column, in 0..2 padding (padding, padding: the image
    itself); flips: (B,) bool. Returns (B, C, H, W).
    """
    count, channels, height, width = images.shape
    across = torch.arange(width, device=images.device)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - across, across)
    pixels = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, pixels.view(count, 1, -1).expand(-1, channels, -1)).view_as(images)
