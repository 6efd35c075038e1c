"""Batches: order, normalisation, augmentation."""

import ctypes
import itertools
import mmap
import os
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batches import Batches, crop_and_flip
from data.datasets import Dataset, ImageSet
from data.images import will_read
from utils.seeds import generator


def make_dataset(n=23, size=6, channels=3, flip=True, padding=2):
    g = torch.Generator().manual_seed(0)
    # 1..255: black only comes from the padding
    images = torch.randint(1, 256, (n, channels, size, size), generator=g, dtype=torch.uint8)
    part = ImageSet(images, torch.arange(n))
    mean, std = (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.25)[:channels]
    return Dataset("toy", part, part, n, mean, std, flip, padding)


def normalised(dataset, images):
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    return (images / 255 - mean) / std


def gathered(batches):
    xs, ys = zip(*batches, strict=True)
    return torch.cat(xs), torch.cat(ys)


@pytest.mark.parametrize("indices", [None, np.array([7, 3, 3, 20]), torch.tensor([5])])
@pytest.mark.parametrize("batch_size", [1, 5, 23, 1000])
def test_plain_batches_are_the_normalised_images_in_order(indices, batch_size):
    dataset = make_dataset()
    batches = Batches(dataset, dataset.test, indices, batch_size)
    x, y = gathered(batches)
    expected = torch.arange(23) if indices is None else torch.as_tensor(indices)
    assert torch.equal(y, expected) and x.dtype == torch.float32
    torch.testing.assert_close(x, normalised(dataset, dataset.test.images[expected]))
    assert batches.num_samples == len(expected)
    sizes = [len(y) for _, y in batches]
    assert len(batches) == len(sizes) and set(sizes[:-1]) <= {batch_size} and sizes[-1] <= batch_size


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(10, [10, 10, 3]), (11, [11, 12]), (22, [23]), (23, [23]), (1, [1] * 23)]
)
def test_a_single_image_left_over_joins_the_batch_before(batch_size, sizes):
    batches = Batches(make_dataset(), make_dataset().train, None, batch_size)
    assert [len(x) for x, _ in batches] == sizes and len(batches) == len(sizes)


@pytest.mark.parametrize(("batch_size", "h"), [(4, 1), (4, 2), (4, 3), (4, 6), (4, 8), (11, 4), (30, 2)])
def test_the_parts_of_a_pass_make_up_the_pass(batch_size, h):
    dataset = make_dataset()

    def part_of(k: int, h: int) -> Batches:
        return Batches(dataset, dataset.train, None, batch_size, shuffle=True, augment=True, part=(k, h),
                       make_generator=lambda: generator(0, "a pass"))

    whole = [*part_of(0, 1)]
    parts = [[*part_of(k, h)] for k in range(h)]
    assert [len(part_of(k, h)) for k in range(h)] == [*map(len, parts)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for (x, y), (x_of_part, y_of_part) in zip(whole, itertools.chain(*parts), strict=True):
        assert torch.equal(x, x_of_part) and torch.equal(y, y_of_part)


def test_batches_have_the_layout_that_is_fast_here():
    x, _ = next(iter(Batches(make_dataset(), make_dataset().train, None, 5)))
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_shuffling_visits_every_sample_once_in_the_generators_order():
    dataset = make_dataset()
    x, y = gathered(Batches(dataset, dataset.train, None, 5, shuffle=True, make_generator=lambda: generator(1)))
    assert torch.equal(y, torch.randperm(23, generator=generator(1)))
    torch.testing.assert_close(x, normalised(dataset, dataset.train.images[y]))


def test_iterating_twice_gives_the_same_batches_and_touches_no_global_state():
    dataset = make_dataset()
    options = {"shuffle": True, "augment": True}
    batches = Batches(dataset, dataset.train, None, 4, make_generator=lambda: generator(2), **options)
    before, state = dataset.train.images.clone(), torch.get_rng_state()
    first, second = gathered(batches), gathered(batches)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(dataset.train.images, before) and torch.equal(torch.get_rng_state(), state)
    other = gathered(Batches(dataset, dataset.train, None, 4, make_generator=lambda: generator(3), **options))
    assert not torch.equal(first[1], other[1])


def test_a_generator_that_goes_on_gives_other_batches():
    dataset, g = make_dataset(), generator(0)
    batches = Batches(dataset, dataset.train, None, 4, shuffle=True, make_generator=lambda: g)
    assert not torch.equal(gathered(batches)[1], gathered(batches)[1])


def test_augmentation_does_not_depend_on_the_batch_size():
    dataset = make_dataset()
    (a, _), (b, _) = (
        gathered(Batches(dataset, dataset.train, None, size, augment=True, make_generator=lambda: generator(0)))
        for size in (3, 23)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(40, 1, 5, 5), (40, 3, 4, 7)])
def test_crop_and_flip_equals_a_loop_over_samples(shape, padding):
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, shape, generator=g, dtype=torch.uint8)
    offsets = torch.randint(2 * padding + 1, (shape[0], 2), generator=g)
    flips = torch.randint(2, (shape[0],), generator=g).bool()
    count, channels, height, width = shape
    expected = np.zeros(shape, dtype=np.uint8)
    for i in range(count):
        canvas = np.zeros((channels, height + 2 * padding, width + 2 * padding), dtype=np.uint8)
        canvas[:, padding : padding + height, padding : padding + width] = images[i].numpy()
        row, column = offsets[i].tolist()
        window = canvas[:, row : row + height, column : column + width]
        expected[i] = window[:, :, ::-1] if flips[i] else window
    np.testing.assert_array_equal(crop_and_flip(images, offsets, flips, padding).numpy(), expected)


def seen_changes(dataset, n):
    """How often each (row offset, column offset, flip) turns up among n copies of one image."""
    image = dataset.train.images[:1]
    copies = replace(dataset, train=ImageSet(image.expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.long)))
    x, _ = gathered(Batches(copies, copies.train, None, 100, augment=True, make_generator=lambda: generator(0)))
    steps = range(2 * dataset.padding + 1)
    seen = {}
    for row in steps:
        for column in steps:
            for flip in (False, True):
                one = crop_and_flip(image, torch.tensor([[row, column]]), torch.tensor([flip]), dataset.padding)
                same = torch.isclose(x, normalised(dataset, one), atol=1e-5).flatten(1).all(1)
                seen[row, column, flip] = int(same.sum())
    return seen


def test_every_sample_has_its_own_offset_and_flip_and_all_turn_up_equally():
    seen = seen_changes(make_dataset(padding=1), 3600)
    assert sum(seen.values()) == 3600 and len(seen) == 18
    assert all(140 < times < 260 for times in seen.values())  # 200 expected, four standard deviations


def test_no_flips_where_the_data_set_forbids_them():
    seen = seen_changes(make_dataset(flip=False, padding=1), 300)
    assert all((times > 0) != flip for (_, _, flip), times in seen.items())


def test_flips_only_without_padding():
    assert all(times > 100 for times in seen_changes(make_dataset(padding=0), 300).values())


def test_nothing_to_augment_changes_nothing():
    dataset = make_dataset(flip=False, padding=0)
    x, _ = gathered(Batches(dataset, dataset.train, None, 5, augment=True, make_generator=lambda: generator(0)))
    torch.testing.assert_close(x, normalised(dataset, dataset.train.images))


def test_errors_say_what_is_wrong():
    dataset = make_dataset()
    with pytest.raises(ValueError, match="batch size 0"):
        Batches(dataset, dataset.train, None, 0)
    with pytest.raises(ValueError, match="no images"):
        Batches(dataset, dataset.train, np.array([], dtype=np.int64), 5)
    for option in ("shuffle", "augment"):
        with pytest.raises(ValueError, match="make_generator"):
            Batches(dataset, dataset.train, None, 5, **{option: True})


def test_images_beyond_memory_are_asked_for_a_batch_ahead(monkeypatch):
    dataset, asked = make_dataset(), []
    how = dict(shuffle=True, augment=True, make_generator=lambda: generator(0, purpose="test"))
    expected = gathered(Batches(dataset, dataset.train, None, 5, **how))
    monkeypatch.setattr("data.batches.usable_memory", lambda: dataset.train.images.nbytes)
    monkeypatch.setattr("data.batches.will_read", lambda images, rows: asked.append(rows))
    found = Batches(dataset, dataset.train, None, 5, **how)
    for k, (_, y) in enumerate(found):
        assert torch.equal(asked[k], y) and len(asked) == min(k + 2, len(found))
    monkeypatch.undo()
    monkeypatch.setattr("data.batches.usable_memory", lambda: 1)
    assert all(torch.equal(a, b) for a, b in zip(gathered(found), expected, strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel which pages are in memory")
def test_rows_of_a_mapped_file_are_fetched_before_they_are_touched(tmp_path):
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.uint8, (64, 1 << 20))
    rows[:] = 7
    rows.flush()
    del rows
    with open(tmp_path / "rows.npy", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    tensor = torch.from_numpy(np.load(tmp_path / "rows.npy", mmap_mode="c"))

    def in_memory(row: int) -> float:
        start = -(-(tensor.data_ptr() + row * tensor.shape[1]) // mmap.PAGESIZE) * mmap.PAGESIZE
        found = (ctypes.c_ubyte * 200)()
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(200 * mmap.PAGESIZE), found)
        return sum(page & 1 for page in found) / 200

    if in_memory(5) or in_memory(50):
        pytest.skip("the file system keeps what it was told to forget")
    will_read(tensor, torch.tensor([50, 5, 63]))
    until = time.monotonic() + 20
    while min(map(in_memory, (5, 50))) < 0.9 and time.monotonic() < until:
        time.sleep(0.01)
    assert in_memory(5) > 0.9 and in_memory(50) > 0.9 and in_memory(30) < 0.5
