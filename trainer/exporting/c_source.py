"""Writes a network as C99: its weights as constants, one call for each operator, and the functions that these need."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.exporting.c_library import needed_of, template
from trainer.exporting.c_memory import plan
from trainer.exporting.c_weights import floats, literal, vector, weight
from trainer.exporting.graph import Graph, Node
from trainer.mistakes import Mistake


class Source:
    """The text of a network in C.

    Attributes:
        memory: Where its maps lie.
        memory_bytes: What these take, with the scratch of recurrent layers.
        weight_bytes: What its weights take.
        text: student.c.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.memory, self.weight_bytes = graph, plan(graph), 0
        self._constants: dict[str, str] = {}  # by name in C
        self.scratch = 0  # numbers that the largest recurrent layer needs beside its maps
        self._maps: dict[str, str] = {}  # {expression: name of its function}
        lines = []
        for node in graph.nodes:
            at = _At(self, node)
            if node.op == "reshape" and at.x() == at.y():
                continue
            layer = re.sub(r"[^\w.\-]", "_", node.layer)
            lines.append(f"    {LINES[node.op](at)}  // {layer or node.op}")
        if self.place(graph.output) != "logits":
            size = int(np.prod(graph.shape(graph.output)))
            lines.append(f"    memcpy(logits, {self.place(graph.output)}, {size} * sizeof(float));")
        self.memory_bytes = 4 * (self.memory.size + self.scratch)
        self.text = self._text(lines)

    def _text(self, lines: list[str]) -> str:
        maps = "".join(
            f"static void {name}(const float *x, float *y, int32_t n)\n{{\n    for (; n > 0; n--) {{\n        float v = *x++;\n"
            f"        *y++ = {body};\n    }}\n}}\n\n"
            for body, name in self._maps.items()
        )
        constants = "".join(self._constants.values())
        memory = f"static float memory[{self.memory.size}];\n\n" if self.memory.size else ""
        if self.scratch:
            memory += f"static float scratch[{self.scratch}];\n\n"
        body = "\n".join(lines)
        program = f"""{constants}
{memory}int student_run(const float *image, float *logits)
{{
{body}
    return 0;
}}
"""
        library = needed_of(template("student_kernels.c"), maps + program)
        return f"""// A student of tiny-student: see student.h.
#include "student.h"

#include <float.h>
#include <stdint.h>
#include <string.h>

{library}{maps}{program}"""

    def place(self, name: str) -> str:
        """Returns the expression of C where a value or constant begins."""
        if name in self.memory.places:
            where = self.memory.places[name]
            return where if isinstance(where, str) else f"memory + {where}" if where else "memory"
        return self.floats(self.graph.weights[name])

    def _name(self, kind: str) -> str:
        return f"{kind}_{len(self._constants)}"

    def floats(self, values: np.ndarray) -> str:
        """Returns the name of an array of plain numbers."""
        name = self._name("numbers")
        self._constants[name] = floats(name, values)
        self.weight_bytes += 4 * np.size(values)
        return name

    def packed(self, kind: str, values: np.ndarray) -> str:
        """Returns the name of a 'weight' or a 'vector'."""
        name = self._name(kind)
        self._constants[name], size = (weight if kind == "weight" else vector)(name, values)
        self.weight_bytes += size
        return name

    def integers(self, values: list[int]) -> str:
        """Returns the name of an array of integers."""
        name = self._name("shape")
        self._constants[name] = f"static const int32_t {name}[] = {{{', '.join(map(str, values))}}};\n"
        return name

    def window(self, values: list[int]) -> str:
        """Returns the name of a 'window'."""
        name = self._name("window")
        sizes, pairs = (
            values[:6],
            [f"{{{a}, {b}}}" for a, b in zip(values[6:16:2], values[7:16:2], strict=True)],
        )
        self._constants[name] = (
            f"static const window {name} = {{{', '.join([*map(str, sizes), *pairs, str(values[16])])}}};\n"
        )
        return name

    def map(self, body: str) -> str:
        """Returns the name of a function that puts an expression of v on each number."""
        return self._maps.setdefault(body, f"map_{len(self._maps)}")


class _At:
    """One node, as the lines below ask for it."""

    def __init__(self, source: Source, node: Node) -> None:
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


_Line = Callable[[_At], str]


def _mapped(body: str) -> _Line:
    """Returns the line of an operator on each number v; $name is one of its attributes."""

    def line(at: _At) -> str:
        filled = re.sub(r"[$](\w+)", lambda found: literal(at.a[found[1]]), body)
        return _map_of(at, filled)

    return line


def _map_of(at: _At, body: str) -> str:
    return f"{at.source.map(body)}({at.x()}, {at.y()}, {int(np.prod(at.out()))});"


def _clamp(at: _At) -> str:
    body = "v"
    if at.a["least"] is not None:
        body = f"v < {(bound := literal(at.a['least']))} ? {bound} : {body}"
    if at.a["most"] is not None:
        body = f"v > {(bound := literal(at.a['most']))} ? {bound} : {body}"
    return _map_of(at, body)


def _gelu(at: _At) -> str:
    if at.a["approximate"] == "tanh":
        return _map_of(at, "0.5f * v * (1.0f + hyperbolic(0.797884561f * (v + 0.044715f * v * v * v)))")
    return _map_of(at, "0.5f * v * (1.0f + error(v * 0.707106781f))")


def _window(at: _At, kernel: Any, dilation: Any, groups: int) -> str:
    def two(values: Any, fill: int) -> list[int]:
        values = [int(value) for value in values]
        return [fill] * (2 - len(values)) + values

    def plane(shape: list[int]) -> list[int]:
        return [shape[1], *two(shape[2:], 1)]

    before, after = ([pair[end] for pair in at.a["padding"]] for end in (0, 1))
    values = [*plane(at.shape()), *plane(at.out()), *two(kernel, 1), *two(at.a["stride"], 1)]
    values += [*two(before, 0), *two(after, 0), *two(dilation, 1), groups]
    return f"&{at.source.window(values)}"


def _conv(at: _At) -> str:
    kernel = at.source.graph.weights[at.node.weights["weight"]].shape[2:]
    window = _window(at, kernel, at.a["dilation"], at.a["groups"])
    return (
        f"conv({at.x()}, {at.y()}, {window}, {at.packed('weight', 'weight')}, {at.packed('vector', 'bias')});"
    )


def _linear(at: _At) -> str:
    inputs, outputs = at.shape()[-1], at.out()[-1]
    rows = int(np.prod(at.shape())) // inputs
    bias = at.packed("vector", "bias")
    return (
        f"linear({at.x()}, {at.y()}, {rows}, {inputs}, {outputs}, {at.packed('weight', 'weight')}, {bias});"
    )


def _batch_norm(at: _At) -> str:
    mean, var = (np.asarray(at.array(role), np.float64) for role in ("mean", "var"))
    given, bias = at.array("weight"), at.array("bias")
    scale = (1.0 if given is None else given) / np.sqrt(var + at.a["eps"])
    shift = (0.0 if bias is None else bias) - mean * scale
    outer, channels, *rest = at.shape()
    names = ", ".join(at.source.floats(array) for array in (scale, shift))
    return f"affine({at.x()}, {at.y()}, {outer}, {channels}, {int(np.prod(rest))}, {names});"


def _max_pool(at: _At) -> str:
    return f"max_pool({at.x()}, {at.y()}, {_window(at, at.a['kernel'], at.a['dilation'], 1)});"


def _avg_pool(at: _At) -> str:
    window = _window(at, at.a["kernel"], [1, 1], 1)
    return f"avg_pool({at.x()}, {at.y()}, {window}, {int(at.a['count_padding'])});"


def _sides(shape: list[int], axes: list[int]) -> str:
    """Returns the numbers before, along and after neighbouring axes."""
    first, last = axes[0], axes[-1] + 1
    return ", ".join(str(int(np.prod(part))) for part in (shape[:first], shape[first:last], shape[last:]))


def _reduced(at: _At) -> str:
    axes = sorted(axis % len(at.shape()) for axis in at.a["axes"])
    return f"{at.node.op}({at.x()}, {at.y()}, {_sides(at.shape(), axes)});"


def _softmax(at: _At) -> str:
    return f"softmax({at.x()}, {at.y()}, {_sides(at.shape(), [at.a['axis'] % len(at.shape())])});"


def _steps(shape: list[int], out: list[int]) -> list[int]:
    """Returns how far apart neighbours along each axis of `out` lie in an array that is broadcast to it."""
    wide = [1] * (len(out) - len(shape)) + shape
    return [0 if wide[a] == 1 else int(np.prod(wide[a + 1 :])) for a in range(len(out))]


def _four(out: list[int], *steps: list[int]) -> tuple[list[int], list[list[int]]]:
    """Returns a shape with four axes, and steps along them, that go through the same numbers in the same order."""
    axes: list[list[int]] = []  # size and steps
    for size, *along in zip(out, *steps, strict=True):
        if size == 1:
            continue
        if axes and all(before == size * here for before, here in zip(axes[-1][1:], along, strict=True)):
            axes[-1] = [axes[-1][0] * size, *along]
        else:
            axes.append([size, *along])
    axes = [[1] + [0] * len(steps)] * (4 - len(axes)) + axes
    return [axis[0] for axis in axes], [[axis[n + 1] for axis in axes] for n in range(len(steps))]


def _binary(sign: str, name: str) -> _Line:
    def line(at: _At) -> str:
        if len(at.node.inputs) == 1:
            scalar = literal(at.a["scalar"])
            return _map_of(at, f"{scalar} {sign} v" if at.a.get("left") else f"v {sign} {scalar}")
        shape, (x, y) = _four(at.out(), *(_steps(at.shape(n), at.out()) for n in range(2)))
        facts = f"{at.source.integers(shape)}, {at.source.integers(x + y)}"
        return f"binary({at.x()}, {at.x(1)}, {at.y()}, {facts}, {name});"

    return line


def _concat(at: _At) -> str:
    axis, out, lines, start = at.a["axis"] % len(at.out()), at.out(), [], 0
    rows, step = int(np.prod(out[:axis])), int(np.prod(out[axis:]))
    for number in range(len(at.node.inputs)):
        size = int(np.prod(at.shape(number)[axis:]))
        lines.append(f"place({at.x(number)}, {at.y()} + {start}, {rows}, {size}, {step});")
        start += size
    return " ".join(lines)


def _gathered(at: _At, steps: list[int], start: int = 0) -> str:
    shape, [steps] = _four(at.out(), steps)
    return f"gather({at.x()} + {start}, {at.y()}, {at.source.integers(shape)}, {at.source.integers(steps)});"


def _plain_steps(shape: list[int]) -> list[int]:
    return [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]


def _permute(at: _At) -> str:
    steps = _plain_steps(at.shape())
    return _gathered(at, [steps[axis] for axis in at.a["order"]])


def _slice(at: _At) -> str:
    steps, axis = _plain_steps(at.shape()), at.a["axis"] % len(at.shape())
    start = at.a["start"] * steps[axis]
    steps[axis] *= at.a["step"]
    return _gathered(at, steps, start)


def _recurrent(at: _At) -> str:
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
    "leaky_relu": _mapped("v < 0.0f ? v * $slope : v"),
    "add": _binary("+", "add"),
    "sub": _binary("-", "sub"),
    "mul": _binary("*", "mul"),
    "div": _binary("/", "div_of"),
    "concat": _concat,
    "reshape": lambda at: f"memcpy({at.y()}, {at.x()}, {int(np.prod(at.out()))} * sizeof(float));",
    "permute": _permute,
    "expand": lambda at: _gathered(at, _steps(at.shape(), at.out())),
    "slice": _slice,
}


def check(graph: Graph) -> None:
    """Raises Mistake for a node that no function of C is written for, though its operator is."""
    for node in graph.nodes:
        trouble = None
        shape = list(graph.shape(node.inputs[0])) if node.inputs else []
        axes = sorted(axis % len(shape) for axis in node.attributes.get("axes", ()))
        if axes and axes != list(range(axes[0], axes[-1] + 1)):
            trouble = "axes that are not neighbours"
        if node.op in ("conv", "max_pool", "avg_pool") and len(shape) not in (3, 4):
            trouble = f"{len(shape) - 2} spatial axes (one or two are written)"
        if (
            node.op in ("add", "sub", "mul", "div", "permute", "expand", "slice")
            and len(graph.shape(node.outputs[0])) > 4
        ):
            trouble = "more than four axes"
        if trouble:
            raise Mistake(
                f"to c: layer {node.layer!r}: operator {node.op} with {trouble} cannot be written for this target"
            )
