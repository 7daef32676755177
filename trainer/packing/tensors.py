"""Codes a tensor: raw, by a codebook, or as integers times a step."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from trainer.mistakes import Mistake
from trainer.packing.grids import Sheet, grid_of
from trainer.packing.integers import MOST_NUMBERS, code_integers
from trainer.packing.masks import code_masks
from trainer.packing.numbers import code_drop, code_float, code_numbers, fraction_bits, patterns_of
from trainer.packing.ranks import code_ranks
from trainer.packing.stream import Stream

MAX_CLUSTERS = 1 << 16


class Zeros(IntEnum):
    """Which numbers of a tensor are zero."""

    NONE, SOME, ALL = range(3)


class Form(IntEnum):
    """How a tensor's non-zeros are written: as they are, by codes into a codebook, as integers times a step."""

    RAW, CODEBOOK, STEPS = range(3)


def code_tensor(stream: Stream, name: str, array: np.ndarray, step: float | None = None) -> np.ndarray:
    """Codes a tensor; a Decoder gets an array of the right shape and dtype. step: see `container.encode`."""
    scalars, dtype, start = stream.scalars, array.dtype, stream.here()
    patterns = patterns_of(array)
    numel = len(patterns)
    if numel == 0:
        return array.copy()
    present = patterns != 0 if stream.coder.writes else np.broadcast_to(False, numel)
    context = (dtype.kind, array.ndim > 1)
    form, zeros = choose(array, patterns, present, step) if stream.coder.writes else (Form.RAW, Zeros.NONE)
    form = scalars.tree(("form", *context), 2, form)
    if form == Form.STEPS and dtype == np.float32 and numel <= min(MOST_NUMBERS, stream.one_by_one):
        stream.part(name, "form", start)
        return _code_small(stream, name, array, step)
    zeros = scalars.tree(("zeros", *context), 2, zeros)
    if form > Form.STEPS or zeros > Zeros.ALL or form != Form.RAW and dtype.kind != "f":
        raise Mistake("the coded stream is damaged: unknown form of a tensor")
    if zeros == Zeros.SOME:
        check_capacity(stream, f"positions of tensor {name}", numel)
    grid = grid_of(array.shape, stream.live)
    matrix = (grid.rows, grid.columns)
    mask = np.full(matrix, zeros == Zeros.NONE, np.uint8)
    stream.part(name, "form", start)
    if zeros == Zeros.SOME:
        start = stream.here()
        (mask,) = code_masks(stream, [present.reshape(matrix)], Sheet([grid]), [stream.density])
        stream.density = (int(mask.sum()), mask.size)
        stream.part(name, "mask", start)
    chosen = mask.reshape(-1) > 0
    values = patterns[chosen]
    start = stream.here()
    if form == Form.RAW:
        values = code_numbers(stream, values, dtype)
    else:
        if form == Form.CODEBOOK:
            codebook, highest = code_codebook(stream, np.unique(values), dtype)
        else:
            codebook, highest = code_steps(stream, array, step)
        stream.part(name, "codebook", start)
        start = stream.here()
        if len(codebook) == 1:
            values = np.repeat(codebook, len(values))
        elif len(codebook):
            check_capacity(stream, f"positions of tensor {name}", len(values))
            ranks = np.zeros(matrix, np.int64)
            if stream.coder.writes:
                ranks = ranks_of(patterns.reshape(matrix), codebook, highest)
            (ranks,) = code_ranks(stream, [ranks], [mask], Sheet([grid]), [highest])
            values = of_ranks(ranks.reshape(-1)[chosen], codebook, highest)
        elif len(values):
            raise Mistake("the coded stream is damaged: an empty codebook")
    stream.part(name, "values", start)
    out = np.zeros(numel, patterns.dtype)
    out[chosen] = values
    if array.ndim > 1:
        stream.live = mask.sum(1, dtype=np.int64)
    return out.view(dtype).reshape(array.shape)


def _code_small(stream: Stream, name: str, array: np.ndarray, step: float | None) -> np.ndarray:
    """Codes a small tensor of a step times integers number by number."""
    start = stream.here()
    scale = _code_scale(stream, step)
    stream.part(name, "codebook", start)
    start = stream.here()
    grid = grid_of(array.shape, stream.live)
    integers = np.zeros((grid.rows, grid.columns), np.int64)
    if stream.coder.writes:
        integers = (
            np.rint(array.astype(np.float64) / np.float64(scale)).astype(np.int64).reshape(integers.shape)
        )
    kind = 0 if array.ndim < 2 else 1 if grid.flat else 2
    integers = code_integers(stream.integers, name, integers, grid, kind)
    stream.one_by_one -= array.size
    stream.part(name, "values", start)
    if array.ndim > 1:
        stream.live = (integers != 0).sum(1, dtype=np.int64)
    with np.errstate(all="ignore"):  # a damaged step may overflow
        return (scale * integers.astype(np.float32)).reshape(array.shape)


def check_capacity(stream: Stream, what: str, num: int) -> None:
    """Raises Mistake, before memory is taken, for more positions than the file's bytes can hold decisions."""
    if num > stream.capacity:
        raise Mistake(f"the coded stream is damaged: it cannot hold the {num:,} {what}")


def ranks_of(patterns: np.ndarray, codebook: np.ndarray, highest: tuple[int, int]) -> np.ndarray:
    """Returns the signed ranks of patterns in a codebook (see `ranks`), 0 for zeros."""
    order = np.argsort(codebook, kind="stable")
    found = np.zeros(patterns.shape, np.int64)
    chosen = patterns != 0
    position = order[np.searchsorted(codebook, patterns[chosen], sorter=order)] - highest[0]
    found[chosen] = position + (position >= 0)
    return found


def of_ranks(ranks: np.ndarray, codebook: np.ndarray, highest: tuple[int, int]) -> np.ndarray:
    """Returns the patterns of signed ranks, of which none is 0."""
    return codebook[ranks + highest[0] - (ranks > 0)]


def choose(
    array: np.ndarray, patterns: np.ndarray, present: np.ndarray, step: float | None
) -> tuple[int, int]:
    """Returns the form of the fewest bytes, judged by entropy, and how zeros are coded."""
    numel, count = len(patterns), int(present.sum())
    mask_bits = entropy_bits(np.array([count, numel - count]))
    if count == 0:
        return Form.RAW, Zeros.ALL
    if array.dtype.kind != "f":
        return Form.RAW, Zeros.NONE
    if step is not None:
        return Form.STEPS, Zeros.SOME if count < numel else Zeros.NONE
    union = int(np.bitwise_or.reduce(patterns)) | 1 << fraction_bits(array.dtype)
    number_bits = fraction_bits(array.dtype) + 4 - (union & -union).bit_length()
    zeros = Zeros.SOME if count < numel else Zeros.NONE
    sizes = {(Form.RAW, Zeros.NONE): numel * number_bits, (Form.RAW, zeros): mask_bits + count * number_bits}
    values, counts = np.unique(patterns[present], return_counts=True)
    if len(values) <= MAX_CLUSTERS:
        sizes[Form.CODEBOOK, zeros] = mask_bits + entropy_bits(counts) + len(values) * (number_bits + 2)
    return min(sizes, key=sizes.__getitem__)


def entropy_bits(counts: np.ndarray) -> float:
    """Returns the entropy of a message with these counts of symbols, in bits."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def code_codebook(
    stream: Stream, patterns: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, tuple[int, int]]:
    """Codes the distinct values in rising order; returns their patterns and how many of each sign there are."""
    sign = 8 * dtype.itemsize - 1
    drop = code_drop(stream, patterns, dtype)
    halves = []
    for negative in (1, 0):
        sizes = np.sort(patterns[patterns >> sign == negative] & (1 << sign) - 1).tolist()
        count = stream.scalars.number("clusters", len(sizes), MAX_CLUSTERS + 1)
        out: list[int] = []
        # Gaps between patterns are like gaps between logarithms; the values of one sign span about 3 octaves.
        plain = max(0, fraction_bits(dtype) - drop + 1 - count.bit_length())
        for i in range(count):
            size = sizes[i] if stream.coder.writes else 0
            if not out:
                out.append(code_float(stream, size, dtype, drop))
                continue
            gap = size - out[-1] - 1 >> drop
            high = stream.scalars.number("gap", gap >> plain, 1 << sign - drop)
            gap = high << plain | stream.coder.uniform(plain, gap & (1 << plain) - 1)
            out.append(out[-1] + (gap + 1 << drop))
        if out and out[-1] >> sign:
            raise Mistake("the coded stream is damaged: a codebook overflows")
        halves.append([size | negative << sign for size in out])
    below, above = halves
    return np.array(below[::-1] + above, patterns.dtype), (len(below), len(above))


def code_steps(stream: Stream, array: np.ndarray, step: float | None) -> tuple[np.ndarray, tuple[int, int]]:
    """Codes the codebook of a step times all integers between the least and the greatest."""
    scale = _code_scale(stream, step)
    integers = np.rint(array.astype(np.float64) / np.float64(scale)) if stream.coder.writes else np.zeros(1)
    most = [int(max(0, (sign * integers).max())) for sign in (-1, 1)]
    negative, positive = (stream.scalars.number("highest", high, MAX_CLUSTERS // 2 + 1) for high in most)
    integers = np.concatenate([np.arange(-negative, 0), np.arange(1, positive + 1)])
    with np.errstate(all="ignore"):  # a damaged step may overflow
        return patterns_of(scale * integers.astype(np.float32)), (negative, positive)


def _code_scale(stream: Stream, step: float | None) -> np.float32:
    pattern = int(np.float32(step or 1).view(np.uint32))
    drop = code_drop(stream, np.array([pattern], np.uint32), np.dtype(np.float32))
    return np.uint32(code_float(stream, pattern, np.dtype(np.float32), drop)).view(np.float32)
