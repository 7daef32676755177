"""Computes a network row by row: each map keeps only the rows that are still to be read, in turn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.exporting.graph import Graph, Node
from trainer.exporting.integer_steps import IMAGE, Step
from trainer.mistakes import Mistake


@dataclass
class Rows:
    """A map of bytes [channels, height, width], of which `rows` rows are kept, from `offset` on.

    The image (number 0) and the logits (the last) are the caller's, and lie nowhere in memory.
    """

    channels: int
    height: int
    width: int
    zero: int = 0
    exponent: int = 0
    rows: int = 1
    offset: int | None = None
    size: int = 0


@dataclass
class Unit:
    """What makes map `number + 1` row by row.

    Attributes:
        op: linear (its kernel is the whole map), conv, max_pool, avg_pool or mean.
        node: Of the graph.
        x, added: Numbers of the maps that it reads; added: None for none.
        kernel, stride, before, dilation: Down and to the right.
        total: How often it runs: once for each row of its output; a mean for each row of its input.
        relu, relu_after: See `Step`.
    """

    op: str
    node: Node
    x: int
    added: int | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    total: int = 1
    relu: bool = False
    relu_after: bool = False

    def reads(self, at: int) -> tuple[int, int]:
        """Returns the first and last row of x that run number `at` reads; some may lie outside."""
        first = at * self.stride[0] - self.before[0]
        return first, first + (self.kernel[0] - 1) * self.dilation[0]


@dataclass
class Program:
    """Units in order, and the maps: number 0 is the image, number u + 1 what unit u makes.

    Attributes:
        size: Bytes of memory.
    """

    units: list[Unit]
    maps: list[Rows]
    size: int = 0
    named: dict[str, int] = field(default_factory=dict)


def program_of(graph: Graph, steps: Sequence[Step]) -> Program:
    """Returns the units of a quantized network, and how many rows of each map are kept and where."""
    made = Program([], [_map(graph, graph.input)], named={IMAGE: 0})
    for step in steps:
        made.maps[0].zero = step.x.zero if step.x.name == IMAGE else made.maps[0].zero
        made.maps[0].exponent = step.x.exponent if step.x.name == IMAGE else made.maps[0].exponent
        x = made.named[step.x.name]
        unit = _unit(graph, step, x, made.maps[x])
        unit.added = None if step.added is None else made.named[step.added.name]
        _append(made, unit, _map(graph, step.node.outputs[0]), step)
        for pool in step.pools:
            below = len(made.maps) - 1
            _append(made, _window(pool, below), _map(graph, pool.outputs[0]), step)
        if step.y is not None:
            made.named[step.y.name] = len(made.maps) - 1
    _keep_rows(made)
    return made


def _append(made: Program, unit: Unit, rows: Rows, step: Step) -> None:
    if step.y is not None:
        rows.zero, rows.exponent = step.y.zero, step.y.exponent
    if unit.op != "mean":
        unit.total = rows.height
    made.units.append(unit)
    made.maps.append(rows)


def _map(graph: Graph, name: str) -> Rows:
    shape = graph.shape(name)[1:]
    if len(shape) > 3:
        raise Mistake(f"a map of {len(shape) - 1} spatial axes cannot be computed in integers")
    channels, *rest = shape
    height, width = [1] * (2 - len(rest)) + rest
    return Rows(channels, height, width)


def _unit(graph: Graph, step: Step, x: int, given: Rows) -> Unit:
    node = step.node
    facts: dict[str, Any] = {"relu": step.relu, "relu_after": step.relu_after}
    if node.op == "linear":
        inputs = graph.weights[node.weights["weight"]].shape[1]
        if inputs != given.channels * given.height * given.width:
            raise Mistake(
                f"layer {node.layer!r}: a linear layer of each position cannot be computed in integers"
            )
        return Unit("linear", node, x, kernel=(given.height, given.width), **facts)
    if node.op == "mean":
        if sorted(node.attributes["axes"]) != list(range(2, len(graph.shape(node.inputs[0])))):
            raise Mistake(
                f"layer {node.layer!r}: a mean of other axes than all positions cannot be computed in integers"
            )
        return Unit("mean", node, x, total=given.height, **facts)
    unit = _window(node, x)
    if node.op == "conv":
        kernel = graph.weights[node.weights["weight"]].shape[2:]
        unit.kernel = _two(kernel, 1)
    unit.relu, unit.relu_after = step.relu, step.relu_after
    return unit


def _two(values: Sequence[int], fill: int) -> tuple[int, int]:
    first, second = [fill] * (2 - len(values)) + [int(value) for value in values]
    return first, second


def _window(node: Node, x: int) -> Unit:
    a = node.attributes
    return Unit(
        node.op,
        node,
        x,
        kernel=_two(a.get("kernel", (1,)), 1),
        stride=_two(a["stride"], 1),
        before=_two([pair[0] for pair in a["padding"]], 0),
        dilation=_two(a.get("dilation", (1,) * len(a["stride"])), 1),
    )


def ready(made: Program, done: Sequence[int], number: int) -> bool:
    """Returns whether a unit can run, `done` being how often each has run; student_run in C asks the same."""
    unit = made.units[number]
    if done[number] >= unit.total:
        return False
    if unit.x == 0:
        return True
    most = made.units[unit.x - 1].total
    return done[unit.x - 1] >= min(reach(made, number) + done[number] * unit.stride[0], most)


def reach(made: Program, number: int) -> int:
    """Returns how often what a unit reads must have been run before its first run."""
    unit = made.units[number]
    if unit.x and made.units[unit.x - 1].op == "mean":
        return made.units[unit.x - 1].total
    return unit.reads(0)[1] + 1


def _keep_rows(made: Program) -> None:
    """Runs the units as C does, and finds how many rows of each map are alive at once, and when; places them."""
    count = len(made.units)
    done, times = [0] * count, [[-1, -1] for _ in made.maps]
    time = 0
    while done[-1] < made.units[-1].total:
        number = next(n for n in reversed(range(count)) if ready(made, done, n))
        unit = made.units[number]
        first, _ = unit.reads(done[number])
        for read, row in ((unit.x, max(0, first)), (unit.added, done[number])):
            if read:
                kept = 1 if made.units[read - 1].op == "mean" else done[read - 1] - row
                if kept < 1:
                    raise Mistake(
                        f"layer {unit.node.layer!r}: what is added to it is not computed before it in rows"
                    )
                made.maps[read].rows = max(made.maps[read].rows, kept)
                times[read][1] = time
        if times[number + 1][0] < 0:
            times[number + 1][0] = time
        times[number + 1][1] = time
        done[number] += 1
        time += 1
    for number, unit in enumerate(made.units[:-1], 1):
        here = made.maps[number]
        here.size = (
            4 * here.channels if unit.op == "mean" else -(-here.rows * here.channels * here.width // 4) * 4
        )
    order = sorted(range(1, count), key=lambda n: -made.maps[n].size)
    for number in order:
        here, (start, end) = made.maps[number], times[number]
        others = [
            made.maps[n] for n in order if made.maps[n].offset is not None and times[n][0] <= end and start <= times[n][1]
        ]  # fmt: skip
        tops = sorted({0, *(int(o.offset or 0) + o.size for o in others)})
        here.offset = next(
            top
            for top in tops
            if all(top + here.size <= (o.offset or 0) or (o.offset or 0) + o.size <= top for o in others)
        )
        made.size = max(made.size, here.offset + here.size)
    made.size = int(np.ceil(made.size / 4)) * 4
