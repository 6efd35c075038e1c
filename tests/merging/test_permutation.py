"""Permutation groups: reordering them leaves the function alone, and leaving out any one tensor does not."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.func import functional_call

from merging.permutation import (
    UnsupportedOperation,
    derive_spec,
    feature_reader,
    identity,
    invert,
    main,
    permute,
    permute_tensor,
    random_permutations,
)
from models import build_model


def conv_bn(inputs, outputs, kernel=3, **options):
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = conv_bn(inputs, outputs, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Residual(nn.Module):
    """Two stages, pooled by a function, viewed flat."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.blocks = nn.Sequential(Block(6, 6, 1), Block(6, 8, 2), Block(8, 8, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.blocks(F.relu(self.stem(x)))
        x = F.avg_pool2d(x, x.size(3))
        return self.fc(x.view(x.size(0), -1))


class Plain(nn.Sequential):
    """Channels become runs of 2 x 2 columns."""

    def __init__(self):
        super().__init__(
            *conv_bn(3, 6), nn.ReLU(inplace=True), nn.MaxPool2d(2), *conv_bn(6, 7), nn.GELU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.BatchNorm1d(28), nn.Dropout(0.5), nn.Linear(28, 9), nn.Hardswish(), nn.Linear(9, 4),
        )  # fmt: skip


class Dense(nn.Module):
    """Concatenation over lists, as densenet, with the image itself in one of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(7), nn.Conv2d(7, 5, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, padding=1)
        self.fc = nn.Linear(18 * 4, 4)

    def forward(self, x):
        features = [x, self.first(x)]
        features.append(self.conv1(F.relu(self.norm1(torch.cat(features, 1)))))
        features.append(self.conv2(F.relu(self.norm2(torch.cat(features, 1)), inplace=True)))
        x = torch.relu_(F.adaptive_avg_pool2d(torch.cat(features, dim=-3), 2))
        return self.fc(torch.flatten(x, 1))


class Depthwise(nn.Module):
    """One and two outputs per channel, squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.depthwise = conv_bn(6, 6, groups=6)
        self.multiplied = conv_bn(6, 12, groups=6)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu6(self.stem(x) * 2)
        x = F.relu(self.multiplied(F.relu(self.depthwise(x))))
        x = F.hardswish(self.pointwise(x))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc(x.mean([2, 3]))


class Reused(nn.Module):
    """One module applied three times, one tensor in two modules, raw parameters."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 5)
        self.body = conv_bn(5, 5)
        self.alias = self.body
        self.tied = nn.Conv2d(5, 5, 3, padding=1)
        self.tied.weight = self.body[0].weight
        self.scale = nn.Parameter(torch.ones(5, 1, 1))
        self.gain = nn.Parameter(torch.ones(1))
        self.slope = nn.PReLU(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = x + F.relu(self.body(x))
        x = self.slope(self.tied(x) * self.scale) * self.gain
        return self.fc(F.adaptive_max_pool2d(x, 1).squeeze(-1).squeeze(-1))


class Split(nn.Module):
    """A sum of a whole and a concatenation: the whole falls into parts."""

    def __init__(self):
        super().__init__()
        self.whole, self.left, self.right = nn.Conv2d(3, 7, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 3)
        self.end = nn.Conv2d(7, 4, 3)

    def forward(self, x):
        x = F.relu(self.whole(x) + torch.cat([self.left(x), self.right(x)], 1))
        return self.end(x).mean((2, 3))


def torchvision_model(name):
    """On the meta device first: the usual initialisation takes longer than all the tests. VGG's hidden layers of 4096
    units are narrowed, for the same reason."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=10, **{"init_weights": False} if "vgg" in name else {})
        if "vgg" in name:
            model.classifier[0], model.classifier[3] = nn.Linear(512 * 49, 24), nn.Linear(24, 20)
            model.classifier[6] = nn.Linear(20, 10)
    return model.to_empty(device="cpu")


LOCAL = {c.__name__: c for c in (Residual, Plain, Dense, Depthwise, Reused, Split)}
HOUSE = {
    "resnet20": lambda: build_model("resnet20", 10, width_multiplier=1),
    "vgg16": lambda: build_model("vgg16", 10, width_multiplier=1),
}
BIG = {name: lambda name=name: torchvision_model(name) for name in (
    "resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2"
)}  # fmt: skip
NETWORKS = LOCAL | HOUSE | BIG


def prepare(model, x):
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
        model.train()(x)
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
        order = torch.randperm(size, generator=generator)
        result[group] = torch.empty_like(order).scatter_(0, order, order.roll(1))
    return result


def relative_error(model, state, x, expected):
    with torch.no_grad():
        return float((functional_call(model, state, (x,), tie_weights=False) - expected).norm() / expected.norm())


def case(name):
    size = 32 if name in HOUSE | BIG else 8
    # BatchNorm is calibrated on more than the two images: the last maps are 1 x 1.
    images = torch.randn(12, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model, x = prepare(NETWORKS[name](), images), images[:2]
    spec = derive_spec(model, x)
    with torch.no_grad():
        return model, spec, x, model(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_permuting_keeps_the_function_and_every_tensor_counts(name):
    model, spec, x, expected = case(name)
    state = model.state_dict()
    permutations = cycles(spec)
    assert list(permutations) == list(spec.sizes)
    assert all((p != torch.arange(len(p))).all() and len(p) > 1 for p in permutations.values())
    assert list(spec.axes) == list(state)
    permuted = permute(spec, permutations, state)
    assert relative_error(model, permuted, x, expected) <= 1e-9

    members = [(group, *member) for group in spec.sizes for member in spec.members(group)]
    if name in BIG:
        chosen = torch.randperm(len(members), generator=torch.Generator().manual_seed(3))[:16]
        members = [members[i] for i in chosen]
    for group, tensor, dim, offset, _ in members:
        left_out = []
        for d, segments in enumerate(spec.axes[tensor]):
            position, kept = 0, []
            for segment in segments:
                is_chosen = (segment.group, d, position) == (group, dim, offset)
                kept.append(dataclasses.replace(segment, group=None) if is_chosen else segment)
                position += segment.length
            left_out.append((d, tuple(kept)))
        wrong = permuted | {tensor: permute_tensor(state[tensor], left_out, permutations)}
        error = relative_error(model, wrong, x, expected)
        assert error > 1e-6, f"{name}: {tensor} dim {dim} from {offset} of group {group} makes no difference"


def test_every_hidden_unit_is_in_a_group():
    for name, hidden in {
        "Residual": 6 + 8 + 6 + 8 + 8, "Plain": 6 + 7 + 9, "Dense": 4 + 5 + 6, "Depthwise": 6 + 8 + 3, "Reused": 5,
        "Split": 7, "resnet20": (16 + 32 + 64) * 4, "resnet18": (64 + 128 + 256 + 512) * 3, "vgg16_bn": 4224 + 44,
        "resnet50": 64 + (64 + 128 + 256 + 512) * 4 + 3 * 2 * 64 + 4 * 2 * 128 + 6 * 2 * 256 + 3 * 2 * 512,
    }.items():  # fmt: skip
        model = NETWORKS[name]()
        size = 32 if name in HOUSE | BIG else 8
        assert sum(derive_spec(model, torch.zeros(1, 3, size, size)).sizes.values()) == hidden, name


def test_the_structure_of_a_concatenation_and_of_a_flattened_map():
    spec = derive_spec(Dense(), torch.zeros(1, 3, 8, 8))
    segments = [(s.group, s.size, s.repeat) for s in spec.axes["fc.weight"][1]]
    assert segments == [(None, 3, 4), ("first", 4, 4), ("conv1", 5, 4), ("conv2", 6, 4)]
    assert [(s.group, s.size, s.repeat) for s in spec.axes["norm1.weight"][0]] == [(None, 3, 1), ("first", 4, 1)]
    assert spec.axes["norm1.num_batches_tracked"] == ()
    assert list(derive_spec(Split(), torch.zeros(1, 3, 8, 8)).sizes) == ["left", "right"]
    assert derive_spec(Split(), torch.zeros(1, 3, 8, 8)).members("right")[0] == ("whole.weight", 0, 3, 1)


def test_input_and_output_stay_and_are_listed():
    spec = derive_spec(Residual(), torch.zeros(1, 3, 8, 8))
    assert spec.fixed == {"input x": "the model's input", "fc": "the model's output"}
    headless = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    assert list(derive_spec(headless, torch.zeros(1, 3, 8, 8)).sizes) == ["0"]


def test_derivation_leaves_the_model_alone():
    model = Residual().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    derive_spec(model, torch.randn(4, 3, 8, 8))
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_permuted_safely_is_fixed_and_listed():
    class Grouped(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3))

    spec = derive_spec(Grouped(), torch.zeros(1, 3, 8, 8))
    assert not spec.sizes
    assert "grouped convolution 1" in spec.fixed["0"] and "grouped convolution 1" in spec.fixed["1"]

    class Overlapping(nn.Module):
        """Units of four columns meet units of one."""

        def __init__(self):
            super().__init__()
            self.conv, self.hidden, self.fc = nn.Conv2d(3, 5, 7), nn.Linear(192, 20), nn.Linear(20, 4)

        def forward(self, x):
            return self.fc(self.conv(x).flatten(1) + self.hidden(x.flatten(1)))

    spec = derive_spec(Overlapping(), torch.zeros(1, 3, 8, 8))
    assert not spec.sizes and "meet in add" in spec.fixed["conv"] and "meet in add" in spec.fixed["hidden"]

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
        assert list(spec.sizes) == ["conv"] and "holds no units in vector" in spec.fixed["hidden"]

    class Mixed(nn.Module):
        """Units that could move are added to some that can't."""

        def __init__(self):
            super().__init__()
            self.free, self.grouped, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 4, 1)
            self.other = nn.Conv2d(3, 6, 1)

        def forward(self, x):
            return self.fc(self.free(x) + self.grouped(self.other(x)))

    spec = derive_spec(Mixed(), torch.zeros(1, 3, 8, 8))
    assert not spec.sizes and "grouped convolution grouped" in spec.fixed["free"]

    class Dangling(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.dangling = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x):
            self.dangling(x)
            return self.used(x)

    assert derive_spec(Dangling(), torch.zeros(1, 3, 8, 8)).fixed["dangling"] == "no layer reads it"


class Applied(nn.Module):
    """A convolution, then any function."""

    def __init__(self, function, **modules):
        super().__init__()
        self.conv, self.function, self.fc = nn.Conv2d(3, 8, 3, padding=1), function, nn.Conv2d(8, 4, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.fc(self.function(self, self.conv(x)))


REFUSED = {
    "GroupNorm norm": Applied(lambda m, x: m.norm(x), norm=nn.GroupNorm(2, 8)),
    "permute": Applied(lambda m, x: x.permute(0, 2, 1, 3)),
    "chunk": Applied(lambda m, x: torch.cat(x.chunk(2, 1), 1)),
    "reshape": Applied(lambda m, x: x.reshape(-1, 2, 4, 8, 8).flatten(1, 2)),
    "cat": Applied(lambda m, x: torch.cat([x, x], 0)),
    "mean": Applied(lambda m, x: x - x.mean(1, keepdim=True)),
    "softmax": Applied(lambda m, x: torch.softmax(x, 1)),
    "getitem": Applied(lambda m, x: x[:, [1, 0, 2, 3, 4, 5, 6, 7]]),
    "pad": Applied(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, -1))),
    "max": Applied(lambda m, x: x * x.max().item()),
    "MaxPool2d pool": Applied(lambda m, x: m.pool(x.flatten(2)).reshape(x.shape), pool=nn.MaxPool2d(3, 1, 1)),
    "Linear last": Applied(lambda m, x: m.last(x), last=nn.Linear(8, 8)),
}


def test_hooks_which_a_trace_does_not_show_are_refused():
    model = Plain()
    model[4].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(UnsupportedOperation, match="module '4' has forward hooks"):
        derive_spec(model, torch.empty(1, 3, 8, 8))


@pytest.mark.parametrize("operation", REFUSED)
def test_an_operation_without_a_rule_is_named(operation):
    with pytest.raises(UnsupportedOperation, match=rf"node '\w+'.*{operation}"):
        derive_spec(REFUSED[operation], torch.zeros(1, 3, 8, 8))


def test_errors_say_what_failed():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    example = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UnsupportedOperation, match=r"in 'gate' \(Branching\) at `return x if x.sum\(\) > 0 else -x`"):
        derive_spec(Applied(lambda m, x: m.gate(x), gate=Branching()), example)
    with pytest.raises(UnsupportedOperation, match=r"not used by the traced forward pass.*spare\.weight, spare\.bias"):
        derive_spec(Applied(lambda m, x: x, spare=nn.Linear(2, 2)), example)
    with pytest.raises(ValueError, match=r"node 'conv'.*fails on the example"):
        derive_spec(Applied(lambda m, x: x), torch.zeros(1, 1, 8, 8))
    spec = derive_spec(Split(), example)
    state, permutations = Split().state_dict(), identity(spec)
    with pytest.raises(ValueError, match=r"group 'left': not a permutation of 3 units"):
        permute(spec, permutations | {"left": torch.tensor([0, 0, 1])}, state)
    with pytest.raises(ValueError, match="differ in their groups: other"):
        permute(spec, permutations | {"other": torch.arange(2)}, state)
    with pytest.raises(ValueError, match=r"differ in their tensors: extra"):
        permute(spec, permutations, state | {"extra": torch.zeros(1)})


def test_inverse_and_identity():
    model = Dense()
    spec, state = derive_spec(model, torch.zeros(1, 3, 8, 8)), model.state_dict()
    permutations = random_permutations(spec, torch.Generator().manual_seed(0))
    there = permute(spec, permutations, state)
    back = permute(spec, invert(permutations), there)
    assert not torch.equal(there["conv2.weight"], state["conv2.weight"])
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
        assert torch.equal(permute(spec, identity(spec), state)[name], tensor)
    again = random_permutations(spec, torch.Generator().manual_seed(0))
    assert all(torch.equal(again[group], p) for group, p in permutations.items())


@pytest.mark.parametrize("at", ["last", "all"])
@pytest.mark.parametrize("name", [*LOCAL, *HOUSE, "mobilenet_v2"])
def test_features_are_permuted_as_the_units_are(name, at):
    """With the model's whole state dict, and alike for both memory formats."""
    model, spec, x, _ = case(name)
    reader = feature_reader(model, spec, at)
    permutations, state = cycles(spec), model.state_dict()
    with torch.no_grad():
        plain = functional_call(reader, state, (x,), tie_weights=False)
        moved = functional_call(reader, permute(spec, permutations, state), (x,), tie_weights=False)
        x = x.contiguous(memory_format=torch.channels_last)
        channels_last = functional_call(reader, state, (x,), tie_weights=False)
    assert plain.keys() == spec.sizes.keys()
    for group, features in plain.items():
        assert len(features) == (1 if at == "last" else len(spec.reads[group]))
        for a, b, c in zip(features, moved[group], channels_last[group], strict=True):
            assert a.shape[1] == spec.sizes[group] and len(a) % 2 == 0 and a.std() > 0
            torch.testing.assert_close(a[:, permutations[group]], b, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-8)


def rows(x):
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def test_features_are_read_where_the_paper_reads_them():
    """After the activation, at the last consumer's input, before a final pooling; what follows does not run."""
    x = torch.randn(2, 3, 8, 8)
    model = Residual().eval()
    spec = derive_spec(model, x)
    reader = feature_reader(model, spec, "last")
    assert "fc" not in [str(node.target) for node in reader.graph.nodes]
    with torch.no_grad():
        features = reader(x)
        stage1 = model.blocks[0](F.relu(model.stem(x)))
        stage2 = model.blocks[2](model.blocks[1](stage1))
        inside = F.relu(model.blocks[1].bn1(model.blocks[1].conv1(stage1)))
    torch.testing.assert_close(features["stem.0"], [rows(stage1)])
    torch.testing.assert_close(features["blocks.1.conv2"], [rows(stage2)])
    torch.testing.assert_close(features["blocks.1.conv1"], [rows(inside)])
    with torch.no_grad():
        everywhere = feature_reader(model, spec, "all")(x)["stem.0"]
    torch.testing.assert_close(everywhere, [rows(F.relu(model.stem(x))), rows(stage1)])  # the shortcut reads no third
    with pytest.raises(ValueError, match="at='first': choose"):
        feature_reader(model, spec, "first")


def test_features_in_concatenations_in_runs_and_before_operations_in_place():
    x = torch.randn(2, 3, 8, 8)
    dense = Dense().eval()
    with torch.no_grad():
        before_pool = feature_reader(dense, derive_spec(dense, x), "last")(x)
        first = dense.first(x)
    # A ReLU in place stands between the pool and the flattening, so the pooled map (2 x 2) is read, after the ReLU.
    torch.testing.assert_close(before_pool["first"], [rows(F.relu(F.adaptive_avg_pool2d(first, 2)))])

    plain = Plain().eval()
    with torch.no_grad():
        read = feature_reader(plain, derive_spec(plain, x), "last")(x)
        columns = nn.Sequential(*list(plain)[:10])(x)
    torch.testing.assert_close(read["4"], [rows(columns.unflatten(1, (7, 4)))])

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
        read = feature_reader(model, spec, "all")(channels_last)["conv1"]
        after = rows(model.conv1(x).relu())
    # conv2 and conv4 read one tensor, before and after it changed in place: the last time counts, and comes last.
    assert [r.node for r in spec.reads["conv1"]] == ["conv3", "conv4"]
    torch.testing.assert_close(read, [2 * after, -3 * after])



CHANGES_IN_PLACE = {
    "method": lambda x: x.relu_(),
    "module": nn.ReLU(inplace=True),
    "keyword": lambda x: F.relu(x, inplace=True),
    "position": lambda x: F.relu(x, True),
    "function": lambda x: torch.relu_(x),
}


@pytest.mark.parametrize("kind", CHANGES_IN_PLACE)
def test_what_was_read_stays_when_the_tensor_is_changed_in_place(kind):
    class ChangedLater(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.change = CHANGES_IN_PLACE[kind]

        def forward(self, x):
            x = self.conv1(x)
            y = self.conv2(x)
            return y + self.conv3(self.change(x) + 1)

    model, x = ChangedLater(), torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        read = feature_reader(model, derive_spec(model, x), "all")(x)["conv1"]
        torch.testing.assert_close(read[0], rows(model.conv1(x)))


def test_the_command_line_prints_groups_sizes_and_members(capsys):
    main(["resnet20", "--width_multiplier", "1"])
    printed = capsys.readouterr().out
    assert "layer1.0.conv1: 16 units\n    layer1.0.conv1.weight dim 0\n" in printed
    assert "12 groups, 448 units\nfixed: input x (the model's input)\n" in printed
    with pytest.raises(SystemExit) as stop:
        main(["nonesuch"])
    assert stop.value.code == 2 and "nonesuch" in capsys.readouterr().err
