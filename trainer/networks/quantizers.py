"""Rounds the maps that a network's layers read to 8 bits, so that integers can compute the network.

All steps are powers of two. float32 then computes exactly what integers do: products and sums of small integers, and shifts.
The network in torch is the integer network, bit for bit, as long as no sum exceeds 2^24 steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.mistakes import Mistake

HIGHEST = 255  # of the integers from 0
TIE = 0.5 - 2**-15  # a larger fraction is rounded up: half is, also where a division has rounded it down
EXPONENTS = range(-60, 61)
NAME = "input_quantizer"  # of the module's child


class Quantizer(nn.Module):
    """Rounds a map to the integers 0 to 255, of which `zero` stands for 0, times the step 2^exponent.

    An image is first brought back to its pixels, which are the integers: mean and std are those of its normalisation, [] for
    any other map. It has no tensors; what it is stands in the network's spec.
    """

    #: What computes it instead, for a graph that keeps it whole.
    operator: Callable[..., Tensor] | None = None

    def __init__(
        self, exponent: int, zero: int, mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.exponent, self.zero = exponent, zero
        self.mean, self.std = list(mean), list(std)

    def forward(self, x: Tensor) -> Tensor:
        if self.operator is not None:
            return self.operator(x, self.exponent, self.zero, self.mean, self.std)
        step = math.ldexp(1.0, self.exponent)
        if self.mean:
            return (pixels(x, self.mean, self.std) - self.zero) * step
        return rounded((x / step).clamp(-self.zero, HIGHEST - self.zero)) * step

    def settings(self) -> list[Any]:
        """Returns what makes it anew, for a spec."""
        return [self.exponent, self.zero, *([self.mean, self.std] if self.mean else [])]


def rounded(x: Tensor) -> Tensor:
    """Returns the nearest integers, of two the higher one. Exact in float32, unlike floor(x + 0.5)."""
    below = x.floor()
    return below + (x - below >= TIE)


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns normalised images [N, C, H, W], or flattened ones [N, C x H x W], as integers from 0 to 255."""
    shift, scale = (torch.tensor(values, device=images.device).view(-1, 1) for values in (mean, std))
    flat = images.reshape(-1, len(mean), images.shape[1:].numel() // len(mean))
    return ((flat * scale + shift) * HIGHEST).round().clamp(0, HIGHEST).reshape(images.shape)


def attach(model: nn.Module, settings: Mapping[str, Sequence[Any]]) -> None:
    """Makes modules round what they are given, in place. settings: {module: of its `Quantizer`}, {} for none.

    Raises Mistake for settings that make none: anyone may have written them.
    """
    modules = dict(model.named_modules())
    if not isinstance(settings, Mapping):
        raise Mistake(f"maps: got {settings!r}; {{module: [exponent, zero]}} is allowed")
    for name, given in settings.items():
        if name not in modules or not name:
            raise Mistake(f"maps: the network has no module {name!r}")
        if not _is_sound(given):
            raise Mistake(f"maps of {name!r}: got {given!r}; [exponent, zero, mean, std] is allowed")
        set_quantizer(modules[name], Quantizer(*given))


def _is_sound(given: Any) -> bool:
    if not isinstance(given, list | tuple) or len(given) not in (2, 4):
        return False
    exponent, zero, *looks = given
    whole = all(type(number) is int for number in (exponent, zero))
    numbers = all(
        isinstance(values, list | tuple) and values and all(type(v) in (int, float) for v in values)
        for values in looks
    )
    return whole and numbers and exponent in EXPONENTS and 0 <= zero <= HIGHEST


def set_quantizer(module: nn.Module, quantizer: Quantizer | None) -> None:
    """Makes a module round what it is given by a quantizer, in place; None ends that."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _round_input:
            del module._forward_pre_hooks[key]
    if hasattr(module, NAME):
        delattr(module, NAME)
    if quantizer is not None:
        module.add_module(NAME, quantizer)
        module.register_forward_pre_hook(_round_input)


def _round_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # By its name, so that a copy of the module finds its own.
    return (getattr(module, NAME)(inputs[0]), *inputs[1:])


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Returns {name of the module that is given a rounded map: its quantizer}; {} for a network that is not quantized."""
    found = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, NAME, None)
        if isinstance(quantizer, Quantizer):
            found[name] = quantizer
    return found
