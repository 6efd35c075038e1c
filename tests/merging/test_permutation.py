"""Permutation groups: reordering them leaves the function alone, and leaving out any one tensor does not."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import convnext

from merging.activation_matching import match_activations
from merging.permutation import (
    FeatureReader,
    Member,
    UnsupportedOperation,
    derive_spec,
    describe,
    identity,
    invert,
    nest,
    permute,
    permute_tensor,
    random_permutations,
    spec_from_axes,
    verify,
)
from merging.tracing.watch import tensors_of
from merging.weight_matching import match_weights
from models import build_model
from tests.merging.networks import HIDDEN, Applied, Dense, Grouped, Plain, Residual, Split, Transformer


def torchvision_model(name):
    """On the meta device first: the usual initialisation takes longer than all the tests. VGG's hidden layers of 4096
    units are narrowed, for the same reason."""
    options = {"init_weights": False} if name in ("vgg16", "vgg16_bn", "googlenet", "inception_v3") else {}
    if name == "swin_t":  # half its width, a pair of blocks (one of them shifted) in each stage
        return torchvision.models.SwinTransformer([4, 4], 48, [2, 2, 2, 2], [3, 6, 12, 24], [7, 7], num_classes=10)
    if name.startswith(("regnet", "mnasnet")):
        return torchvision.models.get_model(name, num_classes=10)  # computes with its tensors
    with torch.device("meta"):
        if name == "vit_b_16":  # two of its twelve layers with a third of their hidden units, for small images
            return torchvision.models.VisionTransformer(32, 16, 2, 12, 768, 1024, num_classes=10).to_empty(device="cpu")
        if name == "convnext_tiny":  # 1, 1, 2, 1 of its 3, 3, 9, 3 blocks
            stages = zip((96, 192, 384, 768), (192, 384, 768, None), (1, 1, 2, 1), strict=True)
            return torchvision.models.ConvNeXt([convnext.CNBlockConfig(*stage) for stage in stages],
                                               num_classes=10).to_empty(device="cpu")
        if name in ("wide_resnet50_2", "resnext50_32x4d"):  # a block of each of their stages
            groups, width = (1, 128) if "wide" in name else (32, 4)
            block = torchvision.models.resnet.Bottleneck
            return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10, groups=groups,
                                             width_per_group=width).to_empty(device="cpu")
        model = torchvision.models.get_model(name, num_classes=10, **options)
        if "vgg" in name:
            model.classifier[0], model.classifier[3] = nn.Linear(512 * 49, 24), nn.Linear(24, 20)
            model.classifier[6] = nn.Linear(20, 10)
    return model.to_empty(device="cpu")


HOUSE = {
    "resnet20": lambda: build_model("resnet20", 10, width_multiplier=1),
    "vgg16": lambda: build_model("vgg16", 10, width_multiplier=1),
}
# How many units of each can move, within groups; from the architectures.
ZOO = {
    "resnet18": (64 + 128 + 256 + 512) * 3,
    "resnet50": 64 + (64 + 128 + 256 + 512) * 4 + 3 * 2 * 64 + 4 * 2 * 128 + 6 * 2 * 256 + 3 * 2 * 512,
    "wide_resnet50_2": 64 + (64 + 128 + 256 + 512) * (4 + 4),
    "resnext50_32x4d": 64 + (64 + 128 + 256 + 512) * (4 + 4),
    "vgg16_bn": 4224 + 44,
    "densenet121": None,
    "mobilenet_v2": None,
    "mobilenet_v3_small": None,
    "efficientnet_b0": None,
    "regnet_y_400mf": None,
    "convnext_tiny": 96 + 192 + 384 + 768 + 4 * (96 + 192 + 2 * 384 + 768),
    "squeezenet1_0": None,
    "shufflenet_v2_x0_5": None,
    "mnasnet0_5": None,
    "googlenet": None,
    "inception_v3": None,
    "vit_b_16": 768 + 2 * (2 * 768 + 1024),
    "swin_t": None,
}
QUICK = {"mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_0"}
NAMES = [*HIDDEN, *HOUSE, *(n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in ZOO)]


def network(name):
    return (HIDDEN[name][0] if name in HIDDEN else HOUSE.get(name, lambda: torchvision_model(name)))()


def inputs_of(name, batch, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    if name in ("Language", "Vocabulary"):
        return (torch.randint(11, (batch, 5), generator=generator),)
    size = 299 if name == "inception_v3" else 32
    shapes = HIDDEN[name][1] if name in HIDDEN else ((3, size, size),)
    return tuple(torch.randn(batch, *shape, dtype=dtype, generator=generator) for shape in shapes)


def prepare(model, inputs):
    """Random weights, BatchNorm calibrated by one training pass, then random affine and running statistics.

    A fresh network hides faults: its BatchNorm tensors are constant and its outputs tiny.
    """
    torch.manual_seed(0)
    model.double()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for p in model.parameters():
            p.normal_().mul_((2 / max(p[0].numel(), 1)) ** 0.5 if p.ndim > 1 else 0.3)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = 1.0
            norm.weight.fill_(1)
            norm.bias.zero_()
        if norms:
            model.train()(*inputs)
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_().mul_(0.3)
            norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.5 + torch.rand_like(norm.running_var)
    return model.eval()


def cycles(spec, seed=1):
    """Permutations that move every unit."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for group, size in spec.sizes.items():
        if group in spec.blocks:
            outer = result[spec.blocks[group]]
            result[group] = nest(outer, torch.stack([torch.randperm(size // len(outer), generator=generator)
                                                     for _ in outer]))
        else:
            order = torch.randperm(size, generator=generator)
            result[group] = torch.empty_like(order).scatter_(0, order, order.roll(1))
    return result


@torch.no_grad()
def outputs(model, state, inputs):
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])
    return torch.cat([y.flatten() for y in tensors_of(model(*inputs))])


def relative_error(model, state, inputs, expected):
    return float((outputs(model, state, inputs) - expected).norm() / expected.norm())


def case(name):
    # BatchNorm is calibrated on more than the two samples: the last maps are 1 x 1.
    inputs = inputs_of(name, 2 if name == "inception_v3" else 12)
    model, inputs = prepare(network(name), inputs), tuple(x[:2] for x in inputs)
    spec = derive_spec(model, inputs, check=False)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return model, spec, state, inputs


def movable(spec):
    """Units, those of blocks left out: what is in them counts."""
    return sum(size for group, size in spec.sizes.items() if group not in spec.blocks.values())


@pytest.mark.parametrize("name", NAMES)
def test_permuting_keeps_the_function_and_every_tensor_counts(name):
    model, spec, state, inputs = case(name)
    hidden = HIDDEN[name][2] if name in HIDDEN else ZOO.get(name) if name not in HOUSE else None
    assert hidden is None or movable(spec) == hidden, f"{dict(spec.sizes)}; fixed: {spec.fixed}"
    expected = outputs(model, state, inputs)
    permutations = cycles(spec)
    assert list(permutations) == list(spec.sizes) and list(spec.of_tensor) == list(state)
    assert all((p != torch.arange(len(p))).all() and len(p) > 1 for p in permutations.values())
    permuted = permute(spec, permutations, state)
    assert relative_error(model, permuted, inputs, expected) <= 1e-9

    # Auxiliary heads speak in training only; the bias of a saturated gate says little.
    members = [(group, member) for group in spec.sizes for member in spec.members[group]
               if "aux" not in member.tensor.lower() and not member.tensor.endswith("fc2.bias")]
    memory = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    if name not in HIDDEN:
        chosen = torch.randperm(len(members), generator=torch.Generator().manual_seed(3))[:6]
        members = [members[i] for i in chosen]
    for group, member in members:
        wrong = dict(permuted)
        for other in [key for key in memory if memory[key] == memory[member.tensor]]:  # all its names
            left_out = [(g, m) for g, m in spec.of_tensor[other] if (g, m.dims) != (group, member.dims)]
            wrong[other] = permute_tensor(state[other], left_out, permutations)
        error = relative_error(model, wrong, inputs, expected)
        assert error > 1e-6, f"{name}: {member.tensor} dims {member.dims} of group {group} makes no difference"
    assert_recovered(model, spec, state, inputs_of(name, 4 if name == "inception_v3" else 24))


def assert_recovered(model, spec, state, inputs):
    """Weight matching and DIMAT find the way back from a permuted copy; returns the permutations and DIMAT's."""
    permutations = random_permutations(spec, torch.Generator().manual_seed(5))
    moved = permute(spec, invert(permutations), state)
    found = match_weights(spec, state, moved)
    wrong = [group for group, p in permutations.items() if not torch.equal(found[group], p)]
    assert not wrong, f"weights: {len(wrong)} of {len(permutations)} groups"
    if len(inputs) == 1:
        found = match_activations(spec, model, [state, moved], [(0, 1)], [inputs[0]])[0, 1].permutations
        # Units that are dead on all images, or alike, may be confused: the outputs show whether any other was.
        expected = outputs(model, state, inputs)
        assert relative_error(model, permute(spec, found, moved), inputs, expected) < 1e-9
    return permutations, found


def test_auxiliary_heads_are_permuted_too():
    model, spec, state, inputs = case("Auxiliary")
    inputs = inputs_of("Auxiliary", 8)
    model.train()
    for norm in (model.stem[1], model.conv[1]):
        norm.eval()
    expected = outputs(model, state, inputs)
    assert len(expected) == 2 * 8 * 4
    assert relative_error(model, permute(spec, cycles(spec), state), inputs, expected) <= 1e-9


def test_the_structure_of_a_concatenation_and_of_a_flattened_map():
    spec = derive_spec(Dense(), torch.zeros(1, 3, 8, 8))
    columns = {group: [m.entries.tolist() for m in spec.members[group] if m.tensor == "fc.weight"]
               for group in spec.sizes}
    # The image's three channels come first, four columns for each channel.
    for group, start, units in (("first", 12, 4), ("conv1", 28, 5), ("conv2", 48, 6)):
        assert columns[group] == [torch.arange(start, start + 4 * units).reshape(units, 4).tolist()]
    assert [m.entries.flatten().tolist() for m in spec.members["first"] if m.tensor == "norm1.weight"] == [[3, 4, 5, 6]]
    assert spec.of_tensor["norm1.num_batches_tracked"] == []
    split = derive_spec(Split(), torch.zeros(1, 3, 8, 8))
    assert list(split.sizes) == ["whole[0:3]", "whole[3:7]"]
    assert {m.tensor for m in split.members["whole[3:7]"]} >= {"whole.weight", "right.weight", "end.weight"}


def test_heads_and_groups_of_channels_are_blocks():
    spec = derive_spec(Transformer(), torch.zeros(1, 3, 8, 8))
    (heads,) = set(spec.blocks.values())
    assert spec.sizes[heads] == 2 and not spec.members[heads]
    inside = [group for group, outer in spec.blocks.items() if outer == heads]
    assert [spec.sizes[group] for group in inside] == [8, 8]  # queries with keys, values
    together = [m.entries.shape for m in spec.members[inside[0]] if m.tensor == "attention.qkv.weight"]
    assert together == [(8, 2)]  # a query's row and a key's

    spec = derive_spec(Grouped(), torch.zeros(1, 3, 8, 8))
    (outer,) = set(spec.blocks.values())
    assert spec.sizes[outer] == 4 and [spec.sizes[group] for group in spec.blocks] == [12, 12]
    assert [m.blocks for group in spec.blocks for m in spec.members[group] if m.tensor == "grouped.0.weight"] == [4, 0]

    permutations = random_permutations(spec, torch.Generator().manual_seed(0))
    group = next(iter(spec.blocks))
    torn = permutations | {group: permutations[group].roll(1)}
    with pytest.raises(ValueError, match="leave the blocks of group"):
        permute(spec, torn, Grouped().state_dict())


def test_input_and_output_stay_and_are_listed():
    spec = derive_spec(Residual(), torch.zeros(1, 3, 8, 8))
    assert list(spec.fixed) == ["stem.0.weight dim 1", "fc"] and spec.fixed["fc"] == "the model's output"
    assert "holds no units" in spec.fixed["stem.0.weight dim 1"] or "hold no units" in spec.fixed["stem.0.weight dim 1"]
    headless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    assert list(derive_spec(headless, torch.zeros(1, 3, 8, 8)).sizes) == ["0"]


def test_derivation_leaves_the_model_alone():
    model = Residual().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    derive_spec(model, torch.randn(4, 3, 8, 8))
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_permuted_safely_is_fixed_and_listed():
    spec = derive_spec(Applied(lambda m, x: F.local_response_norm(x, 3)), torch.zeros(1, 3, 8, 8))
    assert not spec.sizes and "no rule for local_response_norm (test_permutation.py:" in spec.fixed["conv"]

    class BothWays(nn.Module):
        """One vector of eight: over the width here, over hidden units there."""

        def __init__(self, hidden_first):
            super().__init__()
            self.hidden_first = hidden_first
            self.conv, self.hidden, self.fc = nn.Conv2d(3, 5, 1), nn.Linear(3, 8), nn.Linear(13, 4)
            self.vector = nn.Parameter(torch.ones(8))

        def forward(self, x):
            if self.hidden_first:
                hidden, maps = self.hidden(x.mean((2, 3))) + self.vector, self.conv(x) + self.vector
            else:
                maps, hidden = self.conv(x) + self.vector, self.hidden(x.mean((2, 3))) + self.vector
            return self.fc(torch.cat([hidden, maps.amax((2, 3))], 1))

    for hidden_first in (True, False):
        spec = derive_spec(BothWays(hidden_first), torch.zeros(1, 3, 8, 8))
        assert list(spec.sizes) == ["conv"] and "hold no units in add" in spec.fixed["hidden"]

    class Buffered(Applied):
        """A constant per channel that is saved nowhere."""

        def __init__(self):
            super().__init__(lambda m, x: x * m.constant)
            self.register_buffer("constant", torch.rand(8, 1, 1), persistent=False)

    assert "hold no units in mul" in derive_spec(Buffered(), torch.zeros(1, 3, 8, 8)).fixed["conv"]

    class Dangling(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.dangling = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            self.dangling(x)
            return self.used(x)

    assert derive_spec(Dangling(), torch.zeros(1, 3, 8, 8)).fixed["dangling"] == "no layer reads it"


def test_arguments_that_a_rule_does_not_know_fix_what_goes_in(monkeypatch):
    from merging.tracing.rules import RULES

    monkeypatch.setitem(RULES, "relu", lambda trace, call, input: call.args[7])
    spec = derive_spec(Applied(lambda m, x: m.inner(x.relu()), inner=nn.Conv2d(8, 8, 1)), torch.zeros(1, 3, 8, 8))
    assert list(spec.sizes) == ["inner"] and "no rule for relu" in spec.fixed["conv"] and list(spec.stuck) == ["conv"]
    monkeypatch.setenv("DIMAT_DEBUG", "1")
    with pytest.raises(ValueError, match="tuple index out of range"):
        derive_spec(Applied(lambda m, x: x.relu()), torch.zeros(1, 3, 8, 8))


class ByNumber(nn.Module):
    """The second input says which unit of the first one's features counts."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, i):
        h = self.a(x)
        return self.c(self.b(h) + h.gather(1, torch.stack([i, (i + 1) % 8], 1)).sum(1, keepdim=True))


def test_units_picked_by_an_input_stay():
    for numbers in (torch.zeros(1, dtype=torch.long), torch.tensor([7])):
        spec = derive_spec(ByNumber(), (torch.zeros(1, 3), numbers))
        assert list(spec.sizes) == ["b"] and "picked by number in gather" in spec.fixed["a"]


def swish(x):
    return x * torch.sigmoid(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_what_cannot_be_seen_or_read_is_an_error():
    scripted = torch.jit.script(swish)
    with pytest.raises(UnsupportedOperation, match=r"made where it can't be seen, as in torch\.jit\.script"):
        derive_spec(Applied(lambda m, x: scripted(x) + x), torch.zeros(1, 3, 8, 8))

    class OneByOne(Applied):
        def forward(self, x):
            return self.fc(torch.cat([self.inner(F.relu(self.conv(one[None]))) for one in x]).mean((2, 3)))

    with pytest.raises(UnsupportedOperation, match="calls conv2d 4 times for two samples and 6 times for three"):
        derive_spec(OneByOne(None, inner=nn.Conv2d(8, 8, 1)), torch.zeros(1, 3, 8, 8))

    class TwoByTwo(Applied):
        def forward(self, x):
            return self.fc(torch.cat([self.inner(F.relu(self.conv(two))) for two in x.split(2)]).mean((2, 3)))

    with pytest.raises(UnsupportedOperation, match="calls conv2d 2 times for two samples and 4 times for three"):
        derive_spec(TwoByTwo(None, inner=nn.Conv2d(8, 8, 1)), torch.zeros(1, 3, 8, 8))


def test_buffers_that_the_network_replaces_lend_their_names_to_nothing():
    """They are gone then, and Python may give their ids to tensors that are made later."""
    class Replacing(Applied):
        def __init__(self):
            super().__init__(None)
            for n in range(100):
                self.register_buffer(f"cache{n}", torch.zeros(8, 1), persistent=False)

        def forward(self, x):
            kept = [self.conv(x)]
            for n in range(100):
                setattr(self, f"cache{n}", torch.ones(8, 1))
                kept.append(F.relu(kept[-1]))
            return self.fc(kept[-1].mean((2, 3)))

    spec = derive_spec(Replacing(), torch.zeros(1, 3, 8, 8))
    assert list(spec.sizes) == ["conv"] and not any("cache" in name for name in spec.fixed)


def test_outputs_in_objects_stay():
    class Outputs:
        def __init__(self, logits, hidden):
            self.logits, self.more = logits, {"hidden": [hidden]}

    class Model(Applied):
        def forward(self, x):
            x = self.conv(x)
            return Outputs(self.fc(x.mean((2, 3))), x)

    assert derive_spec(Model(None), torch.zeros(1, 3, 8, 8)).fixed["conv"] == "the model's output"


def test_hooks_take_part():
    model = Plain()
    model[4].register_forward_hook(lambda module, inputs, output: output * torch.arange(7.0)[:, None, None])
    spec = derive_spec(model, torch.zeros(1, 3, 8, 8))
    assert "4" not in spec.sizes and "hold no units in mul" in spec.fixed["4"] and "0" in spec.sizes


def test_errors_say_what_failed():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    example = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UnsupportedOperation, match=r"__bool__.*test_permutation\.py:\d+\) takes the values"):
        derive_spec(Applied(lambda m, x: m.gate(x), gate=Branching()), example)
    with pytest.raises(UnsupportedOperation, match=r"item.*takes the values"):
        derive_spec(Applied(lambda m, x: x * x.max().item()), example)
    with pytest.raises(ValueError, match=r"Applied fails on an example of shape \(1, 1, 8, 8\)"):
        derive_spec(Applied(lambda m, x: x), torch.zeros(1, 1, 8, 8))
    spec = derive_spec(Split(), example)
    state, permutations = Split().state_dict(), identity(spec)
    with pytest.raises(ValueError, match=r"group 'whole\[0:3\]': not a permutation of 3 units"):
        permute(spec, permutations | {"whole[0:3]": torch.tensor([0, 0, 1])}, state)
    with pytest.raises(ValueError, match="differ in their groups: other"):
        permute(spec, permutations | {"other": torch.arange(2)}, state)
    with pytest.raises(ValueError, match=r"differ in their tensors: extra"):
        permute(spec, permutations, state | {"extra": torch.zeros(1)})


def test_inverse_and_identity():
    for make in (Dense, Grouped):
        model = make()
        spec, state = derive_spec(model, torch.zeros(1, 3, 8, 8)), model.state_dict()
        permutations = random_permutations(spec, torch.Generator().manual_seed(0))
        there = permute(spec, permutations, state)
        back = permute(spec, invert(permutations), there)
        assert any(not torch.equal(there[name], state[name]) for name in state)
        for name, tensor in state.items():
            assert torch.equal(back[name], tensor)
            assert torch.equal(permute(spec, identity(spec), state)[name], tensor)
        again = random_permutations(spec, torch.Generator().manual_seed(0))
        assert all(torch.equal(again[group], p) for group, p in permutations.items())


# By hand, and checked


BY_HAND = {"0.weight": ("first", None, None, None), "1.weight": ("first",), "1.bias": ("first",),
           "1.running_mean": ("first",), "1.running_var": ("first",), "4.weight": ("second", "first", None, None),
           "5.weight": ("second",), "5.bias": ("second",), "5.running_mean": ("second",), "5.running_var": ("second",),
           "9.weight": ("second",), "9.bias": ("second",), "9.running_mean": ("second",), "9.running_var": ("second",),
           "11.weight": ("third", "second"), "11.bias": ("third",), "13.weight": (None, "third")}


def test_a_spec_by_hand_is_the_derived_one_and_is_verified():
    model, example = Plain(), torch.zeros(1, 3, 8, 8)
    spec, derived = spec_from_axes(model, BY_HAND, example=example), derive_spec(model, example)
    assert list(spec.sizes.values()) == list(derived.sizes.values())
    for mine, theirs in zip(spec.sizes, derived.sizes, strict=True):
        places = [{(m.tensor, m.dims, *m.entries.flatten().tolist()) for m in of[group]}
                  for of, group in ((spec.members, mine), (derived.members, theirs))]
        assert places[0] == places[1] and len(spec.reads[mine]) == len(derived.reads[theirs]) > 0

    with pytest.raises(ValueError, match="group 'first' changes the outputs"):
        spec_from_axes(model, {k: v for k, v in BY_HAND.items() if k != "1.bias"}, example=example)
    with pytest.raises(ValueError, match=r"no tensor '0\.weights'"):
        spec_from_axes(model, {"0.weights": (None,)}, example=example)
    with pytest.raises(ValueError, match="has 4 dimensions"):
        spec_from_axes(model, {"0.weight": ("first",)}, example=example)
    with pytest.raises(ValueError, match="7 entries for 6 units of 'first'"):
        spec_from_axes(model, BY_HAND | {"5.weight": ("first",)}, example=example)


@pytest.mark.parametrize("name", ["Grouped", "transformer", *(
    pytest.param(name, marks=pytest.mark.long) for name in ("Residual", "resnet20"))])
def test_verify_sees_every_missing_and_every_false_member(name):
    """The check that guards users must see what the tests see, on a fresh model too."""
    torch.manual_seed(0)
    model, example = network(name), tuple(x.float() for x in inputs_of(name, 1))
    spec = derive_spec(model, example, check=False)
    assert verify(model, spec, example) < 1e-9
    for group, members in spec.members.items():
        for member in members[:: 1 if name != "resnet20" else 7]:
            without = dataclasses.replace(spec, members=spec.members | {group: tuple(m for m in members
                                                                                     if m is not member)})
            with pytest.raises(ValueError, match="changes the outputs"):
                verify(model, without, example)
    group = next(iter(spec.members))
    (fc,) = (name for name in spec.tensors if name in ("fc.bias", "linear.bias"))
    false = Member(fc, (0,), torch.arange(4).reshape(-1, 1))
    with pytest.raises(ValueError, match="changes the outputs"):
        verify(model, dataclasses.replace(spec, sizes={"false": 4}, members={"false": (false,)}, blocks={}), example)
    assert group in spec.sizes


def test_a_wrong_derivation_is_an_error_not_a_merge(monkeypatch):
    from merging.tracing.rules import RULES

    monkeypatch.setitem(RULES, "cumsum", RULES["relu"])
    with pytest.raises(ValueError, match="changes the outputs"):
        derive_spec(Applied(lambda m, x: x.cumsum(1)), torch.zeros(1, 3, 8, 8))


# Features


def test_memory_is_known_by_more_than_its_address():
    """Only features that are written to in place after they were read need a copy: not those that are gone by then,
    whoever has their memory now, and not those that an activation in place has made."""
    convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(8))

    def forward(m, x):
        for conv in m.convs:
            x, before = conv(x).relu_(), x
        before.neg_()
        return x

    spec = derive_spec(Applied(forward, convs=convs), torch.zeros(1, 3, 8, 8))
    written = [read.written for reads in spec.reads.values() for read in reads]
    assert written == [False] * 7 + [True] + [False]


@pytest.mark.parametrize("at", ["last", "all"])
@pytest.mark.parametrize("name", [*HIDDEN, *HOUSE, "mobilenet_v2"])
def test_features_are_permuted_as_the_units_are(name, at):
    """With the model's whole state dict, for other batches than the spec was derived with, and both memory formats."""
    model, spec, state, _ = case(name)
    inputs = inputs_of(name, 5)
    reader = FeatureReader(model, spec, at)
    permutations = cycles(spec)
    plain, moved = reader(state, *inputs), reader(permute(spec, permutations, state), *inputs)
    last = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    channels_last = reader(state, *last)
    assert plain.keys() == spec.sizes.keys()
    for group, features in plain.items():
        reads = spec.reads[group]
        assert len(features) == (min(1, len(reads)) if at == "last" else len(reads))
        assert reads or group in spec.blocks.values() or name == "Auxiliary"
        for a, b, c in zip(features, moved[group], channels_last[group], strict=True):
            assert a.shape[1] == spec.sizes[group] and len(a) % 5 == 0 and a.std() > 0
            torch.testing.assert_close(a[:, permutations[group]], b, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-8)


def rows(x):
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def read(model, spec, at, x):
    return FeatureReader(model, spec, at)(model.state_dict(), x)


def test_features_are_read_where_the_paper_reads_them():
    """After the activation, at the last consumer's input, before a final pooling; what follows does not run."""
    x = torch.randn(2, 3, 8, 8)
    model = Residual().eval()
    spec = derive_spec(model, x)
    ran = []
    model.fc.register_forward_hook(lambda *_: ran.append("fc"))
    with torch.no_grad():
        features = read(model, spec, "last", x)
        stage1 = model.blocks[0](F.relu(model.stem(x)))
        stage2 = model.blocks[2](model.blocks[1](stage1))
        inside = F.relu(model.blocks[1].bn1(model.blocks[1].conv1(stage1)))
        assert not ran
    torch.testing.assert_close(features["stem.0"], [rows(stage1)])
    torch.testing.assert_close(features["blocks.1.conv2"], [rows(stage2)])
    torch.testing.assert_close(features["blocks.1.conv1"], [rows(inside)])
    with torch.no_grad():
        everywhere = read(model, spec, "all", x)["stem.0"]
        torch.testing.assert_close(everywhere, [rows(F.relu(model.stem(x))), rows(stage1)])  # the shortcut: no third
    with pytest.raises(ValueError, match="at='first': choose"):
        FeatureReader(model, spec, "first")
    with pytest.raises(ValueError, match=r"reads units in dimensions|takes another way"):
        read(model, derive_spec(Plain(), x), "last", x)


def test_features_of_heads_are_read_at_their_product():
    x, model = torch.randn(3, 3, 8, 8), Transformer().eval()
    spec = derive_spec(model, x)
    group = next(group for group, m in spec.members.items() if m and m[0].entries.shape == (8, 2))
    with torch.no_grad():
        features = read(model, spec, "all", x)[group]
        tokens = torch.cat([model.token.expand(3, -1, -1), model.patches(x).flatten(2).mT], 1) + model.positions
        q, k, _ = model.attention.qkv(model.norm1(tokens)).chunk(3, -1)
        torch.testing.assert_close(features, [q.reshape(-1, 8), k.reshape(-1, 8)])


def test_features_in_concatenations_in_runs_and_before_operations_in_place():
    x = torch.randn(2, 3, 8, 8)
    dense = Dense().eval()
    with torch.no_grad():
        before_pool = read(dense, derive_spec(dense, x), "last", x)
        first = dense.first(x)
    # A ReLU in place stands between the pool and the flattening, so the pooled map (2 x 2) is read, after the ReLU.
    torch.testing.assert_close(before_pool["first"], [rows(F.relu(F.adaptive_avg_pool2d(first, 2)))])

    plain = Plain().eval()
    with torch.no_grad():
        features = read(plain, derive_spec(plain, x), "last", x)
        columns = nn.Sequential(*list(plain)[:10])(x)
    torch.testing.assert_close(features["4"], [rows(columns.unflatten(1, (7, 4)))])

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.conv4 = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.conv1(x)
            y = self.conv2(x)
            x.relu_()
            y = y + self.conv3(x * 2)
            x.mul_(-3)
            return y + self.conv4(x)

    model = InPlace()
    channels_last = x.contiguous(memory_format=torch.channels_last)
    spec = derive_spec(model, x)
    with torch.no_grad():
        features = read(model, spec, "all", channels_last)["conv1"]
        before = rows(model.conv1(x))
    assert [r.layer for r in spec.reads["conv1"]] == ["conv2", "conv3", "conv4"]
    torch.testing.assert_close(features, [before, 2 * before.relu(), -3 * before.relu()])


CHANGES_IN_PLACE = {
    "method": lambda x: x.relu_(),
    "module": nn.ReLU(inplace=True),
    "keyword": lambda x: F.relu(x, inplace=True),
    "position": lambda x: F.relu(x, True),
    "function": lambda x: torch.relu_(x),
    "operator": lambda x: x.__imul__(2),
    "assignment": lambda x: x.__setitem__(slice(None), 2 * x) or x,
    "a view": None,  # below
}


@pytest.mark.parametrize("kind", CHANGES_IN_PLACE)
def test_what_was_read_stays_when_the_tensor_is_changed_in_place(kind):
    class ChangedLater(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.change = CHANGES_IN_PLACE[kind] if kind != "a view" else self.change_half

        @staticmethod
        def change_half(x):
            x[:, :2].relu_()
            return x

        def forward(self, x):
            x = self.conv1(x)
            y = self.conv2(x)
            return y + self.conv3(self.change(x) + 1)

    model, x = ChangedLater(), torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    spec = derive_spec(model, x)
    group = next(iter(spec.sizes))
    with torch.no_grad():
        first = read(model, spec, "all", x)[group][0]
        torch.testing.assert_close(first, rows(model.conv1(x)[:, : spec.sizes[group]]))


def test_a_description_names_blocks():
    spec = derive_spec(Grouped(), torch.zeros(1, 3, 8, 8))
    described = describe(spec)
    assert "reduce.0: 12 units in 4 blocks, those of blocks of reduce.0\n" in described and "within 4" in described


def test_features_in_memory_that_every_pass_writes_to_anew_are_the_models_own():
    scratch = nn.Module()
    memory = torch.zeros(5, 8, 4, 4).contiguous(memory_format=torch.channels_last)  # units last: to be read as it is
    scratch.register_buffer("memory", memory, persistent=False)
    model = Applied(lambda m, x: m.after(m.scratch.memory[: len(x)].copy_(x.relu())), scratch=scratch,
                    after=nn.Conv2d(8, 8, 1))
    spec = derive_spec(model, torch.zeros(2, 3, 4, 4))
    state = model.state_dict()
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    reader = FeatureReader(model, spec)
    (first,) = reader(state, x)["conv"]
    before = first.clone()
    reader(permute(spec, cycles(spec), state), x)
    assert torch.equal(first, before)


@pytest.mark.parametrize("activation", [torch.relu, torch.relu_])
def test_what_is_a_copy_of_the_example_may_be_a_view_of_the_images(activation):
    def forward(m, x):
        x = activation(x)
        out = m.second(x)
        z = x.contiguous(memory_format=torch.channels_last)  # x itself where the images have their channels last
        z.mul_(0.5)
        return out + m.third(z)

    model = Applied(forward, second=nn.Conv2d(8, 8, 1), third=nn.Conv2d(8, 8, 1))
    reader = FeatureReader(model, derive_spec(model, torch.zeros(2, 3, 6, 6)))
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    plain, last = (reader(model.state_dict(), x.contiguous(memory_format=layout))["conv"]
                   for layout in (torch.contiguous_format, torch.channels_last))
    for a, b in zip(plain, last, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_units_stay_where_an_input_says_where_they_are_parted():
    def forward(m, x, where):
        first, second = x.tensor_split(where, 1)
        return torch.cat([2 * first, second], 1)

    assert derive_spec(Applied(forward), (torch.zeros(2, 3, 4, 4), torch.tensor([4]))).sizes == {}
