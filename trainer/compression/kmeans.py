"""K-means in one dimension: finds the few values that the weights of a layer should share.

`kmeans_linear` is the classic choice (Lloyd's algorithm from evenly spaced values, Han et al. 2016).
`kmeans_optimal` finds the optimum, optionally weighted, optionally with a cost for the bits of the codes.
`assign` returns the code of each value, `inertia` the squared error.

In one dimension the clusters of an optimal solution are intervals of the sorted values, so dynamic programming
over the ends of the intervals finds the optimum (Wang & Song 2011; Gronlund et al. 2017). Three steps make it
fast here:

1. Values are sorted a chunk at a time and summed into narrow bins, each kept as a point (mean, weight,
   count). The spread inside a bin costs the same in every clustering that keeps the bin whole, so only its
   sums matter.
2. The dynamic programme runs over a few thousand bins. Each round is divide and conquer, a whole level at a time
   in numpy (the best start of the last interval never moves left when its end moves right).
3. Then all ends move jointly, each within a window, over the hundreds of thousands of points.

Bins are not equally wide: their density follows (density of the values)^(1/3), as the centroids of a fine
optimal quantizer do (Panter & Dite 1951). A far outlier therefore costs no resolution.
"""

from __future__ import annotations

import numpy as np

from trainer.compression.intervals import (
    CHUNK,
    LARGEST,
    Line,
    all_pairs,
    as_floats,
    chunks,
    points_of,
    refined,
    start_of,
)
from trainer.mistakes import Mistake

CHUNK_BINS = 1 << 13  # points kept of each chunk, at least
NUM_POINTS = 1 << 18  # points kept altogether, at least: up to here distinct values stay exact
DP_BINS = 4096  # bins of the dynamic programme: up to so many distinct values the result is exact
ENTROPY_BINS = 1024  # the same if codes cost bits, where every pair of bins is tried


def kmeans_linear(values: np.ndarray, k: int) -> np.ndarray:
    """Clusters values by scikit-learn's KMeans from k evenly spaced centroids between minimum and maximum.

    This is the initialisation that Han et al. 2016 (Deep Compression) found best; one start, no randomness.
    Returns float32 centroids in ascending order: k of them, or the distinct values if these are fewer.
    Raises Mistake for no values, NaN or infinity, ValueError for k < 1.
    """
    from sklearn.cluster import KMeans  # here: importing it takes a second

    values = as_floats(_checked(values, k))
    distinct = np.unique(values)
    if len(distinct) <= k:
        return _as_centroids(distinct)
    start = np.linspace(distinct[0], distinct[-1], k)[:, None]
    return _as_centroids(KMeans(k, init=start, n_init=1).fit(values[:, None]).cluster_centers_[:, 0])


def kmeans_optimal(
    values: np.ndarray,
    k: int,
    *,
    weights: np.ndarray | None = None,
    bins: int | None = None,
    code_cost: float = 0.0,
) -> np.ndarray:
    """Finds the k centroids with the least (weighted) sum of squared distances of the values.

    Returns float32 centroids in ascending order, at most k. If at most k values are distinct and codes cost
    nothing, these are the values. Deterministic.

    With `code_cost` > 0 it minimises

        sum_i weights_i * (values_i - centroid_i)^2  +  code_cost * sum_clusters n_c * log2(n / n_c)

    where n_c of the n values fall in cluster c: an ideal entropy coder spends log2(n / n_c) bits on each of
    them (entropy-constrained quantization, Chou, Lookabaugh & Gray 1989; here dynamic programming finds code
    lengths and clusters together, not in turn). Fewer than k clusters may then be best. Clusters are intervals
    of the values; these are optimal unless `weights` and `code_cost` are both given. To use such a codebook,
    alternate `assign` with `code_bits` and `code_lengths` a few times.

    The result is exact if at most `bins` values are distinct. Otherwise the ends of the intervals are optimal on
    `bins` bins, then jointly optimal within a window over some hundred thousand points. If k exceeds half of the
    bins and more values are distinct, the start is the Panter-Dite spacing instead, which is fast but ends a few
    per cent above the optimum: raise `bins`. Sums are in double precision about the mean: structure finer than
    about 1e-8 of the range is not resolved. Memory beside the input is at most about 40 MB for k <= 256 (75 MB if
    codes cost bits), for any number of values.

    Args:
        values: Any array of real numbers.
        k: Number of centroids.
        weights: Factors on the squared distances, of the shape of `values`, such as squared gradients. Only
            ratios matter unless `code_cost` > 0. A value of weight 0 is ignored.
        bins: Bins of the dynamic programme; None takes 4096 (1024 for `code_cost` > 0).
        code_cost: Cost of a bit, in squared distance.

    Raises:
        Mistake: For no values, NaN, infinity or values beyond float32, and for weights that are negative, not
            finite or all zero.
        ValueError: For k < 1, bins < 1, a negative or not finite `code_cost`, and weights of another number.
    """
    values = _checked(values, k)
    bins = DP_BINS if bins is None else bins
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not 0 <= code_cost < np.inf:
        raise ValueError(f"code_cost must be a finite number of at least 0, got {code_cost}")
    if weights is not None:
        weights = _checked_weights(weights, values.size)

    num_chunks = -(-values.size // CHUNK)
    chunk_bins = max(NUM_POINTS // num_chunks, CHUNK_BINS, 2 * bins, 16 * k)
    position, mass, count = points_of(values, weights, chunk_bins)
    if len(position) == 1 or (len(position) <= k and code_cost == 0):
        return _as_centroids(position)
    total = mass.sum()
    centre = (position * mass).sum() / total
    scale = np.abs(position - centre).max()
    fraction = np.maximum(mass / total, 1e-15)  # so that sums of doubles still grow with every point
    line = Line((position - centre) / scale, fraction, count)
    bounds = start_of(line, k, bins)
    if len(position) > bins:
        bounds = refined(line, bounds)
    if code_cost:
        line.code_cost = code_cost / scale / scale / total
        coarse, ends = line.coarse(min(bins, ENTROPY_BINS))
        starts = [bounds, ends[all_pairs(coarse, k)]]
        bounds = min((refined(line, start) for start in starts), key=line.total_cost)
    heads = bounds[:-1]
    return _as_centroids(np.add.reduceat(position * mass, heads) / np.add.reduceat(mass, heads))


def assign(
    values: np.ndarray, centroids: np.ndarray, *, code_bits: np.ndarray | None = None, code_cost: float = 0.0
) -> np.ndarray:
    """Returns the code (index) of each value's nearest centroid, the smaller centroid of two equally near.

    Codes have the shape of `values`: uint8 for up to 256 centroids, int16 up to 32,768, then int32.

    Args:
        values: Any array of real numbers.
        centroids: In any order. Of equal ones the code of fewer bits is used, then the first.
        code_bits: One length per centroid, as from `code_lengths`. The code is then that of the least (value -
            centroid)^2 + code_cost * bits. A code of infinite length is not used.
        code_cost: Cost of a bit, in squared distance.

    Raises:
        Mistake: For NaN or infinity.
        ValueError: For no centroids, lengths of another number or all infinite, and a `code_cost` without lengths.
    """
    values = np.asarray(values)
    codes: np.ndarray = np.empty(values.shape, _code_type(np.size(centroids)))
    flat_values, flat_codes = values.reshape(-1), codes.reshape(-1)
    find = _Finder(np.asarray(centroids), code_bits, code_cost)
    for part in chunks(values.size, CHUNK // 8):
        flat_codes[part] = find(as_floats(flat_values[part]))
    return codes


def code_lengths(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Returns the ideal length of each code in bits, log2(number of codes / times used); infinite for an unused code.

    Raises ValueError if there are no codes, or one is not below `num_codes`.
    """
    used = np.bincount(np.asarray(codes).reshape(-1), minlength=num_codes)
    total = used.sum()
    if total == 0 or len(used) > num_codes:
        got = f"codes up to {len(used) - 1}" if total else "none"
        raise ValueError(f"there must be codes, from 0 to {num_codes - 1}, got {got}")
    bits = np.full(num_codes, np.inf)
    bits[used > 0] = np.log2(total / used[used > 0])
    return bits


def inertia(values: np.ndarray, centroids: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Returns the sum of the (weighted) squared distances of values to their nearest centroids, in double precision.

    Raises as `assign` does; Mistake also for weights that are negative, not finite or all zero, ValueError for
    weights of another number.
    """
    values = np.asarray(values).reshape(-1)
    if weights is not None:
        weights = _checked_weights(weights, values.size)
    centroids = np.asarray(centroids)
    find = _Finder(centroids, None, 0.0)
    total = 0.0
    for part in chunks(values.size, CHUNK // 8):
        chunk = as_floats(values[part])
        distance = chunk.astype(np.float64) - centroids[find(chunk)]
        total += float(np.dot(distance, distance if weights is None else distance * weights[part]))
    return total


def _checked(values: np.ndarray, k: int) -> np.ndarray:
    values = np.asarray(values).reshape(-1)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if values.size == 0:
        raise Mistake("there are no values to cluster")
    for part in chunks(values.size):
        as_floats(values[part])
    return values


def _checked_weights(weights: np.ndarray, size: int) -> np.ndarray:
    weights = np.asarray(weights).reshape(-1)
    if weights.size != size:
        raise ValueError(f"weights must be as many as the values, got {weights.size} for {size}")
    if not (weights.min() >= 0 and 0 < weights.max() <= LARGEST):
        raise Mistake("weights must be finite, in the range of float32, none negative and not all zero")
    return weights


def _as_centroids(centroids: np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(centroids).astype(np.float32))


def _code_type(num_codes: int) -> type:
    return np.uint8 if num_codes <= 1 << 8 else np.int16 if num_codes <= 1 << 15 else np.int32


class _Finder:
    """Finds the codes of values: those of the lower envelope of the parabolas (value - centroid)^2 + code_cost * bits.

    Between thresholds the best code is constant. The cell of a value, in an even grid over the thresholds, says
    which thresholds lie below that cell; those within the cell are compared one by one. Rounding does no harm,
    because thresholds are assigned to cells by the same monotone arithmetic.
    """

    CELLS = 1 << 14
    STEPS = 4  # with more thresholds in one cell a binary search is faster

    def __init__(self, centroids: np.ndarray, bits: np.ndarray | None, code_cost: float):
        if centroids.ndim != 1 or not len(centroids):
            raise ValueError(f"centroids must be a list of at least one number, got shape {centroids.shape}")
        centroids = as_floats(centroids).astype(np.float64)
        if not 0 <= code_cost < np.inf or (code_cost and bits is None):
            raise ValueError(f"code_cost must be finite, at least 0 and come with code_bits, got {code_cost}")
        offset = np.zeros(len(centroids))
        if bits is not None:
            bits = np.asarray(bits, np.float64)
            usable = np.isfinite(bits)
            if bits.shape != centroids.shape or not usable.any() or not bits.min() >= 0:
                need = f"{len(centroids)} numbers of at least 0, not all infinite"
                raise ValueError(f"code_bits must be {need}, got {bits}")
            offset = np.where(usable, code_cost * np.where(usable, bits, 0), np.inf)
        order = np.lexsort((np.arange(len(centroids)), offset, centroids))
        order = order[np.isfinite(offset[order])]
        first = np.concatenate([[True], np.diff(centroids[order]) > 0])
        order = order[first]
        if offset[order].any():
            order = _envelope(centroids, offset, order)
        self.thresholds = _crossings(centroids[order], offset[order])
        self.codes: np.ndarray = order.astype(_code_type(len(centroids)))
        self.cache: dict[np.dtype, tuple] = {}

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if len(self.thresholds) == 0:
            return np.full(values.shape, self.codes[0])
        if values.dtype not in self.cache:
            self.cache[values.dtype] = self._tables(values.dtype)
        thresholds, low, high, scale, table, steps = self.cache[values.dtype]
        if steps > self.STEPS:
            return self.codes[np.searchsorted(thresholds[:-1], values)]
        rank = table.take(self._cells(values, low, high, scale))
        for _ in range(steps):
            rank += values > thresholds.take(rank)
        return self.codes.take(rank)

    def _tables(self, dtype: np.dtype) -> tuple:
        with np.errstate(over="ignore"):  # a threshold beyond float32 becomes infinite, as it should
            thresholds = self.thresholds.astype(dtype)
        above = thresholds > self.thresholds  # round down: then value <= threshold is the same question
        thresholds[above] = np.nextafter(thresholds[above], dtype.type(-np.inf))
        low, high = thresholds[0], thresholds[-1]
        span = float(high) - float(low)
        scale, table, steps = dtype.type(1), None, self.STEPS + 1
        if span <= LARGEST:
            scale = dtype.type(min((self.CELLS - 1) / max(span, 1e-300), LARGEST / 4))
            per_cell = np.bincount(self._cells(thresholds, low, high, scale), minlength=self.CELLS)
            table = (np.cumsum(per_cell) - per_cell).astype(np.int32)
            steps = int(per_cell.max())
        return np.append(thresholds, dtype.type(np.inf)), low, high, scale, table, steps

    @staticmethod
    def _cells(values: np.ndarray, low: np.floating, high: np.floating, scale: np.floating) -> np.ndarray:
        return ((np.clip(values, low, high) - low) * scale).astype(np.int32)


def _envelope(centroids: np.ndarray, offset: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns those of the sorted parabolas that are lowest somewhere."""
    positions, offsets, codes = centroids.tolist(), offset.tolist(), order.tolist()
    kept: list[int] = []
    begins: list[float] = []  # from where on each is the lowest
    for code in codes:
        begin = -np.inf
        while kept:
            last = kept[-1]
            tilt = (offsets[code] - offsets[last]) / (positions[code] - positions[last])
            begin = positions[last] / 2 + positions[code] / 2 + tilt / 2
            if begin > begins[-1]:
                break
            kept.pop()
            begins.pop()
            begin = -np.inf
        kept.append(code)
        begins.append(begin)
    return np.array(kept)


def _crossings(centroids: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Returns where neighbouring parabolas meet: at and below that value the left one is at least as low."""
    return centroids[:-1] / 2 + centroids[1:] / 2 + np.diff(offset) / np.diff(centroids) / 2
