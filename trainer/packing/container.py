"""The packed file: a header and named arrays in few bytes, decoded bit for bit.

    magic, version      3 bytes
    coded stream        header, layout, tensors: one arithmetic-coded stream, see `coder`
    literal bytes       long arrays of raw numbers, plain or deflated; read from the end backwards
    checksum            4 bytes, CRC-32 of all before it

A tensor is written as numbers, or as a mask (True where it is not zero) followed by the non-zero numbers, by
codes into a codebook, or by small integers times a step. Zero means the bit pattern of +0.0; -0.0 is a number
like any other, so add 0.0 to a masked tensor before packing it. Masks and codes are predicted bit by bit from
the known part of the tensor and from the tensor before it: see `masks` and `ranks`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from trainer.mistakes import Mistake
from trainer.networks.bounded import bounded
from trainer.packing.coder import LOWEST, ONE, Decoder, Encoder, Meter
from trainer.packing.numbers import patterns_of
from trainer.packing.rivals import rival_bytes
from trainer.packing.stream import PRIMER, Stream
from trainer.packing.tensors import MAX_CLUSTERS, code_tensor
from trainer.packing.together import code_together

MAGIC = b"tS"
VERSION = 4
# That are read. 1 and 2 are coded alike, and 2 says how images are brought to the input; 3 codes small tensors of integers
# number by number, and expects other headers; 4 codes all tensors together, which takes a tenth of the time.
VERSIONS = (1, 2, 3, 4)
# Bytes of a file up to which it is written in version 3 if that makes it smaller, and up to which if it saves a fiftieth.
SMALL, MEDIUM = 8192, 65536
MAX_NUMEL = 1 << 28  # numbers in all tensors of a file: 1 GB of float32
DTYPES = "float32 int64 float16 float64 int32 int16 int8 uint8 bool uint16 uint32 uint64".split()
_LONG, _LONGEST = 4096, 1 << 24  # bytes: a longer header is deflated; a still longer one is refused
# What a file may ask for: so much at least, and so much more for each of its bytes. Real files are far below: of the
# most heavily pruned networks that are known, a byte holds 20 weights.
_NUMBERS = (1 << 24, 1 << 12)
_CALLS = (1 << 18, 1 << 6)  # function calls that build its network: a ResNet-18's take 46,000
_MOST_CALLS = 1 << 22  # timm's networks take up to 1.2 million
_TEXT = (1 << 13, 1 << 4)  # bytes of its tensors' names
_INFLATED = (1 << 16, 1 << 6)  # bytes of a deflated header's text, by its deflated bytes
Layout = Mapping[str, tuple[tuple[int, ...], str | np.dtype]]
Normal = dict[str, tuple[tuple[int, ...], str]]
LayoutSource = Layout | Callable[[dict], Layout] | None


def _most(limit: tuple[int, int], num_bytes: float) -> float:
    """Returns what a file of so many bytes may ask for."""
    return limit[0] + limit[1] * num_bytes


def _normal(layout: Layout) -> Normal:
    """Returns a layout with plain tuples and dtype names. Raises Mistake for unknown dtypes and too many numbers."""
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
    """Codes names, shapes and dtypes, or only a check of a layout that both sides know.

    layout: of an Encoder, the tensors'; of a Decoder, the one it knows, or None. stored: whether an Encoder writes all.
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
    left = _most(_TEXT, stream.num_bytes)
    for i in range(scalars.number("tensors", len(items), 1 << 20)):
        name, (shape, dtype) = items[i] if stream.coder.writes else ("", ((), DTYPES[0]))
        name = stream.text.code(name, left)
        left -= len(name.encode()) + 1
        if name in found and not stream.coder.writes:
            raise Mistake(f"the coded stream is damaged: two tensors are called {name!r}")
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


def _known_layout(stream: Stream, header: dict, layout: LayoutSource) -> Normal | None:
    """Returns the layout that the reader knows, None if there is none."""
    if not callable(layout):
        return None if layout is None else _normal(layout)
    calls = int(min(_MOST_CALLS, _most(_CALLS, stream.num_bytes)))
    with bounded(calls, int(_most(_NUMBERS, stream.num_bytes))):
        known = layout(header)
    return _normal(known)


def _check_room(layout: Normal, num_bytes: int) -> None:
    """Raises Mistake for more numbers than a file of so many bytes may hold."""
    total, most = sum(math.prod(shape) for shape, _ in layout.values()), _most(_NUMBERS, num_bytes)
    if total > most:
        raise Mistake(f"{total:,} numbers in a file of {num_bytes:,} bytes; at most {most:,} are allowed")


def _code_header(stream: Stream, header: dict) -> dict:
    text, dictionary = "", b"" if stream.version < 4 else PRIMER.encode()
    if stream.coder.writes:
        try:
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        except TypeError as error:
            raise Mistake(f"the header cannot be written as JSON: {error}") from error
    packed = text.encode()
    # A long one (thousands of class names) is deflated, because the text model takes 50 us for a byte.
    if dictionary or stream.coder.bit(16 * LOWEST, int(len(packed) > _LONG)):
        # The dictionary is text that headers have in common; its files have neither zlib's header nor checksum.
        form: dict[str, Any] = {"wbits": -15, "zdict": dictionary} if dictionary else {}
        deflate = zlib.compressobj(9, **form)
        packed = deflate.compress(packed) + deflate.flush()
        packed = stream.literally(stream.scalars.number("header", len(packed), _LONGEST), packed)
        most = int(min(_LONGEST, _most(_INFLATED, len(packed))))
        inflated = zlib.decompressobj(**form).decompress(packed, most + 1)
        if len(inflated) > most:
            raise Mistake(f"the header's {len(packed):,} bytes unfold to more than {most:,} bytes of text")
        text = inflated.decode()
    else:
        text = stream.text.code(text, _LONG)
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
    """Packs a header and arrays into bytes.

    Args:
        header: A dict of JSON's types; tuples become lists.
        tensors: {name: array}, which decode bit for bit.
        steps: {name: step} for float32 tensors that equal float32(step) times integers up to 2^15.
        layout: {name: (shape, dtype)}, in the order of the tensors, if the reader will know it too (from the
            architecture that the header names). Names and shapes are then not written.

    Raises:
        Mistake: For a tensor of an unknown dtype, more than `MAX_NUMEL` numbers, or a header that JSON cannot hold.
        ValueError: For tensors that contradict steps or layout.
    """
    arrays = {str(name): np.asarray(array) for name, array in tensors.items()}
    found = _normal({name: (array.shape, array.dtype) for name, array in arrays.items()})
    if layout is not None and list(_normal(layout).items()) != list(found.items()):
        raise ValueError("the tensors do not have the names, shapes and dtypes of the layout, in its order")
    for name, step in steps.items():
        if name not in arrays:
            raise ValueError(f"steps: there is no tensor {name!r}")
        _check_step(name, arrays[name], step)

    def packed(version: int) -> bytes:
        coder = Encoder()
        stream = Stream(coder, bytearray(), version)
        _code_header(stream, header)
        _code_layout(stream, found, layout is None)
        _code_tensors(stream, arrays, steps)
        body = MAGIC + bytes([version]) + coder.finish(bool(stream.literal)) + bytes(stream.literal)
        _check_room(found, len(body) + 4)
        return body + _checksum(body)

    data = packed(VERSION)
    if len(data) <= MEDIUM:
        smaller = packed(3)
        if len(smaller) < len(data) * (1 if len(data) <= SMALL else 0.98):
            return smaller
    return data


def _code_tensors(
    stream: Stream, arrays: Mapping[str, np.ndarray], steps: Mapping[str, float] = {}
) -> dict[str, np.ndarray]:
    """Codes all tensors; a Decoder gets arrays of the right shapes and dtypes."""
    if stream.version >= 4:
        return code_together(stream, arrays, steps)
    return {name: code_tensor(stream, name, array, steps.get(name)) for name, array in arrays.items()}


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
        known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        raise Mistake(f"{name}: format version {data[2]}; this program reads versions {known}")
    body = data[3:-4]
    decoder = Decoder(body)
    # No decision costs fewer bits than one of the highest possible probability.
    capacity = (8 * len(body) + 64) / -math.log2(1 - LOWEST / ONE)
    coder = Meter(decoder) if measure else decoder
    stream = Stream(coder, bytearray(body), data[2], capacity=capacity, num_bytes=len(data))
    return stream, decoder


def read_header(data: bytes, name: str = "file") -> dict:
    """Returns the header alone. Raises Mistake, with `name`, for damaged data."""
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
        found = _code_layout(stream, _known_layout(stream, header, layout), False)
        _check_room(found, len(data))
        stream.part("", "layout", start)
        blank = {tensor: np.zeros(shape, dtype) for tensor, (shape, dtype) in found.items()}
        tensors = _code_tensors(stream, blank)
        decoder.check_end(len(stream.literal))
    except (ValueError, zlib.error) as error:
        raise Mistake(f"{name}: {error}") from error
    return header, tensors, stream


def decode(
    data: bytes, name: str = "file", layout: LayoutSource = None
) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns the header and the tensors that `encode` was given, bit for bit.

    Args:
        data: The file's bytes.
        name: The file's name, for messages.
        layout: The layout that the file was written with, if any, or a function of the header that returns it.

    Raises:
        Mistake: For damaged data, or data that contradicts the layout.
    """
    header, tensors, _ = _decode(data, name, layout)
    return header, tensors


def account(data: bytes, name: str = "file", layout: LayoutSource = None) -> list[dict[str, Any]]:
    """Returns where each byte goes: rows {"tensor", "part", "bytes"} whose bytes sum to exactly len(data).

    part is frame (magic, version, checksum), header or layout; for each tensor form, mask, codebook or values. Parts
    are in one coded stream, so their bytes are fractional, by ideal code length.
    The "values" row of a weight tensor (floating point, two dimensions or more) also has numel, nonzero, clusters,
    and the bytes of its mask and codes in other codes: iid_bytes (entropy of the mask plus entropy of the values),
    huffman_bytes (Huffman-coded relative indexes of 5 bits for matrices and 8 for convolutions, with fillers, and
    Huffman-coded codes, without tables; Han et al. 2016), dense_huffman_bytes (the code of every weight
    Huffman-coded, zeros included), zlib_bytes (the codes, deflated).
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
    for row, num_bytes in zip(rows[1:], np.diff(edges).tolist(), strict=True):
        row["bytes"] += num_bytes
        tensor = tensors.get(row["tensor"], np.zeros(0))
        if row["part"] == "values" and tensor.dtype.kind == "f" and tensor.ndim > 1:
            row |= rival_bytes(tensor)
    return rows
