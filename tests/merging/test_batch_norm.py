"""BatchNorm re-estimation: the cumulative average over one pass, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from merging.batch_norm import reestimate


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                         nn.Linear(3 * 36, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def batches(sizes=(5, 5, 5)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 8, 8, generator=generator) for size in sizes]


def test_statistics_are_averages_over_the_batches():
    model, data = network(), batches()
    state = reestimate(model, model.state_dict(), data)
    with torch.no_grad():
        outputs = [model[0](x) for x in data]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in outputs]).mean(0)
    torch.testing.assert_close(state["1.running_mean"], mean)
    torch.testing.assert_close(state["1.running_var"], variance)
    assert state["1.num_batches_tracked"] == 3 and state["1.num_batches_tracked"].dtype == torch.long


def test_dropout_stays_off():
    model, data = network(), batches()
    state = reestimate(model, model.state_dict(), data)
    with torch.no_grad():
        features = [model[5](nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(),
                                           nn.Flatten())(model[0](x))) for x in data]
    torch.testing.assert_close(state["6.running_mean"], torch.stack([f.mean(0) for f in features]).mean(0))


def test_the_model_the_state_and_the_momentum_are_unchanged():
    model, data = network(), batches()
    given = {key: value.clone() for key, value in network().state_dict().items()}
    before = copy.deepcopy(model.state_dict())
    fresh = reestimate(model, given, data)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    for key, value in network().state_dict().items():
        assert torch.equal(given[key], value), key
        if "running" not in key and "tracked" not in key:
            assert torch.equal(fresh[key], value), key
    assert list(fresh) == list(given)
    assert model[1].momentum == 0.3 and model[6].momentum == 0.1
    assert all(module.training for module in model.modules())


def test_it_starts_from_nothing_and_repeats_itself():
    model, data = network(), batches()
    once = reestimate(model, model.state_dict(), data)
    twice = reestimate(model, once, data)
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_a_leftover_batch_of_one_image_does_not_count():
    model = network()
    data = batches((5, 5, 1))
    assert torch.equal(reestimate(model, model.state_dict(), data)["1.running_var"],
                       reestimate(model, model.state_dict(), data[:2])["1.running_var"])


def test_labels_beside_the_images_are_ignored():
    model, data = network(), batches()
    pairs = [(x, torch.zeros(len(x))) for x in data]
    assert torch.equal(reestimate(model, model.state_dict(), pairs)["1.running_mean"],
                       reestimate(model, model.state_dict(), data)["1.running_mean"])


def test_a_batch_norm_used_twice_counts_both_uses():
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(norm, nn.Linear(2, 2), norm)
    state = reestimate(model, model.state_dict(), [torch.randn(6, 2)])
    assert state["0.num_batches_tracked"] == 2
    assert torch.equal(state["0.running_mean"], state["2.running_mean"])


class Sometimes(nn.Module):
    """It has a norm that only large batches pass, one that runs three times, and one that none passes."""

    def __init__(self):
        super().__init__()
        self.large, self.thrice, self.never = nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x):
        for _ in range(3):
            x = self.thrice(x).exp()
        return self.large(x) if len(x) > 4 else x


def test_each_norm_counts_the_calls_that_it_had():
    torch.manual_seed(0)
    model, data = Sometimes(), [torch.randn(size, 2) for size in (6, 3, 8)]
    found = {"thrice": [], "large": []}
    for x in data:
        for _ in range(3):
            found["thrice"].append(x)
            x = nn.functional.batch_norm(x, None, None, training=True).exp()
        found["large"] += [x] if len(x) > 4 else []
    state = reestimate(model, model.state_dict(), data)
    for name, inputs in found.items():
        assert state[f"{name}.num_batches_tracked"] == len(inputs)
        torch.testing.assert_close(state[f"{name}.running_mean"], torch.stack([x.mean(0) for x in inputs]).mean(0))
        torch.testing.assert_close(state[f"{name}.running_var"], torch.stack([x.var(0) for x in inputs]).mean(0))
    assert state["never.num_batches_tracked"] == 0 and state["never.running_var"].eq(1).all()


class Restoring(nn.Module):
    """It puts its norm's statistics back once it has used them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        y = self.norm(x)
        self.norm.reset_running_stats()
        return y


def test_statistics_count_as_they_are_right_after_the_norm():
    torch.manual_seed(0)
    model, data = Restoring(), [torch.randn(8, 2) + 3 for _ in range(2)]
    state = reestimate(model, model.state_dict(), data)
    torch.testing.assert_close(state["norm.running_mean"], torch.stack([x.mean(0) for x in data]).mean(0))
    assert state["norm.num_batches_tracked"] == 2


def test_no_batch_norm_no_pass():
    class Forbidden:
        def __iter__(self):
            raise AssertionError("read")

    for model in (nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))):
        state = model.state_dict()
        assert reestimate(model, state, Forbidden()) is state


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        reestimate(network(), network().state_dict(), iter(()))


class Scaled(nn.BatchNorm2d):
    """With a buffer that is no statistic."""

    def __init__(self, features):
        super().__init__(features)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.scale


def test_other_buffers_of_a_norm_are_the_models_own():
    model, data = nn.Sequential(Scaled(2), nn.BatchNorm2d(2)), [torch.randn(20, 2, 3, 3)]
    state = model.state_dict() | {"0.scale": torch.tensor(3.0)}
    new = reestimate(model, state, data)
    assert new["0.scale"] == 3
    torch.testing.assert_close(new["1.running_var"], torch.full((2,), 9.0), rtol=0.05, atol=0)
