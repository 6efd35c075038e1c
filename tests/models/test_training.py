"""Local training: its optimisers are torch's."""

import copy

import pytest
import torch
from torch import nn

from models.training import make_optimizer

TORCHS = {"adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
          "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1)}


@pytest.mark.parametrize("name", TORCHS)
def test_optimisers_step_as_torchs_do_and_exchange_states_with_them(name):
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    theirs = copy.deepcopy(ours)
    pairs = [(ours, make_optimizer(ours, name, 0.01, 0.9, 0.1)), (theirs, TORCHS[name](theirs.parameters()))]
    for step in range(6):
        if step == 3:
            kept = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in pairs]
            for (_, optimizer), state in zip(pairs, reversed(kept), strict=True):
                optimizer.load_state_dict(state)
        images = torch.randn(5, 3)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
            assert all(p.requires_grad for p in model.parameters())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)
    assert isinstance(pairs[0][1], type(pairs[1][1]))
