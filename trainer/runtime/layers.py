"""The layers of our own networks twice: on arrays, and on shapes alone.

A network of `trainer.runtime.networks` is written once against these methods. `Shapes` finds the names and shapes of its
tensors, in the order of torch's `state_dict`; `Values` computes its logits.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.mistakes import Mistake

Shape = tuple[int, ...]
GATES = {"lstm": 4, "gru": 3}


class Shapes:
    """Notes the tensors of each layer; what goes through the layers is the shape (C, H, W) or (D,) of one image's map.

    Args:
        resized: {layer: sizes} of layers from which channels were removed, see `networks.sizes.resize`.
    """

    def __init__(self, resized: Mapping[str, Any]) -> None:
        self.resized = resized
        self.found: dict[str, tuple[Shape, str]] = {}

    def conv(
        self,
        x: Shape,
        name: str,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        depthwise: bool = False,
    ) -> Shape:
        outputs, inputs = self._sizes(name, outputs, x[0])
        self._note(f"{name}.weight", (outputs, 1 if depthwise else inputs, kernel, kernel))
        if bias:
            self._note(f"{name}.bias", (outputs,))
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in x[1:])
        return outputs, height, width

    def linear(self, x: Shape, name: str, outputs: int, bias: bool = True) -> Shape:
        outputs, inputs = self._sizes(name, outputs, x[0])
        self._note(f"{name}.weight", (outputs, inputs))
        if bias:
            self._note(f"{name}.bias", (outputs,))
        return (outputs,)

    def norm(self, x: Shape, name: str) -> Shape:
        (channels,) = self.resized.get(name, x[:1])
        self._fits(name, channels, x[0])
        for part in ("weight", "bias", "running_mean", "running_var"):
            self._note(f"{name}.{part}", (channels,))
        self._note(f"{name}.num_batches_tracked", (), "int64")
        return x

    def recurrent(
        self, x: Shape, name: str, kind: str, hidden: int, num_layers: int, bidirectional: bool
    ) -> Shape:
        channels, _, width = x
        inputs, directions = channels * width, ["", "_reverse"] if bidirectional else [""]
        for layer in range(num_layers):
            for end in directions:
                self._note(f"{name}.weight_ih_l{layer}{end}", (GATES[kind] * hidden, inputs))
                self._note(f"{name}.weight_hh_l{layer}{end}", (GATES[kind] * hidden, hidden))
                self._note(f"{name}.bias_ih_l{layer}{end}", (GATES[kind] * hidden,))
                self._note(f"{name}.bias_hh_l{layer}{end}", (GATES[kind] * hidden,))
            inputs = hidden * len(directions)
        return (inputs,)

    def relu(self, x: Shape) -> Shape:
        return x

    gelu = relu

    def max_pool(self, x: Shape) -> Shape:
        return x[0], x[1] // 2, x[2] // 2

    def mean(self, x: Shape) -> Shape:
        return x[:1]

    def amax(self, x: Shape) -> Shape:
        return x[:1]

    def flatten(self, x: Shape) -> Shape:
        return (math.prod(x),)

    def add(self, x: Shape, y: Shape) -> Shape:
        if x != y:
            raise Mistake(f"maps of {x} and {y} cannot be added")
        return x

    def scale(self, x: Shape, factor: float) -> Shape:
        return x

    def side(self, x: Shape) -> int:
        """Returns the shorter side of a map."""
        return min(x[1:])

    def _sizes(self, name: str, outputs: int, inputs: int) -> Sequence[int]:
        sizes = self.resized.get(name, (outputs, inputs))
        self._fits(name, sizes[1], inputs)
        return sizes

    def _fits(self, name: str, takes: int, gets: int) -> None:
        if takes != gets:
            raise Mistake(f"layer {name!r} takes {takes} channels and gets {gets}")

    def _note(self, name: str, shape: Shape, dtype: str = "float32") -> None:
        if not all(type(size) is int and size > 0 for size in shape):
            raise TypeError(f"{name} would have the shape {shape}")
        self.found[name] = shape, dtype


class Values:
    """Applies the layers to float32 maps [N, C, H, W] or [N, D], as torch's modules of the same names do in evaluation."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self.weights = weights

    def conv(
        self,
        x: np.ndarray,
        name: str,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        depthwise: bool = False,
    ) -> np.ndarray:
        weight = self.weights[f"{name}.weight"]
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        height, width = ((side - kernel) // stride + 1 for side in x.shape[2:])
        out = np.zeros((len(x), len(weight), height, width), np.float32)
        for i in range(kernel):
            for j in range(kernel):
                part = x[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
                part = part[:, :, :height, :width]
                if depthwise:
                    out += weight[:, 0, i, j, None, None] * part
                else:
                    flat = np.ascontiguousarray(part).reshape(len(x), x.shape[1], height * width)
                    out += (weight[:, :, i, j] @ flat).reshape(out.shape)
        return out + self.weights[f"{name}.bias"][:, None, None] if bias else out

    def linear(self, x: np.ndarray, name: str, outputs: int, bias: bool = True) -> np.ndarray:
        out = x @ self.weights[f"{name}.weight"].T
        return out + self.weights[f"{name}.bias"] if bias else out

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        weight, bias, mean, variance = (
            self.weights[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + np.float32(1e-5))
        return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]

    def recurrent(
        self, x: np.ndarray, name: str, kind: str, hidden: int, num_layers: int, bidirectional: bool
    ) -> np.ndarray:
        """Reads an image's rows; returns the top layer's output [N, D] at the last step of each direction."""
        rows = x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)
        last = rows[:, -1]
        step = _lstm_step if kind == "lstm" else _gru_step
        for layer in range(num_layers):
            read = []
            for end in ["", "_reverse"] if bidirectional else [""]:
                parts = [
                    self.weights[f"{name}.{part}_l{layer}{end}"]
                    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                ]
                read.append(_read(rows[:, ::-1] if end else rows, step, hidden, *parts))
            last = np.concatenate([outputs[:, -1] for outputs in read], 1)
            rows = np.concatenate([read[0], *(outputs[:, ::-1] for outputs in read[1:])], 2)
        return last

    def relu(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x, np.float32(0))

    def gelu(self, x: np.ndarray) -> np.ndarray:
        return (x * (1 + _erf(x.astype(np.float64) / math.sqrt(2))) / 2).astype(np.float32)

    def max_pool(self, x: np.ndarray) -> np.ndarray:
        height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        rows = np.maximum(x[:, :, 0:height:2, :width], x[:, :, 1:height:2, :width])
        return np.maximum(rows[..., 0::2], rows[..., 1::2])

    def mean(self, x: np.ndarray) -> np.ndarray:
        return x.mean((2, 3))

    def amax(self, x: np.ndarray) -> np.ndarray:
        return x.max((2, 3))

    def flatten(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), -1)

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x + y

    def scale(self, x: np.ndarray, factor: float) -> np.ndarray:
        return x * np.float32(factor)

    def side(self, x: np.ndarray) -> int:
        """Returns the shorter side of a map."""
        return min(x.shape[2:])


Layers = Any  # Shapes or Values: a network is written once for both


def _read(
    rows: np.ndarray, step: Any, hidden: int, w_in: np.ndarray, w: np.ndarray, b_in: np.ndarray, b: np.ndarray
) -> np.ndarray:
    """Returns the outputs [N, T, hidden] of one layer and direction for rows [N, T, D], in the order of the rows."""
    given = rows @ w_in.T + b_in
    state = np.zeros((2, len(rows), hidden), np.float32)  # output and cell
    outputs = []
    for t in range(rows.shape[1]):
        state = step(given[:, t], state[0] @ w.T + b, state)
        outputs.append(state[0])
    return np.stack(outputs, 1)


def _lstm_step(given: np.ndarray, kept: np.ndarray, state: np.ndarray) -> np.ndarray:
    enters, forgets, new, leaves = np.split(given + kept, 4, 1)
    cell = _sigmoid(forgets) * state[1] + _sigmoid(enters) * np.tanh(new)
    return np.stack([_sigmoid(leaves) * np.tanh(cell), cell])


def _gru_step(given: np.ndarray, kept: np.ndarray, state: np.ndarray) -> np.ndarray:
    (reset, update, new), (own_reset, own_update, own_new) = np.split(given, 3, 1), np.split(kept, 3, 1)
    share = _sigmoid(update + own_update)
    output = (1 - share) * np.tanh(new + _sigmoid(reset + own_reset) * own_new) + share * state[0]
    return np.stack([output, state[1]])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return (np.tanh(x / 2) + 1) / 2  # does not overflow


def _erf(x: np.ndarray) -> np.ndarray:
    """Returns the error function within 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    size = np.abs(x)
    t = 1 / (1 + 0.3275911 * size)
    series = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    return np.sign(x) * (1 - t * series * np.exp(-size * size))
