"""One merge: what comes out, what stays untouched, and how often images go through a model."""

import copy
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import merging
from merging import METHODS, Matching, Pairing, merge, register_method
from merging.activation_matching import Comparison
from merging.averaging import weighted_average
from merging.batch_norm import reestimate
from merging.permutation import derive_spec, permute, random_permutations
from models import build_model

BATCH, BATCHES = 4, 3
WAYS = [name for name, way in METHODS.items() if not way.aligned]
RING5 = [[1 / 3 if (i - j) % 5 in (0, 1, 4) else 0.0 for j in range(5)] for i in range(5)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, momentum=0.3)
        self.second, self.head = nn.Conv2d(6, 7, 3), nn.Linear(7, 3)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(x.mean((2, 3)))


def images(seed: int = 0, size: int = 8, channels: int = 2, batch: int = BATCH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, size, size, generator=generator) for _ in range(BATCHES)]


def nets(count: int) -> list[Net]:
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(Net())
        models[-1].load_state_dict(reestimate(models[-1], models[-1].state_dict(), images(seed)))
    return models


@pytest.fixture(scope="module")
def spec():
    return derive_spec(Net(), images()[0])


def assert_same(state, other, **tolerance):
    assert list(state) == list(other)
    for key in state:
        torch.testing.assert_close(state[key], other[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


class Forbidden:
    def __iter__(self):
        raise AssertionError("these images must not be read")


@pytest.fixture
def counted():
    """Images that went through a layer named in the list: (first weight of the layer) -> images."""
    seen: dict[float, int] = {}

    def hook(module, inputs, output):
        if isinstance(module, nn.Conv2d) and module.in_channels == 2:
            key = float(module.weight.flatten()[0])
            seen[key] = seen.get(key, 0) + len(inputs[0])

    handle = register_module_forward_hook(hook)
    yield seen
    handle.remove()


def key_of(state) -> float:
    return float(state["first.weight"].flatten()[0])


# A permuted copy of a model merges back into the model


@pytest.fixture(scope="module", params=["resnet20", "vgg16"])
def calibrated(request):
    """A width-1 model whose BatchNorm was calibrated by one pass and then given a random affine map."""
    torch.manual_seed(0)
    model = build_model(request.param, 10, width_multiplier=1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.3, 0.2)
    data = images(size=32, channels=3, batch=16)
    model.load_state_dict(reestimate(model, model.state_dict(), data))
    return model.eval(), data, derive_spec(model, data[0])


@pytest.mark.parametrize("method", ["DIMAT", "WM", "WA"])
def test_a_permuted_copy_merges_back(calibrated, method):
    model, data, spec = calibrated
    state = model.state_dict()
    moved = permute(spec, random_permutations(spec, torch.Generator().manual_seed(1)), state)
    merged = merge([state, moved], [[0.7, 0.3], [0.4, 0.6]], method, data, model=model, spec=spec, bn_reset="none")
    if method == "WA":
        assert max((merged[0][key] - state[key]).abs().max() for key in state if "weight" in key) > 0.1
    else:
        assert_same(merged[0], state)
        assert_same(merged[1], moved)


# The arithmetic


def test_weighted_average_is_the_sum_and_keeps_integers():
    states = [{"w": torch.tensor([1.0, 3.0]), "n": torch.tensor(k), "h": torch.ones(1, dtype=torch.float16)}
              for k in (5, 7)]
    states[1]["w"] = torch.tensor([10.0, -1.0])
    average = weighted_average(states, [0.25, 0.75], own=1)
    assert average["w"].tolist() == [7.75, 0.0]
    assert average["n"].item() == 7 and average["n"].dtype == torch.long and average["h"].dtype == torch.float16
    states[1]["n"].add_(1)
    assert average["n"].item() == 7
    with pytest.raises(ValueError, match="one weight for each"):
        weighted_average(states, [1.0])


def test_equal_states_average_to_themselves():
    state = {"w": torch.randn(1000)}
    assert torch.equal(weighted_average([state] * 3, [1 / 3] * 3)["w"], state["w"])


def test_for_fixed_permutations_a_merge_is_linear(spec, monkeypatch):
    fixed = {(i, j): random_permutations(spec, torch.Generator().manual_seed(10 * i + j))
             for i in range(3) for j in range(3)}
    monkeypatch.setitem(merging.METHODS, "FIXED", merging.Method(lambda *_, **__: fixed))
    weights = [[0.5, 0.2, 0.3], [0.1, 0.9, 0.0], [0.3, 0.3, 0.4]]

    def run(states):
        return merge(states, weights, "FIXED", model=Net(), spec=spec, bn_reset="none")

    a, b = ([{k: v.double() for k, v in net.state_dict().items()} for net in nets(6)[s : s + 3]] for s in (0, 3))
    both = [{key: 2 * x[key] - 3 * y[key] for key in x} for x, y in zip(a, b, strict=True)]
    for combined, x, y in zip(run(both), run(a), run(b), strict=True):
        assert_same(combined, {key: 2 * x[key] - 3 * y[key] for key in x}, rtol=0, atol=1e-12)


def test_each_agent_merges_in_its_own_order_of_units(spec):
    """Agents that are permuted copies of one model get exactly their own copy back, whatever the graph."""
    model = nets(1)[0]
    states = [permute(spec, random_permutations(spec, torch.Generator().manual_seed(i)), model.state_dict())
              for i in range(5)]
    for kind in ({"batches": images()}, {"local_batches": [images(seed) for seed in range(5)]}):
        for i, merged in enumerate(merge(states, RING5, "DIMAT", model=model, spec=spec, bn_reset="none", **kind)):
            assert_same(merged, states[i])


def test_an_own_weight_of_zero_keeps_the_own_order_and_buffers(spec):
    model = nets(1)[0]
    states = [permute(spec, random_permutations(spec, torch.Generator().manual_seed(i)), model.state_dict())
              for i in range(3)]
    for i, state in enumerate(states):
        state["norm.num_batches_tracked"] = torch.tensor(i)
    path = [[0, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5]]
    merged = merge(states, path, batches=images(), model=model, bn_reset="none")
    assert_same(merged[0], states[0])


# Passes: an image goes through a model only where the method needs it


@pytest.mark.parametrize(
    ("method", "bn_reset", "agent_passes", "merged_passes"),
    [("DIMAT", "both", 2, 1), ("DIMAT", "after", 1, 1), ("DIMAT", "none", 1, 0), ("WA", "after", 0, 1),
     ("WA", "both", 0, 1), ("WM", "both", 0, 1), ("WM", "none", 0, 0)],
)
def test_passes_over_a_ring(spec, counted, method, bn_reset, agent_passes, merged_passes):
    models = nets(5)
    counted.clear()
    merged = merge(models, RING5, method, images(), spec=spec, bn_reset=bn_reset)
    expected = {key_of(model.state_dict()): agent_passes for model in models}
    expected |= {key_of(state): merged_passes for state in merged}
    assert counted == {key: passes * BATCH * BATCHES for key, passes in expected.items() if passes}


def test_equal_rows_merge_once_for_all(spec, counted):
    models = nets(3)
    counted.clear()
    merged = merge(models, torch.full((3, 3), 1 / 3), "DIMAT", images(), spec=spec, bn_reset="both")
    assert merged[1] is merged[0] and merged[2] is merged[0]
    total = BATCH * BATCHES
    assert counted == {key_of(merged[0]): total} | {key_of(model.state_dict()): 2 * total for model in models}
    rows = [[1 / 3] * 3, [0.2, 0.4, 0.4], [0.2, 0.4, 0.4]]
    assert_same(merged[0], merge(models, rows, batches=images(), spec=spec, bn_reset="both")[0])


def test_equal_rows_with_local_images_merge_in_every_order(spec):
    models = nets(3)
    merged = merge(models, [[1 / 3] * 3] * 3, local_batches=[images(seed) for seed in range(3)], spec=spec)
    assert len({id(state) for state in merged}) == 3
    assert not torch.equal(merged[0]["first.weight"], merged[1]["first.weight"])


@pytest.mark.parametrize("bn_reset", ["none", "after", "both"])
def test_a_unit_row_is_untouched_and_costs_nothing(spec, counted, bn_reset):
    models = nets(3)
    counted.clear()
    merged = merge(models, [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]], "DIMAT", images(), spec=spec, bn_reset=bn_reset)
    assert_same(merged[2], models[2].state_dict(), rtol=0, atol=0)
    assert merged[2]["first.weight"].data_ptr() != models[2].first.weight.data_ptr()
    assert key_of(models[2].state_dict()) not in counted
    assert key_of(models[0].state_dict()) in counted


def test_agents_on_their_own_read_nothing():
    models = nets(2)
    for method in WAYS:
        merged = merge(models, torch.eye(2), method, Forbidden())
        assert_same(merged[1], models[1].state_dict(), rtol=0, atol=0)


# Local images


def test_local_images_serve_their_agent_only(spec):
    """Agent 0 merges with 1; nobody reads what belongs to 2, and before the reset 1's images serve only 1."""
    models, weights = nets(3), [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]
    merged = merge(models, weights, local_batches=[images(0), Forbidden(), Forbidden()], spec=spec, bn_reset="after")
    assert_same(merged[1], models[1].state_dict())
    with pytest.raises(AssertionError, match="must not be read"):
        merge(models, weights, local_batches=[images(0), Forbidden(), None], spec=spec, bn_reset="both")
    both = merge(models, weights, local_batches=[images(0), images(1), None], spec=spec, bn_reset="both")
    reset = [reestimate(net, net.state_dict(), images(i)) for i, net in enumerate(nets(2))]
    expected = merge(reset, [[0.5, 0.5], [0, 1]], local_batches=[images(0), None], model=Net(), spec=spec,
                     bn_reset="after")
    assert_same(both[0], expected[0], rtol=0, atol=0)
    assert_same(both[1], models[1].state_dict(), rtol=0, atol=0)


def test_every_agent_matches_its_own_edges_on_its_own_images(spec, monkeypatch):
    calls = []
    monkeypatch.setitem(merging.METHODS, "RECORD", merging.Method(
        lambda spec, model, states, pairs, batches, **_: calls.append((pairs, batches)) or {}, reads_images=True))
    own = [images(seed) for seed in range(3)]
    path = [[0.5, 0.5, 0], [0.2, 0.4, 0.4], [0, 0.5, 0.5]]
    merge(nets(3), path, "RECORD", local_batches=own, spec=spec, bn_reset="none")
    assert [pairs for pairs, _ in calls] == [[(0, 1)], [(1, 0), (1, 2)], [(2, 1)]]
    assert all(batches is data for (_, batches), data in zip(calls, own, strict=True))


def test_local_passes(spec, counted):
    models = nets(5)
    counted.clear()
    merged = merge(models, RING5, local_batches=[images(seed) for seed in range(5)], spec=spec, bn_reset="both")
    total = BATCH * BATCHES  # itself: reset once, matched on its own images; and on each of two neighbours'
    assert counted == {key_of(m.state_dict()): 4 * total for m in models} | {key_of(s): total for s in merged}


def test_the_merged_model_is_reset_on_its_agents_images(spec):
    models, own = nets(2), [images(0), images(5)]
    merged = merge(models, [[0.5, 0.5], [0.4, 0.6]], "WA", local_batches=own, spec=spec)
    for state, data in zip(merged, own, strict=True):
        assert_same(state, reestimate(Net(), state, data), rtol=0, atol=0)


# What a method brings


@pytest.fixture
def registered():
    """What is registered within a test is forgotten after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


def test_a_method_gets_what_is_set_of_it(spec, registered):
    @dataclass(frozen=True)
    class Turning(Matching):
        turn: int = 1

    @register_method("TURN", options=Turning)
    def turn(spec, model, states, pairs, batches, *, matching):
        return {pair: {group: torch.arange(size).roll(matching.turn) for group, size in spec.sizes.items()}
                for pair in pairs}

    assert METHODS["TURN"].option_names == ("at", "memory", "prior", "turn")
    states = [net.state_dict() for net in nets(2)]
    for matching, turned in ((None, 1), (Turning(turn=2), 2), (Turning(turn=0), 0)):
        merged = merge(states, HALVES, "TURN", model=Net(), spec=spec, bn_reset="none", matching=matching)
        expected = 0.5 * states[0]["first.bias"] + 0.5 * states[1]["first.bias"].roll(turned)
        torch.testing.assert_close(merged[0]["first.bias"], expected)
    with pytest.raises(ValueError, match="matching is a Matching: method='TURN' takes a Turning"):
        merge(states, HALVES, "TURN", model=Net(), spec=spec, bn_reset="none", matching=Matching())


def test_a_method_may_average_in_its_own_way(spec, registered):
    """Which gets the models in the agent's order of units, and says what comes out; BatchNorm is reset as ever."""
    def largest(states, weights, own):
        assert weights == [[0.5, 0.5], [0.4, 0.6]][own]
        return {key: torch.maximum(states[0][key], states[1][key]) for key in states[own]}

    @register_method("LARGEST", average=largest)
    def swap(spec, model, states, pairs, batches, *, matching):
        assert matching is None
        return {pair: Pairing({group: torch.arange(size).flip(0) for group, size in spec.sizes.items()}, {"norm": 0.25})
                for pair in pairs}

    states = [net.state_dict() for net in nets(2)]
    merged = merge(states, HALVES, "LARGEST", images(), model=Net(), spec=spec, bn_reset="after")
    for own, other, result in zip(states, states[::-1], merged, strict=True):
        assert torch.equal(result["first.bias"], torch.maximum(own["first.bias"], other["first.bias"].flip(0)))
        assert_same(result, reestimate(Net(), result, images()), rtol=0, atol=0)
    with pytest.raises(ValueError, match="'LARGEST' averages in its own way: leave robust='median' out"):
        merge(states, HALVES, "LARGEST", model=Net(), spec=spec, bn_reset="none", robust="median")


def test_an_aligned_method_wants_to_hear_that_the_models_are_aligned():
    """Else it would be plain averaging under another name."""
    models = nets(2)
    with pytest.raises(ValueError, match=r"method='COMMON' averages .*common_basis\.align.* lent=True.* method='WA'"):
        merge(models, HALVES, "COMMON", images())
    merged, average = (merge(models, HALVES, method, images(), lent=True) for method in ("COMMON", "WA"))
    assert_same(merged[1], average[1], rtol=0, atol=0)


def test_lent_models_are_not_prepared_again(spec, counted):
    """What `outgoing` does at their owners' is all that bn_reset does before the merge."""
    models = nets(3)
    path = [[0.5, 0.5, 0], [0.2, 0.4, 0.4], [0, 0.5, 0.5]]
    for bn_reset in merging.BN_RESETS:
        whole = merge(models, path, "DIMAT", images(), spec=spec, bn_reset=bn_reset)
        lent = [merging.outgoing(model, model.state_dict(), images(), bn_reset, compared=True) for model in models]
        own = torch.equal(lent[1]["norm.running_mean"], models[1].norm.running_mean)
        assert own == (bn_reset not in ("both", "repair"))
        counted.clear()
        parts = merge(lent, path, "DIMAT", images(), model=Net(), spec=spec, bn_reset=bn_reset, lent=True)
        if bn_reset != "repair":
            assert [counted[key_of(model.state_dict())] for model in models] == [BATCH * BATCHES] * 3  # matching
        assert parts.matches == whole.matches
        for one, other in zip(parts, whole, strict=True):
            assert_same(one, other, rtol=0, atol=0)


# Nothing that is passed in changes


@pytest.mark.parametrize("method", ["DIMAT", "WM", "WA"])
def test_models_and_momentum_stay_as_they_were(method):
    models = nets(3)
    models[0].first.weight.grad = torch.ones_like(models[0].first.weight)
    before = copy.deepcopy([model.state_dict() for model in models])
    weights = [[0.4, 0.3, 0.3], [0.2, 0.4, 0.4], [0.2, 0.4, 0.4]]
    merged = merge(models, weights, method, [(x, 0) for x in images()], bn_reset="both")
    for model, state in zip(models, before, strict=True):
        assert_same(model.state_dict(), state, rtol=0, atol=0)
        assert model.norm.momentum == 0.3 and all(module.training for module in model.modules())
    assert not any(value.requires_grad for state in merged for value in state.values())
    Net().load_state_dict(merged[0])


# Errors before work


def broken(change):
    states = [net.state_dict() for net in nets(2)]
    change(states[1])
    return states


HALVES = [[0.5, 0.5], [0.4, 0.6]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": [[1.0]]}, r"shape \(2, 2\), not \(1, 1\)"),
        ({"weights": [[1.5, -0.5], [0.5, 0.5]]}, "not negative"),
        ({"weights": [[float("nan"), 0.5], [0.5, 0.5]]}, "finite"),
        ({"weights": [[0.5, 0.5], [0.5, 0.4]]}, "row 1 sums to 0.9"),
        ({"matching": Comparison()}, "matching is a Comparison: method='DIMAT' takes a Matching"),
        ({"method": "x" * 1000}, r"unknown merge method 'x{79}: choose"),
        ({"method": "XYZ"}, "'XYZ': choose from DIMAT, WM, C2M3, WA, COMMON"),
        ({"bn_reset": "sometimes"}, "'sometimes': choose from none, after, both, repair"),
        ({"batches": None, "bn_reset": "none"}, "method='DIMAT'.*batches is None"),
        ({"batches": None, "method": "WA"}, "bn_reset='both'.*batches is None"),
        ({"batches": None, "local_batches": [[torch.ones(1)], None]}, r"local_batches\[1\] is None"),
        ({"batches": None, "local_batches": [[torch.ones(1)]]}, "got 1 for 2 agents"),
        ({"local_batches": [[], []]}, "not both"),
        ({"batches": []}, "no images"),
        ({"batches": iter(images())}, "batches is an iterator, which can be read only once"),
        ({"models_or_states": [net.state_dict() for net in nets(2)]}, "model="),
        ({"models_or_states": []}, "at least one model"),
        ({"models_or_states": broken(lambda s: s.pop("norm.bias")), "model": Net()}, r"agent 1.*lacks 'norm.bias'"),
        ({"models_or_states": broken(lambda s: s.update(more=torch.ones(1))), "model": Net()}, "agent 1.*'more'"),
        ({"models_or_states": broken(lambda s: s.update({"head.bias": torch.ones(9)})), "model": Net()},
         r"agent 1's 'head.bias' has shape \(9,\)"),
        ({"models_or_states": broken(lambda s: s.update({"head.bias": torch.full((3,), torch.inf)})), "model": Net()},
         "agent 1's 'head.bias' has NaN or infinite"),
        ({"agents": [7]}, r"agents=\[7\]: there are agents 0 to 1"),
        ({"agents": [0.5]}, r"agents=\[0\.5\]: there are agents 0 to 1"),
        ({"models_or_states": ["models.pt", Net()]}, "agent 0's model is a str: pass models or state dicts"),
        ({"model": "resnet20"}, "model= is a str: pass the architecture"),
        ({"weights": torch.eye(2, device="meta")}, "the weights are without values"),
        ({"batches": [torch.ones(2, 2, 8, 8, device="meta")]}, "the images of a batch are .* without values"),
        ({"batches": [torch.ones(2, 2, 8, 8).to_sparse()]}, "the images of a batch are sparse"),
        ({"spec": {}}, "spec= is a dict: pass what derive_spec returns"),
        ({"models_or_states": [None, *nets(2)], "weights": [[0, 0.5, 0.5]] * 3, "agents": [1]},
         "agent 0 merges others' models, in the order of its own, which is None"),
        ({"batches": 5}, "batches is a int: pass a list of batches"),
        ({"batches": {"image": images()[0]}}, "batches is a dict: pass a list of batches"),
    ],
)
def test_errors_come_before_the_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge(**({"models_or_states": nets(2), "weights": HALVES, "batches": images()} | arguments))


ODD = {
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "meta": lambda t: t.to("meta"),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "lazy": lambda t: nn.parameter.UninitializedParameter(),
    "integer": lambda t: t.long(),
    "list": lambda t: t.tolist(),
}


@pytest.mark.filterwarnings("ignore:.*(quantiz|nested tensors|Sparse)")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("method", WAYS)
def test_tensors_that_cannot_be_averaged_are_named(kind, method):
    states = [net.state_dict() for net in nets(2)]
    states[1]["head.weight"] = ODD[kind](states[1]["head.weight"])
    with pytest.raises(ValueError, match=r"^agent 1's 'head\.weight' is "):
        merge(states, HALVES, method, images(), model=Net())


def test_an_architecture_without_values_is_named():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"`model`'s tensor for agent 0's 'first\.weight' is without values"):
        merge([net.state_dict() for net in nets(2)], HALVES, batches=images(), model=model)


def test_tensors_of_unusual_make_merge_like_others(spec):
    """With a history of gradients, spread from one value, not contiguous."""
    states = [net.state_dict() for net in nets(2)]
    states[1]["head.bias"] = torch.ones(3)
    expected = merge(states, HALVES, batches=images(), model=Net(), spec=spec)
    states[1]["head.bias"] = torch.ones(1).expand(3)
    states[1]["second.weight"] = states[1]["second.weight"].requires_grad_() * 1
    states[1]["head.weight"] = states[1]["head.weight"].T.contiguous().T
    for weights in (HALVES, torch.eye(2)):
        merged = merge(states, weights, batches=images(), model=Net(), spec=spec)
        assert not any(tensor.requires_grad for tensor in merged[1].values())
        merged[1]["head.bias"][0] = 7
        assert merged[1]["head.bias"][1] != 7 and (states[1]["head.bias"] == 1).all()
        if weights is HALVES:
            assert_same(merged[0], expected[0])


# Batches


WRAPS = [
    lambda x: (x, torch.rand(len(x))), lambda x: [x, torch.rand(len(x)), "path"], lambda x: {"image": x, "label": 0.5},
    lambda x: {"labels": torch.rand(len(x)), "pixel_values": x}, lambda x: {"x": x}, lambda x: {"input": x},
    lambda x: UserDict(images=x),
]


@pytest.mark.parametrize("options", [{}, {"method": "WA", "bn_reset": "repair"}])
def test_batches_hold_images_in_one_of_these_ways(spec, options):
    models = nets(2)
    expected = merge(models, HALVES, batches=images(), spec=spec, **options)
    for wrap in WRAPS:
        merged = merge(models, HALVES, batches=[wrap(x) for x in images()], spec=spec, **options)
        assert_same(merged[0], expected[0], rtol=0, atol=0)
    assert_same(merge(models, HALVES, batches=[wrap(x) for x in images()], **options)[0], expected[0])  # without spec


@pytest.mark.parametrize(("batch", "message"), [
    ({"picture": torch.ones(2, 2, 8, 8)}, "a dict with the keys 'picture', none of which is one of 'image', 'images'"),
    ({"image": "cat.png"}, "the images of a batch are of type str: a batch is a tensor of images"),
    ([], "of type list"), ((3, torch.ones(2, 2, 8, 8)), "of type int"), (torch.tensor(1.0), "a single number"),
])
@pytest.mark.parametrize("options", [{}, {"method": "WA"}, {"method": "WA", "bn_reset": "repair"}])
def test_batches_without_images_are_refused(batch, message, options):
    with pytest.raises(ValueError, match=message):
        merge(nets(2), HALVES, batches=[batch], **options)


def test_empty_batches_are_left_out(spec):
    nothing = torch.ones(0, 2, 8, 8)
    merged = merge(nets(2), HALVES, batches=[nothing, *images(), nothing], bn_reset="repair")
    assert_same(merged[0], merge(nets(2), HALVES, batches=images(), bn_reset="repair")[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="no images"):
        merge(nets(2), HALVES, batches=[nothing], spec=spec)


@pytest.mark.parametrize("method", ["DIMAT", "WM"])
def test_a_module_under_two_names_is_merged_once_and_the_same(method):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.again = self.middle

        def forward(self, x):
            x = torch.relu(self.middle(torch.relu(self.first(x))))
            return self.last(torch.relu(self.again(x)))

    torch.manual_seed(0)
    models = [Tied() for _ in range(2)]
    for state in merge(models, [[0.5, 0.5], [0.5, 0.5]], method=method, batches=[torch.randn(50, 4)]):
        assert torch.equal(state["middle.weight"], state["again.weight"])
        models[0].load_state_dict(state)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"at": "first"}, "at='first': choose from last, all"),
    ({"prior": "strong"}, "'strong': choose from none, identity"),
])
def test_what_cannot_be_set_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        Matching(**arguments)


def test_the_result_is_a_sequence_of_models():
    models = nets(3)
    merged = merge(models, [[0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5]], "WM", images(), agents=[0])
    assert len(merged) == 3 and merged[0] is merged.states[0] and merged[1:] == [None, None]
    assert [state is not None for state in merged] == [True, False, False]
    assert {(match.agent, match.neighbour) for match in merged.matches} == {(0, 1)}
    assert [state is not None for state in merge(models, torch.eye(3), "WM", images(), agents=[True])] == [
        False, True, False]


def test_matches_say_how_well_units_matched_and_how_many_moved():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    state = model.state_dict()
    moved = permute(derive_spec(model, torch.zeros(1, 4)), {"0": torch.tensor([1, 0, 2, 3, 4, 5]),
                                                           "2": torch.tensor([4, 3, 2, 1, 0])}, state)
    images = [torch.randn(200, 4)]
    for method in ("DIMAT", "WM", "WA"):
        matches = merge([state, moved], [[0.5, 0.5], [0.4, 0.6]], method=method, batches=images, model=model).matches
        rows = [(match.agent, match.neighbour, match.group, match.units, match.moved) for match in matches]
        if method == "WA":
            assert not rows
            continue
        assert rows == [(i, 1 - i, group, units, pytest.approx(share))
                        for i in range(2) for group, units, share in (("0", 6, 2 / 6), ("2", 5, 4 / 5))]
        expected = 1.0 if method == "DIMAT" else None
        assert all(match.correlation == (pytest.approx(expected) if expected else None) for match in matches)
