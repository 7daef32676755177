"""VGG networks for 32 x 32 images: VGG-8 and VGG-13 of the distillation literature."""

from typing import Literal

from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks, max_pool

_CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}


def cifar_vgg(
    input_shape: tuple[int, int, int], num_classes: int, *, depth: Literal[8, 11, 13, 16] = 8
) -> nn.Module:
    """VGG with batch normalization and one linear classifier (Simonyan and Zisserman 2015).

    At 100 classes VGG-8 has 3,965,028 parameters and VGG-13 9,462,180. Blocks: layer1 to layer5, each after its last
    ReLU and before the pooling; there is no pooling between layer4 and layer5. The embedding is layer5's mean over
    positions. Raises Mistake for images under 8 pixels.

    depth: the published name's number. It counts three fully connected layers; here there is one.
    """
    _, height, width = input_shape
    if min(height, width) < 8:
        raise Mistake(f"cifar_vgg: images of {height} x {width} are too small; 8 x 8 is the least")
    return _CifarVgg(input_shape[0], num_classes, _CONVOLUTIONS[depth])


class _CifarVgg(Blocks):
    def __init__(self, images: int, num_classes: int, convolutions: tuple[int, ...]) -> None:
        super().__init__()
        self.layer1 = _group(convolutions[0], images, 64)
        self.layer2 = _group(convolutions[1], 64, 128)
        self.layer3 = _group(convolutions[2], 128, 256)
        self.layer4 = _group(convolutions[3], 256, 512)
        self.layer5 = _group(convolutions[4], 512, 512)
        self.fc = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def blocks(self):
        return [
            ("layer1", self.layer1),
            ("layer2", lambda x: self.layer2(max_pool(x))),
            ("layer3", lambda x: self.layer3(max_pool(x))),
            ("layer4", lambda x: self.layer4(max_pool(x))),
            ("layer5", self.layer5),
        ]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)


def _group(num_convolutions: int, inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(num_convolutions):
        convolution = nn.Conv2d(inputs if number == 0 else outputs, outputs, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
