"""Adaptive predictors of the coder's probabilities: mixers, scalars, text.

The tables are exact. The terms and sums of matrix products in float64 are integers below 2^53, which float64 holds
exactly in any order of summation.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from operator import mul

import numpy as np

from trainer.mistakes import Mistake
from trainer.packing.coder import LOWEST, ONE, Coder, Encoder

UNIT = 256  # logarithms to base 2 are integers in units of 1 / UNIT
LOG2_SIZE = 1 << 18
STRETCH_LIMIT = 16 * UNIT - 1
TYPICAL = range(116, 128)  # exponents of float32: 0.0005 .. 2


@cache
def log2_table() -> np.ndarray:
    """Returns floor(log2(i) * UNIT) for 0 <= i < LOG2_SIZE (entry 0 equals entry 1), by exact squaring."""
    i = np.arange(LOG2_SIZE, dtype=np.uint64)
    i[0] = 1
    log2 = np.zeros(LOG2_SIZE, np.int64)
    for shift in (16, 8, 4, 2, 1):
        log2[i >> (log2 + shift).astype(np.uint64) > 0] += shift
    mantissa = i << (31 - log2).astype(np.uint64)
    for _ in range(UNIT.bit_length() - 1):
        mantissa = mantissa * mantissa >> np.uint64(31)
        digit = mantissa >> np.uint64(32)
        mantissa >>= digit
        log2 = log2 * 2 + digit.astype(np.int64)
    return log2


@cache
def stretch_table() -> np.ndarray:
    """Returns log2(p / (1 - p)) * UNIT for the probabilities p = i / ONE, 0 <= i <= ONE."""
    log2 = log2_table()[: ONE + 1]
    return log2 - log2[::-1]


@cache
def squash_table() -> np.ndarray:
    """Returns ONE / (1 + 2^(-x / UNIT)) within LOWEST .. ONE - LOWEST, for x = -STRETCH_LIMIT .. STRETCH_LIMIT."""
    scale = 1 << 64
    root = 2 * scale
    for _ in range(UNIT.bit_length() - 1):
        root = math.isqrt(root * scale)
    powers = [scale]  # 2^(i / UNIT) * scale
    for _ in range(UNIT - 1):
        powers.append(powers[-1] * root // scale)
    upper = []
    for x in range(STRETCH_LIMIT + 1):
        power = powers[x % UNIT] << x // UNIT
        upper.append(min(ONE * power // (power + scale), ONE - LOWEST))
    return np.array([ONE - p for p in upper[:0:-1]] + upper, np.int64)


def squash(stretched: np.ndarray) -> np.ndarray:
    """Returns the probabilities (times ONE) of log2 odds in units of 1 / UNIT."""
    return squash_table().take(stretched + STRETCH_LIMIT, mode="clip")


class Mixer:
    """Logistic mixing: log2 odds = weights . inputs. A diagonal Newton step learns the weights online.

    inputs [num_inputs, n] are integers in units of 1 / UNIT, clipped to +-INPUT_LIMIT.

    Args:
        weights: The first weights.
        num_sets: Number of weight vectors; each position picks one by its number in `sets` [n].
        patience: How many typical samples the first weights are worth: the higher, the slower they move at first.
    """

    INPUT_LIMIT = 8 * UNIT - 1
    _NEWTON = int(2**16 / math.log(2))  # 2^24 / ln 2 (units of weights over units of inputs), less 8 bits

    def __init__(self, weights: Sequence[float], num_sets: int = 1, patience: int = 160) -> None:
        column = np.array([round(weight * 65536) for weight in weights], np.int64)[:, None]
        self.weights = np.repeat(column, num_sets, 1)
        self._curvature = np.full_like(self.weights, patience * (UNIT * UNIT * 3700))

    def predict(self, inputs: np.ndarray, sets: np.ndarray | None = None) -> np.ndarray:
        """Returns probabilities [n]. inputs: float64 with integer values, which are clipped in place."""
        np.minimum(inputs, self.INPUT_LIMIT, out=inputs)
        np.maximum(inputs, -self.INPUT_LIMIT, out=inputs)
        odds = self.weights.T.astype(np.float64) @ inputs
        self._odds = odds[0] if sets is None else odds[sets, np.arange(len(sets))]
        self._inputs, self._sets = inputs, sets
        return self._probabilities()

    def refine(self, row: int, values: np.ndarray) -> np.ndarray:
        """Sets an input that was 0 in the last `predict`; returns probabilities [n]."""
        weights = self.weights[row]
        self._inputs[row] = values
        self._odds += values * (weights[0] if self._sets is None else weights[self._sets])
        return self._probabilities()

    def _probabilities(self) -> np.ndarray:
        self.probabilities = squash(np.floor(self._odds * 2.0**-16).astype(np.int64))
        return self.probabilities

    def update(self, bits: np.ndarray, coded: np.ndarray | None = None) -> None:
        """Learns from the bits [n] of the last `predict`. coded: bool [n] of those that count, None for all."""
        error = (bits * ONE - self.probabilities).astype(np.float64)
        spread = (self.probabilities * (ONE - self.probabilities) >> 16).astype(np.float64)
        if coded is not None:
            error *= coded
            spread *= coded
        if self._sets is not None:
            chosen = self._sets == np.arange(self.weights.shape[1])[:, None]
            error, spread = error * chosen, spread * chosen
        else:
            error, spread = error[None], spread[None]
        slope = (self._inputs @ error.T).astype(np.int64)
        self._curvature += ((self._inputs * self._inputs) @ spread.T).astype(np.int64)
        self.weights += slope * self._NEWTON // (self._curvature >> 8)


class Scalars:
    """Codes single numbers with adaptive bits. A context is any hashable value that both directions know."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self._counts: dict[Hashable, list[int]] = {}

    def bit(self, context: Hashable, bit: int = 0) -> int:
        """Codes one bit with the frequencies of its context so far."""
        count = self._counts.setdefault(context, [0, 0])
        probability = ONE * (2 * count[1] + 1) // (2 * (count[0] + count[1]) + 2)
        bit = self.coder.bit(min(max(probability, LOWEST), ONE - LOWEST), bit)
        count[bit] += 1
        return bit

    def tree(self, context: Hashable, num_bits: int, value: int = 0) -> int:
        """Codes 0 <= value < 2^num_bits, highest bit first, each bit in the context of the higher ones."""
        node = 1
        for shift in reversed(range(num_bits)):
            node = node * 2 + self.bit((context, node), value >> shift & 1)
        return node - (1 << num_bits)

    def expect(self, context: Hashable, num_bits: int, values: Iterable[int]) -> None:
        """Makes values of `tree` likely, as if each had been seen once."""
        for value in values:
            for shift in reversed(range(num_bits)):
                key = (context, (1 << num_bits | value) >> shift + 1)
                self._counts.setdefault(key, [0, 0])[value >> shift & 1] += 1

    def number(self, context: Hashable, value: int = 0, limit: int = 1 << 62) -> int:
        """Codes 0 <= value < limit: the length of value + 1 in bits, then those bits, the upper two adaptive."""
        value += 1
        length = 0
        while self.bit((context, length), int(value >> length > 1)):
            length += 1
            if length > 64:
                raise Mistake("the coded stream is damaged: a number has no end")
        upper = min(length, 2)
        read = 1 << upper | self.tree(
            (context, length, "bits"), upper, value >> length - upper & (1 << upper) - 1
        )
        lower = length - upper
        read = (read << lower | self.coder.uniform(lower, value & (1 << lower) - 1)) - 1
        if read >= limit:
            raise Mistake(f"the coded stream is damaged: got {read} where less than {limit} is allowed")
        return read


Context = tuple[int, bytes]  # number of bytes, and the bytes
Contexts = dict[Context, dict[int, int]]
_MOST = ONE - 64  # of a text's probabilities


class Text:
    """Codes text. Each bit is mixed from the contexts of the last 0 to 6 bytes; a known primer trains it first."""

    _ORDERS = (0, 1, 2, 3, 4, 6)

    def __init__(self, coder: Coder, primer: str) -> None:
        self._coder = coder
        self._known, weights, past = self._primed(primer)
        self._states: Contexts = {}
        self._weights, self._past = list(weights), past.copy()

    @staticmethod
    @cache
    def _primed(primer: str) -> tuple[Contexts, list[list[int]], bytearray]:
        model = Text.__new__(Text)
        model._coder = Encoder()
        model._known, model._states = {}, {}
        num = len(Text._ORDERS)
        model._weights = [[20000] * num for _ in range(num + 1)]
        model._past = bytearray(8)
        for text in primer.split("\0"):
            model.code(text)
        return model._states, model._weights, model._past

    def code(self, text: str = "", most: float = math.inf) -> str:
        """Codes text without the byte 0, which ends it.

        Raises Mistake for more than `most` bytes; a Decoder raises UnicodeDecodeError if it is not UTF-8.
        """
        data = text.encode() + b"\0"
        out = bytearray()
        while not out or out[-1]:
            if len(out) > most:
                raise Mistake(f"a text is longer than {most:,.0f} bytes")
            out.append(self._byte(data[len(out)] if self._coder.writes else 0))
            self._past.append(out[-1])
        return out[:-1].decode()

    def _byte(self, byte: int) -> int:
        past, weights = self._past, self._weights
        stretch, squash = _stretches(), _squashes()
        tables = [self._table((order, bytes(past[-order:]) if order else b"")) for order in self._ORDERS]
        node = 1
        for shift in range(7, -1, -1):
            # Of each context: probability << 8 | number of times seen; 0 for a context that was never seen.
            found = [table.get(node, 0) for table in tables]
            inputs = [stretch[state >> 8] for state in found]
            seen = len(found) - found.count(0)
            own = weights[seen]
            odds = sum(map(mul, own, inputs)) >> 16
            probability = squash[min(max(odds, -STRETCH_LIMIT), STRETCH_LIMIT) + STRETCH_LIMIT]
            bit = self._coder.bit(probability, byte >> shift & 1)
            error = bit * ONE - probability
            weights[seen] = [weight + (x * error >> 14) for weight, x in zip(own, inputs, strict=True)]
            target = bit * ONE
            for table, state in zip(tables, found, strict=True):
                times = state & 255
                p = state >> 8 if state else ONE // 2
                p += (target - p) * 4 // (4 * times + 5)
                table[node] = (64 if p < 64 else _MOST if p > _MOST else p) << 8 | (
                    times + 1 if times < 60 else 60
                )
            node = node * 2 + bit
        return node & 255

    def _table(self, context: Context) -> dict[int, int]:
        """Returns what is known in a context, by the bits of the byte so far; what the primer has taught is copied first."""
        table = self._states.get(context)
        if table is None:
            table = self._states[context] = dict(self._known.get(context, ()))
        return table


@cache
def _stretches() -> list[int]:
    """Returns `stretch_table` as a list, with 0 for the probability 0: of a context that was never seen."""
    return [0, *stretch_table()[1:].tolist()]


@cache
def _squashes() -> list[int]:
    return squash_table().tolist()
