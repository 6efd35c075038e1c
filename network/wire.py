"""How a model travels between agents: one flat vector of bytes, as it is or with its kernels in a smaller format; and
how anything does between the processes of a run."""

from __future__ import annotations

import io
import pickle
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

State = dict[str, Tensor]  # as in merging, which takes longer to import than all that is needed here
Piece = tuple[torch.dtype, int]  # the dtype and number of entries of a thing that travels
LEVELS = 127  # int8 codes are -127 ... 127


class Format(Protocol):
    """How a tensor travels: as pieces, flat tensors of fixed sizes one after another."""

    def pieces(self, like: Tensor) -> list[Piece]:
        """Of a tensor like this."""

    def encode(self, value: Tensor) -> list[Tensor]:
        """Those of a tensor, any shape."""

    def decode(self, pieces: list[Tensor], like: Tensor) -> Tensor:
        """The tensor, of `like`'s shape and dtype, that these were made of."""


class Plain:
    """As it is, in its own dtype."""

    def pieces(self, like: Tensor) -> list[Piece]:
        return [(like.dtype, like.numel())]

    def encode(self, value: Tensor) -> list[Tensor]:
        return [value]

    def decode(self, pieces: list[Tensor], like: Tensor) -> Tensor:
        return pieces[0].view(like.shape)


@dataclass(frozen=True)
class Narrow:
    """In a shorter floating dtype; a finite entry beyond it becomes the largest one within."""

    dtype: torch.dtype

    def pieces(self, like: Tensor) -> list[Piece]:
        return [(self.dtype, like.numel())]

    def encode(self, value: Tensor) -> list[Tensor]:
        top = torch.finfo(self.dtype).max
        return [torch.where(value.isinf(), value, value.clamp(-top, top)).to(self.dtype)]

    def decode(self, pieces: list[Tensor], like: Tensor) -> Tensor:
        return pieces[0].view(like.shape).to(like.dtype)


class Rows:
    """A float32 scale for each index of dimension 0, absmax / 127, then the entries as int8 multiples of it, off by
    half of it at most. A row with an entry that is not finite arrives as NaN."""

    def pieces(self, like: Tensor) -> list[Piece]:
        return [(torch.float32, like.shape[0]), (torch.int8, like.numel())]

    def encode(self, value: Tensor) -> list[Tensor]:
        rows = value.flatten(1).to(torch.promote_types(value.dtype, torch.float32))
        largest = rows.abs().amax(1)
        scale = _scale(largest)
        codes = (rows / scale[:, None]).round_().clamp_(-LEVELS, LEVELS)
        # NaN as an integer is anything at all, hence the zeros; the scale says that the row is lost.
        return [scale.masked_fill_(~largest.isfinite(), torch.nan), codes.nan_to_num_(0).to(torch.int8)]

    def decode(self, pieces: list[Tensor], like: Tensor) -> Tensor:
        scale, codes = pieces
        rows = codes.view(like.shape[0], -1).to(like.dtype).mul_(scale[:, None])  # rounded once, at the end
        return rows.view(like.shape).to(like.dtype)


PLAIN = Plain()
# Of kernels and matrices; all else travels as it is.
WIRES: dict[str, Format] = {"fp32": PLAIN, "bf16": Narrow(torch.bfloat16), "fp16": Narrow(torch.float16),
                            "int8": Rows()}


def pack(state: State, wire: str) -> Tensor:
    """The bytes of all tensors, one after another in the state dict's order: a new uint8 (n,) on their device.

    wire: a name in WIRES, the format of kernels and matrices. What is not finite arrives as something not finite.

    Raises ValueError for an unknown `wire`.
    """
    return torch.cat([_bytes(piece) for value in state.values() for piece in _format(value, wire).encode(value)])


def unpack(vector: Tensor, like: State, wire: str) -> State:
    """The state that `pack` made uint8 (n,) `vector` of: new tensors on its device, of `like`'s shapes and dtypes.

    Raises ValueError where the vector's length is not that of a model like `like`, and for an unknown `wire`.
    """
    formats = {key: _format(value, wire) for key, value in like.items()}
    pieces = {key: form.pieces(like[key]) for key, form in formats.items()}
    sizes = [_size(piece) for several in pieces.values() for piece in several]
    if vector.numel() != sum(sizes):
        raise ValueError(f"{vector.numel()} bytes came, but this model takes {sum(sizes)} in {wire}")
    chunks = iter(vector.split(sizes))
    # A chunk begins anywhere, a dtype's view only at multiples of its size: a clone begins at the start of its storage.
    return {key: formats[key].decode([next(chunks).clone().view(dtype) for dtype, _ in several], like[key])
            for key, several in pieces.items()}


def wire_bytes(like: State, wire: str) -> int:
    """The length of `pack`'s vector for a model like `like`. Raises ValueError for an unknown `wire`."""
    return sum(_size(piece) for value in like.values() for piece in _format(value, wire).pieces(value))


def through(state: State, wire: str, packed: Tensor | None = None) -> State:
    """What the receiver gets: unpack(pack(state)), or in fp32 `state` itself. To send that on changes it no more.

    packed: pack(state), where it is there already.

    Raises ValueError for an unknown `wire`.
    """
    if wire == "fp32":
        return state
    return unpack(pack(state, wire) if packed is None else packed, state, wire)


def _format(like: Tensor, wire: str) -> Format:
    """How a tensor like this travels: as it is, where the wire's format would not be smaller."""
    if wire not in WIRES:
        raise ValueError(f"unknown wire {wire!r}: choose one of {', '.join(WIRES)}")
    # Biases and BatchNorm's statistics matter more than most entries and are under one per cent of the bytes.
    if not like.is_floating_point() or like.ndim < 2:
        return PLAIN
    return min(PLAIN, WIRES[wire], key=lambda form: sum(map(_size, form.pieces(like))))  # of two alike the first


def _size(piece: Piece) -> int:
    dtype, count = piece
    return dtype.itemsize * count


def _bytes(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    if flat.stride(0) != 1:  # with one entry or none it may be anything, and a dtype's view minds
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _scale(largest: Tensor) -> Tensor:
    """The unit of each row's codes, float32, from its largest magnitude (rows,).

    Its bounds keep a row of zeros from dividing by zero, tiny units from coarse rounding and 127 units from overflow.
    """
    limits = torch.finfo(torch.float32)
    # Divided by a tensor: by a number, GPUs multiply with its rounded inverse, and what was received would not always
    # have the scale that it was sent with. With a true quotient it has, for each of float32's significands.
    return (largest / torch.full_like(largest, LEVELS)).clamp_(limits.tiny, limits.max / 128).to(torch.float32)


class _Pickler(pickle.Pickler):
    """Tensors go as NumPy's arrays where they can, in a fifth of the time that torch's own way takes for a model."""

    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is Tensor and thing.device.type == "cpu" and not thing.requires_grad:
            with suppress(TypeError, RuntimeError):  # NumPy knows fewer dtypes and layouts
                return torch.from_numpy, (thing.numpy(),)
        return NotImplemented


def pickled(thing: Any) -> bytes:
    """For processes of the same run, who read it with `pickle.loads`."""
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(thing)
    return buffer.getvalue()
