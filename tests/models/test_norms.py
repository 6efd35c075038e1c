"""Norms that don't depend on the other images of a batch, and merging models that have them."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from merging import merge
from merging.batch_norm import reestimate
from merging.permutation import derive_spec, identity, permute, random_permutations
from merging.tracing.verification import verify
from models import MODELS, NORMS, build_model, register_model
from models.norms import EvoNorm

SIZES = {"resnet20": 8, "vgg16": 32}
WITHOUT_BATCH_NORM = list(itertools.product(SIZES, ("group", "evonorm")))


def model_of(name: str, norm: str, seed: int = 0, width: int = 1) -> nn.Module:
    model = build_model(name, 4, in_channels=1, image_size=SIZES[name], width_multiplier=width, norm=norm, seed=seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:  # gains and biases that are not all alike
                draws = torch.Generator().manual_seed(len(key) + seed)
                parameter += 0.2 * torch.randn(parameter.shape, generator=draws)
                if norm == "group" and key.endswith("bias"):
                    parameter += 2  # so that no unit is dead
    return model


def images(name: str, count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(1))


def test_evonorm_is_its_formula():
    norm = EvoNorm(4).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(4))
    x = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    y = norm(x)
    for image, channel in itertools.product(range(3), range(4)):
        group = x[image, :2] if channel < 2 else x[image, 2:]
        mean = group.sum() / group.numel()
        variance = ((group - mean) ** 2).sum() / group.numel()
        own = x[image, channel]
        swish = own / (1 + torch.exp(-norm.v[channel] * own))
        expected = swish / (variance + 1e-5).sqrt() * norm.weight[channel] + norm.bias[channel]
        torch.testing.assert_close(y[image, channel], expected)
    with pytest.raises(ValueError, match="5 channels don't fall into 2 groups"):
        EvoNorm(5)


@pytest.mark.parametrize(("name", "norm"), WITHOUT_BATCH_NORM)
def test_what_an_image_gives_does_not_depend_on_the_others(name, norm):
    model, x = model_of(name, norm).train(), images(name)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]))
    batch_norm = model_of(name, "batch").train()
    with torch.no_grad():
        assert not torch.allclose(batch_norm(x)[2:3], batch_norm(x[2:4])[:1], atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_the_scripts_layout_changes_nothing(norm):
    model, x = model_of("resnet20", norm).eval(), images("resnet20")
    fast = model_of("resnet20", norm).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fast(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "evonorm"])
def test_models_learn_with_them(norm):
    model = build_model("resnet20", 4, in_channels=1, image_size=8, width_multiplier=1, norm=norm, seed=0)
    y = torch.arange(16) % 4
    x = 4 * (images("resnet20", 4)[y] - 0.5) + images("resnet20", 16)
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.003), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_paper_width_has_whole_groups_too():
    with torch.device("meta"):
        for name, norm in WITHOUT_BATCH_NORM:
            build_model(name, 10, image_size=32, width_multiplier=8, norm=norm)
        assert isinstance(build_model("resnet50", 10, norm="group").bn1, nn.GroupNorm)


def test_a_model_without_a_choice_refuses_all_but_batch():
    with pytest.raises(ValueError, match=r"--norm group: tv:resnet18 has the norms .* resnet20, resnet50, vgg16"):
        build_model("tv:resnet18", 10, norm="group")
    with pytest.raises(ValueError, match="--norm evonorm: resnet50 has batch and group"):
        build_model("resnet50", 10, norm="evonorm")
    with pytest.raises(ValueError, match="unknown norm 'layer': choose from batch, group, evonorm"):
        build_model("resnet20", 10, norm="layer")

    @register_model("plain")
    def plain(num_classes, *, in_channels, image_size, width_multiplier):
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))

    try:
        build_model("plain", 10)
        with pytest.raises(ValueError, match="--norm group: plain has the norms that it is built with"):
            build_model("plain", 10, norm="group")
    finally:
        del MODELS["plain"]


# Merging them


@pytest.mark.parametrize(("name", "norm"), WITHOUT_BATCH_NORM)
def test_units_stay_within_their_normalised_groups(name, norm):
    model, x = model_of(name, norm).eval(), images(name)
    spec = derive_spec(model, x)
    batch = derive_spec(model_of(name, "batch").eval(), x)
    assert spec.fixed.keys() == batch.fixed.keys() and len(spec.fixed) == 1  # the classes alone
    assert [spec.sizes[group] for group in batch.sizes] == [*batch.sizes.values()]  # nothing else got stuck
    assert {spec.sizes[blocks] for blocks in spec.blocks.values()} == {2}
    assert spec.blocks.keys() == batch.sizes.keys()
    assert verify(model, spec, x) < 1e-9
    assert not any("var" in read.layer for reads in spec.reads.values() for read in reads)


@pytest.mark.parametrize(("name", "norm"), WITHOUT_BATCH_NORM)
def test_channels_that_change_groups_would_change_the_function(name, norm):
    """So it is not for nothing that the groups hold them."""
    model, x = model_of(name, norm).eval().double(), images(name).double()
    spec = derive_spec(model, x)
    loose, across = dataclasses.replace(spec, blocks={}), identity(spec)
    inner = next(iter(spec.blocks))
    across[inner] = across[inner].roll(1)  # the first of each group goes where the last of the other was
    with torch.no_grad():
        before = model(x)
        model.load_state_dict(permute(loose, across, model.state_dict()))
        assert not torch.allclose(model(x), before, rtol=1e-6)


@pytest.mark.parametrize("method", ["DIMAT", "WM"])
@pytest.mark.parametrize(("name", "norm"), WITHOUT_BATCH_NORM)
def test_merging_a_model_with_its_permuted_copy_gives_the_model(name, norm, method):
    model, other, x = model_of(name, norm).eval(), model_of(name, norm).eval(), images(name, 40)
    spec = derive_spec(model, x)
    moved = permute(spec, random_permutations(spec, torch.Generator().manual_seed(3)), model.state_dict())
    assert any(not torch.equal(moved[key], value) for key, value in model.state_dict().items())
    other.load_state_dict(moved)
    merged = merge([model, other], [[0.5, 0.5], [0, 1]], method=method, batches=[x], bn_reset="both", spec=spec)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(merged[0][key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("norm", ["group", "evonorm"])
def test_there_is_nothing_to_reestimate_and_no_image_is_read_for_it(norm):
    class Unread(list):
        def __iter__(self):
            raise AssertionError("an image is read")

    models = [model_of("resnet20", norm, seed).eval() for seed in (0, 1)]
    state = models[0].state_dict()
    assert reestimate(models[0], state, Unread([images("resnet20")])) is state
    for bn_reset in ("after", "both"):
        merged = merge(models, [[0.5, 0.5], [0.5, 0.5]], method="WA", batches=Unread([images("resnet20")]),
                       bn_reset=bn_reset)
        for key, value in merged[0].items():
            torch.testing.assert_close(value, (state[key] + models[1].state_dict()[key]) / 2)
