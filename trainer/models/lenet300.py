"""LeNet-300-100: the fully connected network of the pruning literature."""

from functools import partial

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks


def lenet300(
    input_shape: tuple[int, int, int], num_classes: int, *, hidden: tuple[PositiveInt, ...] = (300, 100)
) -> nn.Module:
    """Fully connected layers fc1, fc2, ... with ReLU between them (LeCun et al. 1998).

    Each hidden layer is a block; its map [N, units, 1, 1] is taken after the ReLU. The last one is the embedding.

    hidden: units of each hidden layer. The default on 28 x 28 x 1 and 10 classes is the classic 784-300-100-10 with
    266,610 parameters. Raises Mistake for an empty list.
    """
    if not hidden:
        raise Mistake("lenet300: hidden is empty; it lists the units of at least one hidden layer")
    channels, height, width = input_shape
    return _Lenet300([channels * height * width, *hidden, num_classes])


class _Lenet300(Blocks):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.names = [f"fc{number}" for number in range(1, len(widths))]
        for name, inputs, outputs in zip(self.names, widths[:-1], widths[1:], strict=True):
            self.add_module(name, nn.Linear(inputs, outputs))

    def blocks(self):
        return [(name, partial(self._hidden, name)) for name in self.names[:-1]]

    def chain(self):
        return self.names

    def _hidden(self, name: str, x: Tensor) -> Tensor:
        return torch.relu(self.get_submodule(name)(x.flatten(1)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.get_submodule(self.names[-1])(x)
