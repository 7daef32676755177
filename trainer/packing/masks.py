"""Codes tensors' masks (where they are not zero) bit by bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.packing.coder import ONE
from trainer.packing.grids import AROUND, COUNT, FAR, NEAR, Sheet
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


def code_masks(
    stream: Stream, masks: Sequence[np.ndarray], sheet: Sheet, densities: Sequence[tuple[int, int]]
) -> list[np.ndarray]:
    """Codes the masks of a sheet's matrices: [rows, columns] of 0 and 1. Returns them; a Decoder ignores its argument.

    The odds of each position are mixed from the density so far; the excess over the expectation of its column, its
    row and the columns around it; its neighbours in the row's grid, one by one, as a pattern, and as a sum; the rows
    above; and the number of weights, in the tensor before, of the unit that feeds the column (or row).

    densities: for each matrix, ones and positions in which they were seen: what is expected at first.
    """
    num, stretch = len(sheet.grids), stretch_table()
    spatial, wide = sheet.grids[0].kind
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
    column_live = row_live = None
    if num == 1:
        column_live, row_live = (
            None if live is None else liveness(live)
            for live in (sheet.grids[0].column_live, sheet.grids[0].row_live)
        )
    if column_live is not None:
        weights["column live"] = 0.8
    if row_live is not None:
        weights["row live"] = 0.8
    row_of = {name: i for i, name in enumerate(weights)}
    mixer = Mixer(list(weights.values()), num_sets=3 if spatial else 1)
    if spatial:
        near, around = sheet.neighbours(NEAR + FAR if wide else NEAR), sheet.neighbours(AROUND)
    powers = 1 << np.arange(len(NEAR))

    given = sheet.spread(masks, np.uint8) if stream.coder.writes else np.zeros(sheet.size, np.uint8)
    known = np.zeros(sheet.size, np.uint8)
    column_ones, column_seen = np.zeros((2, sheet.columns), np.int64)
    column_ratio, column_probability = np.zeros((2, sheet.columns), np.int64)
    row_ones, row_expected = np.zeros((2, sheet.rows), np.int64)
    pattern_found = np.full(1 << len(NEAR), 2 * COUNT, np.int64)
    pattern_expected = np.full(1 << len(NEAR), 2 * COUNT * ONE, np.int64)
    # Counts beyond the table of logarithms are kept in coarser units.
    coarse = max(0, (max(max(grid.rows, grid.columns) for grid in sheet.grids) * COUNT).bit_length() - 17)
    ones, seen = np.array([[2 * COUNT * n // of + 1, 2 * COUNT + 2] for n, of in densities], np.int64).T

    for r, c, here in sheet.waves():
        owner = sheet.owner.take(r)
        own_density = ONE * ones // seen
        density, odds = own_density.take(owner), stretch.take(own_density).take(owner)
        by_column = _log_ratio(
            column_ones.take(c) * COUNT >> coarse,
            column_seen.take(c) * density * COUNT >> 16 + coarse,
            COUNT,
        )
        probability = squash(odds + by_column)
        column_ratio[c] = by_column
        column_probability[c] = probability
        inputs = np.empty((len(weights), len(r)))
        inputs[0] = odds
        inputs[1] = by_column
        inputs[2] = _log_ratio(
            row_ones.take(r) * COUNT >> coarse, row_expected.take(r) * COUNT >> 16 + coarse, COUNT
        )
        stride = sheet.stride.take(r)
        above = known.take(here - stride)
        inputs[3] = above * float(UNIT)
        inputs[4] = 0
        sets = None
        if spatial:
            neighbours = known.take(sheet.base.take(r) + near.take(c, 1))
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
            pattern = above + 2 * known.take(here - 2 * stride)
        if column_live is not None:
            inputs[row_of["column live"]] = column_live[c]
        if row_live is not None:
            inputs[row_of["row live"]] = row_live[r]
        expected = mixer.predict(inputs, sets)
        correction = _log_ratio(pattern_found.take(pattern), pattern_expected.take(pattern) >> 16, 0)
        bits = stream.code(mixer.refine(4, correction), given.take(here), owner)
        mixer.update(bits)

        known[here] = bits
        np.add.at(column_ones, c, bits)
        np.add.at(column_seen, c, 1)
        np.add.at(row_ones, r, bits)
        np.add.at(row_expected, r, probability)
        np.add.at(pattern_found, pattern, bits * COUNT)
        np.add.at(pattern_expected, pattern, expected * COUNT)
        if int(pattern_expected.max()) >> 16 > 1 << 16:
            halve = pattern_expected >> 16 > 1 << 16
            pattern_found[halve] >>= 1
            pattern_expected[halve] >>= 1
        np.add.at(ones, owner, bits * COUNT)
        np.add.at(seen, owner, COUNT)
    return sheet.gather(known)
