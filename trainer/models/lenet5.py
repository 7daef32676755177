"""LeNet-5 at any width: two convolutions and three fully connected layers."""

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks, max_pool


def lenet5(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    width: PositiveInt = 6,
    batch_norm: bool = False,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, every layer scaled by `width` / 6.

    Blocks: conv1, conv2 (after ReLU and pooling), fc1, fc2 (after ReLU). The embedding is fc2's output. Images under
    16 pixels are padded at conv2 too, because the unpadded convolution would leave too little of them.

    Args:
        width: Channels of conv1. conv2 has 8/3 times as many, fc1 20 times and fc2 14 times as many units. 6 is
            LeNet-5: 61,706 parameters on 28 x 28 x 1 and 10 classes.
        batch_norm: Whether BatchNorm follows each convolution, which then has no bias. Folding it away gives exactly
            the network without batch_norm.
        dropout: Fraction of the inputs of fc1, fc2 and fc3 dropped in training.

    Raises:
        Mistake: For images under 8 pixels.
    """
    _, height, breadth = input_shape
    if min(height, breadth) < 8:
        raise Mistake(f"lenet5: images of {height} x {breadth} are too small; 8 x 8 is the least")
    return _Lenet5(input_shape, num_classes, width, batch_norm, dropout)


class _Lenet5(Blocks):
    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        width: int,
        batch_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        wide = round(width * 8 / 3)
        padding = 0 if min(height, breadth) >= 16 else 2
        left = [(size // 2 - 4 + 2 * padding) // 2 for size in (height, breadth)]
        self.dropout = dropout
        self.conv1 = nn.Conv2d(channels, width, 5, padding=2, bias=not batch_norm)
        self.norm1 = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, wide, 5, padding=padding, bias=not batch_norm)
        self.norm2 = nn.BatchNorm2d(wide) if batch_norm else nn.Identity()
        self.fc1 = nn.Linear(wide * left[0] * left[1], 20 * width)
        self.fc2 = nn.Linear(20 * width, 14 * width)
        self.fc3 = nn.Linear(14 * width, num_classes)

    def blocks(self):
        return [("conv1", self._conv1), ("conv2", self._conv2), ("fc1", self._fc1), ("fc2", self._fc2)]

    def chain(self):
        return ["conv1", "conv2", "fc1", "fc2", "fc3"]

    def norms(self):
        return [("conv1", "norm1"), ("conv2", "norm2")]

    def _conv1(self, x: Tensor) -> Tensor:
        return torch.relu(max_pool(self.norm1(self.conv1(x))))

    def _conv2(self, x: Tensor) -> Tensor:
        return torch.relu(max_pool(self.norm2(self.conv2(x))))

    def _fc1(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc1(self._drop(x.flatten(1))))

    def _fc2(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc2(self._drop(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.fc3(self._drop(x))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)
