"""Writes each operator of a network as a line of C that calls a function of templates/student_kernels.c."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.exporting.c_constants import Constants
from trainer.exporting.c_shapes import AXES, fewest, loops, plain_steps, sides, steps_to
from trainer.exporting.c_weights import literal
from trainer.exporting.graph import Graph, Node, check_sequences
from trainer.mistakes import Mistake


class At:
    """One node, as the lines below ask for it."""

    def __init__(self, source: Constants, node: Node) -> None:
        self.source, self.node, self.a = source, node, node.attributes

    def x(self, number: int = 0) -> str:
        return self.source.place(self.node.inputs[number])

    def y(self) -> str:
        return self.source.place(self.node.outputs[0])

    def shape(self, number: int = 0) -> list[int]:
        return list(self.source.graph.shape(self.node.inputs[number]))

    def out(self) -> list[int]:
        return list(self.source.graph.shape(self.node.outputs[0]))

    def array(self, role: str) -> np.ndarray | None:
        name = self.node.weights.get(role)
        return None if name is None else self.source.graph.weights[name]

    def packed(self, kind: str, role: str) -> str:
        """Returns the address of a weight or vector, '0' where the layer has none."""
        array = self.array(role)
        return "0" if array is None else f"&{self.source.packed(kind, array)}"


_Line = Callable[[At], str]


def _mapped(body: str) -> _Line:
    """Returns the line of an operator on each number v; $name is one of its attributes."""

    def line(at: At) -> str:
        filled = re.sub(r"[$](\w+)", lambda found: literal(at.a[found[1]]), body)
        return _map_of(at, filled)

    return line


def _map_of(at: At, body: str) -> str:
    return f"{at.source.map(body)}({at.x()}, {at.y()}, {int(np.prod(at.out()))});"


def _clamp(at: At) -> str:
    body = "v"
    if at.a["least"] is not None:
        body = f"v < {(bound := literal(at.a['least']))} ? {bound} : {body}"
    if at.a["most"] is not None:
        body = f"v > {(bound := literal(at.a['most']))} ? {bound} : {body}"
    return _map_of(at, body)


def _gelu(at: At) -> str:
    if at.a["approximate"] == "tanh":
        return _map_of(at, "0.5f * v * (1.0f + hyperbolic(0.797884561f * (v + 0.044715f * v * v * v)))")
    return _map_of(at, "0.5f * v * (1.0f + error(v * 0.707106781f))")


def _window(at: At, kernel: Any, dilation: Any, groups: int) -> str:
    def two(values: Any, fill: int) -> list[int]:
        values = [int(value) for value in values]
        return [fill] * (2 - len(values)) + values

    def plane(shape: list[int]) -> list[int]:
        return [shape[1], *two(shape[2:], 1)]

    before, after = ([pair[end] for pair in at.a["padding"]] for end in (0, 1))
    values = [*plane(at.shape()), *plane(at.out()), *two(kernel, 1), *two(at.a["stride"], 1)]
    values += [*two(before, 0), *two(after, 0), *two(dilation, 1), groups]
    return f"&{at.source.window(values)}"


def _each(at: At, line: str) -> str:
    """Returns a line for each of the images that one image has become; $x and $y are where they begin."""
    begins = [(at.x(), plain_steps(at.shape())), (at.y(), plain_steps(at.out()))]
    head, (x, y) = loops(at.out()[:1], begins)
    return head + line.replace("$x", x).replace("$y", y)


def _conv(at: At) -> str:
    kernel = at.source.graph.weights[at.node.weights["weight"]].shape[2:]
    window = _window(at, kernel, at.a["dilation"], at.a["groups"])
    weights = f"{at.packed('weight', 'weight')}, {at.packed('vector', 'bias')}"
    return _each(at, f"conv($x, $y, {window}, {weights});")


def _linear(at: At) -> str:
    inputs, outputs = at.shape()[-1], at.out()[-1]
    rows = int(np.prod(at.shape())) // inputs
    bias = at.packed("vector", "bias")
    return (
        f"linear({at.x()}, {at.y()}, {rows}, {inputs}, {outputs}, {at.packed('weight', 'weight')}, {bias});"
    )


def _batch_norm(at: At) -> str:
    mean, var = (np.asarray(at.array(role), np.float64) for role in ("mean", "var"))
    given, bias = at.array("weight"), at.array("bias")
    scale = (1.0 if given is None else given) / np.sqrt(var + at.a["eps"])
    shift = (0.0 if bias is None else bias) - mean * scale
    outer, channels, *rest = at.shape()
    names = ", ".join(at.source.floats(array) for array in (scale, shift))
    return f"affine({at.x()}, {at.y()}, {outer}, {channels}, {int(np.prod(rest))}, {names});"


def _prelu(at: At) -> str:
    slope, (outer, channels, *rest) = at.array("weight"), at.shape()
    assert slope is not None
    if slope.size == 1:
        outer, channels, rest = 1, 1, [*rest, channels]
    return f"prelu({at.x()}, {at.y()}, {outer}, {channels}, {int(np.prod(rest))}, {at.source.floats(slope)});"


def _normal(at: At, size: int, outer: int, channels: int) -> str:
    """Returns the lines of a normalization of each `size` numbers, with weight and bias of each channel."""
    count = int(np.prod(at.shape()))
    line = f"normal({at.x()}, {at.y()}, {count // size}, {size}, {literal(at.a['eps'])});"
    weight, bias = at.array("weight"), at.array("bias")
    if weight is None:
        return line
    names = ", ".join(at.source.floats(array) for array in (weight, 0 * weight if bias is None else bias))
    inner = count // (outer * channels)
    return f"{line} affine({at.y()}, {at.y()}, {outer}, {channels}, {inner}, {names});"


def _layer_norm(at: At) -> str:
    size = int(np.prod([at.shape()[axis] for axis in at.a["axes"]]))
    return _normal(at, size, int(np.prod(at.shape())) // size, size)


def _group_norm(at: At) -> str:
    outer, channels, *rest = at.shape()
    return _normal(at, channels * int(np.prod(rest)) // at.a["groups"], outer, channels)


def _matmul(at: At) -> str:
    (*_, rows, inner), (*lead, _, columns) = at.shape(), at.out()
    head, begins = _around(at, lead, [*lead, rows, inner], [*lead, inner, columns])
    return f"{head}matmul({', '.join(begins)}, {rows}, {inner}, {columns});"


def _attention(at: At) -> str:
    (*lead, rows, depth), (keys, width) = at.shape(), at.shape(2)[-2:]
    lead = at.out()[:-2]
    wide = [[*lead, rows, depth], [*lead, keys, depth], [*lead, keys, width], [*lead, rows, keys]]
    head, (q, k, v, *mask, y) = _around(at, lead, *wide[: len(at.node.inputs)])
    at.source.scratch = max(at.source.scratch, keys)
    sizes = f"{rows}, {keys}, {depth}, {width}, {literal(at.a['scale'])}"
    return f"{head}attention({q}, {k}, {v}, {mask[0] if mask else 0}, {y}, scratch, {sizes});"


def _around(at: At, lead: list[int], *wide: list[int]) -> tuple[str, list[str]]:
    """Returns the loops through the axes `lead`, and where each input and the output then begins.

    wide: the shape that each input is broadcast to.
    """
    names = [at.x(number) for number in range(len(wide))] + [at.y()]
    steps = [steps_to(at.shape(number), shape) for number, shape in enumerate(wide)] + [plain_steps(at.out())]
    sizes, found = fewest(lead, *(one[: len(lead)] for one in steps))
    return loops(sizes, list(zip(names, found, strict=True)))


def _max_pool(at: At) -> str:
    return _each(at, f"max_pool($x, $y, {_window(at, at.a['kernel'], at.a['dilation'], 1)});")


def _avg_pool(at: At) -> str:
    window = _window(at, at.a["kernel"], [1, 1], 1)
    return _each(at, f"avg_pool($x, $y, {window}, {int(at.a['count_padding'])});")


def _reduced(at: At) -> str:
    axes = sorted(axis % len(at.shape()) for axis in at.a["axes"])
    return f"{at.node.op}({at.x()}, {at.y()}, {sides(at.shape(), axes)});"


def _softmax(at: At) -> str:
    return f"softmax({at.x()}, {at.y()}, {sides(at.shape(), [at.a['axis'] % len(at.shape())])});"


def _binary(sign: str, name: str) -> _Line:
    def line(at: At) -> str:
        if len(at.node.inputs) == 1:
            scalar = literal(at.a["scalar"])
            return _map_of(at, f"{scalar} {sign} v" if at.a.get("left") else f"v {sign} {scalar}")
        shape, (x, y) = fewest(at.out(), *(steps_to(at.shape(n), at.out()) for n in range(2)))
        around = len(shape) - AXES
        arrays = [(at.x(), x), (at.x(1), y), (at.y(), plain_steps(shape))]
        head, begins = loops(shape[:around], arrays)
        facts = f"{at.source.integers(shape[around:])}, {at.source.integers(x[around:] + y[around:])}"
        return f"{head}binary({', '.join(begins)}, {facts}, {name});"

    return line


def _concat(at: At) -> str:
    axis, out, lines, start = at.a["axis"] % len(at.out()), at.out(), [], 0
    rows, step = int(np.prod(out[:axis])), int(np.prod(out[axis:]))
    for number in range(len(at.node.inputs)):
        size = int(np.prod(at.shape(number)[axis:]))
        lines.append(f"place({at.x(number)}, {at.y()} + {start}, {rows}, {size}, {step});")
        start += size
    return " ".join(lines)


def _gathered(at: At, steps: list[int], start: int = 0) -> str:
    shape, [steps] = fewest(at.out(), steps)
    around = len(shape) - AXES
    x = f"{at.x()} + {start}" if start else at.x()
    head, (x, y) = loops(shape[:around], [(x, steps), (at.y(), plain_steps(shape))])
    facts = f"{at.source.integers(shape[around:])}, {at.source.integers(steps[around:])}"
    return f"{head}gather({x}, {y}, {facts});"


def _permute(at: At) -> str:
    steps = plain_steps(at.shape())
    return _gathered(at, [steps[axis] for axis in at.a["order"]])


def _slice(at: At) -> str:
    steps, axis = plain_steps(at.shape()), at.a["axis"] % len(at.shape())
    start = at.a["start"] * steps[axis]
    steps[axis] *= at.a["step"]
    return _gathered(at, steps, start)


def _pad(at: At) -> str:
    steps = plain_steps(at.out())
    start = sum(before * step for (before, _), step in zip(at.a["padding"], steps, strict=True))
    shape, (x, y) = fewest(at.shape(), plain_steps(at.shape()), steps)
    around = len(shape) - AXES
    head, begins = loops(shape[:around], [(at.x(), x), (f"{at.y()} + {start}", y)])
    facts = f"{at.source.integers(shape[around:])}, {at.source.integers(y[around:])}"
    return (
        f"fill({at.y()}, {int(np.prod(at.out()))}, {literal(at.a['value'])}); "
        f"{head}scatter({', '.join(begins)}, {facts});"
    )


def _power(at: At) -> str:
    return _map_of(at, f"raised(v, {int(2 * at.a['exponent'])})")


def _recurrent(at: At) -> str:
    gates, hidden, ways = {"lstm": 4, "gru": 3}[at.node.op], at.a["hidden"], 1 + at.a["bidirectional"]
    shape, layers, lines, x = at.shape(), at.a["layers"], [], at.x()
    steps, size, own = int(np.prod(shape[:-1])), shape[-1], (2 * gates + 1) * hidden
    between = steps * ways * hidden if layers > 1 else 0
    at.source.scratch = max(at.source.scratch, own + between)
    for layer in range(layers):
        y = at.y() if (layers - 1 - layer) % 2 == 0 else f"scratch + {own}"
        for way, end in enumerate(("", "_reverse")[:ways]):
            weights = [at.packed("weight", f"{role}_l{layer}{end}") for role in ("weight_ih", "weight_hh")]
            weights += [at.packed("vector", f"{role}_l{layer}{end}") for role in ("bias_ih", "bias_hh")]
            sizes = f"{steps}, {size}, {hidden}, {ways * hidden}, {way}"
            lines.append(f"{at.node.op}({x}, {y} + {way * hidden}, scratch, {sizes}, {', '.join(weights)});")
        x, size = y, ways * hidden
    return " ".join(lines)


LINES: dict[str, _Line] = {
    "lstm": _recurrent,
    "gru": _recurrent,
    "conv": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "matmul": _matmul,
    "attention": _attention,
    "mean": _reduced,
    "amax": _reduced,
    "softmax": _softmax,
    "relu": _mapped("v > 0.0f ? v : 0.0f"),
    "clamp": _clamp,
    "hardswish": _mapped("v * (v < -3.0f ? 0.0f : v > 3.0f ? 6.0f : v + 3.0f) / 6.0f"),
    "hardsigmoid": _mapped("(v < -3.0f ? 0.0f : v > 3.0f ? 6.0f : v + 3.0f) / 6.0f"),
    "silu": _mapped("v * sigmoid(v)"),
    "sigmoid": _mapped("sigmoid(v)"),
    "tanh": _mapped("hyperbolic(v)"),
    "exp": _mapped("exponential(v)"),
    "erf": _mapped("error(v)"),
    "neg": _mapped("-v"),
    "abs": _mapped("v < 0.0f ? -v : v"),
    "gelu": _gelu,
    "elu": _mapped("v < 0.0f ? $alpha * (exponential(v) - 1.0f) : v"),
    "softplus": _mapped("softplus(v * $beta) / $beta"),
    "mish": _mapped("mish(v)"),
    "sqrt": _mapped("root(v)"),
    "power": _power,
    "prelu": _prelu,
    "pad": _pad,
    "leaky_relu": _mapped("v < 0.0f ? v * $slope : v"),
    "add": _binary("+", "add"),
    "sub": _binary("-", "sub"),
    "mul": _binary("*", "mul"),
    "div": _binary("/", "div_of"),
    "concat": _concat,
    "reshape": lambda at: f"memcpy({at.y()}, {at.x()}, {int(np.prod(at.out()))} * sizeof(float));",
    "permute": _permute,
    "expand": lambda at: _gathered(at, steps_to(at.shape(), at.out())),
    "slice": _slice,
}


def check(graph: Graph) -> None:
    """Raises Mistake for a node that no function of C is written for, though its operator is."""
    check_sequences(graph, "c")
    for node in graph.nodes:
        trouble = None
        shape = list(graph.shape(node.inputs[0])) if node.inputs else []
        axes = sorted(axis % len(shape) for axis in node.attributes.get("axes", ()))
        if axes and axes != list(range(axes[0], axes[-1] + 1)):
            trouble = "axes that are not neighbours"
        if node.op in ("conv", "max_pool", "avg_pool") and len(shape) not in (3, 4):
            trouble = f"{len(shape) - 2} spatial axes (one or two are written)"
        if node.op == "power" and 2 * node.attributes["exponent"] % 1:
            trouble = f"the exponent {node.attributes['exponent']:g} (halves of whole numbers are written)"
        if node.op == "matmul" and min(len(graph.shape(name)) for name in node.inputs) < 2:
            trouble = "a vector"
        if node.op == "attention" and len(node.inputs) == 4:
            rows, keys = graph.shape(node.inputs[0])[-2], graph.shape(node.inputs[1])[-2]
            if graph.shape(node.inputs[3])[-2:] != (rows, keys):
                trouble = "a mask that is not of each query and key"
        if trouble:
            raise Mistake(
                f"to c: layer {node.layer!r}: operator {node.op} with {trouble} cannot be written for this target"
            )
