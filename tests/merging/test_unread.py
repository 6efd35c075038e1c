"""Groups that no layer reads activations of are matched by weights, given how the others were matched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from merging import METHODS, merge
from merging.common_basis import align
from merging.permutation import derive_spec, invert, permute, random_permutations

IMAGES = torch.rand(256, 6, generator=torch.Generator().manual_seed(0))
WAYS = [name for name, way in METHODS.items() if way.permutes]


class Adapted(nn.Module):
    """LoRA, added to the weight: its rank is of units that have no activation."""

    def __init__(self):
        super().__init__()
        self.i, self.w, self.h = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.a, self.b = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

    def forward(self, x):
        x = torch.tanh(self.i(x))
        x = torch.tanh(F.linear(x, self.w.weight + self.b.weight @ self.a.weight, self.w.bias))
        return self.h(x)


class Twice(Adapted):
    """The rank is read by another factor of the weight, too: two groups that know of each other only."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(16, 5, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, x):
        x = torch.tanh(self.i(x))
        x = torch.tanh(F.linear(x, self.w.weight + self.b.weight @ self.c.weight @ self.a.weight, self.w.bias))
        return self.h(x)


class Helped(nn.Module):
    """A head that only training takes."""

    def __init__(self):
        super().__init__()
        self.i, self.h = nn.Linear(6, 16), nn.Linear(16, 3)
        self.aux = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        x = torch.tanh(self.i(x))
        return (self.h(x), self.aux(x)) if self.training else self.h(x)


class Grouped(Helped):
    """The units of that head lie in blocks."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Unflatten(1, (12, 1)), nn.Conv1d(12, 8, 1, groups=4),
                                 nn.Tanh(), nn.Conv1d(8, 3, 1))


def permuted_copies(make, count):
    """A model, its spec, its state dict and those of `count` copies with their units in other orders."""
    torch.manual_seed(0)
    model, noise = make(), torch.Generator().manual_seed(1)
    spec = derive_spec(model, IMAGES[:1])
    assert any(not reads for reads in spec.reads.values())
    state = {name: torch.randn(t.shape, generator=noise) for name, t in model.state_dict().items()}
    orders = [random_permutations(spec, noise) for _ in range(count)]
    return model, spec, state, orders, [permute(spec, order, state) for order in orders]


@pytest.mark.parametrize("make", [Adapted, Twice, Helped, Grouped])
@pytest.mark.parametrize("method", WAYS)
def test_a_permuted_copy_is_found_again(make, method):
    model, spec, state, _, (moved, third) = permuted_copies(make, 2)
    merged = merge([state, moved, third], [[0.5, 0.25, 0.25], [0, 0.5, 0.5], [1 / 3] * 3], method, batches=[IMAGES],
                   model=model, spec=spec, bn_reset="none")
    for own, found in zip((state, moved, third), merged, strict=True):
        for name, value in own.items():
            torch.testing.assert_close(found[name], value)
    assert all(match.correlation is None for match in merged.matches if not spec.reads[match.group])


@pytest.mark.parametrize("make", [Adapted, Twice, Helped, Grouped])
def test_so_they_are_when_models_are_aligned(make):
    model, spec, state, (order,), (moved,) = permuted_copies(make, 1)
    found, _ = align(spec, model, moved, [state, state], [0.3, 0.7], [IMAGES])
    assert all(torch.equal(found[group], p) for group, p in invert(order).items())
