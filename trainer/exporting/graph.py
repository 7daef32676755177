"""The plain form of a network that every target writes from: a list of nodes, in order of computation.

A node has an operator of the list below, the names of its inputs and outputs, weights by role, and attributes. Inputs are names of
values or of constants (keys of `Graph.weights`). Spatial axes follow the channels; sizes along them are tuples, one number for
each. Dropout, casts to float32, clones and parts that do not depend on the image are already gone.

    op            inputs       weights                      attributes
    conv          x            weight [O, I / groups, ...],  stride, padding ((before, after), ...), dilation, groups
                               bias [O] or none
    linear        x            weight [O, I], bias or none
    batch_norm    x            weight, bias (or none),      eps; of the channels, axis 1
                               mean, var
    layer_norm    x            weight, bias (or none)       eps, axes (the last ones)
    group_norm    x            weight, bias (or none)       eps, groups
    lstm          x            for each layer and direction hidden, layers, bidirectional, batch_first; initial states are
                               l (from 0; reverse: l + r):  zero; gates as torch has them: i, f, g, o
                               weight_ih_l, weight_hh_l,
                               bias_ih_l, bias_hh_l
    gru           x            the same                     the same; gates r, z, n, as torch has them
    max_pool      x                                         kernel, stride, padding, dilation, ceil
    avg_pool      x                                         kernel, stride, padding, ceil, count_padding
    mean          x                                         axes, keep
    amax          x                                         axes, keep
    relu hardswish hardsigmoid silu sigmoid tanh mish exp sqrt neg abs erf    (one input, none)
    clamp         x                                         least, most (None: no bound); relu6 is 0, 6
    gelu          x                                         approximate: 'none' (with erf) or 'tanh'
    leaky_relu    x                                         slope
    elu           x                                         alpha
    prelu         x            weight [C] or [1]            of the channels, axis 1
    softplus      x                                         beta
    softmax       x                                         axis
    power         x                                         exponent
    add sub mul div            x, y                         numpy's broadcasting
    add sub mul div            x                            scalar: the second operand; left: True where it is the first
    matmul        x, y
    attention     q, k, v (and a constant mask that is added)    scale
    concat        x, y, ...                                 axis
    reshape       x                                         the output's value has the shape
    permute       x                                         order
    expand        x                                         the output's value has the shape
    slice         x                                         axis, start, stop, step (all of one image; never the batch axis)
    pad           x                                         padding ((before, after) of every axis), value
    quantize      x                                         exponent, zero; of an image mean, std: `networks.quantizers`
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.mistakes import Mistake

OPS = frozenset(
    """conv linear batch_norm layer_norm group_norm lstm gru max_pool avg_pool mean amax relu hardswish hardsigmoid silu
    sigmoid tanh mish exp sqrt neg abs erf clamp gelu leaky_relu elu prelu softplus softmax power add sub mul div matmul
    attention concat reshape permute expand slice pad quantize""".split()
)


@dataclass(frozen=True)
class Value:
    """The shape of a value for one image, and the axis that grows with the number of images (None: it does not grow).

    With N images the size along `batch_axis` is N times that in `shape`.
    """

    shape: tuple[int, ...]
    batch_axis: int | None


@dataclass(frozen=True)
class Node:
    """One operator. layer: dotted name of the module that it comes from, for messages and comments."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, str] = field(default_factory=dict)  # {role: name in Graph.weights}
    attributes: dict[str, Any] = field(default_factory=dict)
    layer: str = ""


@dataclass
class Graph:
    """A network: normalised images [N, C, H, W] to logits [N, K].

    Attributes:
        input: Name of the image's value.
        output: Name of the logits' value.
        nodes: In order of computation.
        values: {name: Value} of the input and of every output of a node.
        weights: {name: array} of parameters, statistics and constants, float32, as the network uses them.
    """

    input: str
    output: str
    nodes: list[Node]
    values: dict[str, Value]
    weights: dict[str, np.ndarray]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a value for one image, or of a constant."""
        return self.values[name].shape if name in self.values else self.weights[name].shape

    def last_use(self) -> dict[str, int]:
        """Returns {value: number of the last node that reads it}; the logits are read after the last node."""
        found = {name: number for number, node in enumerate(self.nodes) for name in node.inputs}
        return found | {self.output: len(self.nodes)}


def check_sequences(graph: Graph, target: str) -> None:
    """Raises Mistake for a recurrent layer that reads several sequences of one image, which `target` does not write."""
    for node in graph.nodes:
        if node.op not in ("lstm", "gru"):
            continue
        count = graph.shape(node.inputs[0])[0 if node.attributes["batch_first"] else 1]
        if count != 1:
            raise Mistake(
                f"to {target}: layer {node.layer!r}: operator {node.op} of {count} sequences an image cannot be written for this target"
            )
