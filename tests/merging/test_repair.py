"""REPAIR: the merged model's layers put out what their parents do on average."""

import copy

import pytest
import torch
from torch import nn

from merging import merge
from merging.averaging import weighted_average
from merging.permutation import derive_spec, permute, random_permutations
from merging.repair import repair, unnormalised


def images(seed: int = 0, sizes=(40, 40, 40), channels: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, channels, 8, 8, generator=generator) for size in sizes]


def plain(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(160, 9), nn.ReLU(), nn.Linear(9, 3))


def states(count: int = 3) -> list[dict]:
    return [plain(seed).state_dict() for seed in range(count)]


def moments(model, state, layer: str, batches):
    model = copy.deepcopy(model)
    model.load_state_dict(state)
    seen = []
    model.get_submodule(layer).register_forward_hook(lambda _, __, y: seen.append(y.detach()))
    for x in batches:
        model(x)
    y = torch.cat(seen).transpose(0, 1).flatten(1)
    return y.mean(1), y.std(1, correction=0)


def test_every_layer_puts_out_the_parents_statistics():
    """Of one batch exactly: what is corrected before is seen by the layers behind."""
    model, batches, weights = plain(), images(sizes=(100,)), [0.5, 0.3, 0.2]
    merged = weighted_average(states(), weights)
    repaired = repair(model, merged, states(), weights, batches)
    for layer in ("0", "2", "5"):
        goals = [moments(model, state, layer, batches) for state in states()]
        for k, actual in enumerate(moments(model, repaired, layer, batches)):
            expected = sum(weight * goal[k] for weight, goal in zip(weights, goals, strict=True))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        assert (moments(model, merged, layer, batches)[1] < 0.9 * expected).any()  # deviations had shrunk
    assert torch.equal(repaired["7.weight"], merged["7.weight"]) and torch.equal(repaired["7.bias"], merged["7.bias"])


def test_layers_behind_one_without_bias_see_what_it_can_do():
    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 12, 3, bias=False), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(),
                             nn.Conv2d(10, 4, 3, bias=False), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(12, 3))

    given, batches = [network(seed).state_dict() for seed in range(2)], images(sizes=(100,))
    repaired = repair(network(0), weighted_average(given, [0.5, 0.5]), given, [0.5, 0.5], batches)
    for layer in ("2", "5"):
        goals = [moments(network(0), state, layer, batches) for state in given]
        for k, actual in enumerate(moments(network(0), repaired, layer, batches)):
            torch.testing.assert_close(actual, (goals[0][k] + goals[1][k]) / 2, rtol=1e-4, atol=1e-5)


def test_a_leftover_image_says_nothing_about_deviations():
    given, weights = states(2), [0.5, 0.5]
    merged, batches = weighted_average(given, weights), images(sizes=(40, 1))
    torch.testing.assert_close(repair(plain(), merged, given, weights, batches),
                               repair(plain(), merged, given, weights, batches[:1]), rtol=0, atol=0)


def test_identical_parents_change_nothing_over_several_batches():
    model, same = plain(), states(1) * 3
    repaired = repair(model, weighted_average(same, [0.5, 0.3, 0.2]), same, [0.5, 0.3, 0.2], images(sizes=(40, 30, 7)))
    for key, value in same[0].items():
        torch.testing.assert_close(repaired[key], value, rtol=1e-5, atol=1e-6)


def test_nothing_that_is_passed_in_changes():
    model, given, weights = plain(), states(), [0.5, 0.3, 0.2]
    merged = weighted_average(given, weights)
    before = [copy.deepcopy(state) for state in (model.state_dict(), merged, *given)]
    model.train()
    repair(model, merged, given, weights, images())
    assert model.training
    for now, then in zip((model.state_dict(), merged, *given), before, strict=True):
        assert all(torch.equal(now[key], then[key]) for key in then)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.shared, self.head = nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 3)
        self.once = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = x + self.second(x).relu()
        x = self.once(self.shared(self.shared(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


def test_which_layers_it_is_for():
    assert unnormalised(plain(), images()[0]) == ["0", "2", "5"]
    assert unnormalised(Mixed().eval(), images()[0]) == ["second", "once"]


class Odd(nn.Module):
    """Two layers that share a weight, one under two names, and one whose weight is made of others."""

    def __init__(self):
        super().__init__()
        self.first, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.again = nn.ModuleList([nn.Linear(4, 4)])
        self.alias = self.again[0]
        self.made = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.plain, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        for layer in (self.first, self.tied, self.alias, self.made, self.plain):
            x = layer(x).relu() + 0.1
        return self.head(x)


def test_weights_that_have_several_owners_or_none_are_left_alone():
    assert unnormalised(Odd(), torch.randn(5, 4)) == ["plain"]
    given = [Odd().state_dict() for _ in range(2)]
    merged = weighted_average(given, [0.5, 0.5])
    repaired = repair(Odd(), merged, given, [0.5, 0.5], [torch.randn(50, 4)])
    # Whoever owns the last one: it is the answer.
    last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), last)
    assert unnormalised(network, torch.randn(5, 4)) == ["0", "2"]
    assert {key for key in merged if not torch.equal(merged[key], repaired[key])} == {"plain.weight", "plain.bias"}


def test_old_batch_norm_statistics_have_no_say():
    given = [Mixed().state_dict() for _ in range(2)]
    merged = weighted_average(given, [0.5, 0.5])
    stale = merged | {"norm.running_var": merged["norm.running_var"] * 100}
    one, other = (repair(Mixed(), state, given, [0.5, 0.5], images()) for state in (merged, stale))
    assert torch.equal(one["second.weight"], other["second.weight"])
    assert torch.equal(other["norm.running_var"], stale["norm.running_var"])


def test_a_layer_without_bias_is_rescaled_only():
    models = [Mixed() for _ in range(2)]
    given = [model.state_dict() for model in models]
    merged = weighted_average(given, [0.5, 0.5])
    repaired = repair(models[0], merged, given, [0.5, 0.5], images())
    changed = {key for key in merged if not torch.equal(merged[key], repaired[key])}
    assert changed == {"second.weight", "second.bias", "once.weight"}
    ratio = repaired["once.weight"] / merged["once.weight"]
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_a_model_that_needs_none_makes_no_pass():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))  # its copies' too
    state = model.state_dict()
    assert repair(model, state, [state], [1.0], images()) is state
    assert len(seen) == 1  # to see which layers there are


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_dead_unit_stays_finite(value):
    model, given = plain(), states(2)
    for state in given:
        state["0.weight"][3] = 0
        state["0.bias"][3] = value
    repaired = repair(model, weighted_average(given, [0.5, 0.5]), given, [0.5, 0.5], images())
    assert all(tensor.isfinite().all() for tensor in repaired.values())
    torch.testing.assert_close(repaired["0.bias"][3], torch.tensor(value))


def test_merge_repairs_permuted_parents():
    """In merge; the mean over the units doesn't depend on their order."""
    batches, given = images(sizes=(100,)), states()
    weights = [[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [1 / 3] * 3]
    merged = merge(given, weights, "DIMAT", batches, model=plain(), bn_reset="repair")
    shrunk = merge(given, weights, "DIMAT", batches, model=plain(), bn_reset="none")
    for i in range(3):
        of_parents = [moments(plain(), state, "2", batches)[1].mean() for state in given]
        goal = sum(weight * value for weight, value in zip(weights[i], of_parents, strict=True))
        torch.testing.assert_close(moments(plain(), merged[i], "2", batches)[1].mean(), goal, rtol=1e-4, atol=0)
        assert moments(plain(), shrunk[i], "2", batches)[1].mean() < 0.8 * goal
    spec = derive_spec(plain(), batches[0])
    copies = [given[0], permute(spec, random_permutations(spec, torch.Generator().manual_seed(0)), given[0])]
    same = merge(copies, [[0.7, 0.3], [0.4, 0.6]], "DIMAT", batches, model=plain(), bn_reset="repair")
    for merged, expected in zip(same, copies, strict=True):  # once permuted, the parents are identical
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="bn_reset='repair' reads images"):
        merge(given, weights, "WA", model=plain(), bn_reset="repair")
