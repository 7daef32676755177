"""Codes raw numbers: floats, integers, long arrays as byte planes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from trainer.mistakes import Mistake
from trainer.packing.coder import LOWEST, ONE
from trainer.packing.predictors import TYPICAL
from trainer.packing.stream import Stream

SHORT = 1024  # raw arrays up to this many numbers go into the coded stream, longer ones into literal planes
_MOST_KINDS = 32  # names' ends that have statistics of their own


def patterns_of(array: np.ndarray) -> np.ndarray:
    """Returns the bit patterns of an array as unsigned integers, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def code_numbers(stream: Stream, patterns: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Codes the patterns [n] of numbers of a dtype; a Decoder uses only the length and dtype of its argument."""
    drop = code_drop(stream, patterns, dtype)
    if len(patterns) > SHORT:
        return _code_planes(stream, patterns >> drop, 8 * dtype.itemsize - drop) << patterns.dtype.type(drop)
    if dtype.kind == "f":
        sign = 8 * dtype.itemsize - 1
        values = [
            stream.scalars.bit("sign", value >> sign) << sign | code_float(stream, value, dtype, drop)
            for value in patterns.tolist()
        ]
    else:
        modulus = 1 << 8 * dtype.itemsize
        values = []
        for value in patterns.tolist():
            folded = 2 * value if 2 * value < modulus else 2 * (modulus - value) - 1  # 0, -1, 1, -2, ...
            folded = stream.scalars.number(("integer", dtype.name), folded, modulus)
            values.append((modulus - folded // 2 - 1 if folded % 2 else folded // 2) % modulus)
    return np.array(values, patterns.dtype)


def fraction_bits(dtype: np.dtype) -> int:
    """Returns the number of fraction bits of a floating-point dtype."""
    return {2: 10, 4: 23, 8: 52}[dtype.itemsize]


def code_drop(stream: Stream, patterns: np.ndarray, dtype: np.dtype) -> int:
    """Codes how many low bits of the fraction are zero in every number: at least 13 if float16 is exact."""
    if dtype.kind != "f":
        return 0
    union = int(np.bitwise_or.reduce(patterns, initial=0)) | 1 << fraction_bits(dtype)
    drop = stream.scalars.tree("drop", 6, (union & -union).bit_length() - 1)
    if drop > fraction_bits(dtype):
        raise Mistake("the coded stream is damaged: a fraction is too short")
    return drop


def code_float(stream: Stream, value: int, dtype: np.dtype, drop: int) -> int:
    """Codes the pattern of a number >= 0 whose fraction ends in `drop` zero bits."""
    fraction = fraction_bits(dtype)
    exponent_bits = 8 * dtype.itemsize - 1 - fraction
    context = "exponent" if dtype.itemsize == 4 else ("exponent", dtype.itemsize)
    exponent = stream.scalars.tree(context, exponent_bits, value >> fraction & (1 << exponent_bits) - 1)
    return (
        exponent << fraction
        | stream.coder.uniform(fraction - drop, (value & (1 << fraction) - 1) >> drop) << drop
    )


def code_floats(stream: Stream, dtype: np.dtype, tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Codes several tensors' patterns [n] of numbers of a floating-point dtype together: {name: patterns}.

    Exponents and signs are coded in waves, by their frequencies so far in tensors whose names end alike; the fractions are
    literal bits. A Decoder uses only names and lengths.
    """
    drops = []
    for name, patterns in tensors.items():
        start = stream.here()
        drops.append(code_drop(stream, patterns, dtype))
        stream.part(name, "values", start)
    kinds: dict[str, int] = {}
    kind_of = [
        kinds.setdefault(name.rpartition(".")[2], min(len(kinds), _MOST_KINDS - 1)) for name in tensors
    ]
    lengths = [len(patterns) for patterns in tensors.values()]
    owner = np.repeat(np.arange(len(tensors)), lengths)
    fraction = fraction_bits(dtype)
    everything = np.concatenate(list(tensors.values()))
    stream.spent = np.zeros(len(tensors))
    high = _code_high(stream, everything >> fraction, dtype, np.repeat(kind_of, lengths), owner)
    for name, bits in zip(tensors, stream.spent.tolist(), strict=True):
        stream.parts.append((name, "values", bits, 0))

    starts = np.cumsum([0, *lengths])
    digits = [
        everything[start : start + length, None]
        >> np.arange(fraction - 1, drop - 1, -1, dtype=everything.dtype)
        & 1
        for start, length, drop in zip(starts.tolist(), lengths, drops, strict=False)
    ]
    sizes = [length * (fraction - drop) for length, drop in zip(lengths, drops, strict=True)]
    packed = np.packbits(np.concatenate([part.reshape(-1) for part in digits]).astype(bool))
    read = np.frombuffer(stream.literally(-(-sum(sizes) // 8), packed.tobytes()), np.uint8)
    low_bits = np.unpackbits(read)[: sum(sizes)]
    found, at = [], 0
    for name, start, length, drop, size in zip(tensors, starts.tolist(), lengths, drops, sizes, strict=False):
        powers = everything.dtype.type(1) << np.arange(fraction - 1, drop - 1, -1, dtype=everything.dtype)
        low = low_bits[at : at + size].reshape(length, fraction - drop) @ powers
        found.append(high[start : start + length] << fraction | low.astype(everything.dtype))
        stream.parts.append((name, "values", 0.0, size / 8))
        at += size
    if tensors:
        stream.parts.append((name, "values", 0.0, len(read) - sum(sizes) / 8))
    return found


def _code_high(
    stream: Stream, high: np.ndarray, dtype: np.dtype, kind: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """Codes signs and exponents [n] of numbers, by their frequencies in numbers of the same kind [n]."""
    num_bits = 8 * dtype.itemsize - 1 - fraction_bits(dtype)
    counts = np.zeros((int(kind.max(initial=0)) + 1, 2 << num_bits, 2), np.int64)  # the last half: of signs
    if dtype.itemsize == 4:  # typical exponents, as if each had been seen once
        for exponent in TYPICAL:
            for shift in range(num_bits):
                counts[:, (1 << num_bits | exponent) >> shift + 1, exponent >> shift & 1] += 1
    out = np.zeros_like(high)
    # Kinds advance side by side, each from its first number to its last.
    place = np.zeros(len(high), np.int64)
    for row in range(len(counts)):
        place[kind == row] = np.arange(int((kind == row).sum()))
    order = np.argsort(place, kind="stable")
    at, size = 0, 16
    while at < len(high):
        now = order[at : at + size]
        at, size = at + size, min(2 * size, 1024)
        numbers, own, whose = high[now].astype(np.int64), kind[now], owner[now]
        node = np.ones(len(now), np.int64)
        for shift in (*range(num_bits - 1, -1, -1), num_bits):
            if shift == num_bits:
                exponents, node = node - (1 << num_bits), np.full_like(node, 1 << num_bits)
            seen = counts[own, node]
            ratio = ONE * (2 * seen[:, 1] + 1) // (2 * seen.sum(1) + 2)
            bit = stream.code(np.clip(ratio, LOWEST, ONE - LOWEST), numbers >> shift & 1, whose)
            np.add.at(counts, (own, node, bit), 1)
            node = node * 2 + bit
        out[now] = (exponents | (node & 1) << num_bits).astype(high.dtype)
    return out


def _code_planes(stream: Stream, patterns: np.ndarray, num_bits: int) -> np.ndarray:
    """Codes the numbers byte plane by byte plane, each deflated if that is smaller."""
    out = np.zeros_like(patterns)
    for shift in range(0, num_bits, 8):
        plane = (
            (patterns >> patterns.dtype.type(shift)).astype(np.uint8).tobytes()
            if stream.coder.writes
            else b""
        )
        packed = zlib.compress(plane, 9)
        if not stream.scalars.bit("deflated", int(len(packed) < len(plane))):
            plane = stream.literally(len(patterns), plane)
        else:
            packed = stream.literally(stream.scalars.number("packed", len(packed), len(patterns)), packed)
            plane = zlib.decompressobj().decompress(packed, len(patterns))
            if len(plane) != len(patterns):
                raise Mistake("literal bytes are damaged")
        out |= np.frombuffer(plane, np.uint8).astype(patterns.dtype) << patterns.dtype.type(shift)
    return out
