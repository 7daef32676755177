"""Makes tensors comparable: full precision, one size, unit length, all classes but one."""

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """Returns the tensor in float32 (float64 stays float64), for norms and softmaxes."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two maps [N, C, H, W] at one size: adaptive average pooling of the larger to the smaller.

    Height and width are each the smaller of the two. A map that already has that size is returned unchanged.
    """
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return _pooled(a, size), _pooled(b, size)


def unit_length(tensor: Tensor, dim: int = -1) -> Tensor:
    """Scales the vectors along `dim` to L2 length 1; a vector of zeros stays zeros.

    A vector shorter than 1e-12 is not scaled, so that its gradient is not multiplied by 1e12.
    """
    length = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    return tensor / torch.where(length > 1e-12, length, 1.0)


def without_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Returns the logits [N, K - 1] of all classes but one of each sample. classes: their ids [N]."""
    # They are gathered, not masked with a large negative number: no such number suits all logits, and a probability of 0
    # has no logarithm.
    column = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, column + (column >= classes[:, None]))


def _pooled(map_: Tensor, size: tuple[int, int]) -> Tensor:
    return map_ if map_.shape[2:] == size else F.adaptive_avg_pool2d(map_, size)


def fraction_among_larger(weight: Tensor, parts: int = 1) -> Tensor:
    """Returns for each weight w^2 / (sum of the squares of the layer's weights as large or larger), in float64.

    The largest weight has 1. Weights of equal magnitude count as rising in memory order, so that no two scores are equal.
    parts: number of stacked matrices along the first axis; each counts as a layer of its own.
    """
    found = []
    for part in weight.chunk(parts):
        square = part.double().reshape(-1) ** 2
        order = torch.argsort(square, stable=True)
        sums = square[order].flip(0).cumsum(0).flip(0)
        fraction = torch.empty_like(square)
        fraction[order] = square[order] / sums.clamp_min(torch.finfo(torch.float64).tiny)
        found.append(fraction.reshape(part.shape))
    return torch.cat(found)
