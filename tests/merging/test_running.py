"""Networks as people have them: right from training, in several precisions, choosy about their inputs.

Whatever their code does, they merge, or a ValueError says what kept them from it.
"""

import copy
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from merging import METHODS, merge
from merging.permutation import derive_spec, permute, random_permutations, spec_from_axes, verify
from merging.running import own_copy

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


def random_dropout(m, x):
    return F.dropout(x.relu(), 0.5, True)


def cached(m, x):
    """Keeps what it made of a parameter."""
    m.cache = getattr(m, "cache", None)
    m.cache = m.a.bias * 2 if m.cache is None else m.cache
    return (x + m.cache).relu()


def test_what_depends_on_more_than_inputs_and_tensors_is_not_the_specs_fault():
    with pytest.raises(ValueError, match="Net puts out other values for the same inputs and tensors"):
        derive_spec(Net(random_dropout), IMAGES[:1])
    with pytest.raises(ValueError, match="Net keeps values from one forward pass to the next"):
        derive_spec(Net(cached), IMAGES[:1])
    with pytest.raises(ValueError, match="group 'h' changes the outputs"):
        spec_from_axes(Net(), WRONG[0], example=IMAGES[:1])


def test_inputs_that_are_no_tensors_are_passed_on():
    class Scaled(Net):
        def forward(self, x, times, offset):
            return super().forward(x) * times + offset

    assert derive_spec(Scaled(), (IMAGES[:1], 2, torch.tensor(3.0))).sizes == {"a": 8}
    with pytest.raises(ValueError, match="tuple of the forward pass's inputs, not a dict"):
        derive_spec(Net(), {"x": IMAGES[:1]})
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
    model = Net()
    model.register_buffer("vector", torch.ones(8))
    with pytest.raises(ValueError, match=r"not used by the forward pass.*vector"):
        merge([model, copy.deepcopy(model)], HALVES, batches=[IMAGES])


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
