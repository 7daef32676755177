"""Computes a tensor's size in other codes, for comparison."""

from __future__ import annotations

import heapq
import zlib
from typing import Any

import numpy as np

from trainer.packing.numbers import patterns_of
from trainer.packing.tensors import entropy_bits


def rival_bytes(tensor: np.ndarray) -> dict[str, Any]:
    """Returns the bytes of a tensor's mask and codes in other codes (see `container.account`), and its counts."""
    patterns = patterns_of(tensor)
    values, codes = np.unique(patterns, return_inverse=True)
    nonzero = np.flatnonzero(patterns)
    if values[:1] != 0:
        codes = codes + 1
    counts = np.bincount(codes[nonzero])
    bits = 8 if tensor.ndim > 2 else 5
    fillers, gaps = np.divmod(np.diff(nonzero, prepend=-1) - 1, 1 << bits)
    gap_counts = np.bincount(gaps, minlength=1 << bits)
    gap_counts[-1] += fillers.sum()
    code_counts = np.append(counts, fillers.sum())
    iid = entropy_bits(np.array([len(nonzero), len(patterns) - len(nonzero)])) + entropy_bits(counts)
    width = np.uint8 if len(values) < 256 else np.uint16 if len(values) < 65536 else np.uint32
    return {
        "numel": len(patterns),
        "nonzero": len(nonzero),
        "clusters": int((counts > 0).sum()),
        "iid_bytes": iid / 8,
        "huffman_bytes": (_huffman_bits(gap_counts) + _huffman_bits(code_counts)) / 8,
        "dense_huffman_bytes": _huffman_bits(np.bincount(codes)) / 8,
        "zlib_bytes": len(zlib.compress(codes.astype(width).tobytes(), 9)),
    }


def _huffman_bits(counts: np.ndarray) -> int:
    """Returns the length of a message in its own Huffman code, without the table."""
    heap = counts[counts > 0].tolist()
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        bits += joined
        heapq.heappush(heap, joined)
    return bits
