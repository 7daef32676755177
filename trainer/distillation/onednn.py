"""Runs fully connected layers by oneDNN on CPUs with AVX-512, and recurrent layers in float32 if oneDNN has no other type.

torch multiplies fully connected layers by MKL, which uses half of the AVX-512 units of AMD's processors. oneDNN gives the
same result up to rounding; a layer's matrix products took 0.46 to 0.7 of the time on an EPYC of family 26
(`scripts/bench_inference.py`, `scripts/bench_fit.py`). Those of family 25 have units of half the width, so that only large
products gain. Layers on other processors or in other types are unchanged.

Inside autocast oneDNN refuses an LSTM in bfloat16 on processors without AVX-512, and in float16 on most: such layers
compute in float32.
"""

import re
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

# Multiplications: in smaller products the overhead of the calls dominates. The second number is that of units of half the
# width: below it oneDNN takes 0.96 to 1.5 of MKL's time there, above it 0.54 to 0.96.
_LEAST, _LEAST_OF_HALVES = 2**21, 2**24
_RECURRENT: tuple[type[nn.LSTM | nn.GRU | nn.RNN], ...] = (nn.LSTM, nn.GRU, nn.RNN)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the names that recipes have for them


def attach(network: nn.Module, learning: bool) -> None:
    """Makes a network's fully connected layers multiply by oneDNN, until `detach`.

    Its recurrent layers compute in float32 inside an autocast to a type that oneDNN does not have for them. Layers with
    masks or shared weights are included; subclasses of nn.Linear and layers with a replaced forward are not.

    learning: whether oneDNN is used only with gradients enabled, or only with gradients disabled. During a training
    it is the former, so that a validation computes as any other evaluation does.
    """
    for module in network.modules():
        lacking = missing_types(module)
        if lacking and (_attached(module) or "forward" not in vars(module)):
            module.forward = partial(_recurrent, module, lacking)
    has_it = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_it:
        return
    least = _least()
    for module in network.modules():
        if _is_linear(module) and (_attached(module) or "forward" not in vars(module)):
            # A partial, not a closure: deepcopy of the network copies its layer too.
            module.forward = partial(_forward, module, learning, least)  # type: ignore[method-assign]  # of this layer alone


def least_product(cpuinfo: str) -> int:
    """Returns from how many multiplications on a product gains by oneDNN, by the text of Linux's /proc/cpuinfo."""
    halves = "AuthenticAMD" in cpuinfo and re.search(r"^cpu family\s*: 25$", cpuinfo, re.MULTILINE)
    return _LEAST_OF_HALVES if halves else _LEAST


@cache
def _least() -> int:
    facts = Path("/proc/cpuinfo")
    return least_product(facts.read_text() if facts.is_file() else "")


def detach(network: nn.Module) -> None:
    """Undoes `attach`."""
    for module in network.modules():
        if _attached(module):
            del module.forward


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    kind = type(module).__base__ if parametrize.is_parametrized(module) else type(module)
    return kind is nn.Linear


def _attached(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) in (_forward, _recurrent)


def missing_types(layer: nn.Module) -> frozenset[torch.dtype]:
    """Returns the autocast types in which this CPU cannot compute a recurrent layer; none for any other layer."""
    kind = _recurrent_kind(layer)
    return frozenset() if kind is None else _missing_types(kind)  # type: ignore[arg-type]  # a class can be hashed


def _recurrent_kind(layer: nn.Module) -> type[nn.LSTM | nn.GRU | nn.RNN] | None:
    return next((kind for kind in _RECURRENT if isinstance(layer, kind)), None)


@cache
def _missing_types(kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> frozenset[torch.dtype]:
    return frozenset(dtype for dtype in HALVES.values() if not _computes(kind, dtype))


def _computes(kind: type[nn.LSTM | nn.GRU | nn.RNN], dtype: torch.dtype) -> bool:
    """Returns whether this CPU computes such a layer in this type, by trying a tiny one, forward and backward."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        layer, x = kind(1, 1), torch.zeros(1, 1, 1)  # float32, as under autocast
        try:
            with torch.autocast("cpu", dtype):
                outputs = layer(x)[0]
            outputs.float().sum().backward()
        except (
            RuntimeError
        ):  # oneDNN's "could not create a primitive", or "not implemented for" of torch itself
            return False
    return True


def kinds_in_float32(networks: Iterable[nn.Module], dtype: torch.dtype) -> list[str]:
    """Returns the names of the kinds of layers that compute in float32 inside a CPU's autocast to this type."""
    layers = (layer for network in networks for layer in network.modules())
    kinds = {_recurrent_kind(layer) for layer in layers if dtype in missing_types(layer)}
    return sorted(kind.__name__ for kind in kinds if kind is not None)


def _recurrent(layer: nn.Module, lacking: frozenset[torch.dtype], *given: Any, **named: Any) -> Any:
    forward = type(layer).forward
    if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") not in lacking:
        return forward(layer, *given, **named)
    with torch.autocast("cpu", enabled=False):
        return forward(
            layer, *map(_in_float32, given), **{name: _in_float32(value) for name, value in named.items()}
        )


def _in_float32(value: Any) -> Any:
    """Returns an argument of a recurrent layer (a sequence, packed or not, or its states) in float32."""
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(map(_in_float32, value))
    tensor = value.data if isinstance(value, PackedSequence) else value
    return value.float() if torch.is_tensor(tensor) and tensor.dtype in HALVES.values() else value


def _forward(layer: nn.Linear, learning: bool, least: int, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    special = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if torch.is_grad_enabled() != learning or special or not plain or x.numel() * len(weight) < least:
        return F.linear(x, weight, bias)
    return _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


class _Product(torch.autograd.Function):
    """Computes a [N, I] times b [O, I] transposed, plus bias [O] or None: [N, O]. Its gradients are such products too."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        # The operator ignores the bias's strides, so the bias must be contiguous.
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        of_a, of_b, of_bias = ctx.needs_input_grad
        return (
            _Product.apply(gradient, b.T, None) if of_a else None,
            _Product.apply(gradient.T, a.T, None) if of_b else None,
            gradient.sum(0) if of_bias else None,
        )
