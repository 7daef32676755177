"""Binary arithmetic coding with integer probabilities, and the small predictors that feed it.

Everything here is integer arithmetic, so that a stream written on one machine decodes on any other. An Encoder and
a Decoder answer the same calls: a model is written once and works in both directions. A call hands over bits to an
Encoder and gets them back; a Decoder ignores what it is handed and returns what it reads.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

PROBABILITY_BITS = 16
ONE = 1 << PROBABILITY_BITS  # a probability p is the integer round(p * ONE)
LOWEST = 4  # every probability handed to a coder lies in LOWEST .. ONE - LOWEST
UNIT = 256  # log2 values are integers in units of 1 / UNIT bit
_TOP = 1 << 48
_BOTTOM = 1 << 32


@cache
def log2_table(size: int = 1 << 18) -> np.ndarray:
    """round-down log2(i) in units of 1/UNIT for i < size; entry 0 is that of 1. Exact: digit by digit squaring."""
    i = np.arange(size, dtype=np.uint64)
    i[0] = 1
    whole = np.zeros(size, np.int64)
    for shift in (16, 8, 4, 2, 1):
        whole[i >> (whole + shift).astype(np.uint64) > 0] += shift
    m = i << (31 - whole).astype(np.uint64)
    out = whole
    for _ in range(UNIT.bit_length() - 1):
        m = (m * m) >> np.uint64(31)
        bit = m >> np.uint64(32)
        m >>= bit
        out = out * 2 + bit.astype(np.int64)
    return out.astype(np.int32)


@cache
def stretch_table() -> np.ndarray:
    """log2(p / (1 - p)) in units of 1/UNIT for the probability p = i / ONE."""
    log2 = log2_table()[: ONE + 1]
    return log2 - log2[::-1]


SQUASH_LIMIT = 16 * UNIT - 1


@cache
def squash_table() -> np.ndarray:
    """ONE / (1 + 2^-x), clipped to LOWEST .. ONE - LOWEST, for x = (i - SQUASH_LIMIT) / UNIT."""
    scale = 1 << 64
    root = 2 * scale
    for _ in range(UNIT.bit_length() - 1):
        root = math.isqrt(root * scale)
    powers = [scale]
    for _ in range(UNIT - 1):
        powers.append(powers[-1] * root // scale)
    upper = []
    for x in range(SQUASH_LIMIT + 1):
        power = powers[x % UNIT] << (x // UNIT)
        upper.append(min(ONE * power // (power + scale), ONE - LOWEST))
    return np.array([ONE - p for p in upper[:0:-1]] + upper, np.int32)


class Encoder:
    """Collects bits with their probabilities; `finish` gives the bytes."""

    writes = True

    def __init__(self) -> None:
        self._low = 0
        self._range = _TOP
        self._words: list[int] = []
        self.cost = 0.0  # ideal code length so far, in bits: for accounts and choices only

    def code(self, probabilities: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Writes each bit with the probability (of a one) beside it."""
        hit = np.where(bits, probabilities, ONE - probabilities)
        self.cost += PROBABILITY_BITS * hit.size - float(np.log2(hit).sum())
        for probability, bit in zip(probabilities.tolist(), bits.tolist()):
            self._step(probability, bit)
        return bits

    def _step(self, probability: int, bit: int) -> None:
        bound = (self._range >> PROBABILITY_BITS) * probability
        if bit:
            self._range = bound
        else:
            self._low += bound
            self._range -= bound
        while self._range < _BOTTOM:
            self._shift()

    def _shift(self) -> None:
        if self._low >= _TOP:
            self._carry()
        self._words.append(self._low >> 32)
        self._low = (self._low & 0xFFFFFFFF) << 16
        self._range <<= 16

    def _carry(self) -> None:
        self._low -= _TOP
        at = len(self._words) - 1
        while self._words[at] == 0xFFFF:
            self._words[at] = 0
            at -= 1
        self._words[at] += 1

    def bit(self, probability: int, bit: int) -> int:
        self.cost += PROBABILITY_BITS - math.log2(probability if bit else ONE - probability)
        self._step(probability, bit)
        return bit

    def uniform(self, value: int, num_bits: int) -> int:
        """Writes value < 2^num_bits, every value equally likely."""
        self.cost += num_bits
        while num_bits:
            take = min(16, num_bits)
            num_bits -= take
            part = self._range >> take
            self._low += part * (value >> num_bits & (1 << take) - 1)
            self._range = part
            while self._range < _BOTTOM:
                self._shift()
        return value

    def finish(self) -> bytes:
        """The shortest bytes that a Decoder, which reads zeros past the end, turns back into what was coded."""
        for num_bytes in range(7):
            step = _TOP >> 8 * num_bytes
            point = -(-self._low // step) * step
            if point < self._low + self._range:
                break
        self._low = point
        if self._low >= _TOP:
            self._carry()
        head = np.array(self._words, ">u2").tobytes()
        return (head + self._low.to_bytes(6, "big")[:num_bytes]).rstrip(b"\0")


class Decoder:
    """Reads back what an Encoder wrote."""

    writes = False

    def __init__(self, data: bytes) -> None:
        self._words = np.frombuffer(data + bytes(6 + len(data) % 2), ">u2").tolist()
        self._num_words = len(self._words)
        self._at = 3
        self._range = _TOP
        self._code = int.from_bytes((data + bytes(6))[:6], "big")
        self.cost = 0.0

    def code(self, probabilities: np.ndarray, bits: np.ndarray | None = None) -> np.ndarray:
        code, span = self._code, self._range
        out = []
        append = out.append
        for probability in probabilities.tolist():
            bound = (span >> PROBABILITY_BITS) * probability
            if code < bound:
                span = bound
                append(1)
            else:
                code -= bound
                span -= bound
                append(0)
            if span < _BOTTOM:
                span <<= 16
                code = code << 16 | self._next()
        self._code, self._range = code, span
        bits = np.array(out, np.uint8)
        hit = np.where(bits, probabilities, ONE - probabilities)
        self.cost += PROBABILITY_BITS * hit.size - float(np.log2(hit).sum())
        return bits

    def _next(self) -> int:
        at = self._at
        self._at = at + 1
        if at < self._num_words:
            return self._words[at]
        if at > self._num_words + 4:
            raise ValueError("the coded stream ends too early")
        return 0

    def bit(self, probability: int, bit: int = 0) -> int:
        bound = (self._range >> PROBABILITY_BITS) * probability
        if self._code < bound:
            self._range = bound
            bit = 1
        else:
            self._code -= bound
            self._range -= bound
            bit = 0
        while self._range < _BOTTOM:
            self._range <<= 16
            self._code = self._code << 16 | self._next()
        self.cost += PROBABILITY_BITS - math.log2(probability if bit else ONE - probability)
        return bit

    def uniform(self, value: int, num_bits: int) -> int:
        self.cost += num_bits
        value = 0
        while num_bits:
            take = min(16, num_bits)
            num_bits -= take
            part = self._range >> take
            digit = min(self._code // part, (1 << take) - 1)
            value = value << take | digit
            self._code -= part * digit
            self._range = part
            while self._range < _BOTTOM:
                self._range <<= 16
                self._code = self._code << 16 | self._next()
        return value
