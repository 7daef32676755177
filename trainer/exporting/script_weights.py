"""Codes weights for the script of a page: an adaptive binary range coder whose decoder is thirty lines of JavaScript.

The probabilities are doubles. Both sides compute them by +, -, *, / and comparisons alone, which IEEE 754 fixes to the bit, so that
every engine decodes what was written here. `templates/student.js` is the other side, line by line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.exporting.shared_values import shared_values

_LIMIT, _LEAST = 250, 1 / 4096
_FULL = 0xFFFFFFFF


@dataclass
class ScriptCoder:
    """Writes weights into one stream. `finish` returns it."""

    stream: bytearray = field(default_factory=bytearray)
    _low: int = 0
    _high: int = _FULL

    def bit(self, model: list, bit: int) -> None:
        """Writes one bit with a model [probability of a 1, number of bits seen], which learns from it."""
        p, seen = model
        bound = self._low + int((self._high - self._low) * p)
        if bit:
            self._high = bound
        else:
            self._low = bound + 1
        model[0] = min(max(p + (bit - p) / (seen + 1.6), _LEAST), 1 - _LEAST)
        model[1] = min(seen + 1, _LIMIT)
        while (self._low ^ self._high) & 0xFF000000 == 0:
            self.stream.append(self._low >> 24)
            self._low = self._low << 8 & _FULL
            self._high = (self._high << 8 & _FULL) | 255

    def weight(self, array: np.ndarray) -> list | None:
        """Writes a weight that holds few values; returns what the script needs beside the stream, None for other weights.

        [rows, columns, bits of a code, whether it has zeros, values]
        """
        shared = shared_values(array)
        if shared is None or not len(shared.values):
            return None
        rows = array.shape[0] if array.ndim > 1 else 1
        columns = array.size // rows
        depth = (len(shared.values) - 1).bit_length()
        masked = shared.positions is not None
        if masked:
            self._mask((array.reshape(rows, columns).view(np.uint32) != 0).astype(int).tolist())
        nodes = _models(1 << depth)
        for code in shared.codes.tolist() if depth else ():
            node = 1
            for shift in reversed(range(depth)):
                bit = code >> shift & 1
                self.bit(nodes[node], bit)
                node = node * 2 + bit
        return [rows, columns, depth, int(masked), shared.values]

    def _mask(self, mask: Sequence[Sequence[int]]) -> None:
        """Writes where a matrix is not zero; a bit's model follows from its column so far and from two neighbours."""
        nodes = _models(48)
        columns = len(mask[0])
        ones = [0] * columns
        total = seen = 0
        above = [0] * columns
        for number, row in enumerate(mask):
            left = 0
            for column, bit in enumerate(row):
                seen += 1
                share = (ones[column] + 0.4) / (number * total / seen + 0.4)
                context = min(11, int(4 * share)) * 4 + left * 2 + above[column]
                self.bit(nodes[context], bit)
                ones[column] += bit
                total += bit
                left = bit
            above = list(row)

    def finish(self) -> bytes:
        """Returns the whole stream. The script reads zeros past its end."""
        # The shortest number within the interval; the decoder appends zeros.
        for num_bytes in range(1, 5):
            step = 1 << 8 * (4 - num_bytes)
            point = -(-self._low // step) * step
            if point <= self._high:
                break
        return bytes(self.stream) + point.to_bytes(4, "big")[:num_bytes]


def _models(count: int) -> list[list]:
    return [[0.5, 0] for _ in range(count)]
