"""Arranges tensors as matrices of small grids, and orders their positions for coding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
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

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether columns have neighbours, and whether far ones too: in a small kernel these add nothing."""
        return not self.flat, self.height * self.width > 25

    def chunks(self, longest: int | None = None) -> np.ndarray:
        """Returns the first column of each chunk that is coded side by side, and at the end the number of columns.

        Chunks are cut at grid borders. longest: columns of a chunk, if a grid is not longer; None for as many chunks as
        make the waves of this matrix alone long.
        """
        area = self.height * self.width
        grids = self.columns // area
        if longest is None:
            num = min(grids, self.rows * self.columns // (128 * min(self.rows, self.columns)))
        else:
            num = -(-grids // max(1, longest // area))
        num = max(1, num)
        return np.arange(num + 1) * grids // num * area

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


class Sheet:
    """Grids whose positions are coded together, wave by wave.

    Rows and columns are numbered through all grids. Behind the columns of each grid comes one that stays empty, and above
    its rows two; with these a grid has an area of its own in arrays of `size` positions.

    Wave t holds the positions of each row with column + row = t, counted from the first of its tile. So the positions to
    the left in the row (above in the grid too) and in the rows above in the same column are then known, except across the
    borders of tiles.

    Args:
        grids: At least one, without empty ones.
        side: Rows and columns of a tile, as far as grids are not cut. None for one grid whose tiles are as high as it is.
    """

    def __init__(self, grids: Sequence[Grid], side: int | None = None) -> None:
        self.grids, self._side = grids, side
        heights, widths = np.array([[grid.rows, grid.columns + 1] for grid in grids], np.int64).T
        areas = (heights + 2) * widths
        self.rows, self.columns, self.size = int(heights.sum()), int(widths.sum()), int(areas.sum())
        self.owner = np.repeat(np.arange(len(grids)), heights)  # [rows]: number of the row's grid
        self.stride = widths[self.owner]  # [rows]: from a position to the one below it
        self._first_row, self._first_column = np.cumsum(heights) - heights, np.cumsum(widths) - widths
        self._area = np.cumsum(areas) - areas
        down = np.arange(self.rows) - self._first_row[self.owner]
        #: [rows]: a position's place in its area is this plus its column
        self.base = (self._area - self._first_column)[self.owner] + (down + 2) * self.stride

    def waves(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields the positions that are coded together, in order: row numbers, column numbers and places."""
        lines = []  # row, first column, first wave, columns
        for first, left, grid in zip(self._first_row, self._first_column, self.grids, strict=True):
            rows = np.arange(grid.rows)
            begin = rows if self._side is None else rows % self._side
            starts = grid.chunks(self._side)
            for start, end in itertools.pairwise(starts.tolist()):
                fixed = np.full((2, grid.rows), [[left + start], [end - start]])
                lines.append(np.stack([first + rows, fixed[0], begin, fixed[1]]))
        row, column, begin, length = np.concatenate(lines, 1)
        end = begin + length
        offset = column - begin
        for t in range(int(end.max())):
            active = np.flatnonzero((begin <= t) & (t < end))
            for at in range(0, len(active), _MOST):
                some = active[at : at + _MOST]
                r, c = row[some], offset[some] + t
                yield r, c, self.base[r] + c

    def neighbours(self, offsets: list[tuple[int, int]]) -> np.ndarray:
        """Returns [offset, column]: the column that is (down, right) of it in the same grid, or its grid's empty one."""
        found = []
        for left, grid in zip(self._first_column.tolist(), self.grids, strict=True):
            own = grid.neighbours(offsets)
            found += [own + left, np.full((len(offsets), 1), left + grid.columns)]
        return np.concatenate(found, 1)

    def spread(self, matrices: Sequence[np.ndarray], dtype: type) -> np.ndarray:
        """Returns [size]: matrices [rows, columns], one for each grid, each in its area, around which there are zeros."""
        flat: np.ndarray = np.zeros(self.size, dtype)
        for own, matrix in zip(self._areas(flat), matrices, strict=True):
            own[...] = matrix
        return flat

    def gather(self, flat: np.ndarray) -> list[np.ndarray]:
        """Returns the matrices of an array [size]."""
        return [own.copy() for own in self._areas(flat)]

    def _areas(self, flat: np.ndarray) -> Iterator[np.ndarray]:
        for start, grid in zip(self._area.tolist(), self.grids, strict=True):
            area = flat[start : start + (grid.rows + 2) * (grid.columns + 1)]
            yield area.reshape(grid.rows + 2, grid.columns + 1)[2:, : grid.columns]


NEAR = [(0, -1), (-1, 0), (-1, 1), (-1, -1), (0, -2), (-2, 0)]
FAR = [(-1, 2), (-1, -2), (-2, -1), (-2, 1), (-2, 2), (-2, -2), (0, -3), (-3, 0)]
AROUND = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
_MOST = 1 << 16  # positions of a wave: the sums of a mixer's products stay below 2^53
COUNT = 16  # counts are kept in units of 1 / COUNT
