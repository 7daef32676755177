"""The recurrent network that the models lstm and gru share."""

import torch
from torch import Tensor, nn

from trainer.networks.blocks import Blocks


class Recurrent(Blocks):
    """A recurrent layer over an image's rows (batch first), the only block, and a linear classifier."""

    def __init__(self, name: str, layer: nn.RNNBase, num_classes: int) -> None:
        super().__init__()
        self.name, self.hidden = name, layer.hidden_size
        self.add_module(name, layer)
        self.fc = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), num_classes)

    def blocks(self):
        return [(self.name, self._read)]

    def _read(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2)
        return getattr(self, self.name)(rows)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        # The upward direction reads the first row last.
        last = torch.cat([x[:, -1, : self.hidden], x[:, 0, self.hidden :]], dim=1)
        return last if pre_logits else self.fc(last)
