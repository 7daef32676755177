"""Rounds values to few bits, for a smaller packed file."""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainer.compression.codebooks import centroid_parameters
from trainer.compression.parametrizations import Rounded
from trainer.mistakes import Mistake


def round_to(values: Tensor, kind: str | int) -> Tensor:
    """Rounds values to 'float16', or to a number of fraction bits; 'float32' leaves them unchanged.

    The type of the tensor stays. No zero is -0.0. Raises Mistake if a value becomes infinite.
    """
    rounded = nearest(values, kind)
    if kind != "float32" and not torch.isfinite(rounded).all():
        raise Mistake("a value is too large for float16: ask for float32")
    return rounded


def nearest(values: Tensor, kind: str | int) -> Tensor:
    """Does the same as `round_to` without a look at the result, for which a training step would wait for a GPU."""
    if kind == "float32":
        return values
    if kind == "float16":
        return values.half().to(values.dtype) + 0.0
    assert isinstance(kind, int)
    fraction, exponent = torch.frexp(values)
    return torch.ldexp((fraction * 2 ** (kind + 1)).round(), exponent - (kind + 1)) + 0.0


def round_codebook(centroids: Tensor, kind: str | int) -> Tensor:
    """Rounds centroids by `round_to`. Raises Mistake also if they are so small that float16 is coarse for them."""
    rounded = round_to(centroids, kind)
    if kind == "float16" and (rounded - centroids).abs().max() > 2**-8 * centroids.abs().max():
        raise Mistake(
            f"the largest shared value is {centroids.abs().max().item():.3g}, too small for float16: ask for float32"
        )
    return rounded


def round_evenly(centroids: Tensor, kind: str | int) -> Tensor:
    """Rounds evenly spaced centroids, of which the smallest is one step: the step by `round_codebook`, and so all of them."""
    step = centroids.abs().min()
    return round_codebook(step, kind) * (centroids / step).round()


def to_grid(values: Tensor, bits: int) -> Tensor:
    """Rounds values to integers times a step: the smallest power of two that keeps all integers within +-(2^(bits-1) - 1).

    A step that is a power of two can be found from the values alone, and costs no more for the same error: see
    `packing.network.grid_steps`. Raises Mistake if a value becomes infinite.
    """
    step = step_of(values, bits)
    if step is None:
        return values
    rounded = on_grid(values, step)
    if not torch.isfinite(rounded).all():
        raise Mistake(f"a value of {values.abs().max().item():.3g} is too large for {bits} bits")
    return rounded


def step_of(values: Tensor, bits: int) -> float | None:
    """Returns the step of `to_grid`; None if all values are zero."""
    largest = values.abs().max().item()
    return 2.0 ** math.ceil(math.log2(largest / (2 ** (bits - 1) - 1))) if largest else None


def on_grid(values: Tensor, step: float) -> Tensor:
    """Returns the nearest integers times a step. No zero is -0.0."""
    return (torch.round(values.double() / step) * step).to(values.dtype) + 0.0


def grid_exponent(values: Tensor) -> int:
    """Returns the greatest e for which all values (float32) are integers times 2^e; 0 if all are zero."""
    fraction, exponent = torch.frexp(values[values != 0].double())
    if not len(fraction):
        return 0
    whole = torch.ldexp(fraction, torch.tensor(24)).long()  # float32 has 24 bits
    return int((torch.log2((whole & -whole).double()).int() + exponent - 24).min())


def biases_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Returns (module, attribute) of all biases: parameters of one dimension with 'bias' in their name."""
    return [
        (module, name)
        for module in model.modules()
        if not isinstance(module, parametrize.ParametrizationList)
        for name, tensor in module.named_parameters(recurse=False)
        if tensor.dim() == 1 and "bias" in name
    ]


def open_biases(model: nn.Module, bits: int) -> list[tuple[nn.Module, str]]:
    """Makes all biases be rounded by `to_grid` at every step of a training, in place. `close_biases` ends it."""
    found = biases_of(model)
    for module, name in found:
        parametrize.register_parametrization(module, name, Rounded(functools.partial(to_grid, bits=bits)))
    return found


def close_biases(opened: list[tuple[nn.Module, str]]) -> None:
    """Turns biases that `open_biases` returned into plain parameters of the rounded values, in place."""
    for module, name in opened:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)


@torch.no_grad()
def round_unshared(model: nn.Module, biases: int | None = None, rest: str = "float32") -> None:
    """Rounds all parameters and statistics that are not shared, in place.

    Args:
        model: The network.
        biases: Bits of the biases, rounded by `to_grid`; None rounds them like the rest. Biases are the parameters of one
            dimension with 'bias' in their name, those of norms and recurrent layers included.
        rest: The kind of `round_to` for all others.

    Raises:
        Mistake: With the tensor's name, for a value that is not finite, before or after.
    """
    shared = {id(parameter) for parameter in centroid_parameters(model)}
    tensors = [
        *model.named_parameters(),
        *((n, b) for n, b in model.named_buffers() if b.is_floating_point()),
    ]
    for name, tensor in tensors:
        if id(tensor) in shared or not tensor.numel():
            continue
        if not torch.isfinite(tensor).all():
            raise Mistake(f"{name} has values that are not finite")
        is_bias = tensor.dim() == 1 and "bias" in name.rpartition(".")[2]
        try:
            tensor.copy_(
                to_grid(tensor, biases) if biases is not None and is_bias else round_to(tensor, rest)
            )
        except Mistake as error:
            raise Mistake(f"{name}: {error}") from None
