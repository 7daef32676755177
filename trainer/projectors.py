"""Learned maps from the student's width to the teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.tensors import full_precision


class MapProjector(nn.Module):
    """A learned 1x1 convolution from the student's width [N, Cs, H, W] to the teacher's [N, Ct, H, W].

    It has a bias: a teacher's channels seldom have mean zero (never after a ReLU), and no channel of the
    student should have to carry that constant. Initialised as PyTorch initialises convolutions.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(student_width, teacher_width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def map_projectors(student_maps: list[torch.Size], teacher_maps: list[torch.Size]) -> nn.ModuleList:
    """Returns a `MapProjector` for each pair of maps' shapes, and the identity where the widths are equal."""
    return nn.ModuleList(
        nn.Identity() if student[1] == teacher[1] else MapProjector(student[1], teacher[1])
        for student, teacher in zip(student_maps, teacher_maps, strict=True)
    )


class EmbeddingProjector(nn.Module):
    """A learned Linear layer with a bias, from the student's embedding [N, Ds] to the teacher's width [N, Dt]."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(student_width, teacher_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep the size (odd kernel), then batch normalisation in full precision.

    A batch with a single value per channel has no variance: the running statistics then normalise it, in training
    too, and do not change. Statistics are per process, as in any BatchNorm that is not synchronised.
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
