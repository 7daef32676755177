"""The packed file: a header and named arrays in as few bytes as we know how, given back bit for bit.

    magic, version      3 bytes
    coded stream        header, layout, tensors: one arithmetic-coded stream, see `coder`
    literal bytes       of long arrays of raw numbers, plain or deflated; read from the end backwards
    checksum            4 bytes, CRC-32 of all before it

A tensor is written as numbers, or as a mask (where it is not zero) followed by the non-zero numbers, or by
codes into a codebook, or by small integers that a step multiplies. Zero means the bit pattern of +0.0; a -0.0
is a number like any other, so add 0.0 to a masked tensor before packing it. Masks and codes are predicted bit
by bit from what is already known of the tensor and of the one before it: see `masks` and `ranks`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainer.mistakes import Mistake
from trainer.packing.coder import LOWEST, ONE, Decoder, Encoder, Meter
from trainer.packing.numbers import patterns_of
from trainer.packing.rivals import rival_bytes
from trainer.packing.stream import Stream
from trainer.packing.tensors import MAX_CLUSTERS, code_tensor

MAGIC = b"tS"
VERSION = 2
VERSIONS = (
    1,
    2,
)  # of files that are read; they are coded alike, and 2 says how images are brought to the input
MAX_NUMEL = 1 << 28  # of all tensors of a file together: 1 GB of float32
DTYPES = "float32 int64 float16 float64 int32 int16 int8 uint8 bool uint16 uint32 uint64".split()
_LONG, _LONGEST = 4096, 1 << 24  # bytes of a header that is deflated, and of the longest that is read
Layout = Mapping[str, tuple[tuple[int, ...], str | np.dtype]]
Normal = dict[str, tuple[tuple[int, ...], str]]
LayoutSource = Layout | Callable[[dict], Layout] | None


def _normal(layout: Layout) -> Normal:
    """A layout with plain tuples and dtype names. Mistake where it asks for too much."""
    normal = {
        str(name): (tuple(int(size) for size in shape), np.dtype(dtype).name)
        for name, (shape, dtype) in layout.items()
    }
    for name, (_, dtype) in normal.items():
        if dtype not in DTYPES:
            raise Mistake(f"tensor {name}: dtype {dtype} is not one of {', '.join(DTYPES)}")
        if "\0" in name:
            raise Mistake(f"tensor {name!r}: a name may not hold the byte 0")
    total = sum(math.prod(shape) for shape, _ in normal.values())
    if total > MAX_NUMEL:
        raise Mistake(f"{total} numbers in all tensors together; at most {MAX_NUMEL} are allowed")
    return normal


def _code_layout(stream: Stream, layout: Normal | None, stored: bool) -> Normal:
    """Names, shapes and dtypes; of a layout that both sides know, only a check.

    stored: whether an Encoder writes it all. A Decoder is handed the layout that it knows, or None.
    """
    scalars = stream.scalars
    if not scalars.bit("stored", int(stored)):
        if layout is None:
            raise Mistake("it holds no names and shapes; they must be given as a layout")
        check = zlib.crc32(repr(list(layout.items())).encode()) & 0xFF
        if stream.coder.uniform(8, check) != check:
            raise Mistake("the layout given is not the one that it was written with")
        return layout
    items = list(layout.items()) if stream.coder.writes and layout is not None else []
    found: Normal = {}
    for i in range(scalars.number("tensors", len(items), 1 << 20)):
        name, (shape, dtype) = items[i] if stream.coder.writes else ("", ((), DTYPES[0]))
        name = stream.text.code(name)
        dtype = DTYPES[scalars.number("dtype", DTYPES.index(dtype), len(DTYPES))]
        dims = scalars.number("dims", len(shape), 65)
        found[name] = (
            tuple(
                scalars.number(("size", dims), shape[j] if stream.coder.writes else 0, MAX_NUMEL + 1)
                for j in range(dims)
            ),
            dtype,
        )
    return _normal(found)


def _code_header(stream: Stream, header: dict) -> dict:
    text = ""
    if stream.coder.writes:
        try:
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        except TypeError as error:
            raise Mistake(f"the header cannot be written as JSON: {error}") from error
    packed = text.encode()
    # a long one (thousands of class names) is deflated: the text model takes 50 us for a byte
    if stream.coder.bit(16 * LOWEST, int(len(packed) > _LONG)):
        packed = zlib.compress(packed, 9)
        packed = stream.literally(stream.scalars.number("header", len(packed), _LONGEST), packed)
        text = zlib.decompressobj().decompress(packed, _LONGEST).decode()
    else:
        text = stream.text.code(text)
    try:
        return json.loads(text)
    except RecursionError:
        raise Mistake("the header is nested too deeply") from None


def encode(
    header: dict,
    tensors: Mapping[str, np.ndarray],
    steps: Mapping[str, float] = {},
    layout: Layout | None = None,
) -> bytes:
    """Packs a header (a dict that JSON can hold; tuples become lists) and arrays, which return bit for bit.

    steps: of a float32 tensor that equals float32(step) times integers up to 2^15, that step.
    layout: name -> (shape, dtype), in the order of the tensors, where the reader will know it too (from the
    architecture that the header names): then neither names nor shapes are written.
    Mistake where a tensor is of an unknown dtype, or not what steps or layout say of it.
    """
    arrays = {str(name): np.asarray(array) for name, array in tensors.items()}
    found = _normal({name: (array.shape, array.dtype) for name, array in arrays.items()})
    if layout is not None and list(_normal(layout).items()) != list(found.items()):
        raise ValueError("the tensors do not have the names, shapes and dtypes of the layout, in its order")
    for name, step in steps.items():
        if name not in arrays:
            raise ValueError(f"steps: there is no tensor {name!r}")
        _check_step(name, arrays[name], step)
    coder = Encoder()
    stream = Stream(coder, bytearray())
    _code_header(stream, header)
    _code_layout(stream, found, layout is None)
    for name, array in arrays.items():
        code_tensor(stream, name, array, steps.get(name))
    body = MAGIC + bytes([VERSION]) + coder.finish(bool(stream.literal)) + bytes(stream.literal)
    return body + _checksum(body)


def _check_step(name: str, array: np.ndarray, step: float) -> None:
    scale = np.float32(step)
    if array.dtype != np.float32 or not np.isfinite(scale) or scale <= 0:
        raise ValueError(
            f"steps: tensor {name} is {array.dtype} with step {step}; it is float32, the step positive"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"steps: tensor {name} holds values that are not finite")
    integers = np.rint(array.astype(np.float64) / np.float64(scale))
    if np.abs(integers).max(initial=0) > MAX_CLUSTERS // 2:
        raise ValueError(
            f"steps: tensor {name} reaches {np.abs(integers).max():.0f} steps of {step}; "
            f"at most {MAX_CLUSTERS // 2} are allowed"
        )
    exact = scale * integers.astype(np.float32) + np.float32(0)
    if not np.array_equal(patterns_of(exact), patterns_of(array)):
        raise ValueError(
            f"steps: tensor {name} is not float32({step}) times integers (-0.0 does not count as 0)"
        )


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body, len(body) & 0xFFFFFFFF).to_bytes(4, "little")


def _open(data: bytes, name: str, measure: bool = False) -> tuple[Stream, Decoder]:
    if data[:2] != MAGIC:
        raise Mistake(f"{name}: not a packed network (it does not begin with {MAGIC.decode()!r})")
    if len(data) < 7 or _checksum(data[:-4]) != data[-4:]:
        raise Mistake(f"{name}: damaged or cut short (its checksum does not match its {len(data)} bytes)")
    if data[2] not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise Mistake(f"{name}: format version {data[2]}; this program reads versions {known}")
    body = data[3:-4]
    decoder = Decoder(body)
    # A decision costs no fewer bits than one of the highest probability that there is.
    capacity = (8 * len(body) + 64) / -math.log2(1 - LOWEST / ONE)
    return Stream(Meter(decoder) if measure else decoder, bytearray(body), capacity=capacity), decoder


def read_header(data: bytes, name: str = "file") -> dict:
    """The header alone. Mistake naming `name` where the data is damaged."""
    stream, _ = _open(data, name)
    try:
        return _code_header(stream, {})
    except (ValueError, zlib.error) as error:
        raise Mistake(f"{name}: {error}") from error


def _decode(
    data: bytes, name: str, layout: LayoutSource, measure: bool = False
) -> tuple[dict, dict[str, np.ndarray], Stream]:
    stream, decoder = _open(data, name, measure)
    try:
        header = _code_header(stream, {})
        stream.part("", "header", (0.0, len(stream.literal)))
        start = stream.here()
        known = layout(header) if callable(layout) else layout
        found = _code_layout(stream, None if known is None else _normal(known), False)
        stream.part("", "layout", start)
        tensors = {
            tensor: code_tensor(stream, tensor, np.zeros(shape, dtype))
            for tensor, (shape, dtype) in found.items()
        }
        decoder.check_end(len(stream.literal))
    except (ValueError, zlib.error) as error:
        raise Mistake(f"{name}: {error}") from error
    return header, tensors, stream


def decode(
    data: bytes, name: str = "file", layout: LayoutSource = None
) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the tensors that `encode` was given, bit for bit.

    layout: needed where the file was written with one; a callable is given the header and returns the layout.
    Mistake naming `name` where the data is damaged, or not what the layout says.
    """
    header, tensors, _ = _decode(data, name, layout)
    return header, tensors


def account(data: bytes, name: str = "file", layout: LayoutSource = None) -> list[dict[str, Any]]:
    """Where each byte goes: rows {"tensor", "part", "bytes"} whose bytes sum to exactly len(data).

    part: frame (magic, version, checksum), header, layout; of each tensor form, mask, codebook, values. Parts
    share one coded stream, so their bytes are fractions, by ideal code length.
    The "values" row of a weight tensor (floating point, two dimensions or more) also tells: numel, nonzero,
    clusters, and what its mask and codes would take otherwise: iid_bytes (entropy of the mask plus that of
    the values), huffman_bytes (Huffman-coded relative indexes of 5 bits for matrices and 8 for convolutions,
    with fillers, and Huffman-coded codes, without tables; Han et al. 2016), dense_huffman_bytes (every weight's
    code Huffman-coded, that of zero among them), zlib_bytes (the codes, deflated).
    """
    _, tensors, stream = _decode(data, name, layout, measure=True)
    rows: list[dict[str, Any]] = [{"tensor": "", "part": "frame", "bytes": 7.0}]
    rows += [
        {"tensor": tensor, "part": part, "bytes": float(literal)} for tensor, part, _, literal in stream.parts
    ]
    coded = len(data) - sum(row["bytes"] for row in rows)
    bits = np.cumsum([0.0, *(bits for _, _, bits, _ in stream.parts)])
    # multiples of 1/1024: their sum is exact
    edges = np.rint(bits / bits[-1] * coded * 1024) / 1024
    for row, share in zip(rows[1:], np.diff(edges).tolist(), strict=True):
        row["bytes"] += share
        tensor = tensors.get(row["tensor"], np.zeros(0))
        if row["part"] == "values" and tensor.dtype.kind == "f" and tensor.ndim > 1:
            row |= rival_bytes(tensor)
    return rows
