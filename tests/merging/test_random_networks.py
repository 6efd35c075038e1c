"""Networks drawn at random from everything that has a rule, and some that has none: permuting never changes them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from merging.permutation import derive_spec, permute, random_permutations

CHANNELS = 8


class Step(nn.Module):
    """(maps, an earlier map of the same shape) -> maps of that shape."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x, other):
        return self.function(self, x, other)


def conv(inputs=CHANNELS, outputs=CHANNELS, **options):
    return nn.Conv2d(inputs, outputs, 1, **options)


def tokens(m, x):
    return x.flatten(2).transpose(1, 2)


def maps(y, like):
    return y.transpose(1, 2).reshape(like.shape)


def halves_in_place(m, x, other):
    x = x + other
    x[:, 4:].relu_()
    return x


def overwritten(m, x, other):
    y = x.clone()
    y[:, :4] = m.conv(other)
    return y


def attention(m, x, other):
    y = tokens(m, x)
    q, k, v = m.qkv(y).reshape(*y.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    if m.scale is not None:
        q = F.normalize(q, dim=-1) * m.scale
    y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
    return x + maps(m.out(y.transpose(1, 2).flatten(2)), x)


STEPS = {
    "conv": lambda: Step(lambda m, x, o: m.conv(x), conv=conv()),
    "relu": lambda: Step(lambda m, x, o: x.relu()),
    "in place": lambda: Step(lambda m, x, o: F.gelu(x).mul_(0.7)),
    "norm": lambda: Step(lambda m, x, o: m.norm(x), norm=nn.BatchNorm2d(CHANNELS)),
    "group norm": lambda: Step(lambda m, x, o: m.norm(x), norm=nn.GroupNorm(4, CHANNELS)),
    "other group norm": lambda: Step(lambda m, x, o: m.norm(x), norm=nn.GroupNorm(2, CHANNELS)),
    "layer norm": lambda: Step(lambda m, x, o: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                               norm=nn.LayerNorm(CHANNELS)),
    "grouped": lambda: Step(lambda m, x, o: m.conv(x), conv=conv(groups=4)),
    "other groups": lambda: Step(lambda m, x, o: m.conv(x), conv=conv(groups=2)),
    "depthwise": lambda: Step(lambda m, x, o: m.conv(x), conv=conv(groups=CHANNELS)),
    "multiplied": lambda: Step(lambda m, x, o: m.back(m.conv(x).relu()), conv=conv(outputs=16, groups=CHANNELS),
                               back=conv(16)),
    "skip": lambda: Step(lambda m, x, o: x + o),
    "product": lambda: Step(lambda m, x, o: x * o.sigmoid()),
    "mirrored": lambda: Step(lambda m, x, o: x + o.flip(1)),
    "rolled": lambda: Step(lambda m, x, o: x + o.roll(4, 1)),
    "gathered": lambda: Step(lambda m, x, o: x + o[:, [1, 0, 2, 3, 6, 7, 4, 5]]),
    "picked from both": lambda: Step(lambda m, x, o: torch.cat([x, o], 1)[:, [0, 9, 2, 11, 4, 5, 14, 15]]),
    "concat": lambda: Step(lambda m, x, o: m.conv(torch.cat([x, o.relu()], 1)), conv=conv(16)),
    "halves": lambda: Step(lambda m, x, o: torch.cat([x[:, 4:].relu(), o[:, :4]], 1)),
    "halves in place": lambda: Step(halves_in_place),
    "overwritten": lambda: Step(overwritten, conv=conv(outputs=4)),
    "shuffle": lambda: Step(lambda m, x, o: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)),
    "branches": lambda: Step(lambda m, x, o: torch.cat([m.conv(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1),
                             conv=conv(4, 4)),
    "padded": lambda: Step(lambda m, x, o: x + F.pad(m.conv(o), (0, 0, 0, 0, 2, 1)), conv=conv(outputs=5)),
    "excite": lambda: Step(lambda m, x, o: x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
                           down=conv(outputs=3), up=conv(3)),
    "glu": lambda: Step(lambda m, x, o: F.glu(m.conv(x), 1), conv=conv(outputs=16)),
    "maxout": lambda: Step(lambda m, x, o: m.conv(x).unflatten(1, (8, 2)).amax(2), conv=conv(outputs=16)),
    "softmax": lambda: Step(lambda m, x, o: x.softmax(1) + o.mean(1, keepdim=True)),
    "repeated": lambda: Step(lambda m, x, o: m.conv(x.repeat(1, 2, 1, 1)), conv=conv(16)),
    "attention": lambda: Step(attention, qkv=nn.Linear(CHANNELS, 24), out=nn.Linear(CHANNELS, CHANNELS), scale=None),
    "scaled attention": lambda: Step(attention, qkv=nn.Linear(CHANNELS, 24), out=nn.Linear(CHANNELS, CHANNELS),
                                     scale=nn.Parameter(torch.ones(2, 1, 1))),
    "torch's attention": lambda: Step(
        lambda m, x, o: maps(m.attention(tokens(m, x), tokens(m, o), tokens(m, o), need_weights=False)[0], x),
        attention=nn.MultiheadAttention(CHANNELS, 4, batch_first=True)),
    "mixed tokens": lambda: Step(lambda m, x, o: m.back(m.mix(x.flatten(2)).relu()).reshape(x.shape),
                                 mix=nn.Linear(16, 6), back=nn.Linear(6, 16)),
    "flattened": lambda: Step(lambda m, x, o: m.linear(x.flatten(1)).relu()[:, :, None, None] + x,
                              linear=nn.Linear(16 * CHANNELS, CHANNELS)),
    "scaled": lambda: Step(lambda m, x, o: x * m.gain + m.shift, gain=nn.Parameter(torch.ones(CHANNELS, 1, 1)),
                           shift=nn.Parameter(torch.zeros(1, CHANNELS, 4, 4))),
    "running sum": lambda: Step(lambda m, x, o: x.cumsum(1)),
    "per channel": lambda: Step(lambda m, x, o: x * torch.arange(1, 9, dtype=x.dtype)[:, None, None]),
    "transposed": lambda: Step(lambda m, x, o: m.conv(x).relu(), conv=nn.ConvTranspose2d(CHANNELS, CHANNELS, 1)),
    "gram": lambda: Step(lambda m, x, o: torch.einsum("bcs,bds,bdt->bct", x.flatten(2), o.flatten(2), x.flatten(2)
                                                      ).reshape(x.shape) / 64),
}


class Network(nn.Module):
    """steps: (name, which earlier map is the other one, whether an earlier step of this name is used again)."""

    def __init__(self, steps):
        super().__init__()
        self.stem, self.head = conv(3), nn.Linear(CHANNELS, 4)
        self.steps, self.others, made = nn.ModuleList(), [], {}
        for name, back, again in steps:
            made[name] = made[name] if again and name in made else STEPS[name]()
            self.steps.append(made[name])
            self.others.append(back)

    def forward(self, x):
        outputs = [self.stem(x)]
        for step, back in zip(self.steps, self.others, strict=True):
            outputs.append(step(outputs[-1], outputs[max(0, len(outputs) - 1 - back)]))
        return self.head(outputs[-1].relu().mean((2, 3)))


def relative_change(steps, seed=0):
    torch.manual_seed(seed)
    model = Network(steps).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_().mul_((1 / max(p[0].numel(), 1)) ** 0.5 if p.ndim > 1 else 0.5)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    spec = derive_spec(model, x, check=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        for key, tensor in permute(spec, random_permutations(spec), state).items():
            model.state_dict()[key].copy_(tensor)
        return float((model(x) - expected).norm() / expected.norm()), spec


DRAWN = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 4), st.booleans()), min_size=1, max_size=10)


@pytest.mark.parametrize("name", STEPS)
def test_each_step_alone(name):
    change, spec = relative_change([("conv", 0, False), (name, 1, False), ("conv", 0, False)])
    assert change < 1e-9
    # Every network has at least the last convolution's or the stem's units to move.
    assert spec.sizes


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(DRAWN)
def test_no_network_changes(steps):
    change, _ = relative_change(steps)
    assert change < 1e-9 or change != change  # a running sum may overflow
