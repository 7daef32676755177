"""How features of two unlike networks are made comparable: one size, one width, one precision, one length."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class MapProjector(nn.Module):
    """A learned 1x1 convolution from the student's width to the teacher's.

    It has a bias: a teacher's channels seldom have mean zero (never after a ReLU), and no channel of the
    student should have to carry that constant. Weights start as PyTorch's convolutions do.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_width, teacher_width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class EmbeddingProjector(nn.Module):
    """A learned Linear, with a bias, from the student's embedding [N, Ds] to the teacher's width [N, Dt]."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(student_width, teacher_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class ConvNorm(nn.Module):
    """A convolution without bias that keeps the size (odd kernel), then batch normalisation.

    Normalised in full precision. A batch with a single value per channel has no variance: the running
    statistics normalise it, in training too, and are left as they are. Statistics are those of the process,
    as in any BatchNorm that is not synchronised.
    """

    def __init__(self, width: int, out_width: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out_width, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_width)

    def forward(self, x: Tensor) -> Tensor:
        x = full_precision(self.conv(x))
        if x.numel() > x.shape[1]:
            return self.norm(x)
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _pooled(map_: Tensor, size: tuple[int, int]) -> Tensor:
    return map_ if map_.shape[2:] == size else F.adaptive_avg_pool2d(map_, size)
