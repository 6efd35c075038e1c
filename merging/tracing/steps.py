"""Compound functions of torch, done in steps that have rules: attention, recurrent networks, a weight's norm.

Each takes what torch's own takes and gives what it gives, or NotImplemented for what is left to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

COMPOUND: dict[str, Callable] = {}


def _compound(name: str) -> Callable[[Callable], Callable]:
    def register(steps: Callable) -> Callable:
        COMPOUND[name] = steps
        return steps

    return register


@_compound("glu")
def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


@_compound("multi_head_attention_forward")
def _multi_head_attention(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k,
                          bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True,
                          key_padding_mask=None, need_weights=True, attn_mask=None, use_separate_proj_weight=False,
                          q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None, static_v=None,
                          average_attn_weights=True, is_causal=False):
    """Attention is All You Need, section 3.2.2, on (tokens, batch, channels) as torch has it."""
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        return NotImplemented
    weights = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    batched = query.dim() == 3
    projected = []
    for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
        x = F.linear(x if batched else x.unsqueeze(1), weight, bias)
        projected.append(x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3))  # (batch, heads, tokens, channels)
    q, k, v = projected
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, num_heads)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(-1, 1, 1, key_padding_mask.shape[-1]))
    mask = None
    for m in masks:
        m = torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -math.inf) if m.dtype == torch.bool else m
        mask = m if mask is None else mask + m
    if need_weights:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = (scores if mask is None else scores + mask).softmax(-1)
        out = F.dropout(scores, dropout_p, training) @ v
    else:
        scores, out = None, F.scaled_dot_product_attention(q, k, v, mask, dropout_p if training else 0.0)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if need_weights and average_attn_weights:
        scores = scores.mean(1)
    if not batched:
        out, scores = out.squeeze(1), scores.squeeze(0) if need_weights else None
    return out, scores


@_compound("scaled_dot_product_attention")
def _grouped_query_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                             enable_gqa=False):
    """Several heads of queries, one after the other, share a head of keys and values."""
    if not enable_gqa or query.shape[-3] == key.shape[-3] == value.shape[-3]:
        return NotImplemented
    key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


@_compound("_weight_norm")
def _weight_norm(v, g, dim=0):
    """Salimans and Kingma 2016: w = g v / |v|, the norm over all dimensions but one."""
    return v * (g / v.square().sum([d for d in range(v.ndim) if d != dim], keepdim=True).sqrt())


def _long_short(x, state, weights):
    """x: what the input makes of the four gates; weights: of the hidden units, and a projection of these or None."""
    hidden, cell = state
    recurrent, bias, projection = weights
    i, f, g, o = (x + F.linear(hidden, recurrent, bias)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return (hidden if projection is None else F.linear(hidden, projection)), cell


def _gated(x, state, weights):
    (hidden,), (recurrent, bias, _) = state, weights
    (r, z, n), (of_r, of_z, of_n) = x.chunk(3, -1), F.linear(hidden, recurrent, bias).chunk(3, -1)
    n, z = (n + (r + of_r).sigmoid() * of_n).tanh(), (z + of_z).sigmoid()
    return (n + z * (hidden - n),)


def _plain(activation):
    def step(x, state, weights):
        (hidden,), (recurrent, bias, _) = state, weights
        return (activation(x + F.linear(hidden, recurrent, bias)),)

    return step


_CELLS = {"lstm": _long_short, "gru": _gated, "rnn_tanh": _plain(torch.tanh), "rnn_relu": _plain(torch.relu)}


def _recurrent(name: str) -> Callable:
    """torch.lstm and its like, time step by time step."""
    cell, kept = _CELLS[name], 2 if name == "lstm" else 1

    def layers(x, state, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first=False):
        if isinstance(has_biases, (list, tuple)):  # packed sequences: (data, batch sizes, state, weights, ...)
            return NotImplemented
        state = state if kept == 2 else (state,)
        directions = 2 if bidirectional else 1
        each = len(weights) // (num_layers * directions)  # W, U, and two biases, and a projection
        x, last = x.transpose(0, 1) if batch_first else x, []
        for layer in range(num_layers):
            sides = []
            for side in range(directions):
                n = layer * directions + side
                into, recurrent, *more = weights[n * each : (n + 1) * each]
                biases = more[:2] if has_biases else (None, None)
                projection = more[-1] if len(more) > (2 if has_biases else 0) else None
                made, now, outputs = F.linear(x, into, biases[0]), tuple(part[n] for part in state), []
                for t in reversed(range(len(x))) if side else range(len(x)):
                    now = cell(made[t], now, (recurrent, biases[1], projection))
                    outputs.append(now[0])
                sides.append(torch.stack(outputs[::-1] if side else outputs))
                last.append(now)
            x = sides[0] if directions == 1 else torch.cat(sides, -1)
            if dropout and train and layer < num_layers - 1:
                x = F.dropout(x, dropout, train)
        x = x.transpose(0, 1) if batch_first else x
        # Put beside each other and taken apart again, because what is stacked holds the same units in all places.
        beside = (torch.cat(parts, -1).unflatten(-1, (len(parts), -1)) for parts in zip(*last, strict=True))
        return (x, *(parts.movedim(-2, 0) for parts in beside))

    return layers


def _one_step(name: str) -> Callable:
    """torch.lstm_cell and its like."""
    cell, kept = _CELLS[name], 2 if name == "lstm" else 1

    def step(x, state, into, recurrent, bias=None, recurrent_bias=None):
        now = cell(F.linear(x, into, bias), state if kept == 2 else (state,), (recurrent, recurrent_bias, None))
        return now if kept == 2 else now[0]

    return step


for _name in _CELLS:
    _compound(_name)(_recurrent(_name))
    _compound(_name + "_cell")(_one_step(_name))
