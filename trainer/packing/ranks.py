"""Codes bit by bit which of few values a weight has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from trainer.packing.grids import AROUND, COUNT, FAR, NEAR, Sheet
from trainer.packing.masks import liveness
from trainer.packing.predictors import LOG2_SIZE, Mixer, log2_table
from trainer.packing.stream import Stream


def code_ranks(
    stream: Stream,
    ranks: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    sheet: Sheet,
    highest: Sequence[tuple[int, int]],
) -> list[np.ndarray]:
    """Codes the non-zeros of a sheet's matrices as signed ranks: 1 is the smallest positive value, -1 the smallest negative.

    The sign is coded first, from the signed neighbours and the balance of the row and column. The rank follows, highest
    bit first, from the values' frequencies so far, the neighbours' ranks, and the mean of the row and column.

    Args:
        stream: The direction of coding.
        ranks: For each matrix [rows, columns]; a Decoder ignores them.
        masks: [rows, columns], known to both directions: 1 where the matrix is not zero.
        sheet: The matrices' grids.
        highest: For each matrix the highest rank of the negative and of the positive values.
    """
    num, spatial = len(sheet.grids), sheet.grids[0].kind[0]
    tops = np.array(highest, np.int64)  # [matrix, sign]
    both = tops.min(1) > 0
    depths = np.array([(int(top) - 1).bit_length() for top in tops.max(1)])
    full = 1 << depths
    # Statistics of ranks: of all matrices with as many bits, and of each matrix, negative values first.
    kinds = np.unique(depths).tolist()
    several = len(kinds) > 1
    sizes_of = {depth: 2 << depth for depth in kinds}
    starts = dict(zip(kinds, _starts(sizes_of.values()), strict=True))
    shared_start = np.array([starts[depth] for depth in depths.tolist()])
    own_start = _starts((4 * full).tolist())
    shared = np.concatenate(
        [_faded(stream.ranks.get(depth, _counts(size, 1)), 24 * COUNT) for depth, size in sizes_of.items()]
    )
    nodes = _counts(int(4 * full.sum()), 1)
    signs = [0.6, 0.2, 0.1, 0.5] + ([1.9, 1.6, 1.3, 0.3, 0.3, 0.5] if spatial else [])
    sizes = [0.6, 0.45, 0.6, 0.2, 0.1] + ([0.9, 0.6, 0.5, 0.0, 0.15, 0.2, 0.15] if spatial else [])
    sign_mixer = Mixer(signs)
    size_mixers = [Mixer(sizes) for _ in range(max(kinds))]
    if spatial:
        near, around = sheet.neighbours(NEAR + FAR[:4]), sheet.neighbours(AROUND)
    given = sheet.spread(ranks, np.int32) if stream.coder.writes else np.zeros(sheet.size, np.int32)
    known = sheet.spread(masks, np.uint8)
    size = np.zeros(sheet.size, np.int16)  # 1 .. 255, of zeros 0
    sign = np.zeros(sheet.size, np.int16)
    out = np.zeros(sheet.size, np.int32)
    row_live = np.concatenate([liveness(mask.sum(1, dtype=np.int64)) >> 1 for mask in masks])

    balance = _counts(num, 1)
    row_signs, column_signs, pattern_signs = _counts(sheet.rows, 3), _counts(sheet.columns, 3), _counts(81, 2)
    powers = np.array([1, 3, 9, 27], np.int64)
    row_sums, row_numbers = np.zeros((2, sheet.rows), np.int64)
    column_sums, column_numbers = np.zeros((2, sheet.columns), np.int64)
    total, number = np.full(num, 4 * 128), np.full(num, 4)
    fresh = 0  # codes since large counts were last halved

    for r, c, here in sheet.waves():
        keep = known.take(here) > 0
        if not keep.any():
            continue
        r, c, here = r[keep], c[keep], here[keep]
        owner = sheet.owner.take(r)
        rank = given.take(here)
        above = here - sheet.stride.take(r)
        inputs = np.empty((len(signs), len(r)))
        inputs[0] = _odds(balance, owner)
        inputs[1] = _odds(row_signs, r)
        inputs[2] = _odds(column_signs, c)
        inputs[3] = sign.take(above) * (size.take(above) + 64)
        if spatial:
            base = sheet.base.take(r)
            where = base + near.take(c, 1)
            near_sign, near_size = sign.take(where).astype(np.int64), size.take(where).astype(np.int64)
            near_signed = near_sign * (3 * near_size + 128)
            inputs[4:8] = near_signed[:4]
            inputs[8] = np.add.reduce(near_signed[4:])
            pattern = powers @ (near_sign[:4] + 1)
            inputs[9] = _odds(pattern_signs, pattern)
        signed = both.take(owner)
        positive = (tops[:, 1] > 0).astype(np.int64).take(owner)
        if signed.any():
            positive = _code_some(stream, sign_mixer, inputs, rank > 0, signed, positive, owner)
        _count(balance, owner, positive)
        _count(row_signs, r, positive)
        _count(column_signs, c, positive)
        if spatial:
            _count(pattern_signs, pattern, positive)

        mean = (total // number).take(owner)
        inputs = np.empty((len(sizes), len(r)))
        for i, sums, numbers, line in ((2, row_sums, row_numbers, r), (3, column_sums, column_numbers, c)):
            inputs[i] = ((sums.take(line) + 3 * mean) // (numbers.take(line) + 3) - mean) * 4
        inputs[4] = row_live.take(r)
        if spatial:
            larger = np.where(near_size > 0, near_size - mean, 0) * 4
            inputs[5:9] = larger[:4]
            inputs[9] = np.add.reduce(larger[4:])
            crowd = np.add.reduce(known.take(base + around.take(c, 1)), dtype=np.int64)
            inputs[10] = (crowd - 2) * 64
            inputs[11] = np.add.reduce(near_sign[:4]) * (2 * positive - 1) * 128
        top = tops[owner, positive]
        rest = np.abs(rank) - 1
        wide, depth = full.take(owner), depths.take(owner)
        common, own = shared_start.take(owner), own_start.take(owner) + positive * 2 * wide
        node, low = np.ones(len(r), np.int64), np.zeros(len(r), np.int64)
        for level, mixer in enumerate(size_mixers):
            half = wide >> level + 1
            common_node, own_node = common + node, own + node
            inputs[0] = _odds(shared, common_node)
            inputs[1] = _odds(nodes, own_node)
            free = low + half < top  # elsewhere the upper half is empty
            deep = depth > level
            free &= deep
            bits = _code_some(stream, mixer, inputs, rest & half > 0, free, 0, owner)
            if several:
                _count(shared, common_node[deep], bits[deep])
                _count(nodes, own_node[deep], bits[deep])
            else:
                _count(shared, common_node, bits)
                _count(nodes, own_node, bits)
            low += bits * half
            node = np.where(deep, node * 2 + bits, node)
        out[here] = (low + 1) * (2 * positive - 1)
        scaled = np.maximum((2 * low + 1) * 128 // wide, 1)
        size[here], sign[here] = scaled, 2 * positive - 1
        for sums, numbers, line in (
            (row_sums, row_numbers, r),
            (column_sums, column_numbers, c),
            (total, number, owner),
        ):
            np.add.at(sums, line, scaled)
            np.add.at(numbers, line, 1)
        fresh += len(r)
        if fresh >= 1024:
            fresh = 0
            for counts in (balance, row_signs, column_signs, pattern_signs, shared, nodes):
                counts[counts.max(1) > LOG2_SIZE // 4] >>= 1
    for depth, size_of in sizes_of.items():
        stream.ranks[depth] = shared[starts[depth] : starts[depth] + size_of]
    return sheet.gather(out)


def _code_some(
    stream: Stream,
    mixer: Mixer,
    inputs: np.ndarray,
    bits: np.ndarray,
    coded: np.ndarray,
    known: np.ndarray | int,
    owner: np.ndarray,
) -> np.ndarray:
    """Codes the bits [n] where `coded`, and learns from them; elsewhere they are as `known`."""
    probabilities = mixer.predict(inputs)
    if coded.all():
        found = stream.code(probabilities, bits, owner)
        mixer.update(found)
        return found
    found = np.empty(len(bits), np.int64)
    found[...] = known
    some = np.flatnonzero(coded)
    found[some] = stream.code(probabilities.take(some), bits.take(some), owner, some)
    mixer.update(found, coded)
    return found


def _starts(sizes: Iterable[int]) -> np.ndarray:
    """Returns where each of several parts of these sizes begins."""
    sizes = np.array(list(sizes), np.int64)
    return np.cumsum(sizes) - sizes


def _count(counts: np.ndarray, lines: np.ndarray, bits: np.ndarray) -> None:
    """Adds bits [n] to the counts [lines, 2] of their lines [n]."""
    np.add.at(counts.reshape(-1), 2 * lines + bits, COUNT)


def _counts(num: int, start: int) -> np.ndarray:
    return np.full((num, 2), start * COUNT, np.int64)


def _odds(counts: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """Returns log2 odds [n] of the second of the two counts [lines, 2] of lines [n]."""
    if len(lines) > len(counts):  # one look-up for each position instead of two
        logs = log2_table().take(counts, mode="clip")
        return (logs[:, 1] - logs[:, 0]).take(lines)
    logs = log2_table().take(counts.take(lines, 0), mode="clip")
    return logs[:, 1] - logs[:, 0]


def _faded(counts: np.ndarray, limit: int) -> np.ndarray:
    """Scales counts [n, 2] so that no row sums to more than a limit."""
    total = counts.sum(1, keepdims=True)
    return np.maximum(np.where(total > limit, counts * limit // np.maximum(total, 1), counts), COUNT // 8)
