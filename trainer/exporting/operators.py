"""Turns the operators of torch's core ATen graph into those of `graph`. Each converter is named by its operator."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from trainer.exporting.graph import Value
from trainer.exporting.operators_moving import MOVING, Arguments, Unsupported, rank

# Operators whose result is their first argument: in evaluation mode, in float32.
ALIASES = {"clone", "alias", "dropout", "detach", "contiguous", "lift_fresh_copy", "detach_", "_to_copy"}

# Types of numbers that float32 stands for: a cast to another one changes them.
TYPES = (torch.float32, torch.float64)

# Operators whose result along one axis is a sum of what lies along that axis, with constant weights.
UPSAMPLING = (
    "upsample_nearest1d.vec upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec".split()
)


def _sizes(value: Any, count: int) -> tuple[int, ...]:
    """Returns one number for each spatial axis."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * count if len(values) == 1 else values)


def _sides(value: Any, count: int) -> tuple[tuple[int, int], ...]:
    return tuple((size, size) for size in _sizes(value, count))


def _axes(value: Any, count: int) -> tuple[int, ...]:
    axes = range(count) if value is None or value == [] else [value] if isinstance(value, int) else value
    return tuple(sorted(axis % count for axis in axes))


def _conv(reader: Any, node: fx.Node, a: Arguments) -> None:
    count = rank(a["weight"]) - 2
    if a.get("transposed") or any(a.get("output_padding") or [0]):
        raise Unsupported("a transposed convolution")
    if rank(a["input"]) != count + 2:
        raise Unsupported("a convolution of a single image without a batch axis")
    reader.add(
        node,
        "conv",
        [a["input"]],
        {"weight": a["weight"], "bias": a["bias"]},
        stride=_sizes(a["stride"], count),
        padding=_sides(a["padding"], count),
        dilation=_sizes(a["dilation"], count),
        groups=a["groups"],
    )


def _linear(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "linear", [a["input"]], {"weight": a["weight"], "bias": a["bias"]})


def _batch_norm(reader: Any, node: fx.Node, a: Arguments) -> None:
    weights = {"weight": a["weight"], "bias": a["bias"], "mean": a["running_mean"], "var": a["running_var"]}
    reader.add(node, "batch_norm", [a["input"]], weights, parts=1, eps=a["eps"])


def _layer_norm(reader: Any, node: fx.Node, a: Arguments) -> None:
    axes = tuple(range(rank(node) - len(a["normalized_shape"]), rank(node)))
    reader.add(
        node, "layer_norm", [a["input"]], {"weight": a["weight"], "bias": a["bias"]}, eps=a["eps"], axes=axes
    )


def _group_norm(reader: Any, node: fx.Node, a: Arguments) -> None:
    weights = {"weight": a["weight"], "bias": a["bias"]}
    reader.add(node, "group_norm", [a["input"]], weights, eps=a["eps"], groups=a["num_groups"])


def _recurrent(op: str) -> Callable[[Any, fx.Node, Arguments], None]:
    def convert(reader: Any, node: fx.Node, a: Arguments) -> None:
        states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
        if any(reader.filled.get(state.name) != 0 for state in states):
            raise Unsupported("an initial state that is not zero")
        directions = 2 if a["bidirectional"] else 1
        roles = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if a["has_biases"] else [])
        names = [
            f"{role}_l{layer}{'_reverse' * direction}"
            for layer in range(a["num_layers"])
            for direction in range(directions)
            for role in roles
        ]
        if len(names) != len(a["params"]):
            raise Unsupported("a projection in an LSTM")
        weights = dict(zip(names, a["params"], strict=True))
        hidden = a["params"][1].meta["val"].shape[1]
        reader.add(
            node,
            op,
            [a["input"]],
            weights,
            parts=1,
            hidden=hidden,
            layers=a["num_layers"],
            bidirectional=bool(a["bidirectional"]),
            batch_first=bool(a["batch_first"]),
        )
        if a["num_layers"] == 1:
            reader.parts[node.name, 1] = _last_state(reader, node, hidden, directions, bool(a["batch_first"]))

    return convert


def _last_state(reader: Any, node: fx.Node, hidden: int, directions: int, batch_first: bool) -> str:
    """Adds the last state [directions, N, hidden] of a recurrent layer: parts of its outputs. Returns its name."""
    outputs = reader.parts[node.name, 0]
    time, ends = int(batch_first), []
    for direction in range(directions):
        step = (
            0 if direction else reader.values[outputs].shape[time] - 1
        )  # upwards the first row is read last
        end = reader.cut(node, outputs, time, step, step + 1)
        if directions == 2:
            end = reader.cut(node, end, 2, direction * hidden, (direction + 1) * hidden)
        if batch_first:
            end = reader.step(node, "permute", [end], Value((1, 1, hidden), 1), order=(1, 0, 2))
        ends.append(end)
    return ends[0] if directions == 1 else reader.step(node, "concat", ends, Value((2, 1, hidden), 1), axis=0)


def _filled(number: float | None) -> Callable[[Any, fx.Node, Arguments], None]:
    def convert(reader: Any, node: fx.Node, a: Arguments) -> None:
        given = a["fill_value"] if number is None else number
        # As its type holds it: 2 for 2.7 in a tensor of whole numbers.
        reader.filled[node.name] = torch.tensor(given).to(node.meta["val"].dtype).item()

    return convert


def _max_pool(reader: Any, node: fx.Node, a: Arguments) -> None:
    count = rank(a["self"]) - 2
    several = isinstance(node.meta["val"], tuple)  # values and positions
    reader.add(
        node,
        "max_pool",
        [a["self"]],
        parts=1 if several else 0,
        kernel=_sizes(a["kernel_size"], count),
        stride=_sizes(a["stride"] or a["kernel_size"], count),
        padding=_sides(a["padding"], count),
        dilation=_sizes(a["dilation"], count),
        ceil=bool(a["ceil_mode"]),
    )


def _avg_pool(reader: Any, node: fx.Node, a: Arguments) -> None:
    if a.get("divisor_override"):
        raise Unsupported("an average pooling with a divisor of its own")
    count = rank(a["self"]) - 2
    reader.add(
        node,
        "avg_pool",
        [a["self"]],
        kernel=_sizes(a["kernel_size"], count),
        stride=_sizes(a["stride"] or a["kernel_size"], count),
        padding=_sides(a["padding"], count),
        ceil=bool(a["ceil_mode"]),
        count_padding=bool(a["count_include_pad"]),
    )


def _adaptive_pool(reader: Any, node: fx.Node, a: Arguments) -> None:
    before, after = a["self"].meta["val"].shape[2:], node.meta["val"].shape[2:]
    if all(size == 1 for size in after):
        reader.add(node, "mean", [a["self"]], axes=tuple(range(2, rank(node))), keep=True)
        return
    if any(b % a_ for b, a_ in zip(before, after, strict=True)):
        pool: Any = adaptive_avg_pool2d if len(after) == 2 else adaptive_avg_pool1d
        _resampled(reader, node, a["self"], lambda rows, sizes, axis: pool(rows, sizes))
        return
    size = tuple(b // a_ for b, a_ in zip(before, after, strict=True))
    none = tuple((0, 0) for _ in size)
    reader.add(
        node, "avg_pool", [a["self"]], kernel=size, stride=size, padding=none, ceil=False, count_padding=True
    )


def _upsampled(reader: Any, node: fx.Node, a: Arguments) -> None:
    target: Any = node.target
    further = [value for name, value in a.items() if name not in ("input", "output_size", "scale_factors")]

    def one(rows: Tensor, sizes: list[int], axis: int) -> Tensor:
        if not a["scale_factors"]:
            return target(rows, sizes, *further, None)
        factors = [f if number == axis else 1.0 for number, f in enumerate(a["scale_factors"])]
        return target(rows, None, *further, factors)

    _resampled(reader, node, a["input"], one)


def _resampled(
    reader: Any, node: fx.Node, source: Any, one: Callable[[Tensor, list[int], int], Tensor]
) -> None:
    """Adds what makes new rows of an image's rows, then new columns of its columns: products with constants.

    one: does it along one spatial axis alone, given a map, the result's sizes and the axis' number.
    """
    name, count = reader.name(source), rank(node) - 2
    shape, out = list(reader.values[name].shape), reader.value(node).shape
    for number in range(count):
        axis, last = 2 + number, number == count - 1
        size = shape[axis]
        ones = [1] * count
        impulses = torch.eye(size).view(1, size, *ones[:number], size, *ones[number + 1 :])
        made = one(impulses, [*ones[:number], out[axis], *ones[number + 1 :]], number).view(size, out[axis])
        constant = reader.constant(reader.part_name(node), made if last else made.T)
        shape[axis] = out[axis]
        inputs = [name, constant] if last else [constant, name]
        name = reader.step(node, "matmul", inputs, Value(tuple(shape), 0))
    reader.same[node.name] = name


def _reduced(op: str) -> Callable[[Any, fx.Node, Arguments], None]:
    def convert(reader: Any, node: fx.Node, a: Arguments) -> None:
        axes = _axes(a["dim"], rank(a["self"]))
        if reader.values[reader.name(a["self"])].batch_axis in axes:
            raise Unsupported("a reduction over the images of a batch")
        reader.add(node, op, [a["self"]], axes=axes, keep=bool(a["keepdim"]))

    return convert


def _sum(reader: Any, node: fx.Node, a: Arguments) -> None:
    source = reader.name(a["self"])
    axes, value = _axes(a["dim"], rank(a["self"])), reader.values[source]
    if value.batch_axis in axes:
        raise Unsupported("a reduction over the images of a batch")
    count = math.prod(value.shape[axis] for axis in axes)
    means = reader.step(node, "mean", [source], reader.value(node), axes=axes, keep=bool(a["keepdim"]))
    reader.add(node, "mul", [means], scalar=float(count), left=False)


def _unary(op: str, **renamed: str) -> Callable[[Any, fx.Node, Arguments], None]:
    """renamed: {attribute of the graph: argument of the operator}."""

    def convert(reader: Any, node: fx.Node, a: Arguments) -> None:
        attributes = {name: a[argument] for name, argument in renamed.items()}
        reader.add(node, op, [next(iter(a.values()))], **attributes)

    return convert


def _clamp(least: str, most: str) -> Callable[[Any, fx.Node, Arguments], None]:
    """least, most: arguments of the operator. An infinite bound is none."""

    def convert(reader: Any, node: fx.Node, a: Arguments) -> None:
        low, high = (
            None if a[name] == end else a[name] for name, end in ((least, -math.inf), (most, math.inf))
        )
        reader.add(node, "clamp", [a["self"]], least=low, most=high)

    return convert


def _softmax(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "softmax", [a["self"]], axis=a["dim"] % rank(node))


def _elu(reader: Any, node: fx.Node, a: Arguments) -> None:
    if a["scale"] != 1 or a["input_scale"] != 1:
        raise Unsupported("an ELU with a scale")
    reader.add(node, "elu", [a["self"]], alpha=float(a["alpha"]))


def _prelu(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "prelu", [a["self"]], {"weight": a["weight"]})


def _softplus(reader: Any, node: fx.Node, a: Arguments) -> None:
    if a["threshold"] != 20:
        raise Unsupported(f"a softplus with the threshold {a['threshold']}")
    reader.add(node, "softplus", [a["self"]], beta=float(a["beta"]))


def _scalar(reader: Any, value: Any) -> float | None:
    """Returns an operand that is one number; None for a tensor."""
    if isinstance(value, fx.Node):
        return float(reader.filled[value.name]) if value.name in reader.filled else None
    return float(value)


def _binary(op: str, left: bool = False) -> Callable[[Any, fx.Node, Arguments], None]:
    def convert(reader: Any, node: fx.Node, a: Arguments) -> None:
        if a.get("alpha", 1) != 1 or a.get("rounding_mode"):
            raise Unsupported(f"{op} with a factor or a rounding")
        first, second = (_scalar(reader, a[side]) for side in ("self", "other"))
        if first is None and second is None:
            reader.add(node, op, [a["self"], a["other"]])
        elif second is not None:
            reader.add(node, op, [a["self"]], scalar=second, left=left)
        else:
            reader.add(node, op, [a["other"]], scalar=first, left=not left)

    return convert


def _power(reader: Any, node: fx.Node, a: Arguments) -> None:
    if not isinstance(a["exponent"], int | float):
        raise Unsupported("a power with a computed exponent")
    reader.add(node, "power", [a["self"]], exponent=float(a["exponent"]))


def _rsqrt(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "power", [a["self"]], exponent=-0.5)


def _reciprocal(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "div", [a["self"]], scalar=1.0, left=True)


def _matmul(reader: Any, node: fx.Node, a: Arguments) -> None:
    reader.add(node, "matmul", [a["self"], a.get("other", a.get("mat2"))])


def _attention(reader: Any, node: fx.Node, a: Arguments) -> None:
    if a["is_causal"] or a.get("enable_gqa") or a["dropout_p"]:
        raise Unsupported("attention that is causal or grouped")
    mask = [] if a["attn_mask"] is None else [a["attn_mask"]]
    scale = a.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(a["query"].meta["val"].shape[-1])
    reader.add(node, "attention", [a["query"], a["key"], a["value"], *mask], scale=float(scale))


def _quantize(reader: Any, node: fx.Node, a: Arguments) -> None:
    facts = {name: a[name] for name in ("exponent", "zero", "mean", "std")}
    reader.add(node, "quantize", [a["x"]], **facts)


CONVERTERS: dict[str, Callable[[Any, fx.Node, Arguments], None]] = {
    **dict.fromkeys(("conv1d", "conv2d", "convolution"), _conv),
    "linear": _linear,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "lstm.input": _recurrent("lstm"),
    "gru.input": _recurrent("gru"),
    "full": _filled(None),
    **dict.fromkeys(("zeros", "zeros_like"), _filled(0)),
    "scalar_tensor": _filled(None),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool2d_with_indices"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d"), _avg_pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d"), _adaptive_pool),
    "mean.dim": _reduced("mean"),
    "amax": _reduced("amax"),
    "sum.dim_IntList": _sum,
    **dict.fromkeys(UPSAMPLING, _upsampled),
    **{
        op: _unary(op)
        for op in "relu hardswish hardsigmoid silu sigmoid tanh mish exp sqrt neg abs erf".split()
    },
    "hardtanh": _clamp("min_val", "max_val"),
    "clamp": _clamp("min", "max"),
    "gelu": _unary("gelu", approximate="approximate"),
    "leaky_relu": _unary("leaky_relu", slope="negative_slope"),
    "elu": _elu,
    "prelu": _prelu,
    "softplus": _softplus,
    "softmax.int": _softmax,
    "_softmax": _softmax,
    **{f"{op}.{kind}": _binary(op) for op in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    "rsub.Scalar": _binary("sub", left=True),
    "pow.Tensor_Scalar": _power,
    "rsqrt": _rsqrt,
    "reciprocal": _reciprocal,
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    "scaled_dot_product_attention": _attention,
    **MOVING,
    "tiny_student.quantize": _quantize,
}
