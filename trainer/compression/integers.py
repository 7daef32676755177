"""Makes a network that integers can compute: weights and biases on grids, maps in 8 bits with trained steps."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compression.masks import set_mask
from trainer.compression.parametrizations import Codebook, Mask, NoDecay, bake_weight, straight
from trainer.compression.rounding import close_biases, on_grid, open_biases, step_of, to_grid
from trainer.compression.weights import weights_of
from trainer.mistakes import Mistake
from trainer.networks.quantizers import HIGHEST, Quantizer, quantizers, rounded, set_quantizer

LARGEST_SUM = 2**24  # steps up to which float32 counts every one
CENTRE = 128  # the zero of maps that have negative numbers
MOST_BITS = 8  # of a weight


class TrainedQuantizer(Quantizer):
    """A quantizer whose step is trained, as its logarithm to the base 2, which is rounded (Jain et al. 2020).

    The gradient goes straight through both roundings: to the map inside the range, and to the step by the rounding error
    and, outside the range, by the end of the range (Esser et al. 2020, Learned Step Size Quantization).
    """

    def __init__(self, exponent: int, zero: int) -> None:
        super().__init__(exponent, zero)
        self.log_step = NoDecay(torch.tensor([float(exponent)]))

    def forward(self, x: Tensor) -> Tensor:
        if self.operator is not None:
            return self.operator(x, self.trained_exponent(), self.zero, [], [])
        step = self._step()
        inside = (x / step).clamp(-self.zero, HIGHEST - self.zero)
        return straight(rounded, inside) * step

    def _step(self) -> Tensor:
        """Returns 2^round(log_step) exactly, with the gradient of 2^log_step."""
        step = torch.ldexp(torch.ones_like(self.log_step), self.log_step.detach().round().int())
        return step + step.detach() * math.log(2) * (self.log_step - self.log_step.detach())

    def trained_exponent(self) -> int:
        return int(self.log_step.detach().round())


@torch.no_grad()
def best_exponent(values: Tensor, zero: int) -> int:
    """Returns the exponent of the step whose rounding has the least squared error for a sample of a map's values."""
    largest = values.abs().max().item()
    if largest == 0:
        return 0
    highest = math.ceil(math.log2(largest / (HIGHEST - zero)))
    errors = {}
    for exponent in range(highest, highest - 4, -1):
        error = Quantizer(exponent, zero)(values).double() - values.double()
        errors[exponent] = error.square().mean().item()
    return min(errors, key=errors.__getitem__)


def open_integers(model: nn.Module, bits: int, bias_bits: int) -> list[tuple[nn.Module, str]]:
    """Makes weights, biases and the steps of maps be rounded at every step of a training, in place.

    Masks and codebooks stay; a weight without either gets a mask of ones. `close_integers` ends it. Returns the biases.
    """
    for layer in weights_of(model).values():
        if layer.parametrization is None:
            set_mask(layer, layer.alive)
        found = layer.parametrization
        assert isinstance(found, Mask | Codebook)
        found.rounding = functools.partial(to_grid, bits=bits)
    modules = dict(model.named_modules())
    for name, quantizer in quantizers(model).items():
        if not quantizer.mean:
            trained = TrainedQuantizer(quantizer.exponent, quantizer.zero)
            set_quantizer(modules[name], trained.to(next(model.parameters()).device))
    return open_biases(model, bias_bits)


@torch.no_grad()
def close_integers(model: nn.Module, opened: Iterable[tuple[nn.Module, str]]) -> None:
    """Ends `open_integers`, in place: steps of maps are fixed, masks of ones become plain weights.

    Weights and biases are not rounded yet: see `to_integers`.
    """
    close_biases(list(opened))
    for layer in weights_of(model).values():
        found = layer.parametrization
        assert isinstance(found, Mask | Codebook)
        found.rounding = None
        if isinstance(found, Mask) and found.mask.all():
            bake_weight(layer)
    modules = dict(model.named_modules())
    for name, quantizer in quantizers(model).items():
        if isinstance(quantizer, TrainedQuantizer):
            set_quantizer(modules[name], Quantizer(quantizer.trained_exponent(), quantizer.zero))


@torch.no_grad()
def to_integers(model: nn.Module, exponents: Mapping[str, int], bits: int, bias_bits: int) -> None:
    """Rounds the weights and biases of a quantized network, in place, so that float32 computes its sums exactly.

    A layer whose largest possible sum exceeds 2^24 steps gets a coarser grid. Weights that are shared stay shared, zeros stay
    zero.

    Args:
        model: The network, with its quantizers.
        exponents: {layer: exponent of the step of the map that it reads}.
        bits: Of a weight, at most.
        bias_bits: Of a bias, at most.

    Raises:
        Mistake: For a layer whose sums are too large on any grid.
    """
    for name, layer in weights_of(model).items():
        module: Any = layer.holders[0][0]
        if name not in exponents:
            raise Mistake(
                f"layer {name!r}: a weight that is neither a convolution's nor a linear layer's cannot be whole"
            )
        weight, bias = layer.value.detach(), getattr(module, "bias", None)
        for some in range(bits, 1, -1):
            step = step_of(weight, some) or 1.0
            unit = step * 2.0 ** exponents[name]
            largest = on_grid(weight, step).double().abs().reshape(len(weight), -1).sum(1) / step * HIGHEST
            if bias is not None:
                new = on_grid(to_grid(bias.detach(), bias_bits), unit)
                largest += new.double().abs() / unit
            if largest.max() <= LARGEST_SUM:
                break
        else:
            raise Mistake(f"layer {name!r} has too many weights, or a bias too large, for sums of 24 bits")
        kept = layer.parameter if isinstance(layer.parametrization, Codebook) else weight
        layer.parameter.copy_(on_grid(kept, step))
        if bias is not None:
            bias.copy_(new)
