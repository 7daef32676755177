"""LSTM: reads an image row by row, as a sequence."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from trainer.features import Staged


def lstm(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    hidden: PositiveInt = 128,
    num_layers: PositiveInt = 1,
    bidirectional: bool = False,
) -> nn.Module:
    """A long short-term memory network (Hochreiter and Schmidhuber 1997) and a linear classifier.

    A step is one row of the image: H steps of C * W values. hidden: units of each layer and direction.
    num_layers: layers on top of each other. bidirectional: read downwards and upwards.
    One stage, lstm: the top layer's outputs [N, H, D] (as a map [N, D, H, 1]). The embedding is the last
    step's output, of both directions where there are two.
    """
    channels, _, width = input_shape
    return _Lstm(channels * width, num_classes, hidden, num_layers, bidirectional)


class _Lstm(Staged):
    def __init__(
        self, inputs: int, num_classes: int, hidden: int, num_layers: int, bidirectional: bool
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.lstm = nn.LSTM(inputs, hidden, num_layers, batch_first=True, bidirectional=bidirectional)
        self.fc = nn.Linear(hidden * (2 if bidirectional else 1), num_classes)

    def stages(self):
        return [("lstm", self._read)]

    def _read(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2).flatten(2)
        return self.lstm(rows)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        # The upward direction reads the first row last.
        last = torch.cat([x[:, -1, : self.hidden], x[:, 0, self.hidden :]], dim=1)
        return last if pre_logits else self.fc(last)
