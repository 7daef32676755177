"""Computes a saved Core ML program by torch, since Core ML itself is on Apple's systems alone.

The operators are those of MIL, Apple's model intermediate language, as coremltools documents them. A Var has `val`, its value if it is
constant, and an operation `op_type`, `inputs` and `outputs`.
"""

from collections.abc import Callable
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.mistakes import Mistake

KINDS = {"fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}
GELU = {"EXACT": "none", "TANH_APPROXIMATION": "tanh"}


def program_of(coremltools: Any, package: Path) -> Any:
    """Returns the main function of a .mlpackage, read from its files."""
    load = import_module("coremltools.converters.mil.frontend.milproto.load").load
    spec = coremltools.utils.load_spec(str(package))
    weights = package / "Data/com.apple.CoreML/weights"
    return load(spec, spec.specificationVersion, str(weights)).functions["main"]


def check(function: Any) -> None:
    """Raises Mistake for an operator that is not computed here, so that the program could not be checked."""
    unknown = sorted({step.op_type for step in function.operations} - OPERATORS.keys() - {"const"})
    if unknown:
        raise Mistake(
            f"Core ML's operators {', '.join(unknown)} cannot be computed here, so the program cannot be checked"
        )


def compute(function: Any, image: Tensor) -> Tensor:
    """Returns what a program of one input and one output answers."""
    [given], [wanted] = function.inputs.values(), function.outputs
    known = {given.name: image}

    def value(var: Any) -> Any:
        if isinstance(var, list | tuple):
            return [value(one) for one in var]
        if var.name in known:
            return known[var.name]
        held = var.val
        return torch.from_numpy(held) if isinstance(held, np.ndarray) and held.dtype.kind == "f" else held

    for step in function.operations:
        if step.op_type != "const":
            found = OPERATORS[step.op_type](
                **{key: value(var) for key, var in step.inputs.items() if var is not None}
            )
            known |= zip(
                (var.name for var in step.outputs),
                found if isinstance(found, tuple) else (found,),
                strict=True,
            )
    return known[wanted.name]


def _padded(x: Tensor, pad: Any, pad_type: str, by: float = 0.0) -> Tensor:
    """Returns maps with `pad`: before and after each axis of space, in order."""
    if pad_type == "valid" or not np.any(pad):
        return x
    if pad_type != "custom":
        raise Mistake(f"Core ML's padding {pad_type} cannot be computed here")
    pairs = np.reshape(pad, (-1, 2)).tolist()
    return F.pad(x, [int(size) for pair in reversed(pairs) for size in pair], value=by)


def _conv(
    x: Any, weight: Any, strides: Any, pad_type: Any, pad: Any, dilations: Any, groups: Any, bias: Any = None
) -> Tensor:
    by = F.conv2d if weight.ndim == 4 else F.conv1d
    return by(_padded(x, pad, pad_type), weight, bias, _sizes(strides), 0, _sizes(dilations), int(groups))


def _max_pool(
    x: Any, kernel_sizes: Any, strides: Any, pad_type: Any, pad: Any, ceil_mode: Any = False
) -> Tensor:
    by = F.max_pool2d if x.ndim == 4 else F.max_pool1d
    return by(
        _padded(x, pad, pad_type, -torch.inf),
        _sizes(kernel_sizes),
        _sizes(strides),
        ceil_mode=bool(ceil_mode),
    )


def _avg_pool(
    x: Any,
    kernel_sizes: Any,
    strides: Any,
    pad_type: Any,
    pad: Any,
    exclude_padding_from_average: Any,
    ceil_mode: Any = False,
) -> Tensor:
    if ceil_mode and not exclude_padding_from_average:
        raise Mistake("Core ML's avg_pool with ceil_mode over padding cannot be computed here")
    by = F.avg_pool2d if x.ndim == 4 else F.avg_pool1d
    found, one = (
        by(_padded(each, pad, pad_type), _sizes(kernel_sizes), _sizes(strides), ceil_mode=bool(ceil_mode))
        for each in (x, torch.ones_like(x))
    )
    return found / one if exclude_padding_from_average else found


def _slice(
    x: Any,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Tensor:
    none = np.zeros(len(begin), bool)
    no_begin, no_end, squeezed = (
        none if mask is None else mask for mask in (begin_mask, end_mask, squeeze_mask)
    )
    steps = np.ones(len(begin), int) if stride is None else stride
    places: list[Any] = []
    for axis, step in enumerate(steps):
        if squeezed[axis]:
            places.append(int(begin[axis]))
        else:
            start, stop = int(begin[axis]), int(end[axis])
            places.append(slice(None if no_begin[axis] else start, None if no_end[axis] else stop, int(step)))
    return x[tuple(places)]


def _batch_norm(
    x: Any, mean: Any, variance: Any, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def _layer_norm(x: Any, axes: Any, gamma: Any = None, beta: Any = None, epsilon: Any = 1e-5) -> Tensor:
    return F.layer_norm(x, [x.shape[axis] for axis in _sizes(axes)], gamma, beta, float(epsilon))


def _sizes(values: Any) -> list[int]:
    return [int(value) for value in values]


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(value)


def _one(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: function(x)


def _two(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, y: function(_tensor(x), _tensor(y))


OPERATORS: dict[str, Callable[..., Any]] = {
    "conv": _conv,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "relu": _one(F.relu),
    "relu6": _one(F.relu6),
    "sigmoid": _one(torch.sigmoid),
    "tanh": _one(torch.tanh),
    "silu": _one(F.silu),
    "exp": _one(torch.exp),
    "erf": _one(torch.erf),
    "abs": _one(torch.abs),
    "sqrt": _one(torch.sqrt),
    "inverse": lambda x, epsilon: 1 / (x + float(epsilon)),
    "floor": _one(torch.floor),
    "round": _one(torch.round),
    "gelu": lambda x, mode="EXACT": F.gelu(x, approximate=GELU[mode]),
    "leaky_relu": lambda x, alpha: F.leaky_relu(x, float(alpha)),
    "sigmoid_hard": lambda x, alpha, beta: (x * float(alpha) + float(beta)).clamp(0, 1),
    "thresholded_relu": lambda x, alpha: torch.where(x >= float(alpha), x, 0),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "cast": lambda x, dtype: _tensor(x).to(KINDS[dtype]),
    "add": _two(torch.add),
    "sub": _two(torch.sub),
    "mul": _two(torch.mul),
    "real_div": _two(torch.div),
    "greater_equal": _two(torch.ge),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(_sizes(axes), bool(keep_dims)),
    "reduce_max": lambda x, axes, keep_dims: x.amax(_sizes(axes), bool(keep_dims)),
    "reshape": lambda x, shape: x.reshape(_sizes(shape)),
    "squeeze": lambda x, axes: x.squeeze(_sizes(axes)),
    "expand_dims": lambda x, axes: reduce(torch.unsqueeze, _sizes(axes), x),
    "transpose": lambda x, perm: x.permute(_sizes(perm)),
    "concat": lambda values, axis, interleave=False: torch.cat(values, int(axis)),
    "slice_by_index": _slice,
}
