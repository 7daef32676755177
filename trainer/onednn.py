"""Fully connected layers by oneDNN, which torch leaves to MKL: on processors of AMD that takes half of their AVX-512 units.

The result is the same up to rounding; a layer's matrix products took 0.46 to 0.7 of the time on an EPYC
(`scripts/bench_inference.py`, `scripts/bench_fit.py`). Elsewhere, and for whatever is not plain float32, nothing changes.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

_LEAST = 2**21  # multiplications in a product below which the calls take the time


def attach(network: nn.Module, learning: bool) -> None:
    """From now on its fully connected layers multiply by oneDNN: where gradients are wanted, or only where they are not.

    learning: the former, so that what a network learned is evaluated as any other is; else the latter. Subclasses of
    nn.Linear and layers whose forward is someone's own are left alone, those with masks or shared weights are not.
    """
    has_it = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_it:
        return
    for module in network.modules():
        if _is_linear(module) and (_attached(module) or "forward" not in vars(module)):
            # No closure: in a copy of the network it has the copy's layer.
            module.forward = partial(_forward, module, learning)


def detach(network: nn.Module) -> None:
    """Takes back what `attach` did."""
    for module in network.modules():
        if _attached(module):
            del module.forward


def _is_linear(module: nn.Module) -> bool:
    kind = type(module).__base__ if parametrize.is_parametrized(module) else type(module)
    return kind is nn.Linear


def _attached(module: nn.Module) -> bool:
    return getattr(vars(module).get("forward"), "func", None) is _forward


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
