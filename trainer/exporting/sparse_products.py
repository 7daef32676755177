"""Replaces the layers of a network by products of sparse matrices, to see whether their zeros save time."""

import copy
import warnings
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.compression.states import bake
from trainer.networks.quantizers import NAME, set_quantizer

Layout = Literal["scipy CSR", "torch CSR"]


def with_sparse_products(network: nn.Module, layout: Layout) -> tuple[nn.Module, float]:
    """Returns a copy of a network whose linear layers and ungrouped convolutions multiply by a sparse matrix.

    A convolution is the product of its weight [O, C*h*w] and the windows of its input. Layers without any zero, and of other kinds,
    stay dense.

    Returns:
        The network, for inference on the CPU, and the fraction of zeros in the layers that are sparse now; NaN if none is.
    """
    plain = bake(copy.deepcopy(network)).cpu().eval().requires_grad_(False)
    num_zeros = num_weights = 0
    for name, layer in list(plain.named_modules(remove_duplicate=False)):
        if not name or not _can_be_sparse(layer):
            continue
        parent, _, own = name.rpartition(".")
        zeros = int((layer.weight == 0).sum())
        if zeros:
            num_zeros, num_weights = num_zeros + zeros, num_weights + layer.weight.numel()
            sparse = _Sparse(layer, layout)
            set_quantizer(sparse, getattr(layer, NAME, None))  # what rounds the layer's input goes with it
            setattr(plain.get_submodule(parent), own, sparse)
    return plain, num_zeros / num_weights if num_weights else float("nan")


def _can_be_sparse(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


class _Sparse(nn.Module):
    """A linear layer or convolution that multiplies by a sparse matrix."""

    def __init__(self, layer: Any, layout: Layout) -> None:
        super().__init__()
        self.bias = layer.bias
        self.convolution = layer if isinstance(layer, nn.Conv2d) else None
        self.multiply = _multiplying(layer.weight.detach().flatten(1), layout)

    def forward(self, x: Tensor) -> Tensor:
        if self.convolution is None:
            found = self.multiply(x.reshape(-1, x.shape[-1]).T).T
            found = found if self.bias is None else found + self.bias
            return found.reshape(*x.shape[:-1], -1)
        layer: Any = self.convolution
        windows = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [N, C*h*w, L]
        found = self.multiply(windows.transpose(0, 1).flatten(1))
        found = found if self.bias is None else found + self.bias[:, None]
        ways = zip(layer.padding, layer.dilation, layer.kernel_size, layer.stride, x.shape[2:], strict=True)
        size = [(s + 2 * p - d * (k - 1) - 1) // step + 1 for p, d, k, step, s in ways]
        return found.reshape(-1, len(x), *size).transpose(0, 1).contiguous()


def _multiplying(weight: Tensor, layout: Layout) -> Any:
    """Returns the function that multiplies a sparse copy of `weight` [O, I] by a dense matrix [I, M]."""
    if layout == "scipy CSR":
        import scipy.sparse

        matrix = scipy.sparse.csr_array(weight.numpy())
        return lambda x: torch.from_numpy(matrix @ np.ascontiguousarray(x.numpy()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        sparse = weight.to_sparse_csr()
    return lambda x: sparse @ x.contiguous()
