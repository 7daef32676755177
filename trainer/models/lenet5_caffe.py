"""LeNet-5-Caffe: the 20-50-500-10 network of the pruning literature."""

import torch
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks, max_pool


def lenet5_caffe(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Two unpadded 5 x 5 convolutions of 20 and 50 channels, then 500 units (Caffe's LeNet).

    It has 431,080 parameters on 28 x 28 x 1 and 10 classes. ReLU follows every hidden layer (Caffe's own definition
    has one after the 500 units only, the papers' reimplementations after all). Blocks: conv1, conv2 (after ReLU and
    pooling) and fc1. The embedding is fc1's output. Raises Mistake for images under 16 pixels.
    """
    _, height, width = input_shape
    if min(height, width) < 16:
        raise Mistake(f"lenet5_caffe: images of {height} x {width} are too small; 16 x 16 is the least")
    return _Lenet5Caffe(input_shape, num_classes)


class _Lenet5Caffe(Blocks):
    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        left = [((size - 4) // 2 - 4) // 2 for size in (height, width)]
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * left[0] * left[1], 500)
        self.fc2 = nn.Linear(500, num_classes)

    def blocks(self):
        return [("conv1", self._conv1), ("conv2", self._conv2), ("fc1", self._fc1)]

    def chain(self):
        return ["conv1", "conv2", "fc1", "fc2"]

    def _conv1(self, x: Tensor) -> Tensor:
        return torch.relu(max_pool(self.conv1(x)))

    def _conv2(self, x: Tensor) -> Tensor:
        return torch.relu(max_pool(self.conv2(x)))

    def _fc1(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc1(x.flatten(1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.fc2(x)
