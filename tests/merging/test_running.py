"""Networks as people have them: right from training, in several precisions, choosy about their inputs.

Whatever their code does, they merge, or a ValueError says what kept them from it.
"""

import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import deform_conv2d, roi_align, roi_pool

from merging import METHODS, merge
from merging.permutation import (
    Member,
    PermutationSpec,
    UnsupportedOperation,
    derive_spec,
    describe,
    permute,
    random_permutations,
    spec_from_axes,
    verify,
)
from merging.tracing.running import own_copy

HALVES = [[0.5, 0.5], [0.4, 0.6]]
WAYS = [name for name, way in METHODS.items() if not way.aligned]
IMAGES = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A perceptron whose forward pass is `a`, `between` (which gets the module, too) and `b`."""

    def __init__(self, between=lambda m, x: x.relu(), seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.between, self.a, self.b = between, nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.between(self, self.a(x.flatten(1))))


RIGHT = {"a.weight": ("h", None), "a.bias": ("h",), "b.weight": (None, "h")}
WRONG = [{name: axes for name, axes in RIGHT.items() if name != left_out} for left_out in RIGHT]


def assert_checked(model, example):
    """A right spec passes the check of this network, and none that leaves out a tensor does."""
    assert spec_from_axes(model, RIGHT, example=example).sizes == {"h": 8}
    for axes in WRONG:
        with pytest.raises(ValueError, match="group 'h' changes the outputs"):
            spec_from_axes(model, axes, example=example)


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

# Copies


def keep(m, x):
    m.kept = {"features": [x.relu()]}
    return m.kept["features"][0]


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.3)


TRAINED = {
    "kept features": lambda: Net(keep),
    **{f"{module.__name__}.{wrap.__name__}": lambda wrap=wrap: wrapped(wrap)
       for module, wrap in ((nn.utils, weight_norm), (nn.utils, spectral_norm), (prune, pruned),
                            (parametrizations, parametrizations.weight_norm),
                            (parametrizations, parametrizations.spectral_norm))},
    "LSTM": lambda: Recurrent(),
}


def wrapped(wrap):
    model = Net()
    model.a = wrap(model.a)
    return model


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.r, self.o = weight_norm(nn.LSTM(4, 6, batch_first=True), "weight_hh_l0"), nn.Linear(6, 3)

    def forward(self, x):
        return self.o(self.r(x[:, 0])[0][:, -1])


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_right_from_training_is_copied_and_merges(name):
    models = [TRAINED[name]() for _ in range(2)]
    for model in models:
        model(IMAGES).square().sum().backward()
    twin = own_copy(models[0])
    assert models[0].training and not any(module.training for module in twin.modules())
    mine, theirs = ({t.untyped_storage().data_ptr() for t in model.state_dict().values()}
                    for model in (twin, models[0]))
    assert not mine & theirs
    models[0].eval()
    torch.testing.assert_close(twin(IMAGES), models[0](IMAGES), rtol=0, atol=0)
    with torch.no_grad():
        for tensor in twin.parameters():
            tensor.zero_()
    assert models[0](IMAGES).abs().sum() > 0 and twin(IMAGES).nan_to_num().abs().sum() == 0
    for method in WAYS:
        merged = merge([model.train() for model in models], HALVES, method, batches=[IMAGES], bn_reset="repair")
        models[0].load_state_dict(merged[0])


def test_tensors_that_share_memory_do_so_in_the_copy():
    model = Net()
    model.whole = torch.ones(4) * torch.ones((), requires_grad=True)
    model.part = model.whole[:2]
    twin = own_copy(model)
    twin.whole.fill_(5)
    assert twin.part.tolist() == [5, 5] and model.part.tolist() == [1, 1]


def test_what_cannot_be_copied_is_said():
    model = Net()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Net can't be copied: .*lock.*copy\.deepcopy"):
        merge([model, model], HALVES, batches=[IMAGES])


# Precision


def in_float32(m, x):
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6)).to(x.dtype)


def constant(m, x):
    return F.linear(x.relu(), torch.eye(8)) + torch.zeros(1, 8, dtype=torch.float32)


def attribute(m, x):
    m.table = getattr(m, "table", torch.full((8,), 0.5))
    return torch.where(x > 0, x, m.table) @ torch.eye(8)


@pytest.mark.parametrize("between", [in_float32, constant, attribute])
def test_what_is_float32_inside_is_checked_in_float64(between):
    assert_checked(Net(between), IMAGES[:1])
    assert verify(Net(between), spec_from_axes(Net(), RIGHT, example=IMAGES[:1]), IMAGES[:1]) < 1e-12
    merge([Net(between), Net(between, seed=1)], HALVES, batches=[IMAGES])


class RMSNorm(nn.Module):
    """As Llama, Mistral and Qwen have it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


def rotated(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class Llama(nn.Module):
    """A layer: norms, positions and softmax are in float32; two heads of keys and values for four of queries."""

    def __init__(self, width=16, hidden=24, heads=4, pairs=2):
        super().__init__()
        self.heads, self.pairs, self.size = heads, pairs, width // heads
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(3))
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, pairs * self.size, bias=False) for _ in range(2))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.register_buffer("frequencies", 1 / 100 ** (torch.arange(self.size // 2) / self.size), persistent=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attend(self.norms[0](x))
        y = self.norms[1](x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.norms[2](x)).float()

    def attend(self, x):
        (batch, length, _), dtype = x.shape, x.dtype
        with torch.autocast("cpu", enabled=False):
            angles = torch.arange(length).float()[:, None] @ self.frequencies.float()[None]
            cos, sin = (f(torch.cat([angles, angles], -1)).to(dtype) for f in (torch.cos, torch.sin))
        q, k, v = (layer(x).view(batch, length, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = q * cos + rotated(q) * sin, k * cos + rotated(k) * sin
        repeat = (batch, self.pairs, self.heads // self.pairs, length, self.size)
        k, v = (t[:, :, None].expand(repeat).reshape(batch, self.heads, length, self.size) for t in (k, v))
        mask = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype).triu(1)
        scores = q @ k.mT / self.size**0.5 + mask
        scores = F.softmax(scores, -1, dtype=torch.float32).to(dtype)
        return self.o((scores @ v).transpose(1, 2).reshape(batch, length, -1))


LLAMA = {
    **{name: (None, "stream") for name in ("embed.weight", "head.weight", "q.weight", "k.weight", "v.weight")},
    **{f"norms.{n}.weight": ("stream",) for n in range(3)}, "o.weight": ("stream", None),
    "gate.weight": ("hidden", "stream"), "up.weight": ("hidden", "stream"), "down.weight": ("stream", "hidden"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_that_computes_in_float32_is_checked_in_float64(dtype):
    torch.manual_seed(0)
    ids, model = torch.randint(11, (1, 6)), Llama().to(dtype)
    spec = derive_spec(model, ids)
    assert spec.sizes == {"embed.weight dim 1": 16, "q": 2, "v": 8, "gate": 24} and spec.blocks == {"v": "q"}
    assert verify(model, spec, ids) < 1e-12
    by_hand = spec_from_axes(model, LLAMA, example=ids)
    assert sorted(by_hand.sizes.values()) == [16, 24]
    for name, axes in LLAMA.items():
        for dim in range(len(axes)):
            if axes[dim]:
                wrong = LLAMA | {name: tuple(None if d == dim else axis for d, axis in enumerate(axes))}
                with pytest.raises(ValueError, match="changes the outputs"):
                    spec_from_axes(model, wrong, example=ids)


def test_an_lstm_with_states_in_float32_merges():
    class Started(Recurrent):
        def forward(self, x):
            zero = torch.zeros(1, len(x), 6)
            return self.o(self.r(x[:, 0], (zero, zero))[0][:, -1])

    merge([Started(), Started()], HALVES, batches=[IMAGES])


def only_float32(m, x):
    assert x.dtype == torch.float32, "float32, please"
    return x.relu()


def test_what_runs_in_float32_only_is_checked_there():
    assert_checked(Net(only_float32), IMAGES[:1])
    assert derive_spec(Net(only_float32), IMAGES[:1]).sizes == {"a": 8}
    with pytest.raises(ValueError, match=r"Net fails on inputs .*float32, please"):  # as a fault of its own would
        verify(Net(only_float32).double(), derive_spec(Net(), IMAGES[:1]), IMAGES[:1])

    def chaotic(m, x):
        return (1e9 * only_float32(m, x)).sin()

    with pytest.raises(ValueError, match=r"Net fails on inputs .*float32, please"):
        spec_from_axes(Net(chaotic), RIGHT, example=IMAGES[:1])


@pytest.mark.parametrize("method", WAYS)
def test_half_beside_single_precision_merges_as_single_precision_does(method):
    coarse, fine = ({k: v.half() for k, v in Net(seed=0).state_dict().items()}, Net(seed=1).state_dict())
    merged = merge([coarse, fine], [[0.5, 0.5]] * 2, method, batches=[IMAGES], model=Net())
    assert [state["a.weight"].dtype for state in merged] == [torch.float16, torch.float32]
    assert coarse["a.weight"].dtype == torch.float16
    widened = {k: v.float() for k, v in coarse.items()}
    for i in range(2):  # each in its own order, as without equal rows
        expected = merge([widened, fine], [[0.5, 0.5]] * 2, method, local_batches=[[IMAGES]] * 2, model=Net())[i]
        for key, value in expected.items():
            torch.testing.assert_close(merged[i][key].float(), value, rtol=0, atol=1e-3 if i == 0 else 0)
    merge([coarse, fine], HALVES, method, batches=[IMAGES], model=Net(only_float32))
    models = [Net(only_float32).half(), Net(only_float32, seed=1)]  # the passes are in the finer one's
    assert torch.equal(merge(models, HALVES, method, batches=[IMAGES])[1]["b.weight"],
                       merge([coarse, fine], HALVES, method, batches=[IMAGES], model=Net())[1]["b.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_of_another_precision_are_fed_in_the_models(dtype):
    x = IMAGES.half()
    merged, expected = (merge([Net(), Net(seed=1)], HALVES, batches=[images])[0] for images in (x.to(dtype), x.float()))
    assert all(torch.equal(merged[key], expected[key]) for key in expected)


# Inputs and outputs


class Picky(Net):
    """Its inputs go through a function that has no value for some numbers."""

    def __init__(self, function=torch.log, seed=0):
        super().__init__(seed=seed)
        self.function = function

    def forward(self, x):
        return super().forward(self.function(x))


@pytest.mark.parametrize(("function", "example"), [
    (torch.log, torch.ones(1, 1, 4, 4)), (torch.asin, torch.ones(1, 1, 4, 4)), (torch.acosh, IMAGES[:1] + 3),
    (torch.acosh, torch.full((1, 1, 4, 4), 3.0)),
])
def test_inputs_are_numbers_that_the_network_is_made_for(function, example):
    assert_checked(Picky(function), example)
    assert derive_spec(Picky(function), example).sizes == {"a": 8}


def test_without_finite_outputs_nothing_is_checked():
    with pytest.raises(ValueError, match="Picky puts out only NaN and infinite values"):
        derive_spec(Picky(torch.acosh), torch.zeros(1, 1, 4, 4))
    merge([Picky(), Picky(seed=1)], HALVES, batches=[IMAGES + 0.1])


class Wrapped(Net):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


@dataclasses.dataclass
class Loose:
    logits: torch.Tensor
    other: object = None


@dataclasses.dataclass(slots=True)
class Tight:
    logits: torch.Tensor


def circular(y):
    found = Loose(y)
    found.other = found
    return found


OUTPUTS = {
    "dict": lambda y: {"big": torch.full((2,), 1e5), "small": 1e-5 * y},
    "tuple": lambda y: (None, [torch.full((2,), 1e9), y]),
    "dataclass": Loose,
    "slots": Tight,
    "circle": circular,
    "masked": lambda y: torch.cat([y, torch.full((len(y), 1), -torch.inf), torch.full((len(y), 1), torch.nan)], 1),
    "complex": lambda y: torch.complex(torch.zeros_like(y), y),
    "with an empty one": lambda y: (y[:0], y),
    "with a sum that is zero": lambda y: (y, y.sum(1) - y.flip(1).sum(1), y.sum() - y.flip(0, 1).sum()),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_output_is_compared(kind):
    assert_checked(Wrapped(OUTPUTS[kind]), IMAGES[:1])
    spec = derive_spec(Wrapped(OUTPUTS[kind]), IMAGES[:1])
    assert spec.sizes == {"a": 8} and "b" in spec.fixed


@pytest.mark.parametrize("nothing", [lambda y: y[:0], lambda y: None, lambda y: {"logits": []}])
def test_what_puts_out_nothing_passes_no_check(nothing):
    for axes in (RIGHT, *WRONG):
        with pytest.raises(ValueError, match="Wrapped puts out no values, so there is nothing to check"):
            spec_from_axes(Wrapped(nothing), axes, example=IMAGES[:1])


@pytest.mark.parametrize("same", [lambda y: 0 * y, lambda y: torch.ones(3), lambda y: y > 1e9])
def test_outputs_that_nothing_changes_pass_no_check(same):
    for axes in (RIGHT, *WRONG):
        with pytest.raises(ValueError, match="outputs of Wrapped do not depend on the tensors that are permuted"):
            spec_from_axes(Wrapped(same), axes, example=IMAGES[:1])


def test_whole_numbers_are_compared_for_many_samples():
    assert_checked(Wrapped(lambda y: y.argmax(1)), IMAGES[:1])
    assert_checked(Wrapped(lambda y: y > 0), IMAGES[:1])


def test_outputs_whose_number_varies_are_not_compared():
    found = Wrapped(lambda y: torch.arange(999.0)[torch.linspace(-1, 1, 999) > y.mean()])
    for axes in WRONG:
        with pytest.raises(ValueError, match=r"Wrapped puts out \d+ numbers in 1 tensors at one time and \d+ in 1 at"):
            verify(found, spec_by_hand(axes), IMAGES[:1])
    counted = iter(range(1, 99))
    with pytest.raises(ValueError, match=r"Wrapped puts out 30 numbers in 5 tensors at one time and 36 in 6 at"):
        derive_spec(Wrapped(lambda y: [y] * next(counted)), IMAGES[:1])


def spec_by_hand(axes):
    """Unchecked."""
    members = tuple(Member(name, (dims.index("h"),), torch.arange(8)[:, None]) for name, dims in axes.items())
    return PermutationSpec({"h": 8}, {"h": members}, {}, {}, {"h": ()}, tuple(Net().state_dict()))


def random_dropout(m, x):
    return F.dropout(x.relu(), 0.5, True)


def noisy(m, x):
    return m.c(x.relu() + torch.rand_like(x)).relu()


class Held:
    cache = None

    def __call__(self, m, x):
        self.cache = m.a.bias * 2 if self.cache is None else self.cache
        return (x + self.cache).relu()


def test_what_depends_on_more_than_inputs_and_tensors_is_not_the_specs_fault():
    model = Net(noisy)
    model.c = nn.Linear(8, 8)
    for random in (Net(random_dropout), model):
        with pytest.raises(ValueError, match="Net puts out other values for the same inputs and tensors"):
            derive_spec(random, IMAGES[:1])
    with pytest.raises(ValueError, match="Net keeps values from one forward pass to the next"):
        derive_spec(Net(Held()), IMAGES[:1])
    with pytest.raises(ValueError, match="group 'h' changes the outputs"):
        spec_from_axes(Net(), WRONG[0], example=IMAGES[:1])


# What a model keeps of what its forward pass computed


class Biased(Net):
    """Attention biases as in LeViT: in evaluation they are computed once, and thrown away for training."""

    def __init__(self, thrown_away=True, seed=0):
        super().__init__(seed=seed)
        self.cache, self.thrown_away, self.places = {}, thrown_away, torch.arange(8)
        self.biases = nn.Parameter(torch.randn(8))
        self.between = lambda m, x: (x + m.bias(x.device)).tanh()

    def train(self, mode=True):
        if mode and self.thrown_away:
            self.cache = {}
        return super().train(mode)

    def bias(self, device):
        if self.training:
            return self.biases[self.places]
        return self.cache.setdefault(str(device), self.biases[self.places])


def last(m, x):
    m.last = getattr(m, "last", None)
    m.last = m.a.bias * 2 if m.last is None else m.last
    return (x + m.last).tanh()


def listed(m, x):
    m.kept = getattr(m, "kept", {"all": []})
    m.kept["all"] += [m.a.bias * 2] if not m.kept["all"] else []
    return (x + m.kept["all"][0]).tanh()


@pytest.mark.parametrize("make", [Biased, lambda: Biased(False), lambda: Net(last), lambda: Net(listed)])
def test_what_a_model_keeps_of_a_pass_is_not_there_in_the_next(make):
    fresh = make()
    spec = derive_spec(fresh, IMAGES[:1])
    assert spec.sizes == {"a": 8}
    state, generator = fresh.state_dict(), torch.Generator().manual_seed(0)
    for tensor in state.values():
        tensor.normal_(generator=generator)
    moved = permute(spec, random_permutations(spec, generator), state)
    for method in WAYS[:-1]:
        merged = merge([state, moved], HALVES, method, batches=[IMAGES], model=fresh, spec=spec, bn_reset="repair")
        for key, value in state.items():
            torch.testing.assert_close(merged[0][key], value, rtol=1e-4, atol=1e-5)
    assert not getattr(fresh, "cache", None) and not hasattr(fresh, "last") and not hasattr(fresh, "kept")


@pytest.mark.parametrize("gradients", [True, False])
def test_a_cache_of_earlier_tensors_is_not_copied(gradients):
    model = Biased().eval()
    sizes = derive_spec(Biased(), IMAGES[:1]).sizes
    with torch.set_grad_enabled(gradients):
        model(IMAGES)
    assert derive_spec(model, IMAGES[:1]).sizes == sizes and model.cache and not model.training


@pytest.mark.parametrize("refuses", [True, False])
def test_a_train_of_ones_own_may_return_nothing_or_refuse(refuses):
    class Frozen(Net):
        def train(self, mode=True):
            if refuses and mode:
                raise NotImplementedError("for evaluation only")
            super().train(mode)

    assert derive_spec(Frozen(), IMAGES[:1]).sizes == {"a": 8}
    merge([Frozen(), Frozen(seed=1)], HALVES, batches=[IMAGES], bn_reset="repair")


# Operations


class Between(Net):
    """Something between two layers, with tensors of its own, by which it is judged in what moves."""

    def __init__(self, between, **own):
        super().__init__(between)
        for name, value in own.items():
            setattr(self, name, value if isinstance(value, nn.Module) else nn.Parameter(torch.randn(value)))


ROWS = torch.tensor([0, 1])


def as_image(x, side=3):
    return x[:, :, None, None] * torch.linspace(0.5, 1.5, side * side).view(side, side)


def boxes():
    return torch.tensor([[0, 0.0, 0.0, 2.0, 2.0], [0, 0.5, 0.0, 2.0, 1.5]])


@pytest.mark.parametrize(("between", "own", "moved"), [
    (lambda m, x: torch.fft.fft(x, dim=0).real + torch.fft.rfft(x, dim=0).imag.sum(0), {}, 8),
    (lambda m, x: torch.fft.fft(x).real, {}, 0),
    (lambda m, x: torch.polar(x.abs(), m.v).imag + torch.complex(x, m.v * x).conj().angle().hypot(x.sinc()).atan(),
     {"v": (8,)}, 8),
    (lambda m, x: torch.fft.irfft2(torch.fft.rfft2(as_image(x))).mean((2, 3)), {}, 8),
    (lambda m, x: torch.fft.fftn(as_image(x), s=(3, 3)).abs().mean((2, 3)), {}, 8),
    (lambda m, x: torch.fft.fftn(x).abs(), {}, 0),
    (lambda m, x: x + torch.mv(x, m.v)[:, None], {"v": (8,)}, 8),
    (lambda m, x: x * torch.dot(m.v, m.w) + torch.vdot(m.v, m.v) * m.w, {"v": (8,), "w": (8,)}, 8),
    (lambda m, x: m.c(x), {"c": spectral_norm(nn.Linear(8, 8))}, 16),
    (lambda m, x: x * torch.cdist(x, m.v).sum(1, keepdim=True), {"v": (5, 8)}, 8),
    (lambda m, x: torch.cdist(x[None], m.v, p=1.0)[0] @ m.w, {"v": (1, 5, 8), "w": (5, 8)}, 8 + 5 + 8),
    (lambda m, x: m.c(x, x).relu(), {"c": nn.Bilinear(8, 8, 8)}, 16),
    (lambda m, x: x.index_add(0, ROWS, x[:2] * 2).index_copy(0, ROWS, x[:2] + 1), {}, 8),
    (lambda m, x: x.index_add(1, ROWS, x[:, :2] * 2), {}, 0),
    (lambda m, x: x + m.c(torch.tensor([[1, 2], [0, 1]])).sum(0), {"c": nn.EmbeddingBag(4, 8)}, 8),
    (lambda m, x: x + m.c(torch.tensor([1, 2, 0]), torch.tensor([0, 2])).sum(0),
     {"c": nn.EmbeddingBag(4, 8, mode="max")}, 8),
    (lambda m, x: deform_conv2d(as_image(x), torch.full((len(x), 18, 3, 3), 0.2), m.w, padding=1).mean((2, 3)),
     {"w": (8, 8, 3, 3)}, 16),
    (lambda m, x: deform_conv2d(as_image(x), torch.zeros(len(x), 18, 3, 3), m.w, m.v, padding=1).mean((2, 3)),
     {"w": (8, 8, 3, 3), "v": (8,)}, 16),
    (lambda m, x: deform_conv2d(as_image(x), torch.zeros(len(x), 18, 3, 3), m.w, padding=1).mean((2, 3)),
     {"w": (8, 4, 3, 3)}, 0),
    (lambda m, x: x + sum(of_boxes(as_image(x), boxes(), 2).mean((0, 2, 3)) for of_boxes in (roi_align, roi_pool)),
     {}, 8),
])
def test_operations_keep_what_can_move(between, own, moved):
    assert sum(derive_spec(Between(between, **own), IMAGES[:2]).sizes.values()) == moved


class Placed(nn.Module):
    """Rows go where the units of another layer are largest, or images are looked at where these say."""

    def __init__(self, places):
        super().__init__()
        torch.manual_seed(0)
        self.places, self.a, self.b, self.c = places, nn.Linear(16, 6), nn.Linear(6, 3), nn.Linear(3, 3)
        self.w = nn.Parameter(torch.randn(2, 2, 3, 3))

    def forward(self, x):
        return self.b(self.a(x.flatten(1)).relu()) + self.c(self.places(self, self.a.weight))


@pytest.mark.parametrize("places", [
    lambda m, w: torch.zeros(5, 3).index_add(0, w[:, :5].argmax(1), torch.linspace(-1, 1, 18).view(6, 3))[0],
    lambda m, w: deform_conv2d(torch.linspace(-1, 1, 6 * 18).view(6, 2, 3, 3), w[:, :1, None, None].expand(6, 18, 3, 3),
                               m.w, padding=1)[0, 0, 0],
])
def test_units_that_say_where_something_is_stay(places):
    assert derive_spec(Placed(places), IMAGES[:2]).sizes == {}


# Arguments


class Called(Net):
    def forward(self, x, times=1, offset=None, *, mask=None, more=()):
        x = x["image"] if isinstance(x, dict) else x
        y = super().forward(x) * times + (0 if offset is None else offset)
        y = y if mask is None else y * mask
        return y + sum(one["a"].mean() for one in more)


@pytest.mark.parametrize(("example", "kwargs"), [
    ((IMAGES[:1], 2, torch.tensor(3.0)), None), ([IMAGES[:1], 2], None), ({"x": IMAGES[:1]}, None),
    (({"image": IMAGES[:1], "name": "x"}, 2, None), {"more": [{"a": torch.ones(1, 2)}, {"a": torch.ones(5)}]}),
    (IMAGES[:1], {"mask": torch.rand(3), "times": 2}),
    ({"x": IMAGES[:4], "offset": None, "mask": torch.ones(4, 1)}, {}),
    ((), {"x": {"image": IMAGES[:1]}}),
])
def test_a_forward_pass_is_called_as_it_takes_its_arguments(example, kwargs):
    assert derive_spec(Called(), example, kwargs).sizes == {"a": 8}
    spec = spec_from_axes(Called(), RIGHT, example=example, kwargs=kwargs)
    assert verify(Called(), spec, example, kwargs=kwargs) < 1e-12
    with pytest.raises(ValueError, match="group 'h' changes the outputs"):
        spec_from_axes(Called(), WRONG[0], example=example, kwargs=kwargs)


class Listed(Net):
    """As torchvision's detectors take images: a list of them, without a batch dimension."""

    def forward(self, images):
        if any(image.shape != (1, 4, 4) for image in images):
            raise ValueError("an image has one channel")
        return super().forward(torch.stack(list(images)))


def test_images_in_a_list_keep_their_channels():
    images = [IMAGES[0], IMAGES[1]]
    assert derive_spec(Listed(), (images,)).sizes == {"a": 8}
    assert verify(Listed(), spec_from_axes(Listed(), RIGHT, example=(images,)), (images,)) < 1e-12
    with pytest.raises(ValueError, match="group 'h' changes the outputs"):
        spec_from_axes(Listed(), WRONG[0], example=(images,))
    with pytest.raises(ValueError, match=r"Listed fails on an example of shape \[\(2, 4, 4\)\]: an image has one"):
        derive_spec(Listed(), ([torch.rand(2, 4, 4)],))


class Hidden(Net):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        hidden = self.a(x.flatten(1)).relu()
        return self.wrap(self.b(hidden), hidden)


@pytest.mark.parametrize(("wrap", "outputs"), [
    (lambda y, h: {"logits": y, "hidden": h}, "logits"), (Loose, "logits"), (lambda y, h: (h, y), 1),
    (lambda y, h: {"all": [h, {"y": y}]}, lambda found: found["all"][1]),
])
def test_what_of_the_outputs_stays_can_be_chosen(wrap, outputs):
    model = Hidden(wrap)
    assert derive_spec(model, IMAGES[:1]).sizes == {}
    spec = derive_spec(model, IMAGES[:1], outputs=outputs)
    assert spec.sizes == {"a": 8} and "b" in spec.fixed
    assert verify(model, spec, IMAGES[:1], outputs=outputs) < 1e-12
    with pytest.raises(ValueError, match="changes the outputs"):
        verify(model, spec, IMAGES[:1])
    assert spec_from_axes(model, RIGHT, example=IMAGES[:1], outputs=outputs).sizes == {"h": 8}
    with pytest.raises(ValueError, match="changes the outputs"):
        spec_from_axes(model, WRONG[0], example=IMAGES[:1], outputs=outputs)
    with pytest.raises(ValueError, match="outputs='absent' can't be taken from the "):
        derive_spec(model, IMAGES[:1], outputs="absent")


def test_examples_that_are_none_are_named():
    with pytest.raises(ValueError, match=r"a tensor, a tuple .* or a dict of its keyword arguments, not a str"):
        derive_spec(Net(), "x")
    with pytest.raises(ValueError, match=r"Net fails on an example of shape y=\(1, 16\): .*unexpected keyword"):
        derive_spec(Net(), {"y": torch.rand(1, 16)})


def test_inputs_that_are_whole_numbers():
    assert derive_spec(nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 4), nn.Linear(4, 2)),
                       torch.full((1, 5), -1)).sizes


# What the network's own code raises


def explode(m, x):
    raise KeyError("a key of its own")


def explode_on_many(m, x):
    if len(x) > 3:
        raise RuntimeError("too many\n  at once")
    return x.relu()


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("bn_reset", ["repair", "both"])
def test_errors_of_a_network_become_a_sentence(method, bn_reset):
    class Normed(Net):
        def __init__(self, between):
            super().__init__(between)
            self.b = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def run(between, images=IMAGES):
        return merge([Normed(between), Normed(between)], HALVES, method, batches=[images], bn_reset=bn_reset)

    with pytest.raises(ValueError, match=r"Normed fails on .* 'a key of its own'"):
        run(explode)
    with pytest.raises(ValueError, match=r"Normed fails on images of shape \(20, 1, 4, 4\): too many at once$"):
        run(explode_on_many)
    with pytest.raises(ValueError, match=r"Normed fails on .* of shape \(\d+, 1, 5, 5\): .*16x8"):
        run(torch.relu_, torch.rand(4, 1, 5, 5))


# Tensors that the forward pass doesn't use


@pytest.mark.parametrize("value", [torch.zeros((), dtype=torch.long), torch.arange(8), torch.ones(8, dtype=torch.bool),
                                   torch.tensor(0.5), torch.ones(1)])
def test_unused_counters_masks_and_single_numbers_refuse_no_network(value):
    models = [Net(), Net(seed=1)]
    for model in models:
        model.register_buffer("epoch", value + len(models) if value.dtype == torch.long else value)
    merged = merge(models, HALVES, batches=[IMAGES])
    assert torch.equal(merged[0]["epoch"], models[0].epoch)


def test_tensors_that_no_pass_uses_are_averaged_as_they_are():
    """As a token in place of what is masked, which only some pretraining takes."""
    models = [Net(), Net(seed=1)]
    for k, model in enumerate(models):
        model.register_buffer("vector", torch.full((8,), float(k)))
        model.token = nn.Parameter(torch.full((1, 8), float(k)))
    spec = derive_spec(models[0], IMAGES[:1])
    assert spec.sizes == {"a": 8} and not spec.of_tensor["token"]
    assert spec.stuck == dict.fromkeys(["token", "vector"], "the forward pass does not use it")
    assert "fixed: token (the forward pass does not use it)" in describe(spec)
    merged = merge(models, HALVES, batches=[IMAGES])
    assert torch.equal(merged[0]["token"], torch.full((1, 8), 0.5))
    torch.testing.assert_close(merged[1]["vector"], torch.full((8,), 0.6))


def test_tensors_that_training_may_use_are_not():
    def forward(m, x):
        return x.relu() * (m.token if m.training and x.sum() > -1e9 else 1)

    model = Net(forward)
    model.token = nn.Parameter(torch.ones(8))
    with pytest.raises(UnsupportedOperation, match=r"not used by the forward pass.* token\. .*training only can't be"):
        derive_spec(model, IMAGES[:1])


# Extra state


class Extra(Net):
    def __init__(self, extra, seed=0):
        super().__init__(seed=seed)
        self.extra, self.norm = extra, nn.BatchNorm1d(8)
        self.between = lambda m, x: m.norm(x).relu() * m.factor()

    def factor(self):
        return self.extra["n"] if isinstance(self.extra, dict) else float(self.extra)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, value):
        self.extra = value


@pytest.mark.parametrize("extras", [({"n": 1}, {"n": 2}), (torch.tensor(1.0), torch.tensor(2.0))])
@pytest.mark.parametrize("weights", [HALVES, [[0.5, 0.5]] * 2, [[1, 0], [0.5, 0.5]]])
@pytest.mark.parametrize("method", WAYS)
def test_extra_state_stays_an_agents_own(extras, weights, method):
    models = [Extra(extra, seed) for seed, extra in enumerate(extras)]
    merged = merge(models, weights, method, batches=[IMAGES], bn_reset="repair")
    for state, extra, model in zip(merged, extras, models, strict=True):
        assert state["_extra_state"] == extra and state["_extra_state"] is not extra
        assert list(state) == list(model.state_dict())
        model.load_state_dict(state)


def test_features_are_those_with_the_extra_state():
    """Matching a permuted copy needs each model's own: the factor -1 turns all correlations with the other's."""
    model = Extra({"n": 1})
    spec = derive_spec(model, IMAGES[:1])
    state = model.state_dict()
    moved = permute(spec, random_permutations(spec, torch.Generator().manual_seed(0)), state)

    def correlation(n):
        other = moved | {"_extra_state": {"n": n}}
        return merge([state, other], HALVES, batches=[IMAGES], model=model, spec=spec).matches[0].correlation

    assert correlation(-1) < 0.5 and correlation(3) > 0.99


class TokensDecide(nn.Module):
    """What way it goes depends on whole numbers that are put in, and not on any tensor of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.fc = nn.Embedding(5, 8), nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, tokens):
        mask = tokens != 0
        x = self.embed(tokens)
        if not mask.all():
            x = x * mask[..., None]
        return self.fc(self.hidden(x).relu().mean(1))


def test_values_of_tokens_may_decide():
    tokens = torch.tensor([[0, 1, 2, 3, 4]])
    spec = derive_spec(TokensDecide(), tokens)
    assert spec.sizes == {"embed.weight dim 1": 8, "hidden": 7}

    class Looks(TokensDecide):
        def forward(self, tokens):
            return super().forward(tokens) if self.embed(tokens).sum() > 0 else super().forward(tokens) * 2

    with pytest.raises(UnsupportedOperation, match="takes the values of a tensor out of the network"):
        derive_spec(Looks(), tokens)

    class Written(TokensDecide):
        def forward(self, tokens):
            chosen = tokens.clone()
            chosen[:, 0] = self.embed(tokens)[:, 0].argmax(-1)
            return super().forward(tokens) if chosen.sum() > 5 else super().forward(tokens) * 2

    with pytest.raises(UnsupportedOperation, match="takes the values of a tensor out of the network"):
        derive_spec(Written(), tokens)

    class Rarely(TokensDecide):
        """What the other way would use can't be seen, so that it must not stay as it is."""

        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 8)

        def forward(self, tokens):
            return super().forward(tokens) if (tokens < 5).all() else self.fc(self.hidden(self.other(tokens)))

    with pytest.raises(UnsupportedOperation, match="2 tensors are not used by the forward pass of this example: other"):
        derive_spec(Rarely(), tokens)


def test_constants_may_stay_in_a_cache():
    kept = {}

    class Cached(nn.Module):
        """It keeps positions outside of itself, and has a tensor that no pass uses."""

        def __init__(self):
            super().__init__()
            self.hidden, self.fc, self.mask = nn.Linear(6, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(3))

        def forward(self, x):
            if "positions" not in kept:
                kept["positions"] = torch.linspace(0, 1, 6, device=x.device)
            return self.fc(self.hidden(x + kept["positions"].to(x)).relu())

    spec = derive_spec(Cached(), torch.zeros(1, 6), check=False)
    assert spec.sizes == {"hidden": 8} and spec.fixed["mask"] == "the forward pass does not use it"
