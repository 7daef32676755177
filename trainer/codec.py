"""The packed file: a header and named arrays in as few bytes as we know how, given back bit for bit.

    magic, version      3 bytes
    coded stream        header, layout, tensors: one arithmetic-coded stream, see trainer/entropy.py
    literal bytes       of long arrays of raw numbers, plain or deflated; read from the end backwards
    checksum            4 bytes, CRC-32 of all before it

A tensor is written as numbers, or as a mask (where it is not zero) followed by the non-zero numbers, or by
codes into a codebook, or by small integers that a step multiplies. Zero means the bit pattern of +0.0; a -0.0
is a number like any other, so add 0.0 to a masked tensor before packing it. Masks and codes are predicted bit
by bit from what is already known of the tensor and of the one before it: see `_code_mask` and `_code_ranks`.
"""

from __future__ import annotations

import heapq
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.entropy import (
    LOG2_SIZE,
    LOWEST,
    ONE,
    UNIT,
    Coder,
    Decoder,
    Encoder,
    Meter,
    Mixer,
    Scalars,
    Text,
    log2_table,
    squash,
    stretch_table,
)
from trainer.mistakes import Mistake

MAGIC = b"tS"
VERSION = 1
MAX_NUMEL = 1 << 28  # of all tensors of a file together: 1 GB of float32
DTYPES = "float32 int64 float16 float64 int32 int16 int8 uint8 bool uint16 uint32 uint64".split()
MAX_CLUSTERS = 1 << 16
_LONG, _LONGEST = 4096, 1 << 24  # bytes of a header that is deflated, and of the longest that is read
_SHORT = 1024  # raw arrays up to this many numbers go into the coded stream, longer ones into literal planes

Layout = Mapping[str, tuple[tuple[int, ...], str]]
LayoutSource = Layout | Callable[[dict], Layout] | None

# Typical headers: what a header shares with them costs next to nothing. Changing them makes a new version.
_PRIMER = (
    "layer4.1.bn2.running_mean\0running_var\0num_batches_tracked\0layer1.0.conv1.weight\0"
    "block2.pointwise.weight\0depthwise.bias\0fc1.weight\0fc1.bias\0"
    '{"net":{"model":"cifar_resnet","depth":20},"shape":[3,32,32],"mean":[0.4914,0.4822,0.4465],'
    '"std":[0.247,0.2435,0.2616],"classes":["airplane","automobile","bird","cat","deer","dog","frog",'
    '"horse","ship","truck"]}\0'
    '{"net":{"model":"timm/resnet18"},"shape":[3,224,224],"mean":[0.485,0.456,0.406],"std":[0.229,0.224,'
    '0.225],"classes":100}\0'
    '{"net":{"model":"lenet5","width":8},"shape":[1,28,28],"mean":[0.286041],"std":[0.353024],'
    '"classes":["T-shirt/top","Trouser","Pullover","Dress","Coat","Sandal","Shirt","Sneaker","Bag",'
    '"Ankle boot"]}\0'
    '{"net":{"model":"lenet5_caffe"},"shape":[1,28,28],"mean":[0.13066],"std":[0.308108],"classes":10}\0'
    '{"net":{"model":"lstm","hidden":128,"batch_norm":false},"shape":[1,28,28],"mean":[0.13066],'
    '"std":[0.308108],"classes":10}\0'
    '{"net":{"model":"lenet300"},"shape":[1,28,28],"mean":[0.13066],"std":[0.308108],"classes":10}\0'
    '{"net":{"model":"separable","widths":[8,12,16,16],"strides":[2,1,2,1],"first_kernel":5,'
    '"batch_norm":false},"shape":[1,28,28],"mean":[0.13066],"std":[0.308108],"classes":10}'
)


@dataclass
class _Stream:
    """One direction of coding: the coder, what it has learned so far, and what each part took."""

    coder: Coder
    literal: bytearray  # an Encoder's: written so far, last first; a Decoder's: not yet read
    scalars: Scalars = field(init=False)
    text: Text = field(init=False)
    parts: list[tuple[str, str, float, int]] = field(default_factory=list)  # tensor, part, bits, literal
    capacity: float = math.inf  # decisions that a Decoder's bytes can tell at the most
    live: np.ndarray | None = None  # non-zero weights of each row of the last weight tensor
    density: tuple[int, int] = (3, 10)  # non-zeros among positions of the last masked tensor
    ranks: dict[int, np.ndarray] = field(default_factory=dict)  # counts of the last codes, by their depth

    def __post_init__(self) -> None:
        self.scalars = Scalars(self.coder)
        self.scalars.expect("exponent", 8, range(116, 128))  # 0.0005 .. 2
        self.text = Text(self.coder, _PRIMER)

    def here(self) -> tuple[float, int]:
        return self.coder.bits, len(self.literal)

    def part(self, tensor: str, name: str, start: tuple[float, int]) -> None:
        """Notes what was coded since `start`, an earlier `here()`."""
        bits, literal = self.here()
        self.parts.append((tensor, name, bits - start[0], abs(literal - start[1])))

    def literally(self, num_bytes: int, data: bytes = b"") -> bytes:
        """Writes or reads literal bytes."""
        if self.coder.writes:
            self.literal[:0] = data
            return data
        if num_bytes > len(self.literal):
            raise Mistake("the literal bytes end too early")
        data = bytes(self.literal[len(self.literal) - num_bytes :])
        del self.literal[len(self.literal) - num_bytes :]
        return data


# ---- raw numbers ----


def _patterns(array: np.ndarray) -> np.ndarray:
    """The bit patterns of an array as unsigned integers, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")


def _code_numbers(stream: _Stream, patterns: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Patterns [n] of numbers of a dtype. What a Decoder is handed matters only for its length and dtype."""
    drop = _code_drop(stream, patterns, dtype)
    if len(patterns) > _SHORT:
        return _code_planes(stream, patterns >> drop, 8 * dtype.itemsize - drop) << patterns.dtype.type(drop)
    if dtype.kind == "f":
        sign = 8 * dtype.itemsize - 1
        values = [
            stream.scalars.bit("sign", value >> sign) << sign | _code_float(stream, value, dtype, drop)
            for value in patterns.tolist()
        ]
    else:
        modulus = 1 << 8 * dtype.itemsize
        values = []
        for value in patterns.tolist():
            folded = 2 * value if 2 * value < modulus else 2 * (modulus - value) - 1  # 0, -1, 1, -2, ...
            folded = stream.scalars.number(("integer", dtype.name), folded, modulus)
            values.append((modulus - folded // 2 - 1 if folded % 2 else folded // 2) % modulus)
    return np.array(values, patterns.dtype)


def _fraction_bits(dtype: np.dtype) -> int:
    return {2: 10, 4: 23, 8: 52}[dtype.itemsize]


def _code_drop(stream: _Stream, patterns: np.ndarray, dtype: np.dtype) -> int:
    """How many low bits of the fraction are zero in every number: 13 where float16 is exact."""
    if dtype.kind != "f":
        return 0
    union = int(np.bitwise_or.reduce(patterns, initial=0)) | 1 << _fraction_bits(dtype)
    drop = stream.scalars.tree("drop", 6, (union & -union).bit_length() - 1)
    if drop > _fraction_bits(dtype):
        raise Mistake("the coded stream is damaged: a fraction is too short")
    return drop


def _code_float(stream: _Stream, value: int, dtype: np.dtype, drop: int) -> int:
    """The pattern of a number >= 0 whose fraction ends in `drop` zero bits."""
    fraction = _fraction_bits(dtype)
    exponent_bits = 8 * dtype.itemsize - 1 - fraction
    context = "exponent" if dtype.itemsize == 4 else ("exponent", dtype.itemsize)
    exponent = stream.scalars.tree(context, exponent_bits, value >> fraction & (1 << exponent_bits) - 1)
    return (
        exponent << fraction
        | stream.coder.uniform(fraction - drop, (value & (1 << fraction) - 1) >> drop) << drop
    )


def _code_planes(stream: _Stream, patterns: np.ndarray, num_bits: int) -> np.ndarray:
    """Byte by byte of the numbers, each plane deflated where that is smaller."""
    out = np.zeros_like(patterns)
    for shift in range(0, num_bits, 8):
        plane = (
            (patterns >> patterns.dtype.type(shift)).astype(np.uint8).tobytes()
            if stream.coder.writes
            else b""
        )
        packed = zlib.compress(plane, 9)
        if not stream.scalars.bit("deflated", int(len(packed) < len(plane))):
            plane = stream.literally(len(patterns), plane)
        else:
            packed = stream.literally(stream.scalars.number("packed", len(packed), len(patterns)), packed)
            plane = zlib.decompressobj().decompress(packed, len(patterns))
            if len(plane) != len(patterns):
                raise Mistake("literal bytes are damaged")
        out |= np.frombuffer(plane, np.uint8).astype(patterns.dtype) << patterns.dtype.type(shift)
    return out


# ---- matrices: masks and codes ----


@dataclass
class _Grid:
    """A tensor as a matrix [rows, columns]; its columns fall into grids of height x width neighbours."""

    rows: int
    columns: int
    height: int = 1
    width: int = 1
    column_live: np.ndarray | None = None  # [columns], [rows]: how alive the unit is that feeds it
    row_live: np.ndarray | None = None

    @property
    def flat(self) -> bool:
        return self.height * self.width == 1

    def waves(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The order of coding: (row numbers, column numbers) of positions that are coded together.

        Wave t holds the positions with column + row = t: by then all is known that lies to the left in the
        row, so above in the grid too, and in the rows above in the same column. Wide matrices are cut at grid
        borders into chunks of columns that advance side by side, so that there are fewer and longer waves.
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
        """Starts of the chunks, and the number of columns."""
        grids = self.columns // (self.height * self.width)
        num = max(1, min(grids, self.rows * self.columns // (128 * min(self.rows, self.columns))))
        return np.arange(num + 1) * grids // num * (self.height * self.width)

    def neighbours(self, offsets: list[tuple[int, int]]) -> np.ndarray:
        """[offset, column]: the column (down, right) of it in the same grid, or `columns` for none."""
        column = np.arange(self.columns)
        y, x = column // self.width % self.height, column % self.width
        found = []
        for down, right in offsets:
            inside = (y + down >= 0) & (y + down < self.height) & (x + right >= 0) & (x + right < self.width)
            found.append(np.where(inside, column + down * self.width + right, self.columns))
        return np.array(found)


def _grid(shape: tuple[int, ...], live: np.ndarray | None) -> _Grid:
    """The matrix of a tensor, by its shape and that of the weight tensor before it (live [its rows])."""
    numel = math.prod(shape)
    if len(shape) < 2:
        return _Grid(1, numel, column_live=live if live is not None and len(live) == numel else None)
    rows, columns = shape[0], numel // shape[0]
    grid = _Grid(rows, columns)
    if live is not None and columns % len(live) == 0 and shape[1] % len(live) == 0:
        grid.column_live = np.repeat(live, columns // len(live))
    elif live is not None and len(live) == rows:
        grid.row_live = live
    if len(shape) > 2:
        grid.height, grid.width = math.prod(shape[2:-1]), shape[-1]
        return grid
    # a matrix whose columns may be pixels: of channels of the layer before it, or of a grey or coloured image
    for channels in (1, 3) if grid.column_live is None else (len(live),):
        side = math.isqrt(columns // channels)
        if channels * side * side == columns and (side >= 8 or grid.column_live is not None):
            grid.height = grid.width = side
            break
    return grid


_NEAR = [(0, -1), (-1, 0), (-1, 1), (-1, -1), (0, -2), (-2, 0)]
_FAR = [(-1, 2), (-1, -2), (-2, -1), (-2, 1), (-2, 2), (-2, -2), (0, -3), (-3, 0)]
_AROUND = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)]
_COUNT = 16  # counts are kept in units of 1 / _COUNT


def _log_ratio(found: np.ndarray, expected: np.ndarray, weight: int) -> np.ndarray:
    """log2((found + weight) / (expected + weight)); all three in units of 1 / _COUNT."""
    log2 = log2_table()
    return log2.take(found + weight, mode="clip") - log2.take(expected + weight, mode="clip")


def _liveness(live: np.ndarray) -> np.ndarray:
    """log2 of how alive each unit is, against the mean."""
    mean = np.full_like(live, live.sum() * _COUNT // len(live))
    return _log_ratio(live * _COUNT, mean, _COUNT // 2)


def _code_mask(stream: _Stream, mask: np.ndarray, grid: _Grid) -> np.ndarray:
    """Where a matrix is not zero: [rows, columns] of 0 and 1.

    Each position's odds are mixed from: the density so far; what the column, the row and the columns around
    it had more than expected; the neighbours in the row's grid, one by one, as a pattern, and as a sum; the
    rows above; and how many weights the unit has that feeds the column (or row) in the tensor before.
    """
    rows, columns = grid.rows, grid.columns
    coder, stretch = stream.coder, stretch_table()
    spatial = not grid.flat
    wide = grid.height * grid.width > 25  # in a small kernel the near ones say it all
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
    column_live = None if grid.column_live is None else _liveness(grid.column_live)
    row_live = None if grid.row_live is None else _liveness(grid.row_live)
    if spatial:
        near, around = grid.neighbours(_NEAR + _FAR if wide else _NEAR), grid.neighbours(_AROUND)
    powers = 1 << np.arange(len(_NEAR))

    stride = columns + 1
    out = np.zeros((rows + 2, stride), np.uint8)  # two rows above and a column to the right stay zero
    known = out.reshape(-1)
    column_ones, row_ones, row_expected = (np.zeros(size, np.int64) for size in (columns, rows, rows))
    column_ratio, column_probability = np.zeros(stride, np.int64), np.zeros(stride, np.int64)
    pattern_found = np.full(1 << len(_NEAR), 2 * _COUNT, np.int64)
    pattern_expected = np.full(1 << len(_NEAR), 2 * _COUNT * ONE, np.int64)
    # counts that would leave the logarithm's table are kept in coarser units
    coarse = max(0, (max(rows, columns) * _COUNT).bit_length() - 17)
    ones, seen = stream.density
    ones, seen = 2 * _COUNT * ones // seen + 1, 2 * _COUNT + 2

    for r, c in grid.waves():
        density = ONE * ones // seen
        odds = int(stretch[density])
        found = column_ones[c]
        by_column = _log_ratio(found * _COUNT >> coarse, r * density * _COUNT >> 16 + coarse, _COUNT)
        probability = squash(odds + by_column)
        column_ratio[c] = by_column
        column_probability[c] = probability
        inputs = np.empty((len(weights), len(r)))
        inputs[0] = odds
        inputs[1] = by_column
        inputs[2] = _log_ratio(
            row_ones[r] * _COUNT >> coarse, row_expected[r] * _COUNT >> 16 + coarse, _COUNT
        )
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
                    np.add.reduce(neighbours[6:], dtype=np.int64) * _COUNT,
                    np.add.reduce(column_probability.take(near[6:].take(c, 1))) >> 12,
                    _COUNT // 2,
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
        pattern_found += np.bincount(pattern, bits, len(pattern_found)).astype(np.int64) * _COUNT
        pattern_expected += np.bincount(pattern, expected, len(pattern_found)).astype(np.int64) * _COUNT
        if int(pattern_expected.max()) >> 16 > 1 << 16:
            halve = pattern_expected >> 16 > 1 << 16
            pattern_found[halve] >>= 1
            pattern_expected[halve] >>= 1
        ones += int(bits.sum()) * _COUNT
        seen += len(r) * _COUNT
    mask = out[2:, :columns]
    stream.density = (int(mask.sum()), mask.size)
    return mask


def _code_ranks(
    stream: _Stream, ranks: np.ndarray, mask: np.ndarray, grid: _Grid, highest: tuple[int, int]
) -> np.ndarray:
    """The non-zeros of a matrix as signed ranks: 1 is the smallest positive value, -1 the smallest negative.

    highest: the highest rank of the negative and of the positive values. The sign is coded first, from the
    signed neighbours and the balance of the row and column; then the rank, highest bit first, from how often
    each value came before, the neighbours' ranks, and the mean of the row and column.
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
    near = grid.neighbours(_NEAR + _FAR[:4]) if spatial else None
    stride = columns + 1
    size = np.zeros((rows + 2) * stride, np.int64)  # 1 .. 255, of zeros 0
    sign = np.zeros((rows + 2) * stride, np.int64)
    out = np.zeros((rows, columns), np.int64)
    padded = np.concatenate([mask, np.zeros((rows, 1), mask.dtype)], 1)
    crowd = padded[:, grid.neighbours(_AROUND)].sum(1, dtype=np.int64) if spatial else None
    row_live = _liveness(mask.sum(1, dtype=np.int64)) >> 1

    balance = _counts(1, 1)
    row_signs, column_signs, pattern_signs = _counts(rows, 3), _counts(columns, 3), _counts(81, 2)
    powers = np.array([1, 3, 9, 27], np.int64)
    shared = _faded(stream.ranks.get(depth, _counts(2 * full, 1)), 24 * _COUNT)
    nodes = _counts(2 * 2 * full, 1)  # those of the negative values first
    row_sizes, column_sizes = np.zeros((rows, 2), np.int64), np.zeros((columns, 2), np.int64)  # sum, number
    total, number = 4 * 128, 4
    signed = min(highest) > 0
    fresh = 0  # codes since the counts were last halved where they had grown

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
        if spatial:
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
        balance += np.bincount(positive, minlength=2) * _COUNT
        np.add.at(row_signs, (r, positive), _COUNT)
        np.add.at(column_signs, (c, positive), _COUNT)
        if spatial:
            np.add.at(pattern_signs, (pattern, positive), _COUNT)

        mean = total // number
        inputs = np.empty((len(sizes), len(r)))
        inputs[2] = ((row_sizes[r, 0] + 3 * mean) // (row_sizes[r, 1] + 3) - mean) * 4
        inputs[3] = ((column_sizes[c, 0] + 3 * mean) // (column_sizes[c, 1] + 3) - mean) * 4
        inputs[4] = row_live[r]
        if spatial:
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
            np.add.at(shared, (node, bits), _COUNT)
            np.add.at(nodes, (own, bits), _COUNT)
            low += bits * half
            node = node * 2 + bits
        out[r, c] = (low + 1) * (2 * positive - 1)
        level = np.maximum((2 * low + 1) * 128 // full, 1)
        size[here], sign[here] = level, 2 * positive - 1
        for sums, line in ((row_sizes, r), (column_sizes, c)):
            np.add.at(sums, (line, 0), level)
            np.add.at(sums, (line, 1), 1)
        total += int(level.sum())
        number += len(r)
        fresh += len(r)
        if fresh >= 1024:
            fresh = 0
            for counts in (balance, row_signs, column_signs, pattern_signs, shared, nodes):
                counts[counts.max(1) > LOG2_SIZE // 4] >>= 1
    stream.ranks[depth] = shared
    return out


def _counts(num: int, start: int) -> np.ndarray:
    return np.full((num, 2), start * _COUNT, np.int64)


def _odds(counts: np.ndarray) -> np.ndarray:
    """log2 odds of the second of two counts [..., 2]."""
    logs = log2_table().take(counts, mode="clip")
    return logs[..., 1] - logs[..., 0]


def _faded(counts: np.ndarray, limit: int) -> np.ndarray:
    """Counts [n, 2] scaled so that no row sums to more than a limit."""
    total = counts.sum(1, keepdims=True)
    return np.maximum(np.where(total > limit, counts * limit // np.maximum(total, 1), counts), _COUNT // 8)


# ---- tensors ----

_NONE, _SOME, _ALL = range(3)  # zeros of a tensor
_RAW, _CODEBOOK, _STEPS = range(3)


def _code_tensor(stream: _Stream, name: str, array: np.ndarray, step: float | None = None) -> np.ndarray:
    """A tensor; a Decoder is handed an array of the right shape and dtype."""
    scalars, dtype, start = stream.scalars, array.dtype, stream.here()
    patterns = _patterns(array)
    numel = len(patterns)
    if numel == 0:
        return array.copy()
    present = patterns != 0 if stream.coder.writes else np.broadcast_to(False, numel)
    context = (dtype.kind, array.ndim > 1)
    form, zeros = _choose(array, patterns, present, step) if stream.coder.writes else (_RAW, _NONE)
    form = scalars.tree(("form", *context), 2, form)
    zeros = scalars.tree(("zeros", *context), 2, zeros)
    if form > _STEPS or zeros > _ALL or form != _RAW and dtype.kind != "f":
        raise Mistake("the coded stream is damaged: unknown form of a tensor")
    if zeros == _SOME and numel > stream.capacity:
        raise Mistake(f"the coded stream is damaged: it cannot hold the {numel:,} positions of tensor {name}")
    grid = _grid(array.shape, stream.live)
    matrix = (grid.rows, grid.columns)
    mask = np.full(matrix, zeros == _NONE, np.uint8)
    stream.part(name, "form", start)
    if zeros == _SOME:
        start = stream.here()
        mask = _code_mask(stream, present.reshape(matrix), grid)
        stream.part(name, "mask", start)
    chosen = mask.reshape(-1) > 0
    values = patterns[chosen]
    start = stream.here()
    if form == _RAW:
        values = _code_numbers(stream, values, dtype)
    else:
        if form == _CODEBOOK:
            codebook, highest = _code_codebook(stream, np.unique(values), dtype)
        else:
            codebook, highest = _code_steps(stream, array, step)
        stream.part(name, "codebook", start)
        start = stream.here()
        if len(codebook) == 1:
            values = np.repeat(codebook, len(values))
        elif len(codebook):
            ranks = np.zeros(matrix, np.int64)
            if stream.coder.writes:
                order = np.argsort(codebook, kind="stable")
                place = order[np.searchsorted(codebook, values, sorter=order)] - highest[0]
                ranks.reshape(-1)[chosen] = place + (place >= 0)
            ranks = _code_ranks(stream, ranks, mask, grid, highest).reshape(-1)[chosen]
            values = codebook[ranks + highest[0] - (ranks > 0)]
        elif len(values):
            raise Mistake("the coded stream is damaged: an empty codebook")
    stream.part(name, "values", start)
    out = np.zeros(numel, patterns.dtype)
    out[chosen] = values
    if array.ndim > 1:
        stream.live = mask.sum(1, dtype=np.int64)
    return out.view(dtype).reshape(array.shape)


def _choose(
    array: np.ndarray, patterns: np.ndarray, present: np.ndarray, step: float | None
) -> tuple[int, int]:
    """The form of the fewest bytes, judged by entropy, and what is told of the zeros."""
    numel, count = len(patterns), int(present.sum())
    mask_bits = _entropy_bits(np.array([count, numel - count]))
    if count == 0:
        return _RAW, _ALL
    if array.dtype.kind != "f":
        return _RAW, _NONE
    if step is not None:
        return _STEPS, _SOME if count < numel else _NONE
    union = int(np.bitwise_or.reduce(patterns)) | 1 << _fraction_bits(array.dtype)
    number_bits = _fraction_bits(array.dtype) + 4 - (union & -union).bit_length()
    zeros = _SOME if count < numel else _NONE
    sizes = {(_RAW, _NONE): numel * number_bits, (_RAW, zeros): mask_bits + count * number_bits}
    values, counts = np.unique(patterns[present], return_counts=True)
    if len(values) <= MAX_CLUSTERS:
        sizes[_CODEBOOK, zeros] = mask_bits + _entropy_bits(counts) + len(values) * (number_bits + 2)
    return min(sizes, key=sizes.get)


def _entropy_bits(counts: np.ndarray) -> float:
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def _code_codebook(
    stream: _Stream, patterns: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, tuple[int, int]]:
    """Distinct values, negative ones first, the largest in magnitude at both ends; how many of each sign."""
    sign = 8 * dtype.itemsize - 1
    drop = _code_drop(stream, patterns, dtype)
    halves = []
    for negative in (1, 0):
        sizes = np.sort(patterns[patterns >> sign == negative] & (1 << sign) - 1).tolist()
        count = stream.scalars.number("clusters", len(sizes), MAX_CLUSTERS + 1)
        out: list[int] = []
        # gaps between patterns are like gaps between logarithms; all of a side take about 3 octaves
        plain = max(0, _fraction_bits(dtype) - drop + 1 - count.bit_length())
        for i in range(count):
            size = sizes[i] if stream.coder.writes else 0
            if not out:
                out.append(_code_float(stream, size, dtype, drop))
                continue
            gap = size - out[-1] - 1 >> drop
            high = stream.scalars.number("gap", gap >> plain, 1 << sign - drop)
            gap = high << plain | stream.coder.uniform(plain, gap & (1 << plain) - 1)
            out.append(out[-1] + (gap + 1 << drop))
        if out and out[-1] >> sign:
            raise Mistake("the coded stream is damaged: a codebook overflows")
        halves.append([size | negative << sign for size in out])
    negative, positive = halves
    return np.array(negative[::-1] + positive, patterns.dtype), (len(negative), len(positive))


def _code_steps(stream: _Stream, array: np.ndarray, step: float | None) -> tuple[np.ndarray, tuple[int, int]]:
    """The codebook of a step times all integers between the least and the greatest."""
    pattern = int(np.float32(step or 1).view(np.uint32))
    drop = _code_drop(stream, np.array([pattern], np.uint32), np.dtype(np.float32))
    scale = np.uint32(_code_float(stream, pattern, np.dtype(np.float32), drop)).view(np.float32)
    integers = np.rint(array.astype(np.float64) / np.float64(scale)) if stream.coder.writes else np.zeros(1)
    most = [int(max(0, (sign * integers).max())) for sign in (-1, 1)]
    negative, positive = (stream.scalars.number("highest", high, MAX_CLUSTERS // 2 + 1) for high in most)
    integers = np.concatenate([np.arange(-negative, 0), np.arange(1, positive + 1)])
    with np.errstate(all="ignore"):  # a damaged step may overflow
        return _patterns(scale * integers.astype(np.float32)), (negative, positive)


def unit_order(weight: np.ndarray) -> np.ndarray:
    """An order of a layer's units that makes it pack smaller: each is followed by the one most like it.

    weight: [units, ...]. Where nothing depends on the order (hidden units, channels), the rows of the weight,
    the bias and the next layer's columns, all in this order, make the same network in fewer bytes.
    """
    rows = weight.reshape(len(weight), math.prod(weight.shape[1:]))
    signs = np.sign(np.nan_to_num(rows)).astype(np.float64)
    marks = np.concatenate([10 * signs, 7 * np.abs(signs)], 1)
    alike = marks @ marks.T
    norm = np.sqrt(np.diag(alike)) + 1
    alike /= norm[:, None] * norm
    order = [int(np.abs(signs).sum(1).argmax())] if len(weight) else []
    while len(order) < len(weight):
        alike[:, order[-1]] = -1
        order.append(int(alike[order[-1]].argmax()))
    return np.array(order, np.int64)


# ---- files ----


def _normal(layout: Layout) -> dict[str, tuple[tuple[int, ...], str]]:
    """A layout with plain tuples and dtype names. Mistake where it asks for too much."""
    layout = {
        str(name): (tuple(int(size) for size in shape), np.dtype(dtype).name)
        for name, (shape, dtype) in layout.items()
    }
    for name, (_, dtype) in layout.items():
        if dtype not in DTYPES:
            raise Mistake(f"tensor {name}: dtype {dtype} is not one of {', '.join(DTYPES)}")
        if "\0" in name:
            raise Mistake(f"tensor {name!r}: a name may not hold the byte 0")
    total = sum(math.prod(shape) for shape, _ in layout.values())
    if total > MAX_NUMEL:
        raise Mistake(f"{total} numbers in all tensors together; at most {MAX_NUMEL} are allowed")
    return layout


def _code_layout(stream: _Stream, layout: Layout | None, stored: bool) -> Layout:
    """Names, shapes and dtypes; of a layout that both sides know, only a check.

    stored: whether an Encoder writes it all. A Decoder is handed the layout that it knows, or None.
    """
    scalars = stream.scalars
    if not scalars.bit("stored", int(stored)):
        if layout is None:
            raise Mistake("it holds no names and shapes; they must be given as a layout")
        check = zlib.crc32(repr(list(layout.items())).encode()) & 0xFF
        if stream.coder.uniform(8, check) != check:
            raise Mistake("the layout given is not the one that it was written with")
        return layout
    items = list(layout.items()) if stream.coder.writes else []
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for i in range(scalars.number("tensors", len(items), 1 << 20)):
        name, (shape, dtype) = items[i] if stream.coder.writes else ("", ((), DTYPES[0]))
        name = stream.text.code(name)
        dtype = DTYPES[scalars.number("dtype", DTYPES.index(dtype), len(DTYPES))]
        dims = scalars.number("dims", len(shape), 65)
        found[name] = (
            tuple(
                scalars.number(("size", dims), shape[j] if stream.coder.writes else 0, MAX_NUMEL + 1)
                for j in range(dims)
            ),
            dtype,
        )
    return _normal(found)


def _code_header(stream: _Stream, header: dict) -> dict:
    text = ""
    if stream.coder.writes:
        try:
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        except TypeError as error:
            raise Mistake(f"the header cannot be written as JSON: {error}") from error
    packed = text.encode()
    # a long one (thousands of class names) is deflated: the text model takes 50 us for a byte
    if stream.coder.bit(16 * LOWEST, int(len(packed) > _LONG)):
        packed = zlib.compress(packed, 9)
        packed = stream.literally(stream.scalars.number("header", len(packed), _LONGEST), packed)
        text = zlib.decompressobj().decompress(packed, _LONGEST).decode()
    else:
        text = stream.text.code(text)
    try:
        return json.loads(text)
    except RecursionError:
        raise Mistake("the header is nested too deeply") from None


def encode(
    header: dict,
    tensors: Mapping[str, np.ndarray],
    steps: Mapping[str, float] = {},
    layout: Layout | None = None,
) -> bytes:
    """Packs a header (a dict that JSON can hold; tuples become lists) and arrays, which return bit for bit.

    steps: of a float32 tensor that equals float32(step) times integers up to 2^15, that step.
    layout: name -> (shape, dtype), in the order of the tensors, where the reader will know it too (from the
    architecture that the header names): then neither names nor shapes are written.
    Mistake where a tensor is of an unknown dtype, or not what steps or layout say of it.
    """
    arrays = {str(name): np.asarray(array) for name, array in tensors.items()}
    found = _normal({name: (array.shape, array.dtype) for name, array in arrays.items()})
    if layout is not None and list(_normal(layout).items()) != list(found.items()):
        raise ValueError("the tensors do not have the names, shapes and dtypes of the layout, in its order")
    for name, step in steps.items():
        if name not in arrays:
            raise ValueError(f"steps: there is no tensor {name!r}")
        _check_step(name, arrays[name], step)
    coder = Encoder()
    stream = _Stream(coder, bytearray())
    _code_header(stream, header)
    _code_layout(stream, found, layout is None)
    for name, array in arrays.items():
        _code_tensor(stream, name, array, steps.get(name))
    body = MAGIC + bytes([VERSION]) + coder.finish(bool(stream.literal)) + bytes(stream.literal)
    return body + _checksum(body)


def _check_step(name: str, array: np.ndarray, step: float) -> None:
    scale = np.float32(step)
    if array.dtype != np.float32 or not np.isfinite(scale) or scale <= 0:
        raise ValueError(
            f"steps: tensor {name} is {array.dtype} with step {step}; it is float32, the step positive"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"steps: tensor {name} holds values that are not finite")
    integers = np.rint(array.astype(np.float64) / np.float64(scale))
    if np.abs(integers).max(initial=0) > MAX_CLUSTERS // 2:
        raise ValueError(
            f"steps: tensor {name} reaches {np.abs(integers).max():.0f} steps of {step}; "
            f"at most {MAX_CLUSTERS // 2} are allowed"
        )
    exact = scale * integers.astype(np.float32) + np.float32(0)
    if not np.array_equal(_patterns(exact), _patterns(array)):
        raise ValueError(
            f"steps: tensor {name} is not float32({step}) times integers (-0.0 does not count as 0)"
        )


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body, len(body) & 0xFFFFFFFF).to_bytes(4, "little")


def _open(data: bytes, name: str, measure: bool = False) -> tuple[_Stream, Decoder]:
    if data[:2] != MAGIC:
        raise Mistake(f"{name}: not a packed network (it does not begin with {MAGIC.decode()!r})")
    if len(data) < 7 or _checksum(data[:-4]) != data[-4:]:
        raise Mistake(f"{name}: damaged or cut short (its checksum does not match its {len(data)} bytes)")
    if data[2] != VERSION:
        raise Mistake(f"{name}: format version {data[2]}; this program reads version {VERSION}")
    body = data[3:-4]
    decoder = Decoder(body)
    # A decision costs no fewer bits than one of the highest probability that there is.
    capacity = (8 * len(body) + 64) / -math.log2(1 - LOWEST / ONE)
    return _Stream(Meter(decoder) if measure else decoder, bytearray(body), capacity=capacity), decoder


def read_header(data: bytes, name: str = "file") -> dict:
    """The header alone. Mistake naming `name` where the data is damaged."""
    stream, _ = _open(data, name)
    try:
        return _code_header(stream, {})
    except (ValueError, zlib.error) as error:
        raise Mistake(f"{name}: {error}") from error


def _decode(
    data: bytes, name: str, layout: LayoutSource, measure: bool = False
) -> tuple[dict, dict[str, np.ndarray], _Stream]:
    stream, decoder = _open(data, name, measure)
    try:
        header = _code_header(stream, {})
        stream.part("", "header", (0.0, len(stream.literal)))
        start = stream.here()
        known = layout(header) if callable(layout) else layout
        found = _code_layout(stream, None if known is None else _normal(known), False)
        stream.part("", "layout", start)
        tensors = {
            tensor: _code_tensor(stream, tensor, np.zeros(shape, dtype))
            for tensor, (shape, dtype) in found.items()
        }
        decoder.check_end(len(stream.literal))
    except (ValueError, zlib.error) as error:
        raise Mistake(f"{name}: {error}") from error
    return header, tensors, stream


def decode(
    data: bytes, name: str = "file", layout: LayoutSource = None
) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the tensors that `encode` was given, bit for bit.

    layout: needed where the file was written with one; a callable is given the header and returns the layout.
    Mistake naming `name` where the data is damaged, or not what the layout says.
    """
    header, tensors, _ = _decode(data, name, layout)
    return header, tensors


def account(data: bytes, name: str = "file", layout: LayoutSource = None) -> list[dict[str, Any]]:
    """Where each byte goes: rows {"tensor", "part", "bytes"} whose bytes sum to exactly len(data).

    part: frame (magic, version, checksum), header, layout; of each tensor form, mask, codebook, values. Parts
    share one coded stream, so their bytes are fractions, by ideal code length.
    The "values" row of a weight tensor (floating point, two dimensions or more) also tells: numel, nonzero,
    clusters, and what its mask and codes would take otherwise: iid_bytes (entropy of the mask plus that of
    the values), huffman_bytes (Huffman-coded relative indexes of 5 bits for matrices and 8 for convolutions,
    with fillers, and Huffman-coded codes, without tables; Han et al. 2016), dense_huffman_bytes (every weight's
    code Huffman-coded, that of zero among them), zlib_bytes (the codes, deflated).
    """
    _, tensors, stream = _decode(data, name, layout, measure=True)
    rows: list[dict[str, Any]] = [{"tensor": "", "part": "frame", "bytes": 7.0}]
    rows += [
        {"tensor": tensor, "part": part, "bytes": float(literal)} for tensor, part, _, literal in stream.parts
    ]
    coded = len(data) - sum(row["bytes"] for row in rows)
    bits = np.cumsum([0.0, *(bits for _, _, bits, _ in stream.parts)])
    # multiples of 1/1024: their sum is exact
    edges = np.rint(bits / bits[-1] * coded * 1024) / 1024
    for row, share in zip(rows[1:], np.diff(edges).tolist(), strict=True):
        row["bytes"] += share
        tensor = tensors.get(row["tensor"], np.zeros(0))
        if row["part"] == "values" and tensor.dtype.kind == "f" and tensor.ndim > 1:
            row |= _others(tensor)
    return rows


def _others(tensor: np.ndarray) -> dict[str, Any]:
    """What a tensor's mask and codes take by other means."""
    patterns = _patterns(tensor)
    values, codes = np.unique(patterns, return_inverse=True)
    nonzero = np.flatnonzero(patterns)
    if values[:1] != 0:
        codes = codes + 1
    counts = np.bincount(codes[nonzero])
    bits = 8 if tensor.ndim > 2 else 5
    fillers, gaps = np.divmod(np.diff(nonzero, prepend=-1) - 1, 1 << bits)
    gap_counts = np.bincount(gaps, minlength=1 << bits)
    gap_counts[-1] += fillers.sum()
    code_counts = np.append(counts, fillers.sum())
    iid = _entropy_bits(np.array([len(nonzero), len(patterns) - len(nonzero)])) + _entropy_bits(counts)
    width = np.uint8 if len(values) < 256 else np.uint16 if len(values) < 65536 else np.uint32
    return {
        "numel": len(patterns),
        "nonzero": len(nonzero),
        "clusters": int((counts > 0).sum()),
        "iid_bytes": iid / 8,
        "huffman_bytes": (_huffman_bits(gap_counts) + _huffman_bits(code_counts)) / 8,
        "dense_huffman_bytes": _huffman_bits(np.bincount(codes)) / 8,
        "zlib_bytes": len(zlib.compress(codes.astype(width).tobytes(), 9)),
    }


def _huffman_bits(counts: np.ndarray) -> int:
    """Length of a message in its own Huffman code."""
    heap = counts[counts > 0].tolist()
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    bits = 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        bits += joined
        heapq.heappush(heap, joined)
    return bits
