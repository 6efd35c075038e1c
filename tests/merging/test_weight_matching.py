"""Weight matching recovers a permuted copy, improves on doing nothing, and gives the same answer twice."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from merging import weight_matching
from merging.permutation import derive_spec, identity, invert, permute, permute_tensor, random_permutations
from merging.weight_matching import match_weights
from models import build_model
from tests.merging.test_random_networks import DRAWN, STEPS, Network

MODELS = {
    "resnet20": {"width_multiplier": 1},
    "vgg16": {"width_multiplier": 1},
    "tv:densenet121": {},
    # Deep and narrow where it counts: descent that starts from the identity recovers none of its groups.
    "tv:mobilenet_v2": {},
}


def model_and_spec(name="resnet20", seed=0):
    torch.manual_seed(seed)
    model = build_model(name, 10, **MODELS[name])
    return model, derive_spec(model, torch.zeros(1, 3, 32, 32))


def similarity(spec, a, b, permutations):
    permuted = permute(spec, permutations, b)
    return sum(float((a[n].double() * t.double()).sum()) for n, t in permuted.items() if "running" not in n)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.long] * (name == "tv:densenet121")) for name in MODELS])
def test_a_permuted_copy_is_recovered_exactly(name):
    model, spec = model_and_spec(name)
    state = model.state_dict()
    permutations = random_permutations(spec, torch.Generator().manual_seed(1))
    found = match_weights(spec, state, permute(spec, invert(permutations), state))
    assert list(found) == list(spec.sizes)
    wrong = [group for group, p in permutations.items() if not torch.equal(found[group], p)]
    assert not wrong, f"{len(wrong)} of {len(spec.sizes)} groups are not recovered"


def test_a_noisy_permuted_copy_is_recovered():
    model, spec = model_and_spec()
    state = model.state_dict()
    permutations = random_permutations(spec, torch.Generator().manual_seed(1))
    noisy = {
        name: t + 0.3 * t.std() * torch.randn_like(t) if t.is_floating_point() and t.ndim > 1 else t
        for name, t in permute(spec, invert(permutations), state).items()
    }
    found = match_weights(spec, state, noisy)
    assert all(torch.equal(found[group], p) for group, p in permutations.items())


def test_independent_models_come_closer():
    model, spec = model_and_spec()
    a, b = model.state_dict(), model_and_spec(seed=1)[0].state_dict()
    before = {name: t.clone() for name, t in b.items()}
    found = match_weights(spec, a, b)
    assert similarity(spec, a, b, found) > similarity(spec, a, b, identity(spec)) * 1.02
    assert all(torch.equal(b[name], t) for name, t in before.items())


def perceptron():
    sizes = (4, 8, 8, 8, 3)
    layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_the_answer_is_a_local_optimum_and_the_same_twice():
    torch.manual_seed(0)
    for _ in range(20):
        model = perceptron()
        spec, a, b = derive_spec(model, torch.zeros(1, 4)), model.state_dict(), perceptron().state_dict()
        found = match_weights(spec, a, b)
        again = match_weights(spec, a, b)
        assert all(torch.equal(found[group], again[group]) for group in spec.sizes)
        best = similarity(spec, a, b, found)
        for group in spec.sizes:
            for first, second in combinations(range(8), 2):
                swapped = found[group].clone()
                swapped[[first, second]] = swapped[[second, first]]
                assert similarity(spec, a, b, found | {group: swapped}) <= best + 1e-9


def test_batch_norm_counts_by_its_affine_parameters_only():
    """Two units that differ in nothing but their BatchNorm are told apart by its weight, not by its statistics."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 4, 3))
    with torch.no_grad():
        for conv in (model[0], model[3]):
            conv.weight.fill_(0.1)
        model[1].weight.copy_(torch.tensor([1.0, 2.0]))
        model[1].running_mean.copy_(torch.tensor([9.0, 0.0]))
    spec, a = derive_spec(model, torch.zeros(1, 3, 8, 8)), model.state_dict()
    swap = {"0": torch.tensor([1, 0])}
    assert torch.equal(match_weights(spec, a, permute(spec, swap, a))["0"], swap["0"])
    # The same weights, the statistics swapped: nothing to gain.
    b = a | {"1.running_mean": a["1.running_mean"].flip(0)}
    assert torch.equal(match_weights(spec, a, b)["0"], torch.tensor([0, 1]))


def test_a_layer_that_feeds_itself_is_matched():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.fc = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            for _ in range(3):
                x = self.body(x).relu()
            return self.fc(x)

    torch.manual_seed(0)
    model = Recurrent()
    spec, state = derive_spec(model, torch.zeros(1, 6)), model.state_dict()
    permutations = random_permutations(spec, torch.Generator().manual_seed(1))
    found = match_weights(spec, state, permute(spec, invert(permutations), state))
    assert list(spec.sizes) == ["stem"] and torch.equal(found["stem"], permutations["stem"])


def test_no_sweep_is_an_error():
    model, spec = model_and_spec()
    with pytest.raises(ValueError, match="max_iterations=0"):
        match_weights(spec, model.state_dict(), model.state_dict(), max_iterations=0)


class Forgetful(weight_matching._Descent):
    """Every visit computes all of it anew, from tensors that are permuted whole."""

    def improve(self, group):
        self.visited.clear()
        return super().improve(group)

    def _similarity(self, group):
        similarity = torch.zeros(self.spec.sizes[group], self.spec.sizes[group], dtype=torch.float64)
        for member in self.members[group]:
            others = [(name, other) for name, other in self.spec.of_tensor[member.tensor] if other.dims != member.dims]
            if not all(name in self.settled for name, _ in others) or any(m.blocks for _, m in [("", member), *others]):
                continue
            theirs = permute_tensor(self.b[member.tensor], others, self.permutations)
            mine, theirs = (self.rows(t, member) for t in (self.a[member.tensor], theirs))
            similarity += mine @ theirs.T
        return similarity

    def rows(self, tensor, member):
        tensor = tensor.movedim(member.dims, tuple(range(len(member.dims)))).flatten(0, len(member.dims) - 1)
        return tensor[member.entries.flatten()].reshape(len(member.entries), -1)


def both_ways(spec, a, b, sweeps=100):
    """What is found by a descent that keeps what it computed, and by one that does not."""
    found = match_weights(spec, a, b, sweeps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_matching, "_Descent", Forgetful)
        return found, match_weights(spec, a, b, sweeps)


def same(found, expected):
    return list(found) == list(expected) and all(torch.equal(found[group], p) for group, p in expected.items())


@pytest.mark.parametrize("noise", [0.5, None])
@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_what_is_kept_changes_no_answer(name, noise):
    model, spec = model_and_spec(name)
    a, b = model.state_dict(), model_and_spec(name, seed=1)[0].state_dict()
    if noise:
        moved = permute(spec, random_permutations(spec, torch.Generator().manual_seed(1)), a)
        b = {key: t + noise * t.std() * torch.randn_like(t) if t.ndim > 1 else t for key, t in moved.items()}
    for sweeps in (1, 2, 100):
        assert same(*both_ways(spec, a, b, sweeps))


def pair_of(steps, seed=0):
    found = []
    for k in range(2):
        torch.manual_seed(2 * seed + k)
        model = Network(steps).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        found.append(model)
    return derive_spec(found[0], torch.zeros(2, 3, 4, 4), check=False), *(model.state_dict() for model in found)


@pytest.mark.long
@pytest.mark.parametrize("name", STEPS)
def test_what_is_kept_changes_no_answer_for_any_layer(name):
    """Between convolutions, and the same layer twice: units that feed themselves."""
    for steps in ([("conv", 0, False), (name, 1, False), ("conv", 0, False)],
                  [(name, 0, False), ("conv", 0, False), ("relu", 0, False), ("conv", 0, True), (name, 1, True)]):
        assert same(*both_ways(*pair_of(steps)))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(DRAWN)
def test_what_is_kept_changes_no_answer_for_random_networks(steps):
    assert same(*both_ways(*pair_of(steps)))


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_changes_no_answer_for_blocks(seed):
    """Heads of attention: units within blocks, whose pairing hangs on how the others within them are paired."""
    steps = [("conv", 0, False), ("attention", 0, False), ("grouped", 0, False), ("attention", 2, True)] * 2
    spec, a, b = pair_of(steps, seed)
    assert spec.blocks and same(*both_ways(spec, a, b))


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_what_has_not_moved_is_not_multiplied_again(name, monkeypatch):
    model, spec = model_and_spec(name)
    a, b = model.state_dict(), model_and_spec(name, seed=1)[0].state_dict()
    solved, multiplied = [], []

    def counting(into, function):
        return lambda *given: (into.append(given[-2].numel() if into is multiplied else 1), function(*given))[1]

    monkeypatch.setattr(weight_matching, "assign", counting(solved, weight_matching.assign))
    monkeypatch.setattr(weight_matching, "_rows", counting(multiplied, weight_matching._rows))
    found, kept = match_weights(spec, a, b), (sum(solved), sum(multiplied))
    monkeypatch.setattr(weight_matching, "_Descent", Forgetful)
    monkeypatch.setattr(Forgetful, "rows", counting(multiplied, Forgetful.rows))
    assert same(found, match_weights(spec, a, b))
    assert kept[0] <= 0.8 * (sum(solved) - kept[0])
    assert kept[1] <= 0.5 * (sum(multiplied) - kept[1])
