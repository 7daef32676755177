"""Residual networks for 32 x 32 images: ResNet-20, -56 and their wide kin of the distillation literature."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks


def cifar_resnet(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    depth: PositiveInt = 20,
    channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (16, 16, 32, 64),
) -> nn.Module:
    """Residual network of basic blocks at three sizes, 1 x 1 convolutions as shortcuts (He et al. 2016).

    The literature's CIFAR-100 students and teachers: ResNet-20 is depth 20 (278,324 parameters), ResNet-56
    depth 56 (861,620); resnet8x4 and resnet32x4 have channels [32, 64, 128, 256] and depth 8 (1,233,540) or
    32 (7,433,860). Blocks: stem, layer1, layer2, layer3, each after its ReLU. The embedding is layer3's mean over
    positions.

    depth: 6 n + 2 layers, with n residual blocks at each size. channels: of the stem, layer1, layer2 and layer3.
    """
    if depth < 8 or (depth - 2) % 6:
        raise Mistake(f"cifar_resnet: depth is {depth}; it must be 6 n + 2: 8, 14, 20, 26, 32, ...")
    return _CifarResnet(input_shape[0], num_classes, (depth - 2) // 6, channels)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


class _CifarResnet(Blocks):
    def __init__(
        self, images: int, num_classes: int, num_blocks: int, channels: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        stem, *groups = channels
        self.conv1 = nn.Conv2d(images, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _group(num_blocks, stem, groups[0], stride=1)
        self.layer2 = _group(num_blocks, groups[0], groups[1], stride=2)
        self.layer3 = _group(num_blocks, groups[1], groups[2], stride=2)
        self.fc = nn.Linear(groups[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def blocks(self):
        groups = [(name, self.get_submodule(name)) for name in ("layer1", "layer2", "layer3")]
        return [("stem", self._stem), *groups]

    def _stem(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)


def _group(num_blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = _Block(inputs, outputs, stride)
    return nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(num_blocks - 1)))
