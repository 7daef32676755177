"""Arithmetic coding with integer probabilities.

All arithmetic that decides a probability is on integers, so a stream written on one machine decodes on any other.
Encoder and Decoder have the same methods. An Encoder writes the bits it gets and returns them; a Decoder ignores
its argument and returns the bits it reads. So each model is written once, for both directions.
"""

from __future__ import annotations

import math
import sys
from array import array
from typing import Any

import numpy as np

from trainer.mistakes import Mistake

PROBABILITY_BITS = 16
ONE = 1 << PROBABILITY_BITS  # a probability p is the integer p * ONE
LOWEST = 4  # every probability given to a coder lies in LOWEST .. ONE - LOWEST
_SPAN = 1 << 48  # the coder's interval; it is widened by 16 bits when it is narrower than _NARROW
_NARROW = 1 << 32


class Encoder:
    """A range coder that writes bits with given probabilities; `finish` returns the bytes."""

    writes = True
    bits = 0.0  # not measured here: see Meter

    def __init__(self) -> None:
        self._low = 0
        self._span = _SPAN
        self._words: list[int] = []

    def code(self, probabilities: np.ndarray, bits: np.ndarray) -> np.ndarray:
        """Writes bits [n] of 0 and 1. probabilities [n]: of a 1, as integers p * ONE."""
        low, span = self._low, self._span
        for probability, bit in zip(probabilities.tolist(), bits.tolist(), strict=True):
            bound = (span >> PROBABILITY_BITS) * probability
            if bit:
                span = bound
            else:
                low += bound
                span -= bound
            if span < _NARROW:
                self._low = low
                self._shift()
                low = self._low
                span <<= 16
        self._low, self._span = low, span
        return bits.astype(np.int64)

    def bit(self, probability: int, bit: int) -> int:
        """Writes one bit."""
        bound = (self._span >> PROBABILITY_BITS) * probability
        if bit:
            self._span = bound
        else:
            self._low += bound
            self._span -= bound
        if self._span < _NARROW:
            self._shift()
            self._span <<= 16
        return bit

    def uniform(self, num_bits: int, value: int) -> int:
        """Writes 0 <= value < 2^num_bits, all values equally likely."""
        while num_bits:
            take = min(16, num_bits)
            num_bits -= take
            self._span >>= take
            self._low += self._span * (value >> num_bits & (1 << take) - 1)
            while self._span < _NARROW:
                self._shift()
                self._span <<= 16
        return value

    def _shift(self) -> None:
        if self._low >= _SPAN:
            self._carry()
        self._words.append(self._low >> 32)
        self._low = (self._low & 0xFFFFFFFF) << 16

    def _carry(self) -> None:
        self._low -= _SPAN
        at = len(self._words) - 1
        while self._words[at] == 0xFFFF:
            self._words[at] = 0
            at -= 1
        self._words[at] += 1

    def finish(self, followed: bool = False) -> bytes:
        """Returns the fewest bytes from which a Decoder restores what was written.

        A Decoder reads zeros past the end of its data. followed: whether other bytes follow there.
        """
        for num_bytes in range(7):
            step = _SPAN >> 8 * num_bytes
            point = -(-self._low // step) * step
            if point + (step - 1 if followed else 0) < self._low + self._span:
                break
        self._low = point
        if self._low >= _SPAN:
            self._carry()
        return np.array(self._words, ">u2").tobytes() + self._low.to_bytes(6, "big")[:num_bytes]


class Decoder:
    """Reads back what an Encoder wrote. Its methods raise Mistake for data that no Encoder wrote."""

    writes = False
    bits = 0.0

    def __init__(self, data: bytes) -> None:
        # Zeros follow the data. A list of the words would take 18 times the file's size.
        self._words = array("H", data + bytes(len(data) % 2 + 8))
        if sys.byteorder == "little":
            self._words.byteswap()
        self._at, self._last = 0, len(self._words) - 1
        self._span = _SPAN
        self._value = 0
        for _ in range(3):
            self._value = self._value << 16 | self._next()

    def code(self, probabilities: np.ndarray, bits: np.ndarray | None = None) -> np.ndarray:
        value, span, words, at = self._value, self._span, self._words, self._at
        out = bytearray(len(probabilities))
        for i, probability in enumerate(probabilities.tolist()):
            bound = (span >> PROBABILITY_BITS) * probability
            if value < bound:
                span = bound
                out[i] = 1
            else:
                value -= bound
                span -= bound
            if span < _NARROW:
                if at > self._last:
                    raise Mistake("the coded stream ends too early")
                span <<= 16
                value = value << 16 | words[at]
                at += 1
        self._value, self._span, self._at = value, span, at
        return np.frombuffer(out, np.uint8).astype(np.int64)

    def bit(self, probability: int, bit: int = 0) -> int:
        bound = (self._span >> PROBABILITY_BITS) * probability
        bit = int(self._value < bound)
        if bit:
            self._span = bound
        else:
            self._value -= bound
            self._span -= bound
        if self._span < _NARROW:
            self._span <<= 16
            self._value = self._value << 16 | self._next()
        return bit

    def uniform(self, num_bits: int, value: int = 0) -> int:
        value = 0
        while num_bits:
            take = min(16, num_bits)
            num_bits -= take
            self._span >>= take
            digit = self._value // self._span
            if digit >> take:
                raise Mistake("the coded stream is damaged")
            value = value << take | digit
            self._value -= self._span * digit
            while self._span < _NARROW:
                self._span <<= 16
                self._value = self._value << 16 | self._next()
        return value

    def _next(self) -> int:
        at = self._at
        if at > self._last:
            raise Mistake("the coded stream ends too early")
        self._at = at + 1
        return self._words[at]

    def check_end(self, num_bytes: int) -> None:
        """Raises Mistake if fewer of the data's num_bytes would have been enough."""
        if num_bytes > 2 * self._at:
            raise Mistake(f"{num_bytes - 2 * self._at} bytes follow the last tensor")


class Meter:
    """Passes every call on to a coder, and sums the ideal code length in bits."""

    def __init__(self, coder: Encoder | Decoder) -> None:
        self._coder = coder
        self.writes = coder.writes
        self.bits = 0.0
        self.costs = np.zeros(0)  # of each bit of the last `code`

    def code(self, probabilities: np.ndarray, bits: np.ndarray | None = None) -> np.ndarray:
        coder: Any = self._coder  # an Encoder must be given the bits
        coded = coder.code(probabilities, bits)
        likelihood = np.where(coded, probabilities, ONE - probabilities)
        self.costs = PROBABILITY_BITS - np.log2(likelihood)
        self.bits += float(self.costs.sum())
        return coded

    def bit(self, probability: int, bit: int = 0) -> int:
        bit = self._coder.bit(probability, bit)
        self.bits += PROBABILITY_BITS - math.log2(probability if bit else ONE - probability)
        return bit

    def uniform(self, num_bits: int, value: int = 0) -> int:
        self.bits += num_bits
        return self._coder.uniform(num_bits, value)


Coder = Encoder | Decoder | Meter
