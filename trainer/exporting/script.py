"""Writes a network as a small script of plain JavaScript: its compressed weights, and one line for each operator."""

import base64
import json
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np

from trainer.exporting.graph import Graph, Node
from trainer.exporting.script_weights import ScriptCoder
from trainer.exporting.subject import Subject
from trainer.networks.quantizers import HIGHEST, TIE

SMALL = 64  # a vector of at most this many numbers is written as it is


def script_of(subject: Subject) -> str:
    """Returns a script that defines `student`: the pixels of one image, 0 to 255, channel by channel => Float32Array of logits.

    `student.shape` and `student.classes` are beside it, and `student.check()`: the largest difference of a logit from the
    network's own on `Subject.test_vector`.
    """
    graph, weights = subject.graph, _Weights()
    names, lines = {graph.input: "x"}, []
    for number, node in enumerate(graph.nodes):
        x = [
            names[name] if name in names else weights.name_of(graph.weights[name], name)
            for name in node.inputs
        ]
        names[node.outputs[0]] = f"v{number}"
        lines.append(f"const v{number} = {LINES[node.op](_At(graph, node, weights), x)};")
    pixels, logits = subject.test_vector()
    expected = weights.name_of(logits, "expected logits")
    channels, height, width = subject.shape
    facts = {
        "shape": list(subject.shape),
        "classes": list(subject.classes) or [str(number) for number in range(len(logits))],
        "mean": [float(np.float32(value)) for value in subject.mean] or [0.0] * channels,
        "scale": subject.scale.tolist(),
    }
    program = f"""const facts = {inside(facts)};
{weights.text()}
const run = pixels => {{
const x = Float32Array.from(pixels, (value, i) => {{
const c = Math.floor(i / {height * width});
return Math.fround(Math.fround(Math.fround(value / 255) - facts.mean[c]) * facts.scale[c]);
}});
{chr(10).join(lines)}
return {names[graph.output]};
}};
const check = () => {{
const found = run(Uint8Array.from({{length: {pixels.size}}}, (_, i) => (i * 37 + Math.floor(i / 101) * 11) % 256));
return Math.max(...found.map((value, i) => Math.abs(value - {expected}[i])));
}};
return Object.assign(run, facts, {{check}});"""
    return f"const student = (() => {{\n{_library(program)}{program}\n}})();\n"


class _Weights:
    """The weights of a script: one coded stream, and the numbers that are written as they are."""

    def __init__(self) -> None:
        self._coder = ScriptCoder()
        self._numbers: list[np.ndarray] = []
        self._names: dict[str, str] = {}
        self._tables: list[str] = []

    def name_of(self, values: np.ndarray, name: str) -> str:
        """Returns the script's name of an array, which is written when it is first asked for."""
        if name in self._names:
            return self._names[name]
        self._names[name] = made = f"w{len(self._names)}"
        coded = self._coder.weight(values) if values.size > SMALL else None
        raw = values if coded is None else coded[-1]
        self._numbers.append(np.asarray(raw, "<f4").reshape(-1))
        read = f"next({raw.size})"
        if coded is not None:
            read = f"decodedWeight(bit, [{', '.join(map(str, coded[:-1]))}, {read}])"
        self._tables.append(f"const {made} = {read};")
        return made

    def text(self) -> str:
        """Returns the lines that make all arrays."""
        numbers = np.concatenate(self._numbers).tobytes()
        lines = [f'const numbers = floats("{base64.b64encode(numbers).decode()}");', "let taken = 0;"]
        lines.append("const next = size => numbers.subarray(taken, taken += size);")
        lines.append(f'const bit = reader(base64("{base64.b64encode(self._coder.finish()).decode()}"));')
        return "\n".join([*lines, *self._tables])


def inside(value: Any) -> str:
    """Returns a value as JSON that may stand in a script element, which "</script" ends, and "<!--<script" does not let end."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def _library(program: str) -> str:
    """Returns the functions of templates/student.js that a program needs, without comments and indents."""
    text = (resources.files("trainer.exporting") / "templates" / "student.js").read_text(encoding="utf-8")
    blocks = re.split(r"\n(?=function |const )", bare(text, indented=True))
    functions = {re.match(r"(?:function|const) (\w+)", block)[1]: block for block in blocks}  # type: ignore[index]
    wanted: set[str] = set()
    due = [program]
    while due:
        named = set(re.findall(r"\w+", due.pop())) & functions.keys() - wanted
        wanted |= named
        due += [functions[name] for name in named]
    return "".join(bare(block) + "\n" for name, block in functions.items() if name in wanted)


def bare(script: str, indented: bool = False) -> str:
    """Returns a script without comments, empty lines and, unless `indented`, indents."""
    lines = (re.sub(r"(^|\s+)//.*$", "", line) for line in script.splitlines())
    return "\n".join(line if indented else line.strip() for line in lines if line.strip())


class _At:
    """One node of a graph, as the lines below ask for it."""

    def __init__(self, graph: Graph, node: Node, weights: _Weights) -> None:
        self.graph, self.node, self._weights, self.a = graph, node, weights, node.attributes

    def array(self, role: str) -> np.ndarray | None:
        """Returns a weight's numbers; None where the layer has none."""
        name = self.node.weights.get(role)
        return None if name is None else self.graph.weights[name]

    def weight(self, role: str) -> str:
        """Returns the script's name of a weight, 'null' where the layer has none."""
        array = self.array(role)
        return "null" if array is None else self._weights.name_of(array, self.node.weights[role])

    def made(self, array: np.ndarray, name: str) -> str:
        """Returns the script's name of an array that is computed here."""
        return self._weights.name_of(np.asarray(array, np.float32), f"{self.node.outputs[0]} {name}")

    def shape(self, number: int = 0) -> list[int]:
        return list(self.graph.shape(self.node.inputs[number]))

    def out(self) -> list[int]:
        return list(self.graph.shape(self.node.outputs[0]))


_Line = Callable[[_At, list[str]], str]


def _mapped(body: str) -> _Line:
    """Returns the line of an operator on each number v; $name is one of its attributes."""

    def line(at: _At, x: list[str]) -> str:
        filled = re.sub(r"[$](\w+)", lambda found: _number(at.a[found[1]]), body)
        return f"mapped({x[0]}, v => {filled})"

    return line


def _number(value: float) -> str:
    """Returns a number as JavaScript reads it: Infinity, not inf."""
    return json.dumps(value)


def _plane(shape: list[int]) -> list[int]:
    """Returns [C, H, W] of a map's shape [1, C, W] or [1, C, H, W]."""
    return shape[1:] if len(shape) == 4 else [shape[1], 1, shape[2]]


def _two_axes(at: _At, *names: str) -> list[list[int]]:
    flat = len(at.shape()) == 3
    found = []
    for name in names:
        values = [list(pair)[0] if isinstance(pair, (tuple, list)) else pair for pair in at.a[name]]
        found.append([0 if name == "padding" else 1, *values] if flat else values)
    return found


def _each(at: _At, x: str, line: Callable[[str], str]) -> str:
    """Returns a line that is done to each of the images that one image has become."""
    count = at.shape()[0]
    return line(x) if count == 1 else f"each({x}, {count}, x => {line('x')})"


def _conv(at: _At, x: list[str]) -> str:
    weight = at.array("weight")
    assert weight is not None
    kernel = list(weight.shape[1:]) if weight.ndim == 4 else [weight.shape[1], 1, weight.shape[2]]
    stride, padding, dilation = _two_axes(at, "stride", "padding", "dilation")
    facts = f"{_plane(at.shape())}, {_plane(at.out())}, {kernel}, {stride}, {padding}, {dilation}, {at.a['groups']}"
    weights = f"{at.weight('weight')}, {at.weight('bias')}"
    return _each(at, x[0], lambda one: f"conv({one}, {weights}, {facts})")


def _affine(at: _At, x: str, scale: np.ndarray, shift: np.ndarray, inner: int) -> str:
    return f"affine({x}, {at.made(scale, 'scale')}, {at.made(shift, 'shift')}, {inner})"


def _batch_norm(at: _At, x: list[str]) -> str:
    mean, var = (np.asarray(at.array(role), np.float64) for role in ("mean", "var"))
    weight, bias = at.array("weight"), at.array("bias")
    scale = (1.0 if weight is None else weight) / np.sqrt(var + at.a["eps"])
    return _affine(at, x[0], scale, (0.0 if bias is None else bias) - mean * scale, _inner(at.shape()))


def _inner(shape: list[int]) -> int:
    """Returns how many numbers of one channel, axis 1, stand side by side."""
    return int(np.prod(shape[2:]))


def _scaled(at: _At, x: str, inner: int) -> str:
    weight, bias = at.array("weight"), at.array("bias")
    if weight is None:
        return x
    return _affine(at, x, weight.reshape(-1), (0 * weight if bias is None else bias).reshape(-1), inner)


def _layer_norm(at: _At, x: list[str]) -> str:
    size = int(np.prod([at.shape()[axis] for axis in at.a["axes"]]))
    return _scaled(at, f"normal({x[0]}, {size}, {at.a['eps']})", 1)


def _group_norm(at: _At, x: list[str]) -> str:
    size = int(np.prod(at.shape()[1:])) // at.a["groups"]
    return _scaled(at, f"normal({x[0]}, {size}, {at.a['eps']})", _inner(at.shape()))


def _pool(mean: bool) -> _Line:
    def line(at: _At, x: list[str]) -> str:
        kernel, stride, padding = _two_axes(at, "kernel", "stride", "padding")
        dilation = [1, 1] if mean else _two_axes(at, "dilation")[0]
        counted = "true" if mean and at.a["count_padding"] else "false"
        facts = f"{_plane(at.shape())}, {_plane(at.out())[1:]}, {kernel}, {stride}, {padding}, {dilation}"
        return _each(at, x[0], lambda one: f"pooled({one}, {facts}, {str(mean).lower()}, {counted})")

    return line


def _recurrent(at: _At, x: list[str]) -> str:
    steps = at.shape()[1 if at.a["batch_first"] else 0]
    gates, hidden, found, size = (4 if at.node.op == "lstm" else 3), at.a["hidden"], x[0], at.shape()[-1]
    for layer in range(at.a["layers"]):
        ways = []
        for end in ("", "_reverse")[: 2 if at.a["bidirectional"] else 1]:
            roles = [f"{kind}_l{layer}{end}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            given = ", ".join(at.weight(role) for role in roles)
            ways.append(
                f"recurrent({found}, [{steps}, {size}], {hidden}, {given}, {gates}, {str(bool(end)).lower()})"
            )
        found, size = ways[0], hidden
        if len(ways) == 2:
            found, size = (
                f"concat([{', '.join(ways)}], [[{steps}, {hidden}], [{steps}, {hidden}]], 1)",
                2 * hidden,
            )
    return found


def _reduced(mean: bool) -> _Line:
    return lambda at, x: (
        f"reduced({x[0]}, {at.shape()}, {[a % len(at.shape()) for a in at.a['axes']]}, {str(mean).lower()})"
    )


def _binary(sign: str) -> _Line:
    def line(at: _At, x: list[str]) -> str:
        if len(x) == 1:
            scalar = _number(at.a["scalar"])
            return (
                f"mapped({x[0]}, v => {f'{scalar} {sign} v' if at.a.get('left') else f'v {sign} {scalar}'})"
            )
        return f"binary({x[0]}, {at.shape()}, {x[1]}, {at.shape(1)}, {at.out()}, (a, b) => a {sign} b)"

    return line


def _clamp(at: _At, x: list[str]) -> str:
    body = "v"
    if at.a["least"] is not None:
        body = f"Math.max({_number(at.a['least'])}, {body})"
    if at.a["most"] is not None:
        body = f"Math.min({_number(at.a['most'])}, {body})"
    return f"mapped({x[0]}, v => {body})"


def _gelu(at: _At, x: list[str]) -> str:
    if at.a["approximate"] == "tanh":
        return f"mapped({x[0]}, v => v / 2 * (1 + Math.tanh(0.7978845608028654 * (v + 0.044715 * v ** 3))))"
    return f"mapped({x[0]}, v => v / 2 * (1 + erf(v / 1.4142135623730951)))"


def _prelu(at: _At, x: list[str]) -> str:
    slope = at.weight("weight")
    return f"{x[0]}.map((v, i) => v >= 0 ? v : v * {slope}[Math.floor(i / {_inner(at.shape())}) % {slope}.length])"


def _attention(at: _At, x: list[str]) -> str:
    q, k, v = at.shape(0), at.shape(1), at.shape(2)
    scores = [*q[:-1], k[-2]]
    steps = [int(np.prod(k[axis + 1 :])) for axis in range(len(k))]
    turned = f"gather({x[1]}, {[*k[:-2], k[-1], k[-2]]}, {[*steps[:-2], steps[-1], steps[-2]]})"
    found = f"matmul({x[0]}, {q}, {turned}, {[*k[:-2], k[-1], k[-2]]}, {scores})"
    found = f"mapped({found}, v => v * {at.a['scale']})"
    if len(x) == 4:
        found = f"binary({found}, {scores}, {x[3]}, {at.shape(3)}, {scores}, (a, b) => a + b)"
    return f"matmul(softmax({found}, {scores}, {len(scores) - 1}), {scores}, {x[2]}, {v}, {at.out()})"


def _permute(at: _At, x: list[str]) -> str:
    shape = at.shape()
    steps = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    return f"gather({x[0]}, {at.out()}, {[steps[axis] for axis in at.a['order']]})"


def _slice(at: _At, x: list[str]) -> str:
    shape, axis = at.shape(), at.a["axis"] % len(at.shape())
    steps = [int(np.prod(shape[a + 1 :])) for a in range(len(shape))]
    start = at.a["start"] * steps[axis]
    steps[axis] *= at.a["step"]
    return f"gather({x[0]}, {at.out()}, {steps}, {start})"


def _quantize(at: _At, x: list[str]) -> str:
    step, zero = 2.0 ** at.a["exponent"], at.a["zero"]
    if at.a["mean"]:  # the image itself
        return f"Float32Array.from(pixels, v => (v - {zero}) * {step})"
    ends = f"Math.max({-zero}, Math.min({HIGHEST - zero}, v / {step}))"
    return f"mapped({x[0]}, v => Math.floor({ends} + {1 - TIE}) * {step})"


LINES: dict[str, _Line] = {
    "quantize": _quantize,
    "conv": _conv,
    "linear": lambda at, x: f"linear({x[0]}, {at.weight('weight')}, {at.weight('bias')}, {at.shape()[-1]})",
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "lstm": _recurrent,
    "gru": _recurrent,
    "max_pool": _pool(mean=False),
    "avg_pool": _pool(mean=True),
    "mean": _reduced(mean=True),
    "amax": _reduced(mean=False),
    "relu": _mapped("Math.max(0, v)"),
    "hardswish": _mapped("v * Math.min(Math.max(v + 3, 0), 6) / 6"),
    "hardsigmoid": _mapped("Math.min(Math.max(v + 3, 0), 6) / 6"),
    "silu": _mapped("v * sigmoid(v)"),
    "sigmoid": _mapped("sigmoid(v)"),
    "tanh": _mapped("Math.tanh(v)"),
    "mish": _mapped("v * Math.tanh(softplus(v, 1))"),
    "exp": _mapped("Math.exp(v)"),
    "sqrt": _mapped("Math.sqrt(v)"),
    "neg": _mapped("-v"),
    "abs": _mapped("Math.abs(v)"),
    "erf": _mapped("erf(v)"),
    "clamp": _clamp,
    "gelu": _gelu,
    "leaky_relu": _mapped("v >= 0 ? v : v * $slope"),
    "elu": _mapped("v >= 0 ? v : $alpha * Math.expm1(v)"),
    "prelu": _prelu,
    "softplus": _mapped("softplus(v, $beta)"),
    "softmax": lambda at, x: f"softmax({x[0]}, {at.shape()}, {at.a['axis'] % len(at.shape())})",
    "power": _mapped("v ** $exponent"),
    "add": _binary("+"),
    "sub": _binary("-"),
    "mul": _binary("*"),
    "div": _binary("/"),
    "matmul": lambda at, x: f"matmul({x[0]}, {at.shape()}, {x[1]}, {at.shape(1)}, {at.out()})",
    "attention": _attention,
    "concat": lambda at, x: (
        f"concat([{', '.join(x)}], {[at.shape(n) for n in range(len(x))]}, {at.a['axis'] % len(at.shape())})"
    ),
    "reshape": lambda at, x: x[0],
    "permute": _permute,
    "expand": lambda at, x: f"spread({x[0]}, {at.shape()}, {at.out()})",
    "slice": _slice,
    "pad": lambda at, x: (
        f"pad({x[0]}, {at.shape()}, {[list(p) for p in at.a['padding']]}, {_number(at.a['value'])})"
    ),
}
