"""Codes raw numbers: floats, integers, long arrays as byte planes."""

from __future__ import annotations

import zlib

import numpy as np

from trainer.mistakes import Mistake
from trainer.packing.stream import Stream

_SHORT = 1024  # raw arrays up to this many numbers go into the coded stream, longer ones into literal planes


def patterns_of(array: np.ndarray) -> np.ndarray:
    """Returns the bit patterns of an array as unsigned integers, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def code_numbers(stream: Stream, patterns: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Codes the patterns [n] of numbers of a dtype; a Decoder uses only the length and dtype of its argument."""
    drop = code_drop(stream, patterns, dtype)
    if len(patterns) > _SHORT:
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
