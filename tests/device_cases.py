"""What trains, compares, merges and mixes models does it where they are: on a device that the machine lacks, which
refuses what a GPU would refuse and counts what a GPU would wait for."""

import inspect
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from benchmarks.iteration import agents_of, evaluated, iterate
from data.batches import Batches
from data.datasets import Dataset, ImageSet
from merging import METHODS
from merging.averaging import ROBUST
from models import build_model, training
from models.registry import MODELS
from network.wire import WIRES, through
from optimizers import BASELINES
from optimizers.corrections import CORRECTIONS
from tests.pretend import CAN_BE, Device, pretend
from utils.seeds import generator

pytestmark = pytest.mark.skipif(not CAN_BE, reason="this PyTorch can't register a device in Python")
BATCH, AGENTS = 8, 3
ALL = ["--dataset=digits", f"--num_models={AGENTS}", f"--batch_size={BATCH}", "--randominit", "--topology=ring",
       "--model=small"]
MAIN = [*ALL, "--training", "--epochs=1", "--match_samples=0", "--optim=sgd", "--lr=0.01"]


def mostly_long(names: Iterable, usual: object) -> list:
    """All of them, but `make test` takes the usual one only."""
    return [name if name == usual else pytest.param(name, marks=pytest.mark.long) for name in names]


class Small(nn.Module):
    """What the larger networks have, once: a shortcut around convolutions, BatchNorm, a layer without it."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv, self.group = nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.out = nn.Linear(6, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.out((x + self.group(self.conv(x)).relu()).mean((2, 3)))


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    def build(num_classes, in_channels=3, image_size=8, **_):
        return Small(num_classes, in_channels)

    monkeypatch.setitem(MODELS, "small", build)
    # Tensors of a class in Python can't be made in inference mode.
    monkeypatch.setattr(training, "evaluate", torch.no_grad()(inspect.unwrap(training.evaluate)))


def images(count: int) -> Dataset:
    """So many training images."""
    g = generator(0, purpose="images")

    def some(n: int) -> ImageSet:
        return ImageSet(torch.randint(256, (n, 3, 8, 8), generator=g).to(torch.uint8), torch.arange(n) % 4)

    half = (0.5, 0.5, 0.5)
    return Dataset("random", some(count), some(BATCH), 4, half, half, flip=True, padding=1)


def work(argv: list[str], device: torch.device | str, batches: int = 2, counts: Device | None = None) -> dict:
    """Two iterations of agents with so many batches each, and what they report. counts: then only of the second one."""
    agents = agents_of("main" if "--training" in argv else "base_lines", argv, images(AGENTS * batches * BATCH),
                       torch.device(device))
    for iteration in (1, 2):
        if counts:
            counts.waits.clear(), counts.uploads.clear()
        iterate(agents, iteration)
    return evaluated(agents, 2)


def does_as_on_a_cpu(argv: list[str], may_wait_at: str = "nowhere") -> None:
    """On the device it does what it does on the CPU, and waits no more often for more batches."""
    with pretend() as (device, counts):
        ours = work(argv, device, counts=counts)
        few = counts.waits.copy(), counts.uploads.copy()
        work(argv, device, 3, counts)
        for before, after in zip(few, (counts.waits, counts.uploads), strict=True):
            more = {line: count for line, count in (after - before).items() if may_wait_at not in line}
            assert not more, f"with more batches more often: {more}"
        for i, theirs in work(argv, "cpu").items():
            assert theirs["evaluation"].loss == pytest.approx(ours[i]["evaluation"].loss, rel=1e-2)
            for key, value in theirs["state"].items():
                torch.testing.assert_close(ours[i]["state"][key].cpu(), value, rtol=1e-2, atol=1e-3,
                                           msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("method", mostly_long(METHODS, "DIMAT"))
def test_merging_and_training(method):
    does_as_on_a_cpu([*MAIN, f"--opt={method}"])


@pytest.mark.parametrize("correction", mostly_long(CORRECTIONS, "LED"))
def test_a_correction(correction):
    does_as_on_a_cpu([*MAIN, "--opt=COMMON", f"--correction={correction}", "--wire=int8", "--loss=adjusted"])


@pytest.mark.long
@pytest.mark.parametrize("options", [["--match_data=local"], ["--match_at=last"], ["--match_prior=identity"],
                                     ["--bn_reset=repair"], ["--momentum=0.9"]])
def test_what_can_be_chosen(options):
    does_as_on_a_cpu([*MAIN, "--opt=DIMAT", *options])


@pytest.mark.long
@pytest.mark.parametrize("robust", [name for name in ROBUST if name != "none"])
def test_a_robust_average(robust):
    does_as_on_a_cpu([*MAIN, "--opt=WA", f"--robust={robust}", "--topology=fully_connected"])


@pytest.mark.parametrize("method", mostly_long(BASELINES, "SGP"))
def test_a_baseline(method):
    # CGA solves a small quadratic program in each step, on the host.
    does_as_on_a_cpu([*ALL, f"--opt={method}", "--epochs=2", "--num_epochs=1", "--eval_bn=all"],
                     may_wait_at="gram" if method == "CGA" else "nowhere")


@pytest.mark.long
@pytest.mark.parametrize("model", ["resnet20", "resnet20,group", "resnet20,evonorm"])
def test_our_models(model):
    name, _, norm = model.partition(",")
    does_as_on_a_cpu([*MAIN, "--opt=DIMAT", f"--model={name}", f"--norm={norm or 'batch'}", "--width_multiplier=1"])


@pytest.mark.parametrize("wire", WIRES)
def test_what_travels_is_the_same(wire):
    state = training.snapshot(build_model("resnet20", 4, width_multiplier=1, seed=0))
    with pretend() as (device, _):
        ours = {key: t.cpu() for key, t in through({key: t.to(device) for key, t in state.items()}, wire).items()}
    for key, value in through(state, wire).items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("most", [0, 10_000])
def test_images_that_the_device_has_no_room_for_come_batch_by_batch(most):
    dataset = images(20)  # 3,840 bytes of training images

    def batches(dataset: Dataset) -> list:
        return list(Batches(dataset, dataset.train, torch.arange(18).flip(0), 5, shuffle=True, augment=True,
                            make_generator=lambda: generator(0, purpose="order")))

    with pretend() as (device, counts):
        there = dataset.to(device, most)
        assert (there.train.images.device == device) == (most > 0) and there.train.labels.device == device
        counts.uploads.clear(), counts.waits.clear()
        found = [(x.cpu(), y.cpu()) for x, y in batches(there) if x.device == y.device == device]
        by_batches = sum(count for line, count in counts.uploads.items() if "non_blocking" in line)
    assert by_batches == (0 if most else 4)
    for (x, y), (their_x, their_y) in zip(found, batches(dataset), strict=True):
        torch.testing.assert_close(x, their_x)
        assert torch.equal(y, their_y)


# The device itself


def test_two_devices_may_not_meet():
    with pretend() as (device, _), pytest.raises(RuntimeError, match="two devices"):
        torch.ones(3, device=device) + torch.ones(3)


def test_a_number_may_come_from_the_cpu():
    with pretend() as (device, _):
        assert (torch.ones(3, device=device) + torch.tensor(1.0)).sum().item() == 6


def test_a_generator_draws_where_it_is():
    with pretend() as (device, _), pytest.raises(RuntimeError, match="generator"):
        torch.randint(3, (2,), device=device, generator=torch.Generator())


@pytest.mark.parametrize("look", [float, bool, torch.Tensor.item, torch.Tensor.cpu,
                                  lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: torch.equal(x, x)])
def test_a_look_at_a_value_is_a_wait(look):
    with pretend() as (device, counts):
        look(torch.ones(1, device=device))
    assert counts.waits.total() >= 1


def test_a_wait_in_a_loop_over_batches_is_seen(monkeypatch):
    usual = training.train_epoch

    def waiting(model, batches, *rest):
        return usual(model, ((x, y) for x, y in batches if float(x.sum()) < 1e9), *rest)

    monkeypatch.setattr(training, "train_epoch", waiting)
    with pytest.raises(AssertionError, match="with more batches"):
        does_as_on_a_cpu([*MAIN, "--opt=WA"])
