"""Architectures: sizes, state-dict keys, tracing, initialisation, and what they cannot take."""

import pytest
import torch
from torch import nn

from models import MODELS, build_model, infer_width, model_builder, register_model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def logits_shape(model: nn.Module, channels: int, size: int) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(model(torch.randn(2, channels, size, size)).shape)


def same_state(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(
    ("name", "channels", "size", "width"),
    [
        ("resnet20", 1, 8, 1),
        ("resnet20", 3, 32, 2),
        ("resnet20", 3, 33, 1),
        ("vgg16", 3, 32, 1),
        ("vgg16", 1, 64, 2),
        ("vgg16", 3, 33, 3),
        ("resnet50", 1, 8, 1),
        ("resnet50", 3, 64, 8),
        ("tv:densenet121", 1, 32, 1),
        ("tv:mobilenet_v2", 2, 8, 1),
        ("tv:squeezenet1_1", 3, 32, 1),
        ("tv:vit_b_32", 3, 32, 1),
        ("tv:googlenet", 3, 32, 1),
    ],
)
def test_images_become_logits(name, channels, size, width):
    model = build_model(name, 7, in_channels=channels, image_size=size, width_multiplier=width)
    assert model.training
    assert logits_shape(model, channels, size) == (2, 7)


@pytest.mark.parametrize(("name", "size"), [("resnet20", 8), ("vgg16", 32), ("resnet50", 32)])
def test_our_architectures_can_be_traced(name, size):
    model = build_model(name, 5, image_size=size, width_multiplier=1).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images), rtol=0, atol=0)


def test_resnet20_of_width_8_has_the_papers_size():
    assert parameters(build_model("resnet20", 100)) == pytest.approx(18.65e6, rel=5e-4)


def test_resnet20_keys_and_shapes():
    state = build_model("resnet20", 10, width_multiplier=2).state_dict()
    batch_norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = ["conv1.weight", *(f"bn1.{name}" for name in batch_norm), "linear.weight", "linear.bias"]
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            shortcut = [("shortcut.0", "shortcut.1")] if stage > 1 and block == 0 else []
            for conv, norm in [("conv1", "bn1"), ("conv2", "bn2"), *shortcut]:
                prefix = f"layer{stage}.{block}"
                expected += [f"{prefix}.{conv}.weight", *(f"{prefix}.{norm}.{name}" for name in batch_norm)]
    assert set(state) == set(expected)
    assert state["conv1.weight"].shape == (32, 3, 3, 3)
    assert state["layer2.0.shortcut.0.weight"].shape == (64, 32, 3, 3)
    assert state["linear.weight"].shape == (10, 128)


def test_vgg16_keys_and_widths():
    model = build_model("vgg16", 10, image_size=64)
    convolutions = [module.out_channels for module in model.features if isinstance(module, nn.Conv2d)]
    assert convolutions == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.features) == 13
    assert model.classifier.in_features == 512 * 2 * 2
    assert {key.split(".")[0] for key in model.state_dict()} == {"features", "classifier"}
    assert build_model("vgg16", 10, width_multiplier=1).features[0].out_channels == 8


def test_resnet50_has_torchvisions_keys():
    from torchvision.models import resnet50

    state, theirs = build_model("resnet50", 10).state_dict(), resnet50().state_dict()
    assert list(state) == list(theirs)
    assert {key for key in state if state[key].shape != theirs[key].shape} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("name", ["resnet20", "tv:mobilenet_v3_small"])
def test_a_seed_fixes_the_initialisation_and_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    one, same, other = (build_model(name, 4, width_multiplier=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same_state(one, same)
    assert not same_state(one, other)


def test_without_a_seed_models_follow_the_global_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        one, other = build_model("resnet20", 4, width_multiplier=1), build_model("resnet20", 4, width_multiplier=1)
        assert not same_state(one, other)
        torch.manual_seed(5)
        assert same_state(one, build_model("resnet20", 4, width_multiplier=1))


@pytest.mark.parametrize(
    ("name", "width", "inferred"),
    [("resnet20", 3, 3), ("vgg16", 2, 2), ("resnet50", 4, None), ("tv:squeezenet1_1", 4, None)],
)
def test_the_width_is_read_from_a_state_dict(name, width, inferred):
    state = build_model(name, 10, in_channels=1, width_multiplier=width).state_dict()
    before = torch.get_rng_state()
    assert infer_width(name, state) == inferred
    assert torch.equal(torch.get_rng_state(), before)


def test_the_width_of_another_architecture_is_refused():
    state = build_model("vgg16", 10, width_multiplier=1).state_dict()
    with pytest.raises(ValueError, match="not a state dict of resnet20"):
        infer_width("resnet20", state)


@pytest.mark.parametrize(
    ("name", "size", "needed"),
    [
        ("vgg16", 8, "at least 32x32"),
        ("tv:alexnet", 32, "at least 63x63"),
        ("tv:densenet121", 8, "at least 29x29"),
        ("tv:inception_v3", 64, "at least 75x75"),
        ("tv:vit_b_16", 40, "a multiple of 16"),
        ("tv:maxvit_t", 64, "a multiple of 224"),
    ],
)
def test_too_small_images_name_the_size_that_is_needed(name, size, needed):
    with pytest.raises(ValueError, match=rf"needs images .*{needed}.*these are {size}x{size}"):
        build_model(name, 10, image_size=size)


def test_the_size_named_is_the_smallest_that_works():
    assert logits_shape(build_model("tv:densenet121", 3, image_size=29), 3, 29) == (2, 3)


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match=r"unknown model 'resnet21'.*resnet20, resnet50, vgg16.*tv:"):
        build_model("resnet21", 10)
    with pytest.raises(ValueError, match=r"no classification model 'resnet21'.*densenet121.*resnet18"):
        model_builder("tv:resnet21")
    with pytest.raises(ValueError, match="no classification model 'fasterrcnn_resnet50_fpn'"):
        model_builder("tv:fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize("option", ["num_classes", "in_channels", "image_size", "width_multiplier"])
def test_counts_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} is 0"):
        build_model(**{"name": "resnet20", "num_classes": 10, option: 0})


def test_a_model_is_one_function_with_one_decorator(monkeypatch):
    monkeypatch.delitem(MODELS, "tiny", raising=False)

    @register_model("tiny")
    def build_tiny(num_classes, *, in_channels, image_size, width_multiplier):
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))

    try:
        assert logits_shape(build_model("tiny", 3, in_channels=1, image_size=4), 1, 4) == (2, 3)
        with pytest.raises(ValueError, match="registered twice"):
            register_model("tiny")(build_tiny)
    finally:
        del MODELS["tiny"]
