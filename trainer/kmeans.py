"""Clustering of numbers on a line: which few values should the weights of a layer share?

`kmeans_linear` is the classic choice (Lloyd's algorithm from evenly spaced values, Han et al. 2016);
`kmeans_optimal` finds the best one, optionally weighted and optionally counting the bits of the codes;
`assign` gives each value its code and `inertia` says what the sharing costs.

In one dimension the clusters of an optimal solution are intervals of the sorted values, so the optimum is
found by dynamic programming over where the intervals end (Wang & Song 2011; Gronlund et al. 2017). What
makes it quick here:

1. Values are sorted a chunk at a time and summed into narrow bins, each kept as a point (mean, weight,
   count). A bin's own spread costs the same in every clustering that keeps the bin whole, so only its sums
   matter.
2. The dynamic programme runs over a few thousand bins, each layer by divide and conquer with a whole level
   at a time in numpy (the best start of the last interval never moves left when its end moves right).
3. Then every end may move within a window over the hundreds of thousands of points, all ends jointly.

Bins are not equally wide: their density follows (density of the values)^(1/3), which is how the centroids
of a fine optimal quantizer are spread (Panter & Dite 1951). A far outlier therefore costs nothing in
resolution.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainer.mistakes import Mistake

CHUNK = 1 << 18  # values in work at a time: what is allocated beside the input does not grow with it
CHUNK_BINS = 1 << 13  # points kept of each chunk at the least
NUM_POINTS = 1 << 18  # points kept in sum at the least: as many distinct values are kept as they are
MAX_POINTS = 1 << 20  # points in hand before they are summed up again
DP_BINS = 4096  # bins of the dynamic programme: at most as many distinct values are solved exactly
ENTROPY_BINS = 1024  # the same where codes cost bits: there every pair of bins is looked at
FEW_POINTS = 256  # up to here looking at every pair is quicker than divide and conquer
WINDOW = 8  # places to either side where a refinement may move the end of an interval
LARGEST = float(np.finfo(np.float32).max)


def kmeans_linear(values: np.ndarray, k: int) -> np.ndarray:
    """Cluster values by scikit-learn's KMeans from k evenly spaced centroids between minimum and maximum.

    The initialisation that Han et al. 2016 (Deep Compression) found best; one start, no randomness.
    Returns float32 centroids in ascending order: k of them, or the distinct values where these are fewer.
    Raises Mistake for k < 1, no values, NaN or infinity.
    """
    from sklearn.cluster import KMeans  # here: importing it takes a second

    values = _as_floats(_checked(values, k))
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
    """Cluster values so that the (weighted) sum of squared distances to k centroids is least.

    With `code_cost` > 0 the clusters are those of the least

        sum_i weights_i * (values_i - centroid_i)^2  +  code_cost * sum_clusters n_c * log2(n / n_c)

    where n_c of the n values fall in cluster c: an ideal entropy coder spends log2(n / n_c) bits on each of
    them (entropy-constrained quantization, Chou, Lookabaugh & Gray 1989, here by dynamic programming on
    that very cost, where code lengths and clusters are not found in turn but together). Clusters are
    intervals of the values, which without `weights` are the best there are; with both, others may cost less. Fewer
    than k clusters may then be best. To use such a codebook, alternate `assign` with `code_bits` and
    `code_lengths` a few times.

    Exact where at most `bins` values are distinct (default 4096; 1024 where `code_cost` > 0). Otherwise the
    ends of the intervals are optimal on `bins` bins, then jointly optimal within a window over some hundred
    thousand points. Where k exceeds half of the bins and more values are distinct, the start is the
    Panter-Dite spacing instead, which is quick but ends a few per cent above the optimum: raise `bins`.
    Deterministic.

    `weights` has the shape of `values`, for example squared gradients; only ratios matter unless
    `code_cost` > 0. A value of weight 0 takes no part.

    Returns float32 centroids in ascending order: at most k, and where at most k values are distinct and
    codes cost nothing, these values. Sums are in double precision about the mean: structure finer than
    about 1e-8 of the range is not resolved. Takes about 40 MB beside the input at most for k <= 256 (75 MB
    where codes cost bits), however many values there are.

    Raises Mistake for k < 1, bins < 1, no values, NaN or infinity, values beyond float32, a negative or
    not finite `code_cost`, and weights that are negative, not finite, all zero or of another number.
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
    position, mass, count = _points(values, weights, chunk_bins)
    if len(position) == 1 or (len(position) <= k and code_cost == 0):
        return _as_centroids(position)
    total = mass.sum()
    centre = (position * mass).sum() / total
    scale = np.abs(position - centre).max()
    share = np.maximum(mass / total, 1e-15)  # so that sums of doubles still grow with every point
    line = _Line((position - centre) / scale, share, count)
    bounds = _start(line, k, bins)
    if len(position) > bins:
        bounds = _refined(line, bounds)
    if code_cost:
        line.code_cost = code_cost / scale / scale / total
        coarse, ends = line.coarse(min(bins, ENTROPY_BINS))
        starts = [bounds, ends[_all_pairs(coarse, k)]]
        bounds = min((_refined(line, start) for start in starts), key=line.total_cost)
    heads = bounds[:-1]
    return _as_centroids(np.add.reduceat(position * mass, heads) / np.add.reduceat(mass, heads))


def assign(
    values: np.ndarray, centroids: np.ndarray, *, code_bits: np.ndarray | None = None, code_cost: float = 0.0
) -> np.ndarray:
    """Give each value the code (index) of its nearest centroid; of two equally near, the smaller centroid.

    With `code_bits` (one length per centroid, as from `code_lengths`) it is the code of the least
    (value - centroid)^2 + code_cost * bits; an infinite length bars a code. Centroids may come in any order;
    of equal ones the cheaper code is used, then the first.

    Returns codes in the shape of `values`: uint8 for up to 256 centroids, int16 up to 32,768, then int32.
    Raises Mistake for no centroids, NaN or infinity, lengths of another number or all infinite, and a
    `code_cost` without lengths.
    """
    values = np.asarray(values)
    codes = np.empty(values.shape, _code_type(np.size(centroids)))
    flat_values, flat_codes = values.reshape(-1), codes.reshape(-1)
    find = _Finder(np.asarray(centroids), code_bits, code_cost)
    for part in _parts(values.size, CHUNK // 8):
        flat_codes[part] = find(_as_floats(flat_values[part]))
    return codes


def code_lengths(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Ideal length of each code in bits, log2(number of codes / times used); infinite where it is unused.

    Raises Mistake where there are no codes or one is not below `num_codes`.
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
    """Sum of the (weighted) squared distances of values to their nearest centroids, in double precision.

    Raises Mistake as `assign` does, and for weights that are negative, not finite, all zero or of
    another shape.
    """
    values = np.asarray(values).reshape(-1)
    if weights is not None:
        weights = _checked_weights(weights, values.size)
    centroids = np.asarray(centroids)
    find = _Finder(centroids, None, 0.0)
    total = 0.0
    for part in _parts(values.size, CHUNK // 8):
        chunk = _as_floats(values[part])
        distance = chunk.astype(np.float64) - centroids[find(chunk)]
        total += float(np.dot(distance, distance if weights is None else distance * weights[part]))
    return total


# -------------------------------------------------------------------------------------------- what comes in


def _checked(values: np.ndarray, k: int) -> np.ndarray:
    values = np.asarray(values).reshape(-1)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if values.size == 0:
        raise Mistake("there are no values to cluster")
    for part in _parts(values.size):
        _as_floats(values[part])
    return values


def _checked_weights(weights: np.ndarray, size: int) -> np.ndarray:
    weights = np.asarray(weights).reshape(-1)
    if weights.size != size:
        raise ValueError(f"weights must be as many as the values, got {weights.size} for {size}")
    if not (weights.min() >= 0 and 0 < weights.max() <= LARGEST):
        raise Mistake("weights must be finite, in the range of float32, none negative and not all zero")
    return weights


def _parts(size: int, length: int = CHUNK) -> Iterator[slice]:
    return (slice(start, start + length) for start in range(0, size, length))


def _as_floats(chunk: np.ndarray) -> np.ndarray:
    """The chunk as float32 or float64, whichever holds it; Mistake where a value is no usable number."""
    if chunk.dtype.kind not in "fiub":
        raise ValueError(f"values must be real numbers, got {chunk.dtype}")
    chunk = chunk.astype(np.float32 if chunk.dtype in (np.float16, np.float32) else np.float64, copy=False)
    if not (chunk.min() >= -LARGEST and chunk.max() <= LARGEST):
        raise Mistake("values must be finite and within the range of float32, got NaN, infinity or more")
    return chunk


def _as_centroids(centroids: np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(centroids).astype(np.float32))


def _code_type(num_codes: int) -> type:
    return np.uint8 if num_codes <= 1 << 8 else np.int16 if num_codes <= 1 << 15 else np.int32


# ------------------------------------------------------------------------------ many values -> fewer points


def _points(values: np.ndarray, weights: np.ndarray | None, chunk_bins: int) -> tuple[np.ndarray, ...]:
    """The values as sorted points: position, mass (sum of weights) and count (number of values), all float64.

    Points are the distinct values where each chunk has at most `chunk_bins`, else means of narrow bins.
    """
    most = max(MAX_POINTS, 8 * chunk_bins)
    held, num_held = [], 0
    for part in _parts(values.size):
        chunk = _as_floats(values[part])
        if weights is None:
            chunk = np.sort(chunk)
            mass = None
        else:
            mass = weights[part].astype(np.float64)
            order = np.argsort(chunk)
            order = order[mass[order] > 0]
            chunk, mass = chunk[order], mass[order]
        if len(chunk) == 0:
            continue
        held.append(_binned(chunk, mass, None, chunk_bins))
        num_held += len(held[-1][0])
        if num_held > most:
            held = [_binned(*_merged(held), most // 2)]
            num_held = len(held[0][0])
    return _binned(*_merged(held), most)


def _merged(held: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    if len(held) == 1:
        return held[0]
    position, mass, count = (np.concatenate(column) for column in zip(*held, strict=True))
    order = np.argsort(position, kind="stable")
    return position[order], mass[order], count[order]


def _binned(
    position: np.ndarray, mass: np.ndarray | None, count: np.ndarray | None, bins: int
) -> tuple[np.ndarray, ...]:
    """Sum sorted points into at most `bins` points; equal positions become one. None stands for ones."""
    heads = np.flatnonzero(np.concatenate([[True], position[1:] != position[:-1]]))
    exact = len(heads) <= bins
    if not exact:
        heads = _bin_heads(position, mass, bins)
    if count is None:
        counts = np.diff(heads, append=len(position)).astype(np.float64)
    else:
        counts = np.add.reduceat(count, heads)
    masses = counts if mass is None else np.add.reduceat(mass, heads)
    if exact:
        positions = position[heads].astype(np.float64)
    else:
        moment = position if mass is None else position * mass
        positions = np.add.reduceat(moment, heads, dtype=np.float64) / masses
    return positions, masses, counts


def _bin_heads(position: np.ndarray, mass: np.ndarray | None, bins: int) -> np.ndarray:
    """Index of the first point of each of at most `bins` bins, spread by Panter and Dite's rule.

    Between neighbouring knots of mass m and distance d the density is m / d, so the share of bins that the
    rule gives to them is (m / d)^(1/3) * d = (m * d^2)^(1/3).
    """
    step = max(1, len(position) // (4 * bins))
    knots = np.append(position[:-1:step], position[-1]).astype(np.float64)
    share = np.diff(knots) ** 2
    if mass is not None:
        between = np.add.reduceat(mass, np.arange(0, len(position) - 1, step))
        share *= between
    share = np.cbrt(share)
    for _ in range(30):  # an empty gap before an outlier must not swallow the bins: no gap gets over 64
        cap = 64 * share.sum() / bins
        if share.max() <= cap:
            break
        share = np.minimum(share, cap)
    reach = np.concatenate([[0.0], np.cumsum(share)])
    edges = np.interp(np.arange(1, bins) * (reach[-1] / bins), reach, knots)
    heads = np.searchsorted(position, edges.astype(position.dtype))
    heads = heads[(heads > 0) & (heads < len(position))]
    return np.concatenate([[0], heads[np.diff(heads, prepend=0) > 0]])


# -------------------------------------------------------------------------------- fewer points -> intervals


class _Line:
    """Sorted points and what an interval of them costs: up to a constant, its inertia and its codes' bits."""

    def __init__(self, position: np.ndarray, mass: np.ndarray, count: np.ndarray):
        self.position, self.mass, self.count = position, mass, count
        self.masses, self.moments, self.counts = (
            np.concatenate([[0.0], np.cumsum(column)]) for column in (mass, position * mass, count)
        )
        self.code_cost = 0.0

    def cost(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Cost of the points first .. last - 1 in one cluster; infinite where there are none."""
        empty = last <= first
        mass = np.where(empty, 1.0, self.masses[last] - self.masses[first])
        cost = -((self.moments[last] - self.moments[first]) ** 2) / mass
        if self.code_cost:
            count = np.where(empty, 1.0, self.counts[last] - self.counts[first])
            cost -= self.code_cost * count * np.log2(count / self.counts[-1])
        return np.where(empty, np.inf, cost)

    def total_cost(self, bounds: np.ndarray) -> float:
        return float(self.cost(bounds[:-1], bounds[1:]).sum())

    def coarse(self, bins: int) -> tuple[_Line, np.ndarray]:
        """A line of at most `bins` points, and the bounds of its points among ours."""
        if len(self.position) <= bins:
            return self, np.arange(len(self.position) + 1)
        heads = _bin_heads(self.position, self.mass, bins)
        mass, count, moment = (
            np.add.reduceat(column, heads) for column in (self.mass, self.count, self.mass * self.position)
        )
        line = _Line(moment / mass, mass, count)
        line.code_cost = self.code_cost
        return line, np.append(heads, len(self.position))


def _start(line: _Line, k: int, bins: int) -> np.ndarray:
    """Bounds of k intervals: optimal on at most `bins` bins where these are enough, else spaced by rule."""
    if k >= len(line.position):
        return np.arange(len(line.position) + 1)
    coarse, bounds = line.coarse(bins)
    if coarse is line or 2 * k <= len(coarse.position):
        return bounds[(_all_pairs if len(coarse.position) <= FEW_POINTS else _divide_and_conquer)(coarse, k)]
    heads = _bin_heads(line.position, line.mass, k)
    size = len(line.position)
    while len(heads) < k:  # split the costliest intervals until there are k
        length = np.diff(heads, append=size)
        width = line.position[heads + length - 1] - line.position[heads]
        cost = np.add.reduceat(line.mass, heads) * width**2
        num_splits = min((k - len(heads) + 1) // 2, np.count_nonzero(length > 1))
        costliest = np.argsort(-cost, kind="stable")[:num_splits]
        heads = np.sort(np.concatenate([heads, heads[costliest] + length[costliest] // 2]))
    return np.append(heads, size)


def _divide_and_conquer(line: _Line, k: int) -> np.ndarray:
    """Bounds of the cheapest k intervals, without cost for codes; needs at least k points.

    Layer c finds the least cost of the points 0 .. j - 1 in c intervals, for every j that leaves a point
    for each of the other k - c, from layer c - 1: the last interval starts at some i, which grows with j.
    Indices are offsets: j = c + t and i = c - 1 + r with 0 <= r <= t <= spare.
    """
    masses, moments = line.masses, line.moments
    spare = len(line.position) - k
    offsets = np.arange(spare + 1)
    strides = [1 << level for level in range((spare + 1).bit_length() - 1, -1, -1)]
    levels = [(stride, np.arange(stride, spare + 2, 2 * stride)) for stride in strides]  # places are t + 1
    best_r = np.zeros(2 * strides[0] + 1, np.int64)  # by place; place 0 and those after the last are walls
    best_r[spare + 2 :] = spare
    choices = np.zeros((k, spare + 1), np.int16 if spare < 1 << 15 else np.int32)
    cost = line.cost(np.zeros(1, np.int64), offsets + 1)
    for c in range(2, k + 1):
        before, mass_i, moment_i = cost, masses[c - 1 : c + spare], moments[c - 1 : c + spare]
        mass_j, moment_j = masses[c : c + spare + 1], moments[c : c + spare + 1]
        cost = np.empty(spare + 1)
        for stride, places in levels if c < k else [(strides[0] * 2, np.array([spare + 1]))]:
            t = places - 1
            low = best_r[places - stride] if c < k else np.zeros(1, np.int64)
            high = np.minimum(best_r[np.minimum(places + stride, len(best_r) - 1)], t) if c < k else t
            length = high - low + 1
            start = np.cumsum(length) - length
            r = np.arange(length.sum()) - np.repeat(start - low, length)
            moment = np.repeat(moment_j[t], length) - moment_i[r]
            trial = before[r] - moment * moment / (np.repeat(mass_j[t], length) - mass_i[r])
            least = np.minimum.reduceat(trial, start)
            hits = np.flatnonzero(trial == np.repeat(least, length))
            chosen = r[hits[np.searchsorted(hits, start)]]
            cost[t] = least
            best_r[places] = chosen
        choices[c - 1] = best_r[1 : spare + 2]
    bounds = np.empty(k + 1, np.int64)
    bounds[k] = len(line.position)
    for c in range(k, 0, -1):
        bounds[c - 1] = c - 1 + choices[c - 1, bounds[c] - c]
    return bounds


def _all_pairs(line: _Line, k: int) -> np.ndarray:
    """Bounds of the cheapest k intervals, looking at every pair of points; of 1 to k where codes cost bits.

    The cost of bits is concave in the count, so the best start of an interval need not grow with its end,
    and divide and conquer does not hold.
    """
    size = len(line.position)
    k = min(k, size)
    first = np.arange(size + 1)
    pair = line.cost(first[None, :], first[:, None])  # [end, start]
    cost, choices, totals = pair[:, 0], [np.zeros(size + 1, np.int64)], [pair[-1, 0]]
    for _ in range(1, k):
        trial = pair + cost
        choices.append(trial.argmin(axis=1))
        cost = trial[first, choices[-1]]
        totals.append(cost[-1])
    path = [size]
    for layer in range(int(np.argmin(totals)) if line.code_cost else k - 1, -1, -1):
        path.append(int(choices[layer][path[-1]]))
    return np.array(path[::-1])


def _refined(line: _Line, bounds: np.ndarray) -> np.ndarray:
    """Move all inner bounds jointly to the best of 2 * WINDOW + 1 places about each, until none moves.

    Places are first far apart, then neighbouring points. Exact within the window, so never worse than the
    start.
    """
    k, size = len(bounds) - 1, len(line.position)
    if k == 1 or k == size:
        return bounds
    shifts = np.arange(-WINDOW, WINDOW + 1)
    stride = 1 << max(0, (size // (WINDOW * k)).bit_length() - 1)
    while stride:
        for _ in range(16):
            places = np.clip(bounds[1:-1, None] + stride * shifts, 0, size)
            moved = np.concatenate([[0], _best_places(line, places), [size]])
            if np.array_equal(moved, bounds):
                break
            bounds = moved
        stride //= 4
    return bounds


def _best_places(line: _Line, places: np.ndarray) -> np.ndarray:
    """One place of each row so that the intervals between them cost least in sum."""
    cost = line.cost(np.zeros(1, np.int64), places[0])
    choices = []
    for start in range(0, len(places) - 1, 512):
        block = places[start : start + 513]
        for pair in line.cost(block[:-1, None, :], block[1:, :, None]):  # [place, place before]
            trial = pair + cost
            choice = trial.argmin(axis=1)
            choices.append(choice)
            cost = trial[np.arange(len(choice)), choice]
    cost = cost + line.cost(places[-1], np.full(1, len(line.position)))
    chosen = [int(cost.argmin())]
    for choice in reversed(choices):
        chosen.append(int(choice[chosen[-1]]))
    return places[np.arange(len(places)), chosen[::-1]]


# ------------------------------------------------------------------------------------------ values -> codes


class _Finder:
    """Codes of values: those of the lower envelope of the parabolas (value - centroid)^2 + code_cost * bits.

    Between thresholds the best code is constant. A value's cell in an even grid over the thresholds says
    which thresholds lie below its cell; those within the cell are compared one by one. Rounding cannot
    hurt, since thresholds are put into cells by the same monotone arithmetic.
    """

    CELLS = 1 << 14
    STEPS = 4  # most thresholds in one cell before a binary search is quicker

    def __init__(self, centroids: np.ndarray, bits: np.ndarray | None, code_cost: float):
        if centroids.ndim != 1 or not len(centroids):
            raise ValueError(f"centroids must be a list of at least one number, got shape {centroids.shape}")
        centroids = _as_floats(centroids).astype(np.float64)
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
        self.codes = order.astype(_code_type(len(centroids)))
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
        with np.errstate(over="ignore"):  # a threshold beyond float32 becomes infinite, which is right
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
    """Those of the sorted parabolas that are lowest somewhere."""
    places, offsets, codes = centroids.tolist(), offset.tolist(), order.tolist()
    kept: list[int] = []
    begins: list[float] = []  # where each becomes the lowest
    for code in codes:
        begin = -np.inf
        while kept:
            last = kept[-1]
            tilt = (offsets[code] - offsets[last]) / (places[code] - places[last])
            begin = places[last] / 2 + places[code] / 2 + tilt / 2
            if begin > begins[-1]:
                break
            kept.pop()
            begins.pop()
            begin = -np.inf
        kept.append(code)
        begins.append(begin)
    return np.array(kept)


def _crossings(centroids: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Where neighbouring parabolas meet: at and below it the left one is at least as low."""
    return centroids[:-1] / 2 + centroids[1:] / 2 + np.diff(offset) / np.diff(centroids) / 2
