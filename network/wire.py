"""How a model travels between agents: one flat vector of bytes, as it is or with its kernels in a smaller format."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]  # as in merging, which takes longer to import than all that is needed here

WIRES = ("fp32", "bf16", "fp16", "int8")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEVELS = 127  # int8 codes are -127 ... 127


def pack(state: State, wire: str) -> Tensor:
    """The bytes of all tensors, one after another in the state dict's order: a new uint8 (n,) on their device.

    fp32: every tensor as it is, in its own dtype. bf16, fp16: kernels and matrices in that dtype. int8: of these a
    float32 scale for each index of dimension 0, absmax / 127, then the entries as multiples of it, off by half of it
    at most. A finite entry beyond the format becomes the largest one within; what is not finite arrives as something
    not finite: in int8, as a whole row of NaN.

    Raises ValueError for an unknown `wire`.
    """
    return torch.cat([_bytes(piece) for value in state.values() for piece in _encode(value, wire)])


def unpack(vector: Tensor, like: State, wire: str) -> State:
    """The state that `pack` made uint8 (n,) `vector` of: new tensors on its device, of `like`'s shapes and dtypes.

    Raises ValueError where the vector's length is not that of a model like `like`, and for an unknown `wire`.
    """
    pieces = {key: _pieces(value, wire) for key, value in like.items()}
    sizes = [_size(piece) for several in pieces.values() for piece in several]
    if vector.numel() != sum(sizes):
        raise ValueError(f"{vector.numel()} bytes came, but this model takes {sum(sizes)} in {wire}")
    chunks = iter(vector.split(sizes))
    # A chunk begins anywhere, a dtype's view only at multiples of its size: a clone begins at the start of its storage.
    return {key: _decode([next(chunks).clone().view(dtype) for dtype, _ in several], like[key])
            for key, several in pieces.items()}


def wire_bytes(like: State, wire: str) -> int:
    """The length of `pack`'s vector for a model like `like`. Raises ValueError for an unknown `wire`."""
    return sum(_size(piece) for value in like.values() for piece in _pieces(value, wire))


def through(state: State, wire: str, packed: Tensor | None = None) -> State:
    """What the receiver gets: unpack(pack(state)), or in fp32 `state` itself. To send that on changes it no more.

    packed: pack(state), where it is there already.

    Raises ValueError for an unknown `wire`.
    """
    if wire == "fp32":
        return state
    return unpack(pack(state, wire) if packed is None else packed, state, wire)


Piece = tuple[torch.dtype, int]


def _pieces(like: Tensor, wire: str) -> list[Piece]:
    """The dtype and number of entries of each thing that travels of a tensor like this; the entries come last."""
    if wire not in WIRES:
        raise ValueError(f"unknown wire {wire!r}: choose one of {', '.join(WIRES)}")
    as_it_is = [(like.dtype, like.numel())]
    # Biases and BatchNorm's statistics matter more than most entries and are under one per cent of the bytes.
    if wire == "fp32" or not like.is_floating_point() or like.ndim < 2:
        return as_it_is
    if wire in HALVES:
        smaller = [(HALVES[wire], like.numel())]
    else:
        smaller = [(torch.float32, like.shape[0]), (torch.int8, like.numel())]
    return min(as_it_is, smaller, key=lambda several: sum(map(_size, several)))  # the first where both are the same


def _size(piece: Piece) -> int:
    dtype, count = piece
    return dtype.itemsize * count


def _bytes(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    if flat.stride(0) != 1:  # with one entry or none it may be anything, and a dtype's view minds
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _encode(value: Tensor, wire: str) -> list[Tensor]:
    """A tensor's pieces, any shape."""
    dtype = _pieces(value, wire)[-1][0]
    if dtype == value.dtype:
        return [value]
    if dtype != torch.int8:
        top = torch.finfo(dtype).max
        return [torch.where(value.isinf(), value, value.clamp(-top, top)).to(dtype)]
    rows = value.flatten(1).to(torch.promote_types(value.dtype, torch.float32))
    largest = rows.abs().amax(1)
    scale = _scale(largest)
    codes = (rows / scale[:, None]).round_().clamp_(-LEVELS, LEVELS)
    # NaN as an integer is anything at all, hence the zeros; the scale says that the row is lost.
    return [scale.masked_fill_(~largest.isfinite(), torch.nan), codes.nan_to_num_(0).to(torch.int8)]


def _scale(largest: Tensor) -> Tensor:
    """The unit of each row's codes, float32, from its largest magnitude (rows,).

    Its bounds keep a row of zeros from dividing by zero, tiny units from coarse rounding and 127 units from overflow.
    """
    limits = torch.finfo(torch.float32)
    # Divided by a tensor: by a number, GPUs multiply with its rounded inverse, and what was received would not always
    # have the scale that it was sent with. With a true quotient it has, for each of float32's significands.
    return (largest / torch.full_like(largest, LEVELS)).clamp_(limits.tiny, limits.max / 128).to(torch.float32)


def _decode(pieces: list[Tensor], like: Tensor) -> Tensor:
    """The tensor, of `like`'s shape and dtype, that these flat pieces were made of."""
    *scale, values = pieces
    if scale:
        values = values.view(like.shape[0], -1).to(like.dtype).mul_(scale[0][:, None])  # rounded once, at the end
    return values.view(like.shape).to(like.dtype)
