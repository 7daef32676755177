"""Codes all tensors of a file together, so that few and long steps suffice: format version 4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from trainer.mistakes import Mistake
from trainer.packing.grids import Grid, Sheet, grid_of
from trainer.packing.masks import code_masks
from trainer.packing.numbers import SHORT, code_floats, code_numbers, patterns_of
from trainer.packing.ranks import code_ranks
from trainer.packing.stream import Stream
from trainer.packing.tensors import (
    Form,
    Zeros,
    check_capacity,
    choose,
    code_codebook,
    code_steps,
    of_ranks,
    ranks_of,
)

_LARGE = 1 << 16  # numbers of a file from which the larger of two tiles is used
_TILES = (32, 64)


@dataclass
class _Tensor:
    """A tensor while it is coded: what is known of it so far."""

    name: str
    array: np.ndarray
    form: int
    zeros: int
    codebook: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    highest: tuple[int, int] = (0, 0)
    mask: np.ndarray = field(init=False)  # [rows, columns]
    ranks: np.ndarray | None = None  # [rows, columns]
    values: np.ndarray | None = None  # the patterns of the non-zeros

    def __post_init__(self) -> None:
        self.grid: Grid = grid_of(self.array.shape, None)
        self.patterns = patterns_of(self.array)
        self.mask = np.full((self.grid.rows, self.grid.columns), self.zeros == Zeros.NONE, np.uint8)

    def decoded(self) -> np.ndarray:
        out = np.zeros(len(self.patterns), self.patterns.dtype)
        chosen = self.mask.reshape(-1) > 0
        if self.values is not None:
            out[chosen] = self.values
        elif self.ranks is not None:
            out[chosen] = of_ranks(self.ranks.reshape(-1)[chosen], self.codebook, self.highest)
        return out.view(self.array.dtype).reshape(self.array.shape)


def code_together(
    stream: Stream, arrays: Mapping[str, np.ndarray], steps: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Codes tensors; a Decoder gets arrays of the right shapes and dtypes. steps: see `container.encode`.

    First come the forms and codebooks of all tensors, then all masks, then all ranks, then all raw numbers. Tensors whose
    grids are of one kind are coded wave by wave at once. What is learned is shared by them, not passed on from one to the
    next as in version 3.
    """
    before = len(stream.parts)
    found = [_code_form(stream, name, array, steps.get(name)) for name, array in arrays.items() if array.size]
    tile = _TILES[sum(one.array.size for one in found) > _LARGE]

    _code_masks(stream, found, tile)
    _code_ranks(stream, found, tile)
    _code_raw(stream, found)
    order = {name: number for number, name in enumerate(arrays)}
    stream.parts[before:] = sorted(stream.parts[before:], key=lambda part: order[part[0]])
    decoded = {one.name: one.decoded() for one in found}
    return {name: decoded[name] if array.size else array.copy() for name, array in arrays.items()}


def _code_form(stream: Stream, name: str, array: np.ndarray, step: float | None) -> _Tensor:
    """Codes how a tensor is written, and its codebook if it has one."""
    scalars, start = stream.scalars, stream.here()
    patterns = patterns_of(array)
    form, zeros = (
        choose(array, patterns, patterns != 0, step) if stream.coder.writes else (Form.RAW, Zeros.NONE)
    )
    context = (array.dtype.kind, array.ndim > 1)
    form = scalars.tree(("form", *context), 2, form)
    zeros = scalars.tree(("zeros", *context), 2, zeros)
    floats = array.dtype.kind == "f"
    if (
        form > Form.STEPS
        or zeros > Zeros.ALL
        or not floats
        and (form, zeros == Zeros.SOME) != (Form.RAW, False)
    ):
        raise Mistake("the coded stream is damaged: unknown form of a tensor")
    if form == Form.STEPS and array.dtype != np.float32:
        raise Mistake("the coded stream is damaged: only float32 tensors have steps")
    stream.part(name, "form", start)
    one = _Tensor(name, array, form, zeros)
    start = stream.here()
    if form == Form.CODEBOOK:
        one.codebook, one.highest = code_codebook(stream, np.unique(patterns[patterns != 0]), array.dtype)
    elif form == Form.STEPS:
        one.codebook, one.highest = code_steps(stream, array, step)
    if form != Form.RAW:
        stream.part(name, "codebook", start)
    return one


def _code_masks(stream: Stream, found: list[_Tensor], tile: int) -> None:
    """Codes where the tensors are zero."""
    masked = [one for one in found if one.zeros == Zeros.SOME]
    check_capacity(stream, "positions", sum(one.array.size for one in masked))
    for sheet, some in _sheets(masked, tile):
        given = [(one.patterns != 0).reshape(one.mask.shape) for one in some] if stream.coder.writes else []
        stream.spent = np.zeros(len(some))
        masks = code_masks(stream, given, sheet, [stream.density] * len(some))
        for one, mask, bits in zip(some, masks, stream.spent.tolist(), strict=True):
            one.mask = mask
            stream.parts.append((one.name, "mask", bits, 0))


def _code_ranks(stream: Stream, found: list[_Tensor], tile: int) -> None:
    """Codes the non-zeros of the tensors that have a codebook."""
    coded = [one for one in found if one.form != Form.RAW and one.zeros != Zeros.ALL]
    for one in coded:
        if not len(one.codebook) and one.mask.any():
            raise Mistake("the coded stream is damaged: an empty codebook")
        if len(one.codebook) < 2 or not one.mask.any():
            one.values = np.repeat(one.codebook[:1], int(one.mask.sum()))
            stream.parts.append((one.name, "values", 0.0, 0))
    ranked = [one for one in coded if one.values is None]
    check_capacity(stream, "non-zeros", sum(int(one.mask.sum()) for one in ranked))
    for sheet, some in _sheets(ranked, tile):
        given = (
            [ranks_of(one.patterns.reshape(one.mask.shape), one.codebook, one.highest) for one in some]
            if stream.coder.writes
            else []
        )
        stream.spent = np.zeros(len(some))
        ranks = code_ranks(stream, given, [one.mask for one in some], sheet, [one.highest for one in some])
        for one, own, bits in zip(some, ranks, stream.spent.tolist(), strict=True):
            one.ranks = own
            stream.parts.append((one.name, "values", bits, 0))


def _code_raw(stream: Stream, found: list[_Tensor]) -> None:
    """Codes the non-zeros of the other tensors."""
    short = []
    for one in found:
        if one.form != Form.RAW:
            continue
        start = stream.here()
        values = one.patterns[one.mask.reshape(-1) > 0]
        if one.array.dtype.kind == "f" and len(values) <= SHORT:
            short.append((one, values))
            continue
        one.values = code_numbers(stream, values, one.array.dtype)
        stream.part(one.name, "values", start)
    for dtype in sorted({one.array.dtype for one, _ in short}, key=str):
        same = [(one, values) for one, values in short if one.array.dtype == dtype]
        numbers = code_floats(stream, dtype, {one.name: values for one, values in same})
        for (one, _), values in zip(same, numbers, strict=True):
            one.values = values


def _sheets(tensors: list[_Tensor], tile: int) -> Iterator[tuple[Sheet, list[_Tensor]]]:
    """Yields the tensors of each kind of grid, and their sheet."""
    for kind in sorted({one.grid.kind for one in tensors}):
        some = [one for one in tensors if one.grid.kind == kind]
        yield Sheet([one.grid for one in some], tile), some
