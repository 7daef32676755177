"""Fully connected layers by oneDNN, which torch leaves to MKL: on processors of AMD that takes half of their AVX-512 units.

The result is the same up to rounding; a layer's matrix products took 0.46 to 0.7 of the time on an EPYC
(`scripts/bench_inference.py`, `scripts/bench_fit.py`). Elsewhere, and for whatever is not plain float32, nothing changes.

And recurrent layers in float32 where oneDNN has them in no other type: inside autocast it refuses an LSTM in bfloat16 on processors
without AVX-512, and one in float16 on most.
"""

from collections.abc import Iterable
from functools import cache, partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

_LEAST = 2**21  # multiplications in a product below which the calls take the time
_RECURRENT: tuple[type[nn.LSTM | nn.GRU | nn.RNN], ...] = (nn.LSTM, nn.GRU, nn.RNN)
_HALVES = (torch.bfloat16, torch.float16)


def attach(network: nn.Module, learning: bool) -> None:
    """From now on its fully connected layers multiply by oneDNN: where gradients are wanted, or only where they are not.

    learning: the former, so that what a network learned is evaluated as any other is; else the latter. Subclasses of
    nn.Linear and layers whose forward is someone's own are left alone, those with masks or shared weights are not.
    Its recurrent layers compute in float32 inside an autocast to a type that oneDNN has not got for them, both ways.
    """
    for module in network.modules():
        lacking = missing_types(module)
        if lacking and (_attached(module) or "forward" not in vars(module)):
            module.forward = partial(_recurrent, module, lacking)
    has_it = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_it:
        return
    for module in network.modules():
        if _is_linear(module) and (_attached(module) or "forward" not in vars(module)):
            # No closure: in a copy of the network it has the copy's layer.
            module.forward = partial(_forward, module, learning)  # type: ignore[method-assign]  # of this layer alone


def detach(network: nn.Module) -> None:
    """Takes back what `attach` did."""
    for module in network.modules():
        if _attached(module):
            del module.forward


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    kind = type(module).__base__ if parametrize.is_parametrized(module) else type(module)
    return kind is nn.Linear


def _attached(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) in (_forward, _recurrent)


def missing_types(layer: nn.Module) -> frozenset[torch.dtype]:
    """The types of autocast in which a recurrent layer cannot be computed on this CPU; none for any other layer."""
    kind = _recurrent_kind(layer)
    return frozenset() if kind is None else _missing_types(kind)  # type: ignore[arg-type]  # a class can be hashed


def _recurrent_kind(layer: nn.Module) -> type[nn.LSTM | nn.GRU | nn.RNN] | None:
    return next((kind for kind in _RECURRENT if isinstance(layer, kind)), None)


@cache
def _missing_types(kind: type[nn.LSTM | nn.GRU | nn.RNN]) -> frozenset[torch.dtype]:
    return frozenset(dtype for dtype in _HALVES if not _computes(kind, dtype))


def _computes(kind: type[nn.LSTM | nn.GRU | nn.RNN], dtype: torch.dtype) -> bool:
    """A tiny rehearsal, forward and backward: what a processor has is not told by its name."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        layer, x = kind(1, 1), torch.zeros(1, 1, 1)  # float32, as autocast finds them
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
    """The kinds of layers of these networks that compute in float32 inside a CPU's autocast to this type."""
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
    """A sequence, packed or not, or the states of a layer, as what came before it in autocast has left them."""
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(map(_in_float32, value))
    tensor = value.data if isinstance(value, PackedSequence) else value
    return value.float() if torch.is_tensor(tensor) and tensor.dtype in _HALVES else value


def _forward(layer: nn.Linear, learning: bool, x: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    special = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if torch.is_grad_enabled() != learning or special or not plain or x.numel() * len(weight) < _LEAST:
        return F.linear(x, weight, bias)
    return _Product.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


class _Product(torch.autograd.Function):
    """a [N, I] times b [O, I] transposed, plus bias [O] or None: [N, O]. Its gradients are such products themselves."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        # Of a bias it takes the numbers that lie there, whatever the strides: those must be plain.
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
