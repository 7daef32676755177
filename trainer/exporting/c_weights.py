"""Writes weights as constant arrays of C: gaps and codes in one stream of bits that is walked as it lies."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.exporting.huffman import bits, codes, lengths
from trainer.exporting.shared_values import SharedValues, shared_values
from trainer.packing.network import grid_steps

LAST_GAP = 254  # goes on in the next word
LONGEST = 16  # bits of a word


def literal(value: float) -> str:
    """Returns a float32 as a literal of C that reads as the same bits; INFINITY is of math.h."""
    if not math.isfinite(np.float32(value)):
        return "NAN" if math.isnan(value) else "INFINITY" if value > 0 else "-INFINITY"
    text = f"{float(np.float32(value)):.9g}"
    return text + ("f" if any(sign in text for sign in ".e") else ".0f")


def floats(name: str, values: Sequence[float] | np.ndarray) -> str:
    """Returns the line of a constant array of float32."""
    return f"static const float {name}[] = {{{', '.join(literal(v) for v in np.ravel(values))}}};\n"


def bytes_of(name: str, values: np.ndarray) -> str:
    """Returns the line of a constant array of bytes."""
    return f"static const uint8_t {name}[] = {{{','.join(map(str, values.tolist() or [0]))}}};\n"


@dataclass(frozen=True)
class Stream:
    """A tensor as gaps and codes in canonical Huffman codes.

    Attributes:
        bits: uint8, the first bit of a byte lowest; a number is the words of its gap, then that of its code.
        values: float32 of the codes, in the order of their words.
        gaps: Of the words, below 255; 254 goes on in the next word. None if no number is zero.
        gap_words: How many words have 1, 2, ... bits; [] for a single one, which is empty.
        code_words: Likewise.
        count: How many numbers are written.
    """

    bits: np.ndarray
    values: np.ndarray
    gaps: np.ndarray | None
    gap_words: list[int]
    code_words: list[int]
    count: int

    @property
    def num_bytes(self) -> int:
        """What it takes, with its tables."""
        tables = 2 * len(self.gap_words + self.code_words) + (0 if self.gaps is None else len(self.gaps))
        return len(self.bits) + 4 * len(self.values) + tables


def weight(name: str, values: np.ndarray) -> tuple[str, int]:
    """Returns the lines of the `weight` of C of this name, and how many bytes its numbers take.

    The smallest of: gaps and codes, codes of all numbers, plain float32.
    """
    shared = [shared_values(values, zero_is_a_value=zero) for zero in (False, True)]
    found = [stream_of(one) for one in shared if one is not None and len(one.values)]
    best = min(found, key=lambda one: one.num_bytes, default=None)
    if best is None or best.num_bytes >= 4 * values.size:
        lines = floats(f"{name}_values", values)
        return (
            f"{lines}static const weight {name} = {{0, {name}_values, 0, 0, 0, {values.size}}};\n",
            4 * values.size,
        )
    lines = bytes_of(f"{name}_bits", best.bits) + floats(f"{name}_values", best.values)
    facts = [f"{name}_bits", f"{name}_values", "0" if best.gaps is None else f"{name}_gaps"]
    if best.gaps is not None:
        lines += bytes_of(f"{name}_gaps", best.gaps)
    for kind, words in (("gap_words", best.gap_words), ("code_words", best.code_words)):
        facts.append(f"{name}_{kind}" if words else "0")
        if words:
            lines += f"static const uint16_t {name}_{kind}[] = {{{', '.join(map(str, words))}}};\n"
    return f"{lines}static const weight {name} = {{{', '.join(facts)}, {best.count}}};\n", best.num_bytes


def stream_of(shared: SharedValues) -> Stream:
    """Returns shared values as a stream of bits."""
    code_order, code_words, words, sizes = _words(shared.codes)
    gap_order: np.ndarray | None = None
    gap_words: list[int] = []
    if shared.positions is not None:
        gaps = shared.gaps()
        ends = np.cumsum(gaps // LAST_GAP + 1)
        parts = np.full(int(ends[-1]), LAST_GAP)
        parts[ends - 1] = gaps % LAST_GAP
        gap_order, gap_words, of_gaps, sizes_of_gaps = _words(parts)
        # The code of a number comes after all words of its gap.
        words, sizes = np.insert(of_gaps, ends, words), np.insert(sizes_of_gaps, ends, sizes)
    packed = np.packbits(bits(words, sizes, LONGEST), bitorder="little")
    return Stream(packed, shared.values[code_order], gap_order, gap_words, code_words, len(shared.codes))


def _words(symbols: np.ndarray) -> tuple[np.ndarray, list[int], np.ndarray, np.ndarray]:
    """Returns the different symbols in the order of their words, how many have 1, 2, ... bits, and each symbol's word and its bits."""
    different, numbers = np.unique(symbols, return_inverse=True)
    if len(different) < 2:
        none = np.zeros(len(symbols), np.int64)
        return different, [], none, none
    sizes = lengths(np.bincount(numbers), LONGEST)
    order = np.argsort(sizes, kind="stable")
    words = np.empty(len(order), np.int64)
    words[order] = codes(sizes[order], LONGEST)
    return different[order], np.bincount(sizes)[1:].tolist(), words[numbers], sizes[numbers]


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
