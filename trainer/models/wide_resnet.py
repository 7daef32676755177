"""Wide residual networks for 32 x 32 images: WRN-16-2, WRN-40-2 and the like."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks


def wide_resnet(
    input_shape: tuple[int, int, int], num_classes: int, *, depth: PositiveInt = 16, widen: PositiveInt = 2
) -> nn.Module:
    """Residual network of pre-activation blocks, `widen` times as wide (Zagoruyko and Komodakis 2016).

    At 100 classes WRN-16-2 has 703,284 parameters and WRN-40-2 2,255,156. Blocks: stem, layer1, layer2 (before the next
    layer's normalization) and layer3 (after normalization and ReLU). The embedding is layer3's mean over positions.

    depth: 6 n + 4 layers, with n residual blocks at each of three sizes. widen: factor on the channels 16, 32 and 64.
    """
    if depth < 10 or (depth - 4) % 6:
        raise Mistake(f"wide_resnet: depth is {depth}; it must be 6 n + 4: 10, 16, 22, 28, 34, 40, ...")
    return _WideResnet(input_shape[0], num_classes, (depth - 4) // 6, widen)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        inner = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return inner + (x if self.shortcut is None else self.shortcut(active))


class _WideResnet(Blocks):
    def __init__(self, images: int, num_classes: int, num_blocks: int, widen: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(images, 16, 3, padding=1, bias=False)
        self.layer1 = _group(num_blocks, 16, 16 * widen, stride=1)
        self.layer2 = _group(num_blocks, 16 * widen, 32 * widen, stride=2)
        self.layer3 = _group(num_blocks, 32 * widen, 64 * widen, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def blocks(self):
        groups = [("layer1", self.layer1), ("layer2", self.layer2), ("layer3", self._layer3)]
        return [("stem", self.conv1), *groups]

    def _layer3(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.layer3(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)


def _group(num_blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = _Block(inputs, outputs, stride)
    return nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(num_blocks - 1)))
