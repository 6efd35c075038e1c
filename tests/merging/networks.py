"""Small networks, each with something that makes permuting its units hard."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def conv_bn(inputs, outputs, kernel=3, **options):
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = conv_bn(inputs, outputs, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Residual(nn.Module):
    """Two stages, pooled by a function, viewed flat."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.blocks = nn.Sequential(Block(6, 6, 1), Block(6, 8, 2), Block(8, 8, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.blocks(F.relu(self.stem(x)))
        x = F.avg_pool2d(x, x.size(3))
        return self.fc(x.view(x.size(0), -1))


class Plain(nn.Sequential):
    """Channels become runs of 2 x 2 columns."""

    def __init__(self):
        super().__init__(
            *conv_bn(3, 6), nn.ReLU(inplace=True), nn.MaxPool2d(2), *conv_bn(6, 7), nn.GELU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.BatchNorm1d(28), nn.Dropout(0.5), nn.Linear(28, 9), nn.Hardswish(), nn.Linear(9, 4),
        )  # fmt: skip


class Dense(nn.Module):
    """Concatenation over lists, as densenet, with the image itself in one of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(7), nn.Conv2d(7, 5, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, padding=1)
        self.fc = nn.Linear(18 * 4, 4)

    def forward(self, x):
        features = [x, self.first(x)]
        features.append(self.conv1(F.relu(self.norm1(torch.cat(features, 1)))))
        features.append(self.conv2(F.relu(self.norm2(torch.cat(features, 1)), inplace=True)))
        x = torch.relu_(F.adaptive_avg_pool2d(torch.cat(features, dim=-3), 2))
        return self.fc(torch.flatten(x, 1))


class Depthwise(nn.Module):
    """One and two outputs per channel, squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.depthwise = conv_bn(6, 6, groups=6)
        self.multiplied = conv_bn(6, 12, groups=6)
        self.pointwise = nn.Conv2d(12, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu6(self.stem(x) * 2)
        x = F.relu(self.multiplied(F.relu(self.depthwise(x))))
        x = F.hardswish(self.pointwise(x))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc(x.mean([2, 3]))


class Reused(nn.Module):
    """One module applied three times, one tensor in two modules, raw parameters."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 5)
        self.body = conv_bn(5, 5)
        self.alias = self.body
        self.tied = nn.Conv2d(5, 5, 3, padding=1)
        self.tied.weight = self.body[0].weight
        self.scale = nn.Parameter(torch.ones(5, 1, 1))
        self.gain = nn.Parameter(torch.ones(1))
        self.slope = nn.PReLU(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = x + F.relu(self.body(x))
        x = self.slope(self.tied(x) * self.scale) * self.gain
        return self.fc(F.adaptive_max_pool2d(x, 1).squeeze(-1).squeeze(-1))


class Split(nn.Module):
    """A sum of a whole and a concatenation: the whole falls into parts."""

    def __init__(self):
        super().__init__()
        self.whole, self.left, self.right = nn.Conv2d(3, 7, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 3)
        self.end = nn.Conv2d(7, 4, 3)

    def forward(self, x):
        x = F.relu(self.whole(x) + torch.cat([self.left(x), self.right(x)], 1))
        return self.end(x).mean((2, 3))


class Applied(nn.Module):
    """A convolution to 8 channels, any function, a linear layer on what comes out of it."""

    def __init__(self, function, features=8, size=8, **modules):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 3, padding=1), function
        for name, module in modules.items():
            setattr(self, name, module)
        self.fc = nn.Linear(features, 4)

    def forward(self, x, *more):
        x = self.function(self, self.conv(x), *more)
        return self.fc(x.mean((2, 3)) if x.ndim == 4 else x)


class Attention(nn.Module):
    """Two heads of four, written by hand as vision transformers have it."""

    def __init__(self, width=8, heads=2, bmm=False):
        super().__init__()
        self.heads, self.bmm = heads, bmm
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if self.bmm:
            q, k, v = (t.reshape(b * self.heads, n, -1) for t in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(0.5).softmax(-1), v).view(b, self.heads, n, -1)
        else:
            y = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, c))


class Transformer(nn.Module):
    """Patches, a class token, positions, attention before and after normalisation, a hidden layer of 12."""

    def __init__(self, attention=None, norm=nn.LayerNorm):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.norm1, self.norm2 = norm(8), norm(8)
        self.attention = attention or Attention()
        self.hidden = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.fc = nn.Linear(8, 4)

    def attend(self, x):
        if isinstance(self.attention, nn.MultiheadAttention):
            return self.attention(x, x, x)[0]
        return self.attention(x)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = x + self.attend(self.norm1(x))
        x = x + self.hidden(self.norm2(x))
        return self.fc(x[:, 0])


class CrossAttention(nn.Module):
    """Queries of one width, keys and values of others; a mask; two inputs and three outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 8), nn.Linear(5, 6)
        self.attention = nn.MultiheadAttention(8, 4, kdim=6, vdim=6, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x, y):
        x, y = self.left(x).relu(), self.right(y).relu()
        mask = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool).triu(2)
        attended, weights = self.attention(x, y, y, attn_mask=mask)
        return {"scores": self.fc(x + attended), "more": [weights, self.fc(x)]}


class Language(nn.Module):
    """Tied embeddings, rotary-free causal attention, RMS norm, a gated hidden layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.RMSNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x)


class Mixer(nn.Module):
    """Hidden units along the tokens, then along the channels."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.tokens1, self.tokens2 = nn.Linear(4, 7), nn.Linear(7, 4)
        self.channels1, self.channels2 = nn.Linear(8, 9), nn.Linear(9, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens2(F.gelu(self.tokens1(self.norm(x).mT))).mT
        x = x + self.channels2(F.gelu(self.channels1(x)))
        return self.fc(x.mean(1))


class Shuffled(nn.Module):
    """Shuffled channels, half of which go past the next layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        a, b = self.stem(x).relu().chunk(2, 1)
        x = torch.stack([a, self.branch(b).relu()], 2).flatten(1, 2)
        return self.fc(self.last(x).relu().mean((2, 3)))


class ZeroPadded(nn.Module):
    """The first residual networks' shortcut: every second pixel, new channels of zeros on both sides."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.fc(x.relu().mean((2, 3)))


class Grouped(nn.Module):
    """A bottleneck with four groups of three channels, used twice."""

    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.reduce, self.grouped, self.expand = conv_bn(6, 12, 1), conv_bn(12, 12, groups=4), conv_bn(12, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        for _ in range(2):
            x = (x + self.expand(self.grouped(self.reduce(x).relu()).relu())).relu()
        return self.fc(x.mean((2, 3)))


class GroupNormed(nn.Module):
    """The same groups in two normalisations that a skip joins."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12)
        self.conv2, self.norm2 = nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = x + self.norm2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


class WindowedCalls(nn.Module):
    """Control flow over shapes, keyword arguments, a closure, values that are built anew in every pass."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)])
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        for n, conv in enumerate(self.convs):
            x = conv(input=x)
            if x.shape[-1] % 2 == 0 and n < len(self.convs):
                x = F.max_pool2d(input=x, kernel_size=2)
            ramp = torch.linspace(0.5, 1, x.shape[-1], dtype=x.dtype)
            x = torch.mul(x, other=ramp).relu()
        (rows,) = torch.split(x, x.shape[1], dim=1)
        return self.fc(torch.stack([row.mean((1, 2)) for row in rows]))


class Gram(nn.Module):
    """Products of all channels with all channels, summed over one side."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), nn.Linear(6, 4)

    def forward(self, x):
        x = self.conv(x).flatten(2)
        gram = torch.einsum("bct,bdt->bcd", x, x) / x.shape[-1]
        return self.fc(self.inner(gram).relu().mean(-1))


class Standardised(nn.Module):
    """Weights that are normalised before they are used."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8, 4)
        self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))

    def forward(self, x):
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True) * self.gain
        x = F.conv2d(self.stem(x).relu(), weight, self.conv.bias).relu()
        return self.fc(x.mean((2, 3)))


class Assigned(nn.Module):
    """Channels that are overwritten and added to in place, through views."""

    def __init__(self):
        super().__init__()
        self.conv, self.left, self.other, self.fc = (
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Linear(8, 4))

    def forward(self, x):
        x = self.conv(x).relu()
        y = x.clone()
        y[:, :4] = self.left(x)
        y[:, 4:] += self.other(x)
        y.mul_(0.5)
        return self.fc(y.relu().mean((2, 3)))


class Recurrent(nn.Module):
    """An LSTM between other layers."""

    def __init__(self):
        super().__init__()
        self.inner, self.lstm, self.hidden = nn.Linear(3, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 7)
        self.fc = nn.Linear(7, 4)

    def forward(self, x):
        x, _ = self.lstm(self.inner(x.flatten(2).mT).relu())
        return self.fc(self.hidden(x[:, -1]).relu())


class InSequence(nn.Module):
    """A recurrent network along the columns of a map; the mean of its outputs, or a cell's last one, is read."""

    def __init__(self, recurrent, size):
        super().__init__()
        self.inner, self.recurrent, self.fc = nn.Linear(3, 6), recurrent, nn.Linear(size, 4)

    def forward(self, x):
        x = self.inner(x.mean(2).mT).relu()
        if isinstance(self.recurrent, nn.RNNCellBase):
            state = None
            for t in range(x.shape[1]):
                state = self.recurrent(x[:, t], state)
            return self.fc(state[0] if isinstance(state, tuple) else state)
        return self.fc(self.recurrent(x)[0].mean(1))


class HandMade(nn.Module):
    """A gated cell as people write it."""

    def __init__(self, size=5):
        super().__init__()
        self.size, self.into, self.back = size, nn.Linear(6, 2 * size), nn.Linear(size, 2 * size)

    def forward(self, x):
        hidden, outputs = x.new_zeros(len(x), self.size), []
        for t in range(x.shape[1]):
            gate, new = (self.into(x[:, t]) + self.back(hidden)).chunk(2, -1)
            hidden = gate.sigmoid() * hidden + (1 - gate.sigmoid()) * new.tanh()
            outputs.append(hidden)
        return torch.stack(outputs, 1), hidden


class GroupedQueries(nn.Module):
    """Six heads of queries, three of keys and values; rotary: with positions rotated in; normed: after an RMS norm."""

    def __init__(self, rotary=False, normed=False):
        super().__init__()
        self.rotary, self.normed = rotary, normed
        self.embed, self.q, self.o = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.k, self.v = nn.Linear(8, 12, bias=False), nn.Linear(8, 12)  # softmax takes no notice of a bias
        self.norm, self.fc = nn.RMSNorm(4), nn.Linear(8, 4)
        angles = torch.arange(8.0)[:, None] / torch.tensor([1.0, 10.0]).repeat(2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def heads(self, x):
        x = x.unflatten(-1, (-1, 4)).transpose(1, 2)
        if self.normed:
            x = self.norm(x)
        if not self.rotary:
            return x
        if self.rotary == "partly":
            turned, left = x.chunk(2, -1)
            return torch.cat((turned * self.cos[:, :2] + turned.flip(-1) * self.sin[:, :2], left), -1)
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin

    def forward(self, x):
        x = self.embed(x.mean(2).mT)
        v = self.v(x).unflatten(-1, (3, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(self.heads(self.q(x)), self.heads(self.k(x)), v, is_causal=True,
                                           enable_gqa=True)
        return self.fc((x + self.o(y.transpose(1, 2).flatten(2))).mean(1))


class ThroughAView(nn.Module):
    """A tensor without units is written to; an earlier view of it is read, and so is what was written."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 8, 1), nn.Linear(512, 4), nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x)
        y = x.new_zeros(x.shape)
        view = y.flatten(1)
        y += x
        return self.fc1(view) + self.fc2(x.mean((2, 3)))


class Vocabulary(nn.Module):
    """Rows of one matrix are picked by number here and are hidden units there."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.fc = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(11, 4)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.fc(F.linear(x, self.embed.weight).relu()) + self.hidden(x).relu().sum(-1, keepdim=True)


class SkipFromInput(nn.Module):
    """The image is added to what a layer makes of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.fc = nn.Conv2d(5, 3, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x):
        return self.fc((x + self.conv(self.inner(x).relu())).mean((2, 3)))


class Auxiliary(nn.Module):
    """A second head in training only."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = conv_bn(3, 6), conv_bn(6, 5)
        self.aux = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4))
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        out = self.fc(self.conv(x).relu().mean((2, 3)))
        return (out, self.aux(x.mean((2, 3)))) if self.training else out


def rows_of_an_empty_tensor(m, x):
    rows = torch.empty(len(x), 2, 8, dtype=x.dtype)
    for n in range(2):
        rows[:, n] = x[:, :, n].mean(-1)
    return rows.flatten(1)


def one_channel_is_cleared(m, x):
    x = x.clone()
    x[:, 2] = 0
    return x


IMAGES = ((3, 8, 8),)

# Network, shapes of its inputs, and how many units can move: within groups, without the blocks they may lie in.
HIDDEN = {
    "Residual": (Residual, IMAGES, 6 + 8 + 6 + 8 + 8),
    "Plain": (Plain, IMAGES, 6 + 7 + 9),
    "Dense": (Dense, IMAGES, 4 + 5 + 6),
    "Depthwise": (Depthwise, IMAGES, 6 + 8 + 3),
    "Reused": (Reused, IMAGES, 5),
    "Split": (Split, IMAGES, 7),
    "transformer": (Transformer, IMAGES, 8 + 8 + 8 + 12),
    "transformer, heads in the batch": (lambda: Transformer(Attention(bmm=True)), IMAGES, 8 + 8 + 8 + 12),
    "transformer, torch's attention": (
        lambda: Transformer(nn.MultiheadAttention(8, 2, batch_first=True)), IMAGES, 8 + 8 + 8 + 12),
    "transformer, one head": (lambda: Transformer(Attention(heads=1)), IMAGES, 8 + 8 + 8 + 12),
    "CrossAttention": (CrossAttention, ((4, 3), (6, 5)), 8 + 6 + 8 + 8),
    "Language": (Language, ((5,),), 8 + 8 + 8 + 10),
    "Mixer": (Mixer, IMAGES, 8 + 7 + 9),
    "Shuffled": (Shuffled, IMAGES, 4 + 4 + 6),
    "ZeroPadded": (ZeroPadded, IMAGES, 4 + 4),
    "Grouped": (Grouped, IMAGES, 6 + 12 + 12),
    "GroupNormed": (GroupNormed, IMAGES, 12),
    "WindowedCalls": (WindowedCalls, IMAGES, 6 + 6),
    "Gram": (Gram, IMAGES, 6),
    "Standardised": (Standardised, IMAGES, 6 + 8),
    "Assigned": (Assigned, IMAGES, 8),
    "Recurrent": (Recurrent, IMAGES, 6 + 5 + 7),
    "GRU, two layers, both ways": (
        lambda: InSequence(nn.GRU(6, 5, 2, batch_first=True, bidirectional=True), 10), IMAGES, 6 + 4 * 5),
    "LSTM with a projection": (
        lambda: InSequence(nn.LSTM(6, 5, batch_first=True, proj_size=3), 3), IMAGES, 6 + 5 + 3),
    "RNN": (lambda: InSequence(nn.RNN(6, 5, batch_first=True, nonlinearity="relu", bias=False), 5), IMAGES, 6 + 5),
    "GRUCell": (lambda: InSequence(nn.GRUCell(6, 5), 5), IMAGES, 6 + 5),
    "LSTMCell": (lambda: InSequence(nn.LSTMCell(6, 5), 5), IMAGES, 6 + 5),
    "a gated cell by hand": (lambda: InSequence(HandMade(), 5), IMAGES, 6 + 5),
    "grouped queries": (GroupedQueries, IMAGES, 8 + 12 + 12),
    "grouped queries, rotary": (lambda: GroupedQueries(rotary=True), IMAGES, 8 + 12),
    "grouped queries, partly rotary": (lambda: GroupedQueries(rotary="partly"), IMAGES, 8 + 12),
    "grouped queries, normed": (lambda: GroupedQueries(normed=True), IMAGES, None),
    "channel by channel, by a part of a weight": (
        lambda: Applied(lambda m, x: F.conv1d(x.flatten(2), m.inner.weight.unsqueeze(1), groups=8).relu().mean(2),
                        inner=nn.Linear(3, 8, bias=False)), IMAGES, 8),
    "zeros beside it": (lambda: Applied(lambda m, x: torch.cat((x, x.new_zeros(len(x), 4, *x.shape[2:])), 1),
                                        features=12), IMAGES, 8),
    "parts by keywords": (
        lambda: Applied(lambda m, x: sum(x.chunk(chunks=2, dim=1)) * torch.tensor_split(x, sections=2, dim=1)[0],
                        features=4), IMAGES, 4),
    "a weight's norm": (lambda: Applied(lambda m, x: m.inner(x).relu(), inner=nn.utils.weight_norm(nn.Conv2d(8, 8, 1))),
                        IMAGES, 16),
    "zeros in place of a bias": (
        lambda: Applied(lambda m, x: m.inner(x) + m.zeros, inner=nn.Conv2d(8, 8, 1),
                        zeros=nn.Buffer(torch.zeros(8, 1, 1), persistent=False)), IMAGES, 16),
    "ThroughAView": (ThroughAView, IMAGES, 0),
    "Vocabulary": (Vocabulary, ((5,),), 8),
    "SkipFromInput": (SkipFromInput, IMAGES, 5),
    "Auxiliary": (Auxiliary, IMAGES, 6 + 5 + 7),
    "a slice goes elsewhere": (
        lambda: Applied(lambda m, x: x + F.pad(m.inner(x[:, :3]), (0, 0, 0, 0, 0, 5)), inner=nn.Conv2d(3, 3, 1)),
        IMAGES, 3 + 5),
    "a channel-wise gather": (lambda: Applied(lambda m, x: x + x[:, [1, 0, 3, 2, 5, 4, 7, 6]]), IMAGES, 4),
    "a cyclic gather": (lambda: Applied(lambda m, x: x + x.roll(1, 1)), IMAGES, 0),
    "a product of two branches": (
        lambda: Applied(lambda m, x: x * m.other(x).sigmoid(), other=nn.Conv2d(8, 8, 1)), IMAGES, 8),
    "a product of mirrored branches": (
        lambda: Applied(lambda m, x: x * m.other(x).flip(1), other=nn.Conv2d(8, 8, 1)), IMAGES, 8),
    "flattened before a norm": (
        lambda: Applied(lambda m, x: m.norm(x.flatten(1)), features=512, norm=nn.LayerNorm(512)), IMAGES, 8),
    "channels last": (
        lambda: Applied(lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=nn.LayerNorm(8)),
        IMAGES, 8),
    "channels become rows": (lambda: Applied(lambda m, x: m.conv2(x.transpose(1, 2)), conv2=nn.Conv2d(8, 8, 1)),
                             IMAGES, 8),
    "a product with any dimensions before": (
        lambda: Applied(lambda m, x: torch.einsum("oi, ...ihw -> ...ohw", m.inner.weight, x), inner=nn.Linear(8, 8)),
        IMAGES, None),
    "a product of what any dimensions come before": (
        lambda: Applied(lambda m, x: x + torch.einsum("A...ij, A...jk -> A...ik", x, x)), IMAGES, 8),
    "a cosine": (lambda: Applied(lambda m, x: x * F.cosine_similarity(x, m.inner(x), dim=1).unsqueeze(1),
                                 inner=nn.Conv2d(8, 8, 1)), IMAGES, 8),
    "a cosine alone": (lambda: Applied(
        lambda m, x: m.last(F.cosine_similarity(x, m.inner(x)).unsqueeze(1)), features=5, inner=nn.Conv2d(8, 8, 1),
        last=nn.Conv2d(1, 5, 1)), IMAGES, 8 + 5),
    "a shape like another's": (
        lambda: Applied(lambda m, x: m.inner(x.flatten(1).view_as(x)).flatten(2).reshape_as(x),
                        inner=nn.Conv2d(8, 8, 1)), IMAGES, 8 + 8),
    "channels become pixels": (lambda: Applied(lambda m, x: F.pixel_shuffle(x, 2), features=2), IMAGES, 8),
    "softmax over channels": (lambda: Applied(lambda m, x: x.softmax(1) + x - x.mean(1, keepdim=True)), IMAGES, 8),
    "a running sum over channels": (lambda: Applied(lambda m, x: x.cumsum(1)), IMAGES, 0),
    "a running sum over pixels": (lambda: Applied(lambda m, x: x.cumsum(-1).flip(2)), IMAGES, 8),
    "maxout": (lambda: Applied(lambda m, x: x.unflatten(1, (4, 2)).amax(2), features=4), IMAGES, 8),
    "a softmax within halves": (
        lambda: Applied(lambda m, x: x.unflatten(1, (2, 4)).softmax(2).flatten(1, 2)), IMAGES, 8),
    "a norm within halves": (
        lambda: Applied(lambda m, x: F.layer_norm(x.unflatten(1, (2, 4)).movedim(2, -1), (4,)).movedim(-1, 2)
                        .flatten(1, 2)), IMAGES, 8),
    "a constant token": (
        lambda: Applied(lambda m, x: torch.cat([x.flatten(2).mT, torch.arange(8.0).expand(len(x), 1, 8)], 1).amax(1)),
        IMAGES, 0),
    "rows of an empty tensor": (lambda: Applied(rows_of_an_empty_tensor, features=16), IMAGES, 0),
    "turned in place": (lambda: Applied(lambda m, x: x.clone().transpose_(1, 2)), IMAGES, 0),
    "a result given": (lambda: Applied(lambda m, x: torch.add(x, m.inner(x).relu(), out=torch.empty_like(x)),
                                       inner=nn.Conv2d(8, 8, 1)), IMAGES, 0),
    "one channel is cleared": (lambda: Applied(one_channel_is_cleared), IMAGES, 7),
    "one channel gates all": (
        lambda: Applied(lambda m, x: m.inner(x) * x[:, :1], inner=nn.Conv2d(8, 8, 1)), IMAGES, 15),
    "the strongest channel's number": (
        lambda: Applied(lambda m, x: x * x.max(1, keepdim=True)[1] + m.inner(x), inner=nn.Conv2d(8, 8, 1)), IMAGES, 0),
    "a word for the strongest channel": (
        lambda: Applied(lambda m, x: m.words(x.mean((2, 3)).argmax(1)) + m.inner(x.mean((2, 3))),
                        words=nn.Embedding(8, 8), inner=nn.Linear(8, 8)), IMAGES, 8),
    "sorted along an axis": (lambda: Applied(lambda m, x: m.inner(x) + x.cumsum(axis=1), inner=nn.Conv2d(8, 8, 1)),
                             IMAGES, 0),
    "a triangle of a matrix": (lambda: Applied(lambda m, x: F.linear(x.mean((2, 3)), m.inner.weight.tril()).relu(),
                                               inner=nn.Linear(8, 8, bias=False)), IMAGES, 0),
    "a grouped weight's norm": (
        lambda: Applied(lambda m, x: m.inner(x) / m.inner.weight.abs().sum(0).max(),
                        inner=nn.Conv2d(8, 8, 1, groups=2)), IMAGES, 8),
    "nothing to flatten": (lambda: Applied(lambda m, x: m.inner(x.mean((2, 3)).relu().flatten(1)),
                                           inner=nn.Linear(8, 8)), IMAGES, 16),
    "a gated linear unit": (lambda: Applied(lambda m, x: F.glu(x, 1), features=4), IMAGES, 4),
    "repeated channels": (lambda: Applied(lambda m, x: x.repeat(1, 2, 1, 1), features=16), IMAGES, 8),
    "normalised across channels": (lambda: Applied(lambda m, x: F.local_response_norm(x, 3)), IMAGES, 0),
    "transposed convolution": (
        lambda: Applied(lambda m, x: m.up(x).relu(), features=5, up=nn.ConvTranspose2d(8, 5, 2, 2)), IMAGES, 8 + 5),
    "two kinds of groups": (
        lambda: Applied(lambda m, x: m.two(m.four(x)), two=nn.GroupNorm(2, 8), four=nn.GroupNorm(4, 8)), IMAGES, 0),
    "an unfolded map": (lambda: Applied(lambda m, x: F.unfold(x, 2).mean(-1), features=32), IMAGES, 8),
    "sheared channels": (
        lambda: Applied(lambda m, x: x.gather(3, (torch.arange(8)[:, None, None] + torch.arange(8)).remainder(8)
                                              .expand(len(x), 8, 8, 8))), IMAGES, 0),
    "half a flattened channel": (
        lambda: Applied(lambda m, x: F.avg_pool2d(x, 4).flatten(1)[:, 2:-2], features=28), IMAGES, 6),
    "an instance norm": (
        lambda: Applied(lambda m, x: m.norm(x.relu()).relu(), norm=nn.InstanceNorm2d(8, affine=True)), IMAGES, 8),
    "a constant per channel": (lambda: Applied(lambda m, x: x * torch.arange(8.0)[:, None, None]), IMAGES, 0),
    "keywords in another order": (
        lambda: Applied(lambda m, x: torch.matmul(other=x.flatten(2), input=m.inner.weight).amax(2), features=5,
                        inner=nn.Linear(8, 5, bias=False)), IMAGES, 8 + 5),
    "attention by keywords": (
        lambda: Applied(lambda m, x: F.scaled_dot_product_attention(value=m.inner(x).flatten(2).mT, key=x.flatten(2).mT,
                                                                    query=x.flatten(2).mT.sin()).mean(1),
                        features=6, inner=nn.Conv2d(8, 6, 1)), IMAGES, 8 + 6),
    "NumPy's names of arguments": (
        lambda: Applied(lambda m, x: x.unflatten(1, (2, 4)).softmax(axis=2).flatten(1, 2)), IMAGES, 8),
    "a root mean square norm by position": (
        lambda: Applied(lambda m, x: torch.rms_norm(x.mean((2, 3)), (8,), m.inner.weight, 1e-6), features=8,
                        inner=nn.LayerNorm(8, bias=False)), IMAGES, 8),
    "picked by number, by keywords": (
        lambda: Applied(lambda m, x: torch.gather(dim=3, index=torch.tensor([2, 0, 1]).expand(len(x), 8, 8, 3),
                                                  input=x).exp()), IMAGES, 8),
}
