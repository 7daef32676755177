"""Tensors made comparable: one size, one precision, one length."""

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is float64: what norms and softmaxes are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two maps [N, C, H, W] at one size: adaptive average pooling of the larger to the smaller.

    Height and width are each the smaller of the two. A map that has that size already is returned as it is.
    """
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return _pooled(a, size), _pooled(b, size)


def unit_length(tensor: Tensor, dim: int = -1) -> Tensor:
    """The vectors along `dim` scaled to L2 length 1; a vector of zeros stays zeros.

    Where the length is below 1e-12 nothing is scaled, so that the gradient there is not multiplied by 1e12.
    """
    length = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    return tensor / torch.where(length > 1e-12, length, 1.0)


def _pooled(map_: Tensor, size: tuple[int, int]) -> Tensor:
    return map_ if map_.shape[2:] == size else F.adaptive_avg_pool2d(map_, size)


def share_among_larger(weight: Tensor, parts: int = 1) -> Tensor:
    """w^2 over the sum of the squares of the layer's weights as large or larger, for each weight; float64.

    The largest weight has 1. parts: stacked matrices along the first axis that count as a layer each. Weights of one size
    count as rising in their order, so that no two are equal.
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
