"""Codes a tensor's mask (where it is not zero) bit by bit."""

from __future__ import annotations

import numpy as np

from trainer.packing.coder import ONE
from trainer.packing.grids import AROUND, COUNT, FAR, NEAR, Grid
from trainer.packing.predictors import UNIT, Mixer, log2_table, squash, stretch_table
from trainer.packing.stream import Stream


def _log_ratio(found: np.ndarray, expected: np.ndarray, weight: int) -> np.ndarray:
    """Returns log2((found + weight) / (expected + weight)); all three in units of 1 / COUNT."""
    log2 = log2_table()
    return log2.take(found + weight, mode="clip") - log2.take(expected + weight, mode="clip")


def liveness(live: np.ndarray) -> np.ndarray:
    """Returns for each unit log2 of its number of non-zero weights over the mean."""
    mean = np.full_like(live, live.sum() * COUNT // len(live))
    return _log_ratio(live * COUNT, mean, COUNT // 2)


def code_mask(stream: Stream, mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes the mask of a matrix: [rows, columns] of 0 and 1. Returns it; a Decoder ignores its argument.

    The odds of each position are mixed from the density so far; the excess over the expectation of its column, its
    row and the columns around it; its neighbours in the row's grid, one by one, as a pattern, and as a sum; the rows
    above; and the number of weights, in the tensor before, of the unit that feeds the column (or row).
    """
    rows, columns = grid.rows, grid.columns
    coder, stretch = stream.coder, stretch_table()
    spatial = not grid.flat
    wide = grid.height * grid.width > 25  # in a small kernel far neighbours add nothing
    weights = {"density": 1.0, "column": 0.6, "row": 0.5, "above": 0.3, "pattern": 0.6}
    if spatial:
        weights |= {
            "left": 1.8,
            "up": 1.1,
            "up right": 0.9,
            "up left": -0.1,
            "left 2": 0.1,
            "up 2": 0.0,
            "around": 0.4,
            "corners": 0.1,
            "none": -0.7,
        }
    if wide:
        weights["far"] = 0.2
    if grid.column_live is not None:
        weights["column live"] = 0.8
    if grid.row_live is not None:
        weights["row live"] = 0.8
    row_of = {name: i for i, name in enumerate(weights)}
    mixer = Mixer(list(weights.values()), num_sets=3 if spatial else 1)
    column_live = None if grid.column_live is None else liveness(grid.column_live)
    row_live = None if grid.row_live is None else liveness(grid.row_live)
    if spatial:
        near, around = grid.neighbours(NEAR + FAR if wide else NEAR), grid.neighbours(AROUND)
    powers = 1 << np.arange(len(NEAR))

    stride = columns + 1
    out = np.zeros((rows + 2, stride), np.uint8)  # two rows above and a column to the right stay zero
    known = out.reshape(-1)
    column_ones, row_ones, row_expected = (np.zeros(size, np.int64) for size in (columns, rows, rows))
    column_ratio, column_probability = np.zeros(stride, np.int64), np.zeros(stride, np.int64)
    pattern_found = np.full(1 << len(NEAR), 2 * COUNT, np.int64)
    pattern_expected = np.full(1 << len(NEAR), 2 * COUNT * ONE, np.int64)
    # Counts beyond the table of logarithms are kept in coarser units.
    coarse = max(0, (max(rows, columns) * COUNT).bit_length() - 17)
    ones, seen = stream.density
    ones, seen = 2 * COUNT * ones // seen + 1, 2 * COUNT + 2

    for r, c in grid.waves():
        density = ONE * ones // seen
        odds = int(stretch[density])
        found = column_ones[c]
        by_column = _log_ratio(found * COUNT >> coarse, r * density * COUNT >> 16 + coarse, COUNT)
        probability = squash(odds + by_column)
        column_ratio[c] = by_column
        column_probability[c] = probability
        inputs = np.empty((len(weights), len(r)))
        inputs[0] = odds
        inputs[1] = by_column
        inputs[2] = _log_ratio(row_ones[r] * COUNT >> coarse, row_expected[r] * COUNT >> 16 + coarse, COUNT)
        here = (r + 2) * stride + c
        above = known.take(here - stride)
        inputs[3] = above * float(UNIT)
        inputs[4] = 0
        sets = None
        if spatial:
            neighbours = known.take((r + 2) * stride + near.take(c, 1))
            inputs[5:11] = neighbours[:6] * float(UNIT)
            ratios = column_ratio.take(around.take(c, 1))
            inputs[11] = np.add.reduce(ratios[:4]) >> 2
            inputs[12] = np.add.reduce(ratios[4:]) >> 2
            touching = np.add.reduce(neighbours[:4], dtype=np.int64)
            inputs[13] = (touching == 0) * float(UNIT)
            if wide:
                inputs[row_of["far"]] = _log_ratio(
                    np.add.reduce(neighbours[6:], dtype=np.int64) * COUNT,
                    np.add.reduce(column_probability.take(near[6:].take(c, 1))) >> 12,
                    COUNT // 2,
                )
            sets = np.minimum(touching, 2)
            pattern = powers @ neighbours[:6]
        else:
            pattern = above + 2 * known[here - 2 * stride]
        if column_live is not None:
            inputs[row_of["column live"]] = column_live[c]
        if row_live is not None:
            inputs[row_of["row live"]] = row_live[r]
        expected = mixer.predict(inputs, sets)
        correction = _log_ratio(pattern_found[pattern], pattern_expected[pattern] >> 16, 0)
        bits = coder.code(mixer.refine(4, correction), mask[r, c])
        mixer.update(bits)

        known[here] = bits
        column_ones[c] += bits
        add = np.bincount(r, bits).astype(np.int64)
        row_ones[: len(add)] += add
        add = np.bincount(r, probability).astype(np.int64)
        row_expected[: len(add)] += add
        pattern_found += np.bincount(pattern, bits, len(pattern_found)).astype(np.int64) * COUNT
        pattern_expected += np.bincount(pattern, expected, len(pattern_found)).astype(np.int64) * COUNT
        if int(pattern_expected.max()) >> 16 > 1 << 16:
            halve = pattern_expected >> 16 > 1 << 16
            pattern_found[halve] >>= 1
            pattern_expected[halve] >>= 1
        ones += int(bits.sum()) * COUNT
        seen += len(r) * COUNT
    mask = out[2:, :columns]
    stream.density = (int(mask.sum()), mask.size)
    return mask
