"""Canonical Huffman codes of limited length, and a stream of bits in rows that can be read side by side."""

import heapq

import numpy as np


def lengths(counts: np.ndarray, longest: int, unit: int = 1) -> np.ndarray:
    """Returns int64 [n]: the bits of each symbol's code, multiples of `unit` up to `longest`; every symbol has one, used or not.

    The code is complete: every sequence of bits begins with one of its words.
    With more bits in a unit the codes are longer, and fewer places are to be looked at where one may begin.
    """
    counts = np.maximum(np.asarray(counts, np.int64), 1)
    if len(counts) < 2 or len(counts) > 1 << longest // unit * unit:
        raise ValueError(
            f"{len(counts)} symbols: 2 to {1 << longest // unit * unit} have codes of {longest} bits"
        )
    while True:
        found = _huffman(counts, 1 << unit) * unit
        if found.max() <= longest:
            return found
        counts = (counts + 1) // 2 + 1  # flatter, so that the longest code is shorter


def _huffman(counts: np.ndarray, radix: int) -> np.ndarray:
    """Returns the digits of each symbol's code (Huffman 1952)."""
    weights = counts.tolist()
    heap = [(number, node) for node, number in enumerate(weights)]
    heapq.heapify(heap)
    parent: list[int] = [0] * len(weights)
    while len(heap) > 1:
        taken = [heapq.heappop(heap) for _ in range(radix)]
        for _, node in taken:
            parent[node] = len(parent)
        heapq.heappush(heap, (sum(number for number, _ in taken), len(parent)))
        parent.append(0)
    depth = [0] * len(parent)
    for node in range(len(parent) - 2, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return np.array(depth[: len(counts)], np.int64)


def codes(sizes: np.ndarray, longest: int) -> np.ndarray:
    """Returns int64 [n]: the code of each symbol, of `sizes` bits in ascending order, left-aligned in `longest` bits."""
    if (np.diff(sizes) < 0).any():
        raise ValueError("canonical codes are for symbols in the order of their lengths")
    widths = 1 << (longest - sizes)
    return np.cumsum(widths) - widths


def bits(words: np.ndarray, sizes: np.ndarray, longest: int) -> np.ndarray:
    """Returns uint8 [total] of 0 and 1: the words one after the other, of `sizes` bits, left-aligned in `longest` bits."""
    ends = np.cumsum(sizes)
    found = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    starts = ends - sizes
    for place in range(longest):
        here = sizes > place
        found[starts[here] + place] = (words[here] >> (longest - 1 - place)) & 1
    return found
