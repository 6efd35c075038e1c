"""Models that train at once become what they become one after the other."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import build_model
from models.at_once import scores_of, train_at_once
from models.training import Adjusted, Diverged, make_optimizer, train_epoch

SIZES = {"a": [4, 4, 3], "b": [4, 4, 3], "c": [4, 2], "d": [4]}  # of each model's batches


def models_and_batches(name: str = "resnet20", **how) -> tuple[dict[str, nn.Module], dict[str, list]]:
    g = torch.Generator().manual_seed(0)
    models = {key: build_model(name, 10, in_channels=1, image_size=8, width_multiplier=1, seed=k, **how).double()
              for k, key in enumerate(SIZES)}
    batches = {key: [(torch.rand(n, 1, 8, 8, generator=g, dtype=torch.float64),
                      torch.randint(10, (n,), generator=g)) for n in sizes] for key, sizes in SIZES.items()}
    return models, batches


@pytest.mark.parametrize("optim,norm", [("sgd", "batch"), ("adam", "batch"), ("sgd", "group"), ("sgd", "evonorm")])
def test_at_once_is_one_after_the_other(optim, norm):
    """With batches of unlike sizes and numbers, losses and corrections of their own, momentum and weight decay."""
    models, batches = models_and_batches(norm=norm)
    apart = copy.deepcopy(models)
    losses = {key: F.cross_entropy for key in models} | {"b": Adjusted(torch.tensor([0, 0, 1]), 10, 1.0)}

    def correcting(model: nn.Module):
        return lambda: [p.data.sub_(1e-3) for p in model.parameters()] and None

    joint = make_optimizer(nn.ModuleList(models.values()), optim, 0.01, 0.9, 0.1, fused=True)
    own = {key: make_optimizer(model, optim, 0.01, 0.9, 0.1) for key, model in apart.items()}
    for _ in range(2):
        stats = train_at_once(models, batches, joint, losses,
                              after_step={key: correcting(model) if key != "c" else None
                                          for key, model in models.items()})
        for key, model in apart.items():
            expected = train_epoch(model, batches[key], own[key], loss_of=losses[key],
                                   after_step=correcting(model) if key != "c" else None)
            assert stats[key].loss == pytest.approx(expected.loss, rel=1e-6)
            assert (stats[key].accuracy, stats[key].samples, stats[key].steps) == (
                expected.accuracy, expected.samples, expected.steps)
    for key, model in models.items():
        for name, t in apart[key].state_dict().items():
            assert torch.allclose(model.state_dict()[name], t, rtol=1e-6, atol=1e-9), (key, name)
    assert int(models["d"].state_dict()["bn1.num_batches_tracked"]) == 2 if norm == "batch" else True


class Tied(nn.Module):
    """One weight under two names, a buffer that is not in the state dict, and a parameter that isn't trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        self.seen += 1
        return self.second(self.first(x.flatten(1)).relu()) * self.scale


def test_tied_weights_stay_tied_and_what_is_not_trained_stays():
    models = [Tied(), Tied()]
    x = [torch.rand(3, 4) for _ in models]
    expected = [copy.deepcopy(model)(own) for model, own in zip(models, x, strict=True)]
    scores = scores_of(models, x)
    assert all(torch.allclose(a, b) for a, b in zip(scores, expected, strict=True))
    scores.square().sum().backward()
    for model, own in zip(models, x, strict=True):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        alone(own).square().sum().backward()
        assert torch.allclose(model.first.weight.grad, alone.first.weight.grad)
        assert model.second.weight is model.first.weight and model.scale.grad is None and model.seen == 1


def test_dropout_draws_for_each_model():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    scores = scores_of([model, copy.deepcopy(model)], [torch.ones(2, 50)] * 2)
    assert not torch.equal(scores[0], scores[1]) and (scores == 0).any() and (scores == 2).any()


def test_a_model_that_looks_at_values_is_refused():
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) > 0 else x

    with pytest.raises(ValueError, match="only one after the other"):
        scores_of([Looks(4, 4), Looks(4, 4)], [torch.rand(2, 4)] * 2)


def test_a_model_that_diverges_is_named():
    models, batches = models_and_batches()
    batches["c"][0][0].fill_(torch.nan)
    optimizer = make_optimizer(nn.ModuleList(models.values()), "sgd", 0.01, 0.0, 0.0)
    with pytest.raises(Diverged, match="agent c: the training loss became nan"):
        train_at_once(models, batches, optimizer, dict.fromkeys(models, F.cross_entropy))
