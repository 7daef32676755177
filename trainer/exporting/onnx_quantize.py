"""Writes the rounding of maps in ONNX: as torch rounds, or as QuantizeLinear, with weights and biases as integers."""

from typing import Any

import numpy as np
import torch

from trainer.compression.rounding import grid_exponent
from trainer.exporting.graph import Graph, Node
from trainer.exporting.integer_steps import exponents_read
from trainer.exporting.onnx_builder import FLOAT, Builder
from trainer.networks.quantizers import HIGHEST, TIE


def quantize(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    """Writes a quantizer with the same bits as in torch."""
    a, step = node.attributes, _number(made, 2.0 ** node.attributes["exponent"])
    if a["mean"]:
        return _image(made, graph, node, x[0])
    scaled = made.add("Mul", x[0], _number(made, 2.0 ** -a["exponent"]))
    below = made.add("Floor", scaled)
    up = made.add("GreaterOrEqual", made.add("Sub", scaled, below), _number(made, TIE))
    whole = made.add("Add", below, made.add("Cast", up, to=FLOAT))
    ends = [_number(made, end - a["zero"]) for end in (0, HIGHEST)]
    return made.add("Mul", made.add("Clip", whole, *ends), step)


def _image(made: Builder, graph: Graph, node: Node, x: str) -> str:
    """Writes the quantizer of a normalised image, whose bytes are its pixels."""
    a, shape = node.attributes, graph.shape(node.inputs[0])
    std, mean = (np.float32(HIGHEST) * np.asarray(a[key], np.float32) for key in ("std", "mean"))
    if len(mean) > 1:
        positions = shape[1] // len(mean) if len(shape) == 2 else 1
        std, mean = (np.repeat(v, positions).reshape(-1, *[1] * (len(shape) - 2)) for v in (std, mean))
    pixels = made.add("Round", made.add("Add", made.add("Mul", x, made.constant(std)), made.constant(mean)))
    from_zero = made.add("Sub", pixels, _number(made, a["zero"])) if a["zero"] else pixels
    return made.add("Mul", from_zero, _number(made, 2.0 ** a["exponent"]))


def quantize_linear(made: Builder, graph: Graph, node: Node, x: list[str]) -> str:
    """Writes a quantizer as QuantizeLinear and DequantizeLinear with the same step; halves go to the even number there."""
    a = node.attributes
    given = _image(made, graph, node, x[0]) if a["mean"] else x[0]
    facts = [_number(made, 2.0 ** a["exponent"]), made.constant(np.uint8(a["zero"]))]
    return made.add("DequantizeLinear", made.add("QuantizeLinear", given, *facts), *facts)


def integer_layer(made: Builder, graph: Graph, node: Node) -> list[str]:
    """Returns the names of a layer's weight and bias, which are written as integers times their steps."""
    weight = graph.weights[node.weights["weight"]]
    exponent = grid_exponent(torch.from_numpy(weight))
    parts: list[tuple[np.ndarray, int, Any]] = [(weight, exponent, np.int8)]
    if "bias" in node.weights:
        unit = exponent + exponents_read(graph)[node.layer]
        parts.append((graph.weights[node.weights["bias"]], unit, np.int32))
    return [
        made.add(
            "DequantizeLinear",
            made.constant(np.rint(values.astype(np.float64) * 2.0**-e), kind),
            _number(made, 2.0**e),
            made.constant(kind(0)),
        )
        for values, e, kind in parts
    ]


def _number(made: Builder, value: float) -> str:
    return made.constant(np.float32(value))
