"""Small depthwise-separable convolution network: a student of a thousand weights or a hundred thousand."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks, Mean


def separable(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    widths: tuple[PositiveInt, ...] = (8, 12, 16, 16, 16),
    strides: tuple[PositiveInt, ...] = (2, 1, 2, 1, 1),
    first_kernel: PositiveInt = 5,
    kernel: PositiveInt = 3,
    batch_norm: bool = True,
    residual: bool = False,
    repeat: PositiveInt = 1,
) -> nn.Module:
    """A convolution, then depthwise-separable blocks, the mean over positions and a linear classifier.

    A block is a depthwise convolution, a 1 x 1 convolution and ReLU (after MobileNet, Howard et al. 2017,
    with one normalization a block). The default has 1,706 parameters once the normalization is folded, on one
    input channel and 10 classes; widths [16, 24, 24, 32, 32, 40] with strides [2, 1, 1, 2, 1, 1] 6,162.
    Blocks: conv1, block2, block3, ..., each after its ReLU. The embedding is the last one's mean over positions.

    Args:
        widths: Channels of the first convolution and of each block.
        strides: Strides of the first convolution and of each block, as many as widths.
        first_kernel: Kernel size of the first convolution, odd.
        kernel: Kernel size of the depthwise convolutions, odd.
        batch_norm: Whether BatchNorm precedes each ReLU; the convolution before it then has no bias. Folding it away
            gives exactly the network without batch_norm.
        residual: Whether a block's input is added to its output where their shapes are equal.
        repeat: How many times in a row each block that keeps its input's shape is applied, with the same weights. With
            more than one, these blocks have no normalization, whose statistics would differ from time to time.

    Raises:
        Mistake: For an even kernel size, for widths and strides of different number, and for a repeat of no block.
    """
    if not widths or len(strides) != len(widths):
        raise Mistake(
            f"separable: {len(widths)} widths and {len(strides)} strides; as many are needed, at least 1"
        )
    for name, side in (("first_kernel", first_kernel), ("kernel", kernel)):
        if side % 2 == 0:
            raise Mistake(f"separable: {name} is {side}; it must be odd")
    steps = zip(widths[:-1], widths[1:], strides[1:], strict=True)
    if repeat > 1 and not any(inputs == outputs and stride == 1 for inputs, outputs, stride in steps):
        raise Mistake(
            f"separable: repeat {repeat} has no effect: no block has stride 1 and as many channels as the one before"
        )
    return _Separable(
        input_shape[0], num_classes, widths, strides, first_kernel, kernel, batch_norm, residual, repeat
    )


class _Block(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        kernel: int,
        batch_norm: bool,
        residual: bool,
        repeat: int,
    ) -> None:
        super().__init__()
        keeps_shape = stride == 1 and inputs == outputs
        self.times = repeat if keeps_shape else 1
        batch_norm = batch_norm and self.times == 1
        self.depthwise = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(outputs) if batch_norm else nn.Identity()
        self.residual = residual and keeps_shape

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            inner = torch.relu(self.norm(self.pointwise(self.depthwise(x))))
            x = x + inner if self.residual else inner
        return x


class _Separable(Blocks):
    def __init__(
        self,
        images: int,
        num_classes: int,
        widths: tuple[int, ...],
        strides: tuple[int, ...],
        first_kernel: int,
        kernel: int,
        batch_norm: bool,
        residual: bool,
        repeat: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            images, widths[0], first_kernel, strides[0], first_kernel // 2, bias=not batch_norm
        )
        self.norm1 = nn.BatchNorm2d(widths[0]) if batch_norm else nn.Identity()
        self.names = [f"block{number}" for number in range(2, len(widths) + 1)]
        steps = zip(self.names, widths[:-1], widths[1:], strides[1:], strict=True)
        for name, inputs, outputs, stride in steps:
            self.add_module(name, _Block(inputs, outputs, stride, kernel, batch_norm, residual, repeat))
        self.pool = Mean()
        self.fc = nn.Linear(widths[-1], num_classes)

    def blocks(self):
        return [("conv1", self._conv1), *((name, self.get_submodule(name)) for name in self.names)]

    def chain(self):
        if any(
            self.get_submodule(name).residual or self.get_submodule(name).times != 1 for name in self.names
        ):
            return []
        return [
            "conv1",
            *(f"{name}.{part}" for name in self.names for part in ("depthwise", "pointwise")),
            "fc",
        ]

    def norms(self):
        once = [name for name in self.names if self.get_submodule(name).times == 1]
        return [("conv1", "norm1"), *((f"{name}.pointwise", f"{name}.norm") for name in once)]

    def _conv1(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm1(self.conv1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.pool(x)
        return pooled if pre_logits else self.fc(pooled)
