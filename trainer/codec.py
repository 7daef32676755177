"""The packed file: a header and named arrays in as few bytes as we know how, bit for bit.

    magic, version     3 bytes
    coded stream       header, layout, tensors: one arithmetic-coded stream (trainer.entropy)
    literal bytes      what does not compress (low bits of long raw arrays), read from the end backwards
    checksum           4 bytes, CRC-32 of all that precedes

Each array is written in the smallest of the forms that give it back exactly: raw numbers, zeros as coded positions
followed by the rest as raw numbers, as codes into a codebook, or as small integers times a step.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainer.entropy import LOWEST, ONE, Decoder, Encoder, log2_table, squash_table, stretch_table

MAGIC = b"tS"
VERSION = 1
MAX_NUMEL = 1 << 28  # of all tensors of a file together: 1 GB of float32
DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool",
          "uint16", "uint32", "uint64")

Layout = Mapping[str, tuple[tuple[int, ...], str]]


class _Scalars:
    """Codes single numbers with adaptive bits; a context is any hashable thing."""

    def __init__(self, coder: Encoder | Decoder) -> None:
        self.coder = coder
        self.counts: dict[Any, list[int]] = {}

    def bit(self, context: Any, bit: int = 0) -> int:
        count = self.counts.setdefault(context, [0, 0])
        probability = ONE * (2 * count[1] + 1) // (2 * (count[0] + count[1]) + 2)
        bit = self.coder.bit(min(max(probability, LOWEST), ONE - LOWEST), bit)
        count[bit] += 1
        return bit

    def tree(self, context: Any, num_bits: int, value: int = 0) -> int:
        """A number below 2^num_bits, most significant bit first."""
        node = 1
        for shift in reversed(range(num_bits)):
            node = node * 2 + self.bit((context, node), value >> shift & 1)
        return node - (1 << num_bits)

    def number(self, context: Any, value: int = 0, limit: int = 1 << 63) -> int:
        """A number 0 <= value < limit: its length in unary, then its bits."""
        value += 1
        length = 0
        while self.bit((context, "length", length), int(value >> length > 1)):
            length += 1
            if length > 64:
                raise ValueError("a number is out of range")
        node = 1
        for shift in reversed(range(length)):
            bit = value >> shift & 1
            if length - shift <= 2:
                node = node * 2 + self.bit((context, length, node), bit)
            else:
                node = node * 2 + self.coder.uniform(bit, 1)
        if node - 1 >= limit:
            raise ValueError(f"got {node - 1} where less than {limit} is allowed")
        return node - 1

    def text(self, context: Any, text: str = "") -> str:
        data = text.encode()
        out = bytearray()
        last = 0
        for i in range(self.number((context, "bytes"), len(data), 1 << 24)):
            last = self.tree((context, last), 8, data[i] if self.coder.writes else 0)
            out.append(last)
        return out.decode()


def _patterns(array: np.ndarray) -> np.ndarray:
    """The bit patterns of an array as unsigned integers, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


class _Stream:
    """One direction of coding: the coder, its adaptive state, the literal bytes and the account."""

    def __init__(self, coder: Encoder | Decoder, literal: bytes = b"") -> None:
        self.coder = coder
        self.scalars = _Scalars(coder)
        self.literal = literal  # a Decoder's: not yet read; an Encoder's: written so far
        self.rows: list[dict[str, Any]] = []

    def mark(self, tensor: str, part: str, start: float, literal: int = 0, **more: Any) -> None:
        self.rows.append({"tensor": tensor, "part": part, "bits": self.coder.cost - start + 8 * literal, **more})

    def take(self, num_bytes: int, data: bytes = b"") -> bytes:
        if self.coder.writes:
            self.literal = data + self.literal
            return data
        if num_bytes > len(self.literal):
            raise ValueError("the literal bytes end too early")
        data = self.literal[len(self.literal) - num_bytes:]
        self.literal = self.literal[: len(self.literal) - num_bytes]
        return data


FORMS = ("raw", "sparse", "codebook", "steps")


def _code_mask(stream: _Stream, mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """v0: adaptive column counts."""
    rows, cols = shape
    ones = np.zeros(cols, np.int64)
    total = 1
    out = np.zeros(shape, bool)
    seen = 0
    for r in range(rows):
        base = ONE * (2 * total + 1) // (2 * (seen + 2))
        p = (ONE * ones + 2 * base) // (r + 2)
        p = np.clip(p, 16, ONE - 16)
        out[r] = stream.coder.code(p, mask[r] if stream.coder.writes else None)
        ones += out[r]
        total += int(out[r].sum())
        seen += cols
    return out


def _code_codes(stream: _Stream, codes: np.ndarray, num: int, k: int) -> np.ndarray:
    coder = stream.coder
    depth = max(1, (k - 1).bit_length())
    counts = np.full((1 << depth, 2), 1, np.int64)
    out = np.zeros(num, np.int64)
    at = 0
    while at < num:
        end = min(num, at + 1 + at // 16)
        node = np.ones(end - at, np.int64)
        for shift in reversed(range(depth)):
            c = counts[node]
            p = np.clip(ONE * c[:, 1] // (c[:, 0] + c[:, 1]), 16, ONE - 16)
            bits = coder.code(p, codes[at:end] >> shift & 1 if coder.writes else None)
            np.add.at(counts, (node, bits.astype(np.int64)), 2)
            node = node * 2 + bits
        out[at:end] = node - (1 << depth)
        at = end
    if k and out.size and int(out.max()) >= k:
        raise ValueError("a code is outside its codebook")
    return out


def _code_raw(stream: _Stream, patterns: np.ndarray, num: int, dtype: np.dtype) -> np.ndarray:
    """Numbers as bit patterns: common trailing zero bits dropped, high bits adaptive, low bits as they are."""
    scalars = stream.scalars
    width = dtype.itemsize * 8
    if dtype.kind in "iub":
        signed = patterns.view(f"i{dtype.itemsize}").astype(object) if stream.coder.writes else []
        out = []
        for i in range(num):
            value = int(signed[i]) if stream.coder.writes else 0
            zigzag = scalars.number(("integer", width), value * 2 if value >= 0 else -2 * value - 1, 1 << width + 1)
            out.append(zigzag // 2 if zigzag % 2 == 0 else -(zigzag + 1) // 2)
        return np.array(out, f"i{dtype.itemsize}").view(patterns.dtype)
    high = {16: 6, 32: 9, 64: 12}[width]
    values = patterns.tolist() if stream.coder.writes else [0] * num
    common = 0
    for value in values:
        common |= value
    drop = min((common & -common).bit_length() - 1, width - high) if common else width - high
    drop = scalars.number("drop", drop, width - high + 1)
    out = []
    for value in values:
        top = scalars.tree(("high", width), high, value >> width - high)
        low = stream.coder.uniform(value >> drop & (1 << width - high - drop) - 1, width - high - drop)
        out.append((top << width - high - drop | low) << drop)
    return np.array(out, patterns.dtype)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    numel = math.prod(shape)
    return (shape[0], numel // shape[0]) if shape and numel else (1, numel)


def _code_tensor(stream: _Stream, name: str, array: np.ndarray | None, shape: tuple[int, ...], dtype: str,
                 step: float | None) -> np.ndarray:
    coder, scalars = stream.coder, stream.scalars
    kind = np.dtype(dtype)
    numel = math.prod(shape)
    unsigned = np.dtype(f"u{kind.itemsize}")
    patterns = _patterns(array) if coder.writes else np.zeros(numel, unsigned)
    if numel == 0:
        return np.zeros(shape, kind)
    start = coder.cost
    form = 0
    nonzero = patterns != 0
    codebook = np.zeros(0, unsigned)
    if coder.writes:
        codebook = np.unique(patterns[nonzero])
        if step is not None:
            form = 3
        elif kind.kind == "f" and 2 * codebook.size < nonzero.sum() and codebook.size <= 1 << 16:
            form = 2
        elif kind.kind == "f" and not nonzero.all():
            form = 1
    form = scalars.tree(("form", kind.kind, len(shape) > 1), 2, form)
    stream.mark(name, "header", start)
    if form == 0:
        start = coder.cost
        patterns = _code_raw(stream, patterns, numel, kind)
        stream.mark(name, "values", start, numel=numel)
        return patterns.view(kind).reshape(shape)
    if form == 3:
        start = coder.cost
        scale = int(scalars.coder.uniform(int(np.float32(step or 0).view(np.uint32)), 32))
        scale32 = np.uint32(scale).view(np.float32)
        integers = np.zeros(numel, np.int64)
        if coder.writes:
            integers = np.rint(array.reshape(-1) / scale32).astype(np.int64)
        integers = _code_raw(stream, integers.view(np.uint64), numel, np.dtype(np.int64)).view(np.int64)
        stream.mark(name, "values", start, numel=numel)
        return (scale32 * integers.astype(np.float32)).reshape(shape)
    start = coder.cost
    mask = _code_mask(stream, nonzero.reshape(_matrix(shape)), _matrix(shape)).reshape(-1)
    stream.mark(name, "mask", start, numel=numel)
    count = int(mask.sum())
    start = coder.cost
    out = np.zeros(numel, unsigned)
    if form == 1:
        out[mask] = _code_raw(stream, patterns[nonzero], count, kind)
        stream.mark(name, "values", start, numel=numel)
        return out.view(kind).reshape(shape)
    k = scalars.number("clusters", codebook.size, 1 << 17)
    codebook = _code_raw(stream, codebook, k, kind)
    stream.mark(name, "codebook", start)
    start = coder.cost
    codes = np.searchsorted(codebook, patterns[nonzero]) if coder.writes else np.zeros(0, np.int64)
    out[mask] = codebook[_code_codes(stream, codes, count, k)]
    stream.mark(name, "values", start, numel=numel)
    return out.view(kind).reshape(shape)


def _code_layout(stream: _Stream, layout: Layout | None, known: bool) -> Layout:
    """Names, shapes and dtypes; of a layout that both sides know, only a check."""
    scalars = stream.scalars
    if scalars.bit("known", int(known)):
        if layout is None:
            raise ValueError("the file holds no names and shapes: a layout is needed")
        check = zlib.crc32(repr([(n, tuple(s), str(d)) for n, (s, d) in layout.items()]).encode()) & 0xFF
        if stream.coder.uniform(check, 8) != check:
            raise ValueError("the layout given is not the one that the file was written with")
        return layout
    out = {}
    items = list(layout.items()) if stream.coder.writes else []
    total = 0
    for i in range(scalars.number("tensors", len(items), 1 << 20)):
        name, (shape, dtype) = items[i] if stream.coder.writes else ("", ((), ""))
        name = scalars.text("name", name)
        dtype = DTYPES[scalars.number("dtype", DTYPES.index(dtype) if dtype else 0, len(DTYPES))]
        ndim = scalars.number("ndim", len(shape), 33)
        shape = tuple(scalars.number(("dim", ndim), shape[j] if shape else 0, MAX_NUMEL + 1) for j in range(ndim))
        out[name] = (shape, dtype)
    return out


def _check_layout(layout: Layout) -> None:
    total = sum(math.prod(shape) for shape, _ in layout.values())
    if total > MAX_NUMEL:
        raise ValueError(f"{total} numbers; at most {MAX_NUMEL} fit a file")


def encode(header: dict, tensors: Mapping[str, np.ndarray], steps: Mapping[str, float] = {},
           layout: Layout | None = None) -> bytes:
    """Packs a header (any JSON-able dict) and arrays into bytes that `decode` turns back, bit for bit.

    steps: for a float32 tensor that equals float32(step) times small integers, that step.
    layout: name -> (shape, dtype) in the order of tensors, where the reader knows it too: then neither names nor
    shapes are stored.
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    found = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    for name, (shape, dtype) in found.items():
        if dtype not in DTYPES:
            raise ValueError(f"tensor {name}: dtype {dtype} is not one of {', '.join(DTYPES)}")
    if layout is not None and [(n, tuple(s), str(d)) for n, (s, d) in layout.items()] != [
            (n, s, d) for n, (s, d) in found.items()]:
        raise ValueError("the tensors do not have the names, shapes and dtypes of the layout, in its order")
    _check_layout(found)
    for name, step in steps.items():
        if name not in arrays:
            raise ValueError(f"steps: no tensor is called {name!r}")
        array, scale = arrays[name], np.float32(step)
        integers = np.rint(array.astype(np.float64) / scale)
        if array.dtype != np.float32 or not np.array_equal(
                _patterns(scale * integers.astype(np.float32)), _patterns(array)):
            raise ValueError(f"steps: tensor {name} is not float32({step}) times integers")
    stream = _Stream(Encoder())
    _code_header(stream, header)
    _code_layout(stream, found, layout is not None)
    for name, array in arrays.items():
        _code_tensor(stream, name, array, *found[name], steps.get(name))
    body = MAGIC + bytes([VERSION]) + stream.coder.finish() + stream.literal
    return body + zlib.crc32(body, len(body)).to_bytes(4, "little")


def _code_header(stream: _Stream, header: dict | None) -> dict:
    text = "" if header is None else json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    start = stream.coder.cost
    text = stream.scalars.text("header", text)
    stream.mark("", "header", start)
    return json.loads(text)


def _open(data: bytes, name: str) -> _Stream:
    if data[:2] != MAGIC:
        raise ValueError(f"{name}: not a packed network (it does not begin with {MAGIC!r})")
    body = data[:-4]
    if len(data) < 7 or zlib.crc32(body, len(body)) != int.from_bytes(data[-4:], "little"):
        raise ValueError(f"{name}: damaged or cut short (its checksum does not match)")
    if data[2] != VERSION:
        raise ValueError(f"{name}: format version {data[2]}; this program reads version {VERSION}")
    return _Stream(Decoder(body[3:]), body[3:])


def read_header(data: bytes, name: str = "file") -> dict:
    """The header alone. ValueError naming `name` where the data is damaged."""
    stream = _open(data, name)
    try:
        return _code_header(stream, None)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _decode(data: bytes, name: str, layout) -> tuple[dict, dict[str, np.ndarray], _Stream]:
    stream = _open(data, name)
    try:
        header = _code_header(stream, None)
        start = stream.coder.cost
        layout = _code_layout(stream, layout(header) if callable(layout) else layout, False)
        _check_layout(layout)
        stream.mark("", "layout", start)
        tensors = {tensor: _code_tensor(stream, tensor, None, tuple(shape), str(dtype), None)
                   for tensor, (shape, dtype) in layout.items()}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return header, tensors, stream


def decode(data: bytes, name: str = "file",
           layout: Layout | Callable[[dict], Layout] | None = None) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and tensors of `encode`. ValueError naming `name` where the data is damaged.

    layout: needed where the file was written with one; a callable is given the header.
    """
    header, tensors, _ = _decode(data, name, layout)
    return header, tensors


def account(data: bytes, name: str = "file",
            layout: Layout | Callable[[dict], Layout] | None = None) -> list[dict]:
    """Where each byte goes: rows {"tensor", "part", "bytes", ...} that sum to len(data)."""
    _, _, stream = _decode(data, name, layout)
    total = len(data) - 7 - 0
    bits = sum(row["bits"] for row in stream.rows)
    rows = [{"tensor": "", "part": "frame", "bytes": 7}]
    for row in stream.rows:
        share = row.pop("bits")
        rows.append({**row, "bytes": share / bits * total})
    rows[0]["bytes"] += len(data) - sum(row["bytes"] for row in rows)
    return rows
