"""Large groups are assigned side by side: to what each is assigned alone."""

import torch
from torch import nn

from merging import assignment
from merging.assignment import assign
from merging.permutation import derive_spec


def test_large_groups_side_by_side_are_what_each_is_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 260), nn.ReLU(), nn.Linear(260, 8), nn.ReLU(),
                          nn.Linear(8, 3))
    spec = derive_spec(model, torch.rand(2, 4))
    generator = torch.Generator().manual_seed(0)
    similarity = {group: torch.randn(units, units, generator=generator) for group, units in spec.sizes.items()}
    assert sorted(spec.sizes.values()) == [8, 260, 300]
    pools = []
    monkeypatch.setattr(assignment, "ThreadPoolExecutor",
                        lambda *args, made=assignment.ThreadPoolExecutor: pools.append(args) or made(*args))
    together = assign(spec, similarity)
    assert len(pools) == 1
    for group in spec.sizes:
        alone = assign(spec, similarity, [group])
        assert alone.keys() == {group} and torch.equal(alone[group], together[group])
        assert torch.equal(together[group].sort().values, torch.arange(spec.sizes[group]))
    assert len(pools) == 1
