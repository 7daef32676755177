"""Codes small tensors of small integers, number by number."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from trainer.mistakes import Mistake
from trainer.packing.coder import ONE, Coder
from trainer.packing.grids import Grid
from trainer.packing.predictors import STRETCH_LIMIT, squash_table, stretch_table

MOST_NUMBERS = 2048  # of a tensor that is coded here: a number takes about 30 us
MOST_TOGETHER = 16384  # of all of them in a file
_MOST_BITS = 16  # of a magnitude


class MixedBits:
    """Codes bits. The log2 odds of a bit are a weighted sum of those that its contexts have seen; the weights are learned.

    `predictors.Mixer` does the same for many bits at a time, which a few hundred numbers do not have.
    """

    _FIRST = 70000  # the sum of the first weights, in units of 1 / 65536
    _RATE = 14  # 2^-_RATE: change of a weight for an input and an error
    _FADE = 250  # bits after which a context's probability no longer moves more slowly
    _CERTAIN = ONE // 256

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self._seen: dict[Hashable, tuple[int, int]] = {}  # context: probability of a 1, number of bits
        self._weights: dict[Hashable, list[int]] = {}

    def code(self, node: Hashable, contexts: Sequence[Hashable], bit: int = 0) -> int:
        """Codes a bit. node: what the bit says; it chooses the weights. contexts: as many for each call with this node."""
        weights = self._weights.setdefault(node, [self._FIRST // len(contexts)] * len(contexts))
        keys = [(node, context) for context in contexts]
        states = [self._seen.get(key, (ONE // 2, 0)) for key in keys]
        stretch = stretch_table()
        inputs = [int(stretch[probability]) for probability, _ in states]
        odds = sum(weight * x for weight, x in zip(weights, inputs, strict=True)) >> 16
        mixed = int(squash_table()[min(max(odds, -STRETCH_LIMIT), STRETCH_LIMIT) + STRETCH_LIMIT])
        mixed = min(max(mixed, 2 * self._CERTAIN), ONE - 2 * self._CERTAIN)
        bit = self.coder.bit(mixed, bit)
        for i, x in enumerate(inputs):
            weights[i] += x * (bit * ONE - mixed) >> self._RATE
        for key, (probability, count) in zip(keys, states, strict=True):
            probability += (bit * ONE - probability) * 2 // (2 * count + 5)
            probability = min(max(probability, self._CERTAIN), ONE - self._CERTAIN)
            self._seen[key] = probability, min(count + 1, self._FADE)
        return bit


def code_integers(
    bits: MixedBits, tensor: Hashable, integers: np.ndarray, grid: Grid, kind: int
) -> np.ndarray:
    """Codes the integers of a matrix, row by row; a Decoder ignores their values.

    A number is coded as zero or not, its sign, and its magnitude by the Elias gamma code. Each bit is predicted from its
    frequencies in the tensor and in all tensors of the kind; a sign also from its neighbours in the grid and above.

    Args:
        bits: The coder, with the statistics of the file so far.
        tensor: Any name of the tensor.
        integers: [rows, columns].
        grid: The matrix's grid.
        kind: Of the tensor; tensors of a kind share statistics.

    Raises:
        Mistake: For a stream that is damaged.
    """
    rows, columns = integers.shape
    out = [[0] * columns for _ in range(rows)]
    for r in range(rows):
        for c in range(columns):
            left = _sign(out[r][c - 1]) if c % grid.width else 0
            up = _sign(out[r][c - grid.width]) if c // grid.width % grid.height else 0
            above = _sign(out[r - 1][c]) if r else 0
            around = [(kind, left, up), (kind, "above", above)]
            out[r][c] = _code_integer(bits, [kind, (kind, tensor)], around, int(integers[r, c]))
    return np.array(out, np.int64).reshape(rows, columns)


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def _code_integer(
    bits: MixedBits, contexts: Sequence[Hashable], around: Sequence[Hashable], number: int
) -> int:
    def code(node: Hashable, bit: int) -> int:
        return bits.code(node, contexts, bit)

    size = abs(number)
    if not code("any", int(size > 0)):
        return 0
    negative = bits.code("negative", [*contexts, *around], int(number < 0))
    size = _code_gamma(bits.coder.uniform, code, size)
    return -size if negative else size


def _code_gamma(uniform: Callable[[int, int], int], code: Callable[[Hashable, int], int], size: int) -> int:
    """Codes a number above 0: its length in bits, then these bits, the upper two adaptive."""
    length = 1
    while code(("longer", length), int(size >> length > 0)):
        length += 1
        if length > _MOST_BITS:
            raise Mistake("the coded stream is damaged: an integer has no end")
    upper = min(length - 1, 2)
    lower = length - 1 - upper
    found = 1
    for shift in range(length - 2, lower - 1, -1):
        found = 2 * found + code(("bit", length, found), size >> shift & 1)
    return found << lower | uniform(lower, size & (1 << lower) - 1)
