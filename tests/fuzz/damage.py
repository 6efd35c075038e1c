"""What can be wrong with a file: cut, flipped, replaced by something else, or with anything in it replaced."""

import csv
import datetime
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from torch import nn


def _flip(content: bytes, at: float, bit: int) -> bytes:
    place = int(at * len(content))
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:] if content else content


def _insert(content: bytes, at: float, what: bytes) -> bytes:
    place = int(at * len(content))
    return content[:place] + what + content[place:]


def _overwrite(content: bytes, at: float, what: bytes) -> bytes:
    place = int(at * len(content))
    return content[:place] + what + content[place + len(what):]


@dataclass(frozen=True)
class Evil:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def _torch(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


OTHER_KINDS = {
    "nothing": b"", "a blank": b" ", "a NUL": b"\0", "a list": b"[]", "a mapping": b"{}", "a number": b"5",
    "null": b"null",
    "lines": b"one\ntwo\n", "a line of commas": b",,,\n,,,\n", "UTF-16": "a: 1\n".encode("utf-16"),
    "no UTF-8": b"\xff\xfe\xfa",
    "a byte-order mark": b"\xef\xbb\xbfa: 1\n", "CRLF": b"a: 1\r\nb: 2\r\n",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "deep lists": b"[" * 20000, "deep mappings": b"{a: " * 3000, "a web page": b"<!DOCTYPE html><html></html>",
    "an alias bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(ord("b"), ord("k"))),
    "YAML that builds an object": b"!!python/object/apply:os.mkdir [executed]\n", "a date": b"2020-01-01\n",
    "a key that is no text": b"{5: 6, null: 7, [1, 2]: 3, ? {a: 1} : 2}", "an anchor to itself": b"&a [*a]\n",
    "an empty zip": b"PK\x05\x06" + b"\0" * 18, "a tensor": _torch(torch.ones(3)), "torch's empty": _torch({}),
    "an object to unpickle": _torch(Evil()), "a list of torch's": _torch([1, 2]), "None of torch's": _torch(None),
    "an array": _npy(np.ones((2, 2))), "an array of objects": _npy(np.array([Evil()])),
    "an empty array": _npy(np.ones(0)),
    "an array of another type": _npy(np.full((8, 3, 16, 16), np.nan)),
    "an array of too few images": _npy(np.zeros((1, 3, 16, 16), np.uint8)), "labels": _npy(np.full(8, 10**6)),
    "negative labels": _npy(np.full(8, -1)), "an array that claims too much": _npy(np.zeros(8)).replace(
        b"(8,), }" + b" " * 10, b"(" + b"9" * 11 + b",), }"[:6]),
}


def _in_its_place(path: Path, what: str) -> None:
    path.unlink()
    if what == "a folder":
        path.mkdir()
    elif what == "a dangling link":
        path.symlink_to("nowhere")
    elif what == "a link to itself":
        path.symlink_to(path.name)
    elif what == "a link to a victim":
        path.symlink_to(next(p for p in path.parents if (p / "victim").is_dir()) / "victim" / "precious")
    elif what == "a pipe":
        os.mkfifo(path)


SPECIAL = ["nothing at all", "a folder", "a dangling link", "a link to itself", "a link to a victim", "a pipe"]
TRAVERSAL = "x" + "/.." * 30


# ---- structure -----------------------------------------------------------------------------------

GONE, RENAMED = object(), object()
WRONG = [None, True, False, "", "x", "5", " ", "a b", "maybe", "a\nb", "a\0b", "\udcff", "\x1b[31m", "$x^2$",
         "../victim", TRAVERSAL, "~", 0, -1, 1, 2, 7, 10**6, 10**30, -0.0, 1.5, 1e300, math.nan, math.inf, -math.inf,
         [], [1], [[]], ["x"], {}, {"a": 1}, {5: 6}, datetime.date(2020, 1, 1), b"bytes", "x" * 200_000, GONE, RENAMED]
OF_TENSORS: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t.double(), lambda t: t.bool(), lambda t: t.to(torch.complex64), lambda t: t.bfloat16(),
    lambda t: t.long(), lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: t[None], lambda t: t.flatten()[:0],
    lambda t: t.flatten(), lambda t: torch.tensor(1.0), lambda t: torch.full_like(t.float(), math.nan),
    lambda t: t.float() * math.inf,
    lambda t: torch.full_like(t, -1) if t.dtype != torch.bool else t, lambda t: t.float() * 1e30,
    lambda t: torch.zeros(1).expand(10**13), lambda t: torch.zeros(1, dtype=t.dtype).expand(t.shape or (1,)),
    lambda t: torch.zeros(1, dtype=t.dtype).expand((10**6, *t.shape)),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8), lambda t: nn.Parameter(t.float()),
    lambda t: t.repeat(2, *[1] * (t.dim() - 1)) if t.dim() else t, lambda t: t.mT if t.dim() > 1 else t,
    lambda t: {"weight": t}, lambda t: [t], lambda t: t.tolist(), lambda t: t.numpy().tobytes(),
]


def replaced(content: Any, way: list[int], wrong: int) -> Any:
    """`content` with something else at the end of `way`, whose numbers choose a key or an entry at each level."""
    if way and isinstance(content, (dict, list, tuple)) and content:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = keys[way[0] % len(keys)]
        value = replaced(content[key], way[1:], wrong)
        if isinstance(content, dict):
            new = {("other" if k == key and value is RENAMED else k): v for k, v in content.items()}
            if value is RENAMED:
                return new
            return {k: value if k == key else v for k, v in content.items() if not (k == key and value is GONE)}
        changed = [value if k == key else v for k, v in enumerate(content) if not (k == key and value is GONE)]
        return type(content)(changed)
    if isinstance(content, torch.Tensor) and wrong % 2:
        return OF_TENSORS[wrong // 2 % len(OF_TENSORS)](content)
    return WRONG[wrong % len(WRONG)]


def _yaml(content: Any) -> bytes:
    return yaml.safe_dump(_plain(content), sort_keys=False).encode("utf-8", "surrogateescape")


def _plain(content: Any) -> Any:
    return None if content in (GONE, RENAMED) else content


def _csv(content: Any) -> bytes:
    if not isinstance(content, list):
        return str(content).encode("utf-8", "surrogateescape")
    lines = [",".join(map(str, row)) if isinstance(row, list) else str(row) for row in content]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


STRUCTURED: dict[str, tuple[Callable[[Path], Any], Callable[[Any], bytes]]] = {
    ".yaml": (lambda file: yaml.safe_load(file.read_text()), _yaml),
    ".json": (lambda file: json.loads(file.read_text()), lambda content: json.dumps(
        _plain(content), default=str).encode("utf-8", "surrogateescape")),
    ".csv": (lambda file: list(csv.reader(file.open())), _csv),
    ".txt": (lambda file: [line.split("\t") for line in file.read_text().splitlines()], _csv),
    ".pt": (lambda file: torch.load(file, weights_only=True), lambda content: _torch(_plain(content))),
    ".pth": (lambda file: torch.load(file, weights_only=True), lambda content: _torch(_plain(content))),
}

PARTS = st.floats(0, 1, exclude_max=True)
BLIND = st.one_of(st.tuples(st.just("cut"), PARTS), st.tuples(st.just("flip"), PARTS, st.integers(0, 7)),
                  st.tuples(st.just("insert"), PARTS, st.sampled_from([b"\0", b"x", b"\n", b"- ", b"\xff" * 9, b'"'])),
                  st.tuples(st.just("overwrite"), PARTS, st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\n\n"])))
OTHER = st.tuples(st.just("other"), st.sampled_from(sorted(OTHER_KINDS) + SPECIAL))
WITHIN = st.tuples(st.just("within"), st.lists(st.integers(0, 200), max_size=5), st.integers(0, 10_000))
DAMAGES = st.sampled_from([WITHIN] * 4 + [BLIND] * 2 + [OTHER]).flatmap(lambda kind: kind)


def damage(file: Path, how: tuple) -> None:
    kind, *what = how
    if kind == "within" and file.suffix not in STRUCTURED:
        way, wrong = what
        kind, what = "flip", (wrong % 997 / 997, len(way))
    if kind == "other" and what[0] in OTHER_KINDS:
        file.write_bytes(OTHER_KINDS[what[0]])
    elif kind == "other":
        _in_its_place(file, what[0])
    elif kind == "within":
        load, dump = STRUCTURED[file.suffix]
        file.write_bytes(dump(replaced(load(file), *what)))
    else:
        content = file.read_bytes()
        ways = {"cut": lambda c, at: c[:int(at * len(c))], "flip": _flip, "insert": _insert, "overwrite": _overwrite}
        file.write_bytes(ways[kind](content, *what))
