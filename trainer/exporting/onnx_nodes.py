"""Writes a graph's nodes as standard ONNX operators of opset 18."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.exporting.graph import Graph, Node
from trainer.exporting.onnx_builder import IMAGE, LOGITS, Builder
from trainer.exporting.onnx_quantize import integer_layer, quantize, quantize_linear

Writer = Callable[[Builder, Graph, Node, list[str]], str]


def write_nodes(graph: Graph, integers: bool = False) -> Builder:
    """Returns the nodes and dense constants of a graph.

    integers: whether a quantized network's maps and weights are written as QuantizeLinear and integers.
    """
    made = Builder()
    writers = {**WRITERS, **INTEGER_WRITERS} if integers else WRITERS
    names: dict[str, str] = {graph.input: IMAGE}
    for node in graph.nodes:
        inputs = [
            names[name] if name in names else made.constant(graph.weights[name]) for name in node.inputs
        ]
        before = len(made.nodes)
        names[node.outputs[0]] = writers[node.op](made, graph, node, inputs)
        assert len(made.nodes) > before, node
    last = names[graph.output]
    for _, inputs, outputs, _ in made.nodes:
        inputs[:] = [LOGITS if name == last else name for name in inputs]
        outputs[:] = [LOGITS if name == last else name for name in outputs]
    return made


def _array(graph: Graph, node: Node, role: str) -> np.ndarray | None:
    return graph.weights[node.weights[role]] if role in node.weights else None


def _pads(padding: tuple[tuple[int, int], ...]) -> dict[str, list[int]]:
    sides = [before for before, _ in padding] + [after for _, after in padding]
    return {"pads": sides} if any(sides) else {}


def _sizes(name: str, sizes: tuple[int, ...]) -> dict[str, list[int]]:
    """Returns an attribute of sizes, or none where all are 1, the default."""
    return {name: list(sizes)} if any(size != 1 for size in sizes) else {}


def _constants(made: Builder, graph: Graph, node: Node) -> list[str]:
    """Returns the names of a layer's weight and bias."""
    return [made.constant(graph.weights[node.weights[r]]) for r in ("weight", "bias") if r in node.weights]


def _conv(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    return _conv_of(made, node, x, _constants(made, graph, node))


def _conv_of(made: Builder, node: Node, x: list[str], weights: list[str]) -> str:
    a = node.attributes
    attributes: dict[str, Any] = {
        **_sizes("strides", a["stride"]),
        **_sizes("dilations", a["dilation"]),
        **_pads(a["padding"]),
    }
    if a["groups"] != 1:
        attributes["group"] = a["groups"]
    return made.add("Conv", *x, *weights, **attributes)


def _linear(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    weight, bias = _array(graph, node, "weight"), _array(graph, node, "bias")
    assert weight is not None
    if len(graph.shape(node.inputs[0])) == 2:
        inputs = [made.constant(weight), *([] if bias is None else [made.constant(bias)])]
        return made.add("Gemm", *x, *inputs, transB=1)
    found = made.add("MatMul", *x, made.constant(weight.T))
    return found if bias is None else made.add("Add", found, made.constant(bias))


def _batch_norm(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    mean, var = _array(graph, node, "mean"), _array(graph, node, "var")
    assert mean is not None and var is not None
    weight, bias = _array(graph, node, "weight"), _array(graph, node, "bias")
    arrays = (
        np.ones_like(mean) if weight is None else weight,
        np.zeros_like(mean) if bias is None else bias,
        mean,
        var,
    )
    return made.add("BatchNormalization", *x, *map(made.constant, arrays), epsilon=node.attributes["eps"])


def _layer_norm(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    axes = node.attributes["axes"]
    shape = graph.shape(node.inputs[0])[axes[0] :]
    weight, bias = _array(graph, node, "weight"), _array(graph, node, "bias")
    inputs = [made.constant(np.ones(shape, np.float32) if weight is None else weight)]
    if bias is not None:
        inputs.append(made.constant(bias))
    return made.add("LayerNormalization", *x, *inputs, axis=axes[0] - len(graph.shape(node.inputs[0])), epsilon=node.attributes["eps"])  # fmt: skip


def _group_norm(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    groups, shape = node.attributes["groups"], graph.shape(node.inputs[0])
    grouped = made.add("Reshape", *x, made.constant([0, groups, -1], np.int64))
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    even = made.add("InstanceNormalization", grouped, made.constant(ones), made.constant(zeros), epsilon=node.attributes["eps"])  # fmt: skip
    found = made.add("Reshape", even, made.constant([-1, *shape[1:]], np.int64))
    for op, role in (("Mul", "weight"), ("Add", "bias")):
        array = _array(graph, node, role)
        if array is not None:
            found = made.add(op, found, made.constant(array.reshape(-1, *[1] * (len(shape) - 2))))
    return found


# The gates of torch in ONNX's order: i, f, g, o -> i, o, f, g; and r, z, n -> z, r, n.
GATES = {"lstm": (4, [0, 3, 1, 2]), "gru": (3, [1, 0, 2])}


def _recurrent(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    a = node.attributes
    num_gates, order = GATES[node.op]
    ends = ("", "_reverse") if a["bidirectional"] else ("",)

    def gates(name: str) -> np.ndarray:
        parts = np.split(graph.weights[node.weights[name]], num_gates)
        return np.concatenate([parts[number] for number in order])

    found = made.add("Transpose", *x, perm=[1, 0, 2]) if a["batch_first"] else x[0]
    for layer in range(a["layers"]):
        inputs = [
            made.constant(np.stack([gates(f"{role}_l{layer}{end}") for end in ends]))
            for role in ("weight_ih", "weight_hh")
        ]
        if f"bias_ih_l{layer}" in node.weights:
            biases = [
                np.concatenate([gates(f"bias_{kind}_l{layer}{end}") for kind in ("ih", "hh")]) for end in ends
            ]
            inputs.append(made.constant(np.stack(biases)))
        attributes: dict[str, Any] = {"hidden_size": a["hidden"]}
        if a["bidirectional"]:
            attributes["direction"] = "bidirectional"
        if node.op == "gru":
            attributes["linear_before_reset"] = 1
        found = made.add(node.op.upper(), found, *inputs, **attributes)  # [steps, directions, N, hidden]
        if a["bidirectional"]:
            found = made.add("Transpose", found, perm=[0, 2, 1, 3])
            found = made.add("Reshape", found, made.constant([0, 0, -1], np.int64))
        else:
            found = made.add("Squeeze", found, made.constant([1], np.int64))
    return made.add("Transpose", found, perm=[1, 0, 2]) if a["batch_first"] else found


def _pool(op: str) -> Writer:
    def write(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
        a = node.attributes
        attributes: dict[str, Any] = {
            "kernel_shape": list(a["kernel"]),
            **_sizes("strides", a["stride"]),
            **_pads(a["padding"]),
        }
        attributes |= _sizes("dilations", a.get("dilation", ()))
        if a["ceil"]:
            attributes["ceil_mode"] = 1
        if a.get("count_padding") and "pads" in attributes:
            attributes["count_include_pad"] = 1
        return made.add(op, *x, **attributes)

    return write


def _reduced(op: str) -> Writer:
    def write(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
        axes = made.constant(node.attributes["axes"], np.int64)
        return made.add(op, *x, axes, **({} if node.attributes["keep"] else {"keepdims": 0}))

    return write


def _simple(op: str, **renamed: str) -> Writer:
    """renamed: {attribute of ONNX: attribute of the graph}."""

    def write(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
        return made.add(op, *x, **{name: node.attributes[own] for name, own in renamed.items()})

    return write


def _scalar(made: Builder, value: float) -> str:
    return made.constant(np.float32(value))


def _hardsigmoid(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    return made.add("HardSigmoid", *x, alpha=1 / 6)


def _silu(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    return made.add("Mul", *x, made.add("Sigmoid", *x))


def _clamp(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    ends = [node.attributes[end] for end in ("least", "most")]
    return made.add("Clip", *x, *("" if end is None else _scalar(made, end) for end in ends))


def _gelu(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    if node.attributes["approximate"] == "none":
        inner = made.add("Erf", made.add("Div", *x, _scalar(made, math.sqrt(2))))
    else:
        cube = made.add("Mul", made.add("Pow", *x, _scalar(made, 3)), _scalar(made, 0.044715))
        sum_ = made.add("Add", *x, cube)
        inner = made.add("Tanh", made.add("Mul", sum_, _scalar(made, math.sqrt(2 / math.pi))))
    factor = made.add("Add", inner, _scalar(made, 1))
    return made.add("Mul", made.add("Mul", *x, factor), _scalar(made, 0.5))


def _prelu(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    slope = _array(graph, node, "weight")
    assert slope is not None
    return made.add(
        "PRelu", *x, made.constant(slope.reshape(-1, *[1] * (len(graph.shape(node.inputs[0])) - 2)))
    )


def _softplus(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    beta = node.attributes["beta"]
    if beta == 1:
        return made.add("Softplus", *x)
    return made.add(
        "Div", made.add("Softplus", made.add("Mul", *x, _scalar(made, beta))), _scalar(made, beta)
    )


def _power(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    return made.add("Pow", *x, _scalar(made, node.attributes["exponent"]))


def _binary(op: str) -> Writer:
    def write(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
        if "scalar" not in node.attributes:
            return made.add(op, *x)
        operands = [*x, _scalar(made, node.attributes["scalar"])]
        return made.add(op, *(operands[::-1] if node.attributes["left"] else operands))

    return write


def _attention(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    query, key, value, *mask = x
    order = list(range(len(graph.shape(node.inputs[1]))))
    order[-2:] = order[:-3:-1]
    query = made.add("Mul", query, _scalar(made, node.attributes["scale"]))
    scores = made.add("MatMul", query, made.add("Transpose", key, perm=order))
    scores = made.add("Add", scores, *mask) if mask else scores
    return made.add("MatMul", made.add("Softmax", scores), value)


def _reshape(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    found = graph.values[node.outputs[0]]
    shape = [-1 if axis == found.batch_axis else size for axis, size in enumerate(found.shape)]
    return made.add("Reshape", *x, made.constant(shape, np.int64))


def _expand(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    found = graph.values[node.outputs[0]]
    axis, shape = found.batch_axis, list(found.shape)
    if axis is None:
        return made.add("Expand", *x, made.constant(shape, np.int64))
    size = made.add("Shape", IMAGE, end=1)
    if shape[axis] != 1:
        size = made.add("Mul", size, made.constant([shape[axis]], np.int64))
    ends = [made.constant(part, np.int64) if part else None for part in (shape[:axis], shape[axis + 1 :])]
    parts = [part for part in (ends[0], size, ends[1]) if part is not None]
    return made.add("Expand", *x, made.add("Concat", *parts, axis=0))


def _slice(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    a = node.attributes
    keys = ("start", "stop", "axis") + (("step",) if a["step"] != 1 else ())
    return made.add("Slice", *x, *(made.constant([a[key]], np.int64) for key in keys))


def _pad(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    sides = _pads(node.attributes["padding"]).get("pads", [0] * 2 * len(node.attributes["padding"]))
    return made.add("Pad", *x, made.constant(sides, np.int64), _scalar(made, node.attributes["value"]))


INTEGER_WRITERS: dict[str, Writer] = {
    "quantize": quantize_linear,
    "conv": lambda made, graph, node, x: _conv_of(made, node, x, integer_layer(made, graph, node)),
    "linear": lambda made, graph, node, x: made.add("Gemm", *x, *integer_layer(made, graph, node), transB=1),
}
WRITERS: dict[str, Writer] = {
    "quantize": quantize,
    "conv": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "lstm": _recurrent,
    "gru": _recurrent,
    "max_pool": _pool("MaxPool"),
    "avg_pool": _pool("AveragePool"),
    "mean": _reduced("ReduceMean"),
    "amax": _reduced("ReduceMax"),
    "relu": _simple("Relu"),
    "hardswish": _simple("HardSwish"),
    "hardsigmoid": _hardsigmoid,
    "silu": _silu,
    "sigmoid": _simple("Sigmoid"),
    "tanh": _simple("Tanh"),
    "mish": _simple("Mish"),
    "exp": _simple("Exp"),
    "sqrt": _simple("Sqrt"),
    "neg": _simple("Neg"),
    "abs": _simple("Abs"),
    "erf": _simple("Erf"),
    "clamp": _clamp,
    "gelu": _gelu,
    "leaky_relu": _simple("LeakyRelu", alpha="slope"),
    "elu": _simple("Elu", alpha="alpha"),
    "prelu": _prelu,
    "softplus": _softplus,
    "softmax": _simple("Softmax", axis="axis"),
    "power": _power,
    **{op: _binary(op.capitalize()) for op in ("add", "sub", "mul", "div")},
    "matmul": _simple("MatMul"),
    "attention": _attention,
    "concat": _simple("Concat", axis="axis"),
    "reshape": _reshape,
    "permute": _simple("Transpose", perm="order"),
    "expand": _expand,
    "slice": _slice,
    "pad": _pad,
}
