"""Codes bit by bit which of few values a weight has."""

from __future__ import annotations

import numpy as np

from trainer.packing.grids import AROUND, COUNT, FAR, NEAR, Grid
from trainer.packing.masks import liveness
from trainer.packing.predictors import LOG2_SIZE, Mixer, log2_table
from trainer.packing.stream import Stream


def code_ranks(
    stream: Stream, ranks: np.ndarray, mask: np.ndarray, grid: Grid, highest: tuple[int, int]
) -> np.ndarray:
    """Codes the non-zeros of a matrix as signed ranks: 1 is the smallest positive value, -1 the smallest negative.

    The sign is coded first, from the signed neighbours and the balance of the row and column. The rank follows, highest
    bit first, from the values' frequencies so far, the neighbours' ranks, and the mean of the row and column.

    Args:
        stream: The direction of coding.
        ranks: [rows, columns]; a Decoder ignores them.
        mask: [rows, columns], known to both directions: 1 where the matrix is not zero.
        grid: The matrix's grid.
        highest: The highest rank of the negative and of the positive values.
    """
    coder = stream.coder
    rows, columns = mask.shape
    depth = (max(highest) - 1).bit_length()
    full = 1 << depth
    spatial = not grid.flat
    signs = [0.6, 0.2, 0.1, 0.5] + ([1.9, 1.6, 1.3, 0.3, 0.3, 0.5] if spatial else [])
    sizes = [0.6, 0.45, 0.6, 0.2, 0.1] + ([0.9, 0.6, 0.5, 0.0, 0.15, 0.2, 0.15] if spatial else [])
    sign_mixer = Mixer(signs)
    size_mixers = [Mixer(sizes) for _ in range(depth)]
    near = grid.neighbours(NEAR + FAR[:4]) if spatial else None
    stride = columns + 1
    size = np.zeros((rows + 2) * stride, np.int64)  # 1 .. 255, of zeros 0
    sign = np.zeros((rows + 2) * stride, np.int64)
    out = np.zeros((rows, columns), np.int64)
    padded = np.concatenate([mask, np.zeros((rows, 1), mask.dtype)], 1)
    crowd = padded[:, grid.neighbours(AROUND)].sum(1, dtype=np.int64) if spatial else None
    row_live = liveness(mask.sum(1, dtype=np.int64)) >> 1

    balance = _counts(1, 1)
    row_signs, column_signs, pattern_signs = _counts(rows, 3), _counts(columns, 3), _counts(81, 2)
    powers = np.array([1, 3, 9, 27], np.int64)
    shared = _faded(stream.ranks.get(depth, _counts(2 * full, 1)), 24 * COUNT)
    nodes = _counts(2 * 2 * full, 1)  # negative values first
    row_sizes, column_sizes = np.zeros((rows, 2), np.int64), np.zeros((columns, 2), np.int64)  # sum, number
    total, number = 4 * 128, 4
    signed = min(highest) > 0
    fresh = 0  # codes since large counts were last halved

    for r, c in grid.waves():
        keep = mask[r, c] > 0
        if not keep.any():
            continue
        r, c = r[keep], c[keep]
        here = (r + 2) * stride + c
        rank = ranks[r, c]
        inputs = np.empty((len(signs), len(r)))
        inputs[0] = _odds(balance[0])
        inputs[1] = _odds(row_signs[r])
        inputs[2] = _odds(column_signs[c])
        inputs[3] = sign[here - stride] * (size[here - stride] + 64)
        if near is not None:
            where = (r + 2) * stride + near.take(c, 1)
            near_sign, near_size = sign.take(where), size.take(where)
            near_signed = near_sign * (3 * near_size + 128)
            inputs[4:8] = near_signed[:4]
            inputs[8] = np.add.reduce(near_signed[4:])
            pattern = powers @ (near_sign[:4] + 1)
            inputs[9] = _odds(pattern_signs[pattern])
        if signed:
            positive = coder.code(sign_mixer.predict(inputs), rank > 0)
            sign_mixer.update(positive)
        else:
            positive = np.full(len(r), int(highest[1] > 0))
        balance += np.bincount(positive, minlength=2) * COUNT
        np.add.at(row_signs, (r, positive), COUNT)
        np.add.at(column_signs, (c, positive), COUNT)
        if spatial:
            np.add.at(pattern_signs, (pattern, positive), COUNT)

        mean = total // number
        inputs = np.empty((len(sizes), len(r)))
        inputs[2] = ((row_sizes[r, 0] + 3 * mean) // (row_sizes[r, 1] + 3) - mean) * 4
        inputs[3] = ((column_sizes[c, 0] + 3 * mean) // (column_sizes[c, 1] + 3) - mean) * 4
        inputs[4] = row_live[r]
        if crowd is not None:
            larger = np.where(near_size > 0, near_size - mean, 0) * 4
            inputs[5:9] = larger[:4]
            inputs[9] = np.add.reduce(larger[4:])
            inputs[10] = (crowd[r, c] - 2) * 64
            inputs[11] = np.add.reduce(near_sign[:4]) * (2 * positive - 1) * 128
        top = np.array(highest)[positive]
        rest = np.abs(rank) - 1
        node, low = np.ones(len(r), np.int64), np.zeros(len(r), np.int64)
        for level, mixer in enumerate(size_mixers):
            half = full >> level + 1
            own = node + positive * 2 * full
            inputs[0] = _odds(shared[node])
            inputs[1] = _odds(nodes[own])
            probability = mixer.predict(inputs)
            bits = rest & half > 0
            free = low + half < top  # elsewhere the upper half is empty
            if free.all():
                bits = coder.code(probability, bits)
                mixer.update(bits)
            else:
                coded = coder.code(probability[free], bits[free])
                bits = np.zeros(len(r), np.int64)
                bits[free] = coded
                mixer.update(bits, free)
            np.add.at(shared, (node, bits), COUNT)
            np.add.at(nodes, (own, bits), COUNT)
            low += bits * half
            node = node * 2 + bits
        out[r, c] = (low + 1) * (2 * positive - 1)
        scaled = np.maximum((2 * low + 1) * 128 // full, 1)
        size[here], sign[here] = scaled, 2 * positive - 1
        for sums, line in ((row_sizes, r), (column_sizes, c)):
            np.add.at(sums, (line, 0), scaled)
            np.add.at(sums, (line, 1), 1)
        total += int(scaled.sum())
        number += len(r)
        fresh += len(r)
        if fresh >= 1024:
            fresh = 0
            for counts in (balance, row_signs, column_signs, pattern_signs, shared, nodes):
                counts[counts.max(1) > LOG2_SIZE // 4] >>= 1
    stream.ranks[depth] = shared
    return out


def _counts(num: int, start: int) -> np.ndarray:
    return np.full((num, 2), start * COUNT, np.int64)


def _odds(counts: np.ndarray) -> np.ndarray:
    """Returns log2 odds of the second of two counts [..., 2]."""
    logs = log2_table().take(counts, mode="clip")
    return logs[..., 1] - logs[..., 0]


def _faded(counts: np.ndarray, limit: int) -> np.ndarray:
    """Scales counts [n, 2] so that no row sums to more than a limit."""
    total = counts.sum(1, keepdims=True)
    return np.maximum(np.where(total > limit, counts * limit // np.maximum(total, 1), counts), COUNT // 8)
