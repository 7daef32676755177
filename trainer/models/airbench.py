"""Convolutional network made for quick training: a teacher for small images that a processor can teach in an hour."""

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks, largest, max_pool


def airbench(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    first: PositiveInt = 24,
    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 96, 128),
) -> nn.Module:
    """A 2 x 2 convolution, three groups of two 3 x 3 convolutions, the maximum over positions, a linear classifier.

    A group is convolution, max pooling, normalization, GELU, convolution, normalization, GELU. After Jordan 2024, "94% on
    CIFAR-10 in 3.29 Seconds on a Single GPU", at widths for processors; there the first convolution is set to whiten the
    images' patches and stays so, here it learns. The 3 x 3 convolutions start as the identity on as many channels as
    they take. The default has 387,192 parameters on one input channel and 10 classes.
    Blocks: first, group1, group2, group3, each after its GELU. The embedding is group3's maximum over positions, divided
    by 9 (the paper scales the logits).

    first: channels of the first convolution. widths: channels of the three groups.
    """
    if min(input_shape[1:]) < 9:
        raise Mistake(
            f"airbench: images of {input_shape[1]} x {input_shape[2]} are too small; 9 x 9 is the least"
        )
    return _Airbench(input_shape[0], num_classes, first, widths)


class _Group(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.norm1(max_pool(self.conv1(x))))
        return functional.gelu(self.norm2(self.conv2(x)))


class _Airbench(Blocks):
    def __init__(self, images: int, num_classes: int, first: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.first = nn.Conv2d(images, first, 2)
        for number, (inputs, outputs) in enumerate(zip((first, *widths[:-1]), widths, strict=True), 1):
            self.add_module(f"group{number}", _Group(inputs, outputs))
        self.fc = nn.Linear(widths[-1], num_classes, bias=False)

    def blocks(self):
        groups = [(name, self.get_submodule(name)) for name in ("group1", "group2", "group3")]
        return [("first", self._first), *groups]

    def _first(self, x: Tensor) -> Tensor:
        return functional.gelu(self.first(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        embedding = largest(x) / 9
        return embedding if pre_logits else self.fc(embedding)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[: min(inputs, outputs)].detach())
    return conv
