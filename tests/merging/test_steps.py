"""Functions that are watched step by step do what torch's own do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from merging.tracing.watch import Watch

RECURRENT = {
    "LSTM": lambda: nn.LSTM(3, 4),
    "LSTM, three layers, both ways, projected": lambda: nn.LSTM(3, 4, 3, bidirectional=True, proj_size=2),
    "LSTM, no bias, batch first": lambda: nn.LSTM(3, 4, 2, bias=False, batch_first=True),
    "LSTM, no bias, projected": lambda: nn.LSTM(3, 4, bias=False, proj_size=2),
    "GRU, two layers, both ways": lambda: nn.GRU(3, 4, 2, bidirectional=True),
    "GRU, no bias, batch first": lambda: nn.GRU(3, 4, bias=False, batch_first=True),
    "RNN": lambda: nn.RNN(3, 4, 2),
    "RNN, relu, both ways": lambda: nn.RNN(3, 4, nonlinearity="relu", bidirectional=True),
}
CELLS = {
    "LSTMCell": lambda: nn.LSTMCell(3, 4), "LSTMCell, no bias": lambda: nn.LSTMCell(3, 4, bias=False),
    "GRUCell": lambda: nn.GRUCell(3, 4), "GRUCell, no bias": lambda: nn.GRUCell(3, 4, bias=False),
    "RNNCell": lambda: nn.RNNCell(3, 4), "RNNCell, relu": lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
}


def tensors(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for part in results for tensor in tensors(part)]


def assert_same(function, own):
    """function() gives the same when watched, and is not called by its `own` name then."""
    expected, watch = tensors(function()), Watch()
    with watch:
        found = tensors(function())
    assert own not in watch.calls and watch.calls
    assert [y.shape for y in found] == [y.shape for y in expected]
    for y, right in zip(found, expected, strict=True):
        torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("started", [False, True])
@torch.no_grad()
def test_recurrent_networks(name, started):
    torch.manual_seed(0)
    model, x = RECURRENT[name]().double(), torch.randn(5, 2, 3, dtype=torch.float64)
    state = None
    if started:
        _, state = model(x)
        state = tuple(part.cos() for part in state) if isinstance(state, tuple) else state.cos()
    own = {"RNN": "rnn_relu" if "relu" in name else "rnn_tanh"}.get(type(model).__name__, type(model).__name__.lower())
    assert_same(lambda: model(x, state), own)


@pytest.mark.parametrize("name", CELLS)
@torch.no_grad()
def test_recurrent_cells(name):
    torch.manual_seed(0)
    model, x = CELLS[name]().double(), torch.randn(2, 3, dtype=torch.float64)
    state = model(x)
    own = {"RNNCell": "rnn_relu_cell" if "relu" in name else "rnn_tanh_cell", "LSTMCell": "lstm_cell"}
    assert_same(lambda: model(x, state), own.get(type(model).__name__, "gru_cell"))


def test_packed_sequences_are_left_to_torch():
    packed, watch = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), [5, 3]), Watch()
    with watch:
        nn.LSTM(3, 4)(packed)
    assert watch.calls["lstm"] == 1


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_weight_norm(dim):
    torch.manual_seed(0)
    v = torch.randn(3, 4, 5, dtype=torch.float64)
    g = torch.randn([n if d == dim else 1 for d, n in enumerate(v.shape)], dtype=torch.float64)
    assert_same(lambda: torch._weight_norm(v, g, dim), "_weight_norm")


def test_grouped_query_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 4, dtype=torch.float64) for heads in (6, 3, 2))
    mask = torch.randn(5, 5, dtype=torch.float64)
    for options in ({"is_causal": True}, {"attn_mask": mask, "scale": 0.3}):
        found = F.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(3, 1), **options)
        watch = Watch()
        with watch:
            watched = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        assert watch.calls["repeat_interleave"] == 2
        torch.testing.assert_close(watched, found, rtol=1e-12, atol=1e-12)
