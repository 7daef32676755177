"""Arranges a tensor as a matrix of small grids, and orders its positions for coding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass
class Grid:
    """A tensor as a matrix [rows, columns], whose columns form grids of height x width neighbours."""

    rows: int
    columns: int
    height: int = 1
    width: int = 1
    column_live: np.ndarray | None = None  # [columns]: non-zero weights of the unit that feeds the column
    row_live: np.ndarray | None = None  # [rows]: likewise for the row

    @property
    def flat(self) -> bool:
        """Whether no column has a neighbour."""
        return self.height * self.width == 1

    def waves(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the positions that are coded together, in order: (row numbers, column numbers).

        Wave t holds the positions with column + row = t. The positions to the left in the row (so above in the grid
        too) and in the rows above in the same column are then known. Wide matrices are cut at grid borders into
        chunks of columns that advance side by side, so that there are fewer and longer waves.
        """
        starts = self._chunks()
        longest = int(np.diff(starts).max())
        even = int(np.diff(starts).min()) == longest
        everything = np.arange(self.rows)
        for t in range(self.rows + longest - 1):
            rows = everything[max(0, t - longest + 1) : t + 1]
            if len(starts) == 2:
                yield rows, t - rows
                continue
            columns = starts[:-1, None] + (t - rows)
            rows = np.broadcast_to(rows, columns.shape)
            if even:
                yield rows.reshape(-1), columns.reshape(-1)
            else:
                inside = columns < starts[1:, None]
                yield rows[inside], columns[inside]

    def _chunks(self) -> np.ndarray:
        """Returns the first column of each chunk, and at the end the number of columns."""
        grids = self.columns // (self.height * self.width)
        num = max(1, min(grids, self.rows * self.columns // (128 * min(self.rows, self.columns))))
        return np.arange(num + 1) * grids // num * (self.height * self.width)

    def neighbours(self, offsets: list[tuple[int, int]]) -> np.ndarray:
        """Returns [offset, column]: the column that is (down, right) of it in the same grid, or `columns` for none."""
        column = np.arange(self.columns)
        y, x = column // self.width % self.height, column % self.width
        found = []
        for down, right in offsets:
            inside = (y + down >= 0) & (y + down < self.height) & (x + right >= 0) & (x + right < self.width)
            found.append(np.where(inside, column + down * self.width + right, self.columns))
        return np.array(found)


def grid_of(shape: tuple[int, ...], live: np.ndarray | None) -> Grid:
    """Returns the grid of a tensor of this shape. live: non-zero weights of each row of the weight tensor before it."""
    numel = math.prod(shape)
    if len(shape) < 2:
        return Grid(1, numel, column_live=live if live is not None and len(live) == numel else None)
    rows, columns = shape[0], numel // shape[0]
    grid = Grid(rows, columns)
    if live is not None and columns % len(live) == 0 and shape[1] % len(live) == 0:
        grid.column_live = np.repeat(live, columns // len(live))
    elif live is not None and len(live) == rows:
        grid.row_live = live
    if len(shape) > 2:
        grid.height, grid.width = math.prod(shape[2:-1]), shape[-1]
        return grid
    # The columns of a matrix may be pixels: of the previous layer's channels, or of a grey or coloured image.
    for channels in (1, 3) if grid.column_live is None or live is None else (len(live),):
        side = math.isqrt(columns // channels)
        if channels * side * side == columns and (side >= 8 or grid.column_live is not None):
            grid.height = grid.width = side
            break
    return grid


NEAR = [(0, -1), (-1, 0), (-1, 1), (-1, -1), (0, -2), (-2, 0)]
FAR = [(-1, 2), (-1, -2), (-2, -1), (-2, 1), (-2, 2), (-2, -2), (0, -3), (-3, 0)]
AROUND = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
COUNT = 16  # counts are kept in units of 1 / COUNT
