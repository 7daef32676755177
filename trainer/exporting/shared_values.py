"""A weight as few values: which positions are not zero, and which of the values each holds."""

from dataclasses import dataclass

import numpy as np

MOST_VALUES = 256  # a weight with more different values is written as it is


@dataclass(frozen=True)
class SharedValues:
    """A tensor whose non-zero numbers are few different values.

    Attributes:
        shape: Of the tensor.
        positions: int64 [n], in ascending order, of the non-zero numbers in the flat tensor; None if none is zero.
        codes: int64 [n], for each of them the index of its value.
        values: float32 [k], ascending.
    """

    shape: tuple[int, ...]
    positions: np.ndarray | None
    codes: np.ndarray
    values: np.ndarray

    def gaps(self) -> np.ndarray:
        """Returns int64 [n]: how many zeros come before each non-zero number, since the one before it."""
        if self.positions is None:
            return np.zeros(len(self.codes), np.int64)
        return np.diff(self.positions, prepend=-1) - 1

    def dense(self) -> np.ndarray:
        """Returns the tensor, bit for bit."""
        flat = np.zeros(int(np.prod(self.shape)), np.float32)
        flat[slice(None) if self.positions is None else self.positions] = self.values[self.codes]
        return flat.reshape(self.shape)


def shared_values(array: np.ndarray, zero_is_a_value: bool = False) -> SharedValues | None:
    """Returns a float32 tensor as shared values; None for more than `MOST_VALUES` different ones.

    Zero is the bit pattern of +0.0; -0.0 is a value like any other. A tensor of zeros alone has no values.
    zero_is_a_value: whether +0.0 counts as a value too, which suits a tensor with few zeros.
    """
    patterns = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint32)
    alive = np.full(patterns.shape, True) if zero_is_a_value else patterns != 0
    found, codes = np.unique(patterns[alive], return_inverse=True)
    if len(found) > MOST_VALUES:
        return None
    values = found.view(np.float32)
    order = np.argsort(values, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    positions = None if alive.all() else np.flatnonzero(alive)
    return SharedValues(array.shape, positions, rank[codes.reshape(-1)], values[order])
