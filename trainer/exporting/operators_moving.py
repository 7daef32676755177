"""Turns those operators of torch's core ATen graph that move numbers, and compute nothing, into those of `graph`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx

MOST_PARTS = 64  # that a choice of positions may consist of

Arguments = dict[str, Any]


class Unsupported(Exception):
    """What a converter cannot express; the reader adds the layer."""


def rank(node: Any) -> int:
    return len(node.meta["val"].shape)


def _concat(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "concat", a["tensors"], axis=(a["dim"] or 0) % rank(node))


def _reshape(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "reshape", [next(iter(a.values()))])


def _permute(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "permute", [a["self"]], order=tuple(axis % rank(node) for axis in a["dims"]))


def _transpose(reader: Any, node: fx.Node, a: Arguments) -> None:
    order = list(range(rank(node)))
    first, second = a["dim0"] % len(order), a["dim1"] % len(order)
    order[first], order[second] = second, first
    reader.add(node, "permute", [a["self"]], order=tuple(order))


def _expand(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "expand", [a["self"]])


def _repeat(reader: Any, node: fx.Node, a: Arguments) -> None:
    """Converts a repetition of axes of size 1, as of positions for each image of a batch: it is an `expand`."""
    shape = a["self"].meta["val"].shape
    times = a["repeats"][len(a["repeats"]) - len(shape) :]
    if any(
        not (isinstance(number, int) and number == 1) and not (isinstance(size, int) and size == 1)
        for number, size in zip(times, shape, strict=True)
    ):
        raise Unsupported("a repetition of more than one row")
    reader.add(node, "expand", [a["self"]])


def _slice(reader: Any, node: fx.Node, a: Arguments) -> None:
    shape = a["self"].meta["val"].shape
    if tuple(shape) == tuple(node.meta["val"].shape):
        reader.same[node.name] = reader.name(a["self"])
        return
    axis = a["dim"] % len(shape)
    ends = (a["start"], a["end"], a["step"])
    if not isinstance(shape[axis], int) or not all(isinstance(end, int | None) for end in ends):
        raise Unsupported("a part of the images of a batch")
    start, stop, step = slice(*ends).indices(shape[axis])
    reader.add(node, "slice", [a["self"]], axis=axis, start=start, stop=stop, step=step)


def _select(reader: Any, node: fx.Node, a: Arguments) -> None:
    size = a["self"].meta["val"].shape[a["dim"] % rank(a["self"])]
    if not isinstance(size, int):
        raise Unsupported("one image of a batch")
    start, axis = a["index"] % size, a["dim"] % rank(a["self"])
    cut = reader.cut(node, a["self"], axis, start, start + 1)
    reader.add(node, "reshape", [cut])


def _split(reader: Any, node: fx.Node, a: Arguments) -> None:
    axis, start = a["dim"] % rank(a["self"]), 0
    for number, part in enumerate(node.meta["val"]):
        stop = start + part.shape[axis]
        reader.parts[node.name, number] = reader.cut(node, a["self"], axis, start, stop)
        start = stop


def _pad(reader: Any, node: fx.Node, a: Arguments) -> None:
    sides: Sequence[int] = a["pad"]
    if any(side < 0 for side in sides):
        raise Unsupported("a negative padding")
    padding = [(0, 0)] * rank(node)
    for number in range(len(sides) // 2):
        padding[-1 - number] = (sides[2 * number], sides[2 * number + 1])
    reader.add(node, "pad", [a["self"]], padding=tuple(padding), value=float(a["value"] or 0))


def _positions(reader: Any, node: fx.Node, source: Any, axis: int, index: Any) -> None:
    """Adds a choice of constant positions along an axis: neighbouring ones are parts, which are put side by side."""
    if not isinstance(index, fx.Node) or index.name not in reader.constants:
        raise Unsupported("a choice of positions that depends on the image")
    positions = reader.constants[index.name][1].numpy()
    if positions.ndim != 1:
        raise Unsupported(f"a choice of positions in {positions.ndim} axes")
    size = source.meta["val"].shape[axis]
    if not isinstance(size, int):
        raise Unsupported("a part of the images of a batch")
    parts = np.split(positions % size, np.flatnonzero(np.diff(positions % size) != 1) + 1)
    if len(parts) > MOST_PARTS:
        raise Unsupported(f"a choice of {len(parts)} parts")
    cuts = [reader.cut(node, source, axis, int(part[0]), int(part[-1]) + 1) for part in parts]
    reader.add(node, "concat", cuts, axis=axis)


def _index_select(reader: Any, node: fx.Node, a: Arguments) -> None:
    _positions(reader, node, a["self"], a["dim"] % rank(node), a["index"])


def _index(reader: Any, node: fx.Node, a: Arguments) -> None:
    given = [axis for axis, index in enumerate(a["indices"]) if index is not None]
    if len(given) != 1:
        raise Unsupported(f"a choice of positions in {len(given)} axes")
    _positions(reader, node, a["self"], given[0], a["indices"][given[0]])


MOVING: dict[str, Callable[[Any, fx.Node, Arguments], None]] = {
    "cat": _concat,
    **dict.fromkeys(
        (
            "view",
            "_unsafe_view",
            "reshape",
            "unsqueeze",
            "squeeze.dim",
            "squeeze.dims",
            "squeeze",
            "flatten.using_ints",
        ),
        _reshape,
    ),
    "permute": _permute,
    "transpose.int": _transpose,
    "expand": _expand,
    "repeat": _repeat,
    "slice.Tensor": _slice,
    "select.int": _select,
    "split_with_sizes": _split,
    "constant_pad_nd": _pad,
    "index_select": _index_select,
    "index.Tensor": _index,
}
