"""Finds the intervals of an optimal clustering of sorted values, by dynamic programming and refinement.

See `kmeans` for why the clusters are intervals and why this is fast.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from trainer.mistakes import Mistake

CHUNK = 1 << 18  # values processed at a time, so that memory beside the input does not grow with it
MAX_POINTS = 1 << 20  # points in memory before they are summed into bins again
FEW_POINTS = 256  # up to here, trying every pair is faster than divide and conquer
MANY_BOUNDS = 1 << 14
WINDOW = 8  # positions to either side where a refinement may move the end of an interval
LARGEST = float(np.finfo(np.float32).max)
Points = tuple[np.ndarray, np.ndarray, np.ndarray]  # position, mass, count


def chunks(size: int, length: int = CHUNK) -> Iterator[slice]:
    """Yields slices of at most `length` that cover 0 .. size."""
    return (slice(start, start + length) for start in range(0, size, length))


def as_floats(chunk: np.ndarray) -> np.ndarray:
    """Returns the chunk as float32 or float64, whichever holds it exactly.

    Raises Mistake for values that are not finite or beyond float32, ValueError for values that are no real numbers.
    """
    if chunk.dtype.kind not in "fiub":
        raise ValueError(f"values must be real numbers, got {chunk.dtype}")
    chunk = chunk.astype(np.float32 if chunk.dtype in (np.float16, np.float32) else np.float64, copy=False)
    if not (chunk.min() >= -LARGEST and chunk.max() <= LARGEST):
        raise Mistake("values must be finite and within the range of float32, got NaN, infinity or more")
    return chunk


def points_of(values: np.ndarray, weights: np.ndarray | None, chunk_bins: int) -> Points:
    """Returns the values as sorted points: position, mass (sum of weights) and count (number of values), all float64.

    Points are the distinct values if each chunk has at most `chunk_bins` of them, else means of narrow bins.
    """
    most = max(MAX_POINTS, 8 * chunk_bins)
    held: list[Points] = []
    num_held = 0
    for part in chunks(values.size):
        chunk = as_floats(values[part])
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
        held.append(binned(chunk, mass, None, chunk_bins))
        num_held += len(held[-1][0])
        if num_held > most:
            held = [binned(*merged(held), most // 2)]
            num_held = len(held[0][0])
    return binned(*merged(held), most)


def merged(held: list[Points]) -> Points:
    """Joins lists of points (position, mass, count) into one, sorted by position."""
    if len(held) == 1:
        return held[0]
    position, mass, count = (np.concatenate(column) for column in zip(*held, strict=True))
    order = np.argsort(position, kind="stable")
    return position[order], mass[order], count[order]


def binned(position: np.ndarray, mass: np.ndarray | None, count: np.ndarray | None, bins: int) -> Points:
    """Sums sorted points into at most `bins` points; equal positions become one. None stands for ones."""
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
    """Returns the index of the first point of each of at most `bins` bins, spaced by Panter and Dite's rule.

    Between neighbouring knots of mass m and distance d the density is m / d, so the rule gives them a number of bins
    proportional to (m / d)^(1/3) * d = (m * d^2)^(1/3).
    """
    step = max(1, len(position) // (4 * bins))
    knots = np.append(position[:-1:step], position[-1]).astype(np.float64)
    fraction = np.diff(knots) ** 2
    if mass is not None:
        between = np.add.reduceat(mass, np.arange(0, len(position) - 1, step))
        fraction *= between
    fraction = np.cbrt(fraction)
    for _ in range(30):  # an empty gap before an outlier must not take all bins: no gap gets more than 64
        cap = 64 * fraction.sum() / bins
        if fraction.max() <= cap:
            break
        fraction = np.minimum(fraction, cap)
    reach = np.concatenate([[0.0], np.cumsum(fraction)])
    edges = np.interp(np.arange(1, bins) * (reach[-1] / bins), reach, knots)
    heads = np.searchsorted(position, edges.astype(position.dtype))
    heads = heads[(heads > 0) & (heads < len(position))]
    return np.concatenate([[0], heads[np.diff(heads, prepend=0) > 0]])


class Line:
    """Sorted points, and the cost of an interval of them: its inertia plus its codes' bits, up to a constant."""

    def __init__(self, position: np.ndarray, mass: np.ndarray, count: np.ndarray):
        self.position, self.mass, self.count = position, mass, count
        self.masses, self.moments, self.counts = (
            np.concatenate([[0.0], np.cumsum(column)]) for column in (mass, position * mass, count)
        )
        self.code_cost = 0.0

    def cost(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Returns the cost of the points first .. last - 1 as one cluster; infinite for an empty one."""
        empty = last <= first
        mass = np.where(empty, 1.0, self.masses[last] - self.masses[first])
        cost = -((self.moments[last] - self.moments[first]) ** 2) / mass
        if self.code_cost:
            count = np.where(empty, 1.0, self.counts[last] - self.counts[first])
            cost -= self.code_cost * count * np.log2(count / self.counts[-1])
        return np.where(empty, np.inf, cost)

    def total_cost(self, bounds: np.ndarray) -> float:
        """Returns the cost of all intervals between consecutive bounds."""
        return float(self.cost(bounds[:-1], bounds[1:]).sum())

    def coarse(self, bins: int) -> tuple[Line, np.ndarray]:
        """Returns a line of at most `bins` points, and the bounds of its points among this line's."""
        if len(self.position) <= bins:
            return self, np.arange(len(self.position) + 1)
        heads = _bin_heads(self.position, self.mass, bins)
        mass, count, moment = (
            np.add.reduceat(column, heads) for column in (self.mass, self.count, self.mass * self.position)
        )
        line = Line(moment / mass, mass, count)
        line.code_cost = self.code_cost
        return line, np.append(heads, len(self.position))


def start_of(line: Line, k: int, bins: int) -> np.ndarray:
    """Returns the bounds of k intervals: optimal on at most `bins` bins if that is enough for k, else spaced by rule."""
    if k >= len(line.position):
        return np.arange(len(line.position) + 1)
    coarse, bounds = line.coarse(bins)
    if coarse is line or 2 * k <= len(coarse.position):
        return bounds[(all_pairs if len(coarse.position) <= FEW_POINTS else divide_and_conquer)(coarse, k)]
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


def divide_and_conquer(line: Line, k: int) -> np.ndarray:
    """Returns the bounds of the cheapest k intervals, without a cost for codes. Needs at least k points.

    Round c finds the least cost of the points 0 .. j - 1 in c intervals from round c - 1, for every j that leaves a
    point for each of the other k - c. The best start i of the last interval never falls as j rises. Indices are offsets:
    j = c + t and i = c - 1 + r with 0 <= r <= t <= spare.
    """
    masses, moments = line.masses, line.moments
    spare = len(line.position) - k
    offsets = np.arange(spare + 1)
    strides = [1 << level for level in range((spare + 1).bit_length() - 1, -1, -1)]
    levels = [(stride, np.arange(stride, spare + 2, 2 * stride)) for stride in strides]  # positions are t + 1
    best_r = np.zeros(2 * strides[0] + 1, np.int64)  # by position; 0 and those after the last are sentinels
    best_r[spare + 2 :] = spare
    choices = np.zeros((k, spare + 1), np.int16 if spare < 1 << 15 else np.int32)
    cost = line.cost(np.zeros(1, np.int64), offsets + 1)
    for c in range(2, k + 1):
        before, mass_i, moment_i = cost, masses[c - 1 : c + spare], moments[c - 1 : c + spare]
        mass_j, moment_j = masses[c : c + spare + 1], moments[c : c + spare + 1]
        cost = np.empty(spare + 1)
        for stride, positions in levels if c < k else [(strides[0] * 2, np.array([spare + 1]))]:
            t = positions - 1
            low = best_r[positions - stride] if c < k else np.zeros(1, np.int64)
            high = np.minimum(best_r[np.minimum(positions + stride, len(best_r) - 1)], t) if c < k else t
            length = high - low + 1
            start = np.cumsum(length) - length
            r = np.arange(length.sum()) - np.repeat(start - low, length)
            moment = np.repeat(moment_j[t], length) - moment_i[r]
            trial = before[r] - moment * moment / (np.repeat(mass_j[t], length) - mass_i[r])
            least = np.minimum.reduceat(trial, start)
            hits = np.flatnonzero(trial == np.repeat(least, length))
            chosen = r[hits[np.searchsorted(hits, start)]]
            cost[t] = least
            best_r[positions] = chosen
        choices[c - 1] = best_r[1 : spare + 2]
    bounds = np.empty(k + 1, np.int64)
    bounds[k] = len(line.position)
    for c in range(k, 0, -1):
        bounds[c - 1] = c - 1 + choices[c - 1, bounds[c] - c]
    return bounds


def all_pairs(line: Line, k: int) -> np.ndarray:
    """Returns the bounds of the cheapest k intervals by trying every pair of points; of 1 to k intervals if codes cost bits.

    The cost of bits is concave in the count, so the best start of an interval may fall as its end rises, and divide and
    conquer would be wrong.
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


def refined(line: Line, bounds: np.ndarray) -> np.ndarray:
    """Moves all inner bounds jointly to the best of 2 * WINDOW + 1 positions around each, until none moves.

    The positions are first far apart, then neighbouring points. Each move is exact within its window, so the result is
    never worse than the start. So many bounds that one move takes a second get two moves, which end 0.5 % above sixteen.
    """
    k, size = len(bounds) - 1, len(line.position)
    if k == 1 or k == size:
        return bounds
    shifts = np.arange(-WINDOW, WINDOW + 1)
    stride = 1 << max(0, (size // (WINDOW * k)).bit_length() - 1)
    while stride:
        for _ in range(16 if k <= MANY_BOUNDS else 2):
            positions = np.clip(bounds[1:-1, None] + stride * shifts, 0, size)
            moved = np.concatenate([[0], _best_positions(line, positions), [size]])
            if np.array_equal(moved, bounds):
                break
            bounds = moved
        stride //= 4
    return bounds


def _best_positions(line: Line, positions: np.ndarray) -> np.ndarray:
    """Picks one position of each row so that the intervals between them cost least in sum."""
    cost = line.cost(np.zeros(1, np.int64), positions[0])
    choices = []
    for start in range(0, len(positions) - 1, 512):
        block = positions[start : start + 513]
        for pair in line.cost(block[:-1, None, :], block[1:, :, None]):  # [position, position before]
            trial = pair + cost
            choice = trial.argmin(axis=1)
            choices.append(choice)
            cost = trial[np.arange(len(choice)), choice]
    cost = cost + line.cost(positions[-1], np.full(1, len(line.position)))
    chosen = [int(cost.argmin())]
    for choice in reversed(choices):
        chosen.append(int(choice[chosen[-1]]))
    return positions[np.arange(len(positions)), chosen[::-1]]
