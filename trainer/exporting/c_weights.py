"""Writes weights as constant arrays of C: gaps and codes in one stream of bits that is walked as it lies."""

from collections.abc import Sequence

import numpy as np

from trainer.exporting.shared_values import SharedValues, shared_values
from trainer.packing.network import grid_steps


def literal(value: float) -> str:
    """Returns a float32 as a literal of C that reads as the same bits."""
    text = f"{float(np.float32(value)):.9g}"
    return text + ("f" if any(sign in text for sign in ".e") else ".0f")


def floats(name: str, values: Sequence[float] | np.ndarray) -> str:
    """Returns the line of a constant array of float32."""
    return f"static const float {name}[] = {{{', '.join(literal(v) for v in np.ravel(values))}}};\n"


def bytes_of(name: str, values: np.ndarray) -> str:
    """Returns the line of a constant array of bytes."""
    return f"static const uint8_t {name}[] = {{{','.join(map(str, values.tolist() or [0]))}}};\n"


def weight(name: str, values: np.ndarray) -> tuple[str, int]:
    """Returns the lines of the `weight` of C of this name, and how many bytes its numbers take.

    The smallest of: gaps and codes, codes of all numbers, plain float32.
    """
    found: list[tuple[int, int, SharedValues, np.ndarray]] = []
    for zero in (False, True):
        shared = shared_values(values, zero_is_a_value=zero)
        if shared is not None and len(shared.values):
            gap_bits, stream = stream_of(shared)
            found.append((len(stream) + 4 * len(shared.values), gap_bits, shared, stream))
    found.sort(key=lambda one: one[0])
    if not found or found[0][0] >= 4 * values.size:
        lines = floats(f"{name}_values", values)
        return (
            f"{lines}static const weight {name} = {{0, {name}_values, {values.size}, -1, 0}};\n",
            4 * values.size,
        )
    size, gap_bits, shared, stream = found[0]
    lines = bytes_of(f"{name}_bits", stream) + floats(f"{name}_values", shared.values)
    facts = f"{name}_bits, {name}_values, {len(shared.codes)}, {gap_bits}, {code_bits(shared)}"
    return f"{lines}static const weight {name} = {{{facts}}};\n", size


def code_bits(shared: SharedValues) -> int:
    """Returns how many bits a code takes."""
    return max(len(shared.values) - 1, 0).bit_length()


def stream_of(shared: SharedValues) -> tuple[int, np.ndarray]:
    """Returns the bits of a gap that are written as they are (-1: no gaps), and the stream, uint8.

    A number is its gap in a Golomb-Rice code (gap >> k ones, a zero, k low bits), then its code; all with the least bit first.
    """
    codes, wide = shared.codes, code_bits(shared)
    if shared.positions is None:
        best, ones, low = -1, np.zeros(len(codes), np.int64), np.zeros(len(codes), np.int64)
        widths = np.full(len(codes), wide)
    else:
        gaps = shared.gaps()
        best = min(range(16), key=lambda k: int((gaps >> k).sum()) + k * len(gaps))
        ones, low = gaps >> best, gaps & ((1 << best) - 1)
        widths = ones + 1 + best + wide
    ends = np.cumsum(widths)
    bits = np.zeros(int(ends[-1]), np.uint8)
    for number, end in enumerate(ends.tolist()):
        at = end - int(widths[number])
        bits[at : at + int(ones[number])] = 1
        tail = int(low[number]) | int(codes[number]) << max(best, 0)
        for place in range(max(best, 0) + wide):
            bits[end - max(best, 0) - wide + place] = tail >> place & 1
    return best, np.packbits(bits, bitorder="little")


def vector(name: str, values: np.ndarray) -> tuple[str, int]:
    """Returns the lines of the `vector` of C of this name, and its bytes: integers times a step, or plain float32."""
    values = np.ascontiguousarray(values, np.float32).reshape(-1)
    step = grid_steps({name: values}).get(name)
    if step is not None:
        steps = np.rint(values.astype(np.float64) / step).astype(np.int64)
        least = int(steps.min())
        exact = steps.astype(np.float32) * np.float32(step)
        if steps.max() - least < 256 and np.array_equal(exact.view(np.uint32), values.view(np.uint32)):
            lines = bytes_of(f"{name}_bits", steps - least)
            return (
                f"{lines}static const vector {name} = {{{name}_bits, 0, {literal(step)}, {least}}};\n",
                len(values),
            )
    return (
        f"{floats(f'{name}_floats', values)}static const vector {name} = {{0, {name}_floats, 0.0f, 0}};\n",
        4 * len(values),
    )
