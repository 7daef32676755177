"""LSTM: reads an image row by row, as a sequence."""

from pydantic import PositiveInt
from torch import nn

from trainer.networks.recurrent import Recurrent


def lstm(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    hidden: PositiveInt = 128,
    num_layers: PositiveInt = 1,
    bidirectional: bool = False,
) -> nn.Module:
    """A long short-term memory network (Hochreiter and Schmidhuber 1997) and a linear classifier.

    A time step is one row of the image: H steps of C * W values. The only block, lstm, is the top layer's output
    [N, H, D], as a map [N, D, H, 1]. The embedding is the output at the last step, of each direction.

    Args:
        hidden: Units of each layer and direction.
        num_layers: Number of stacked layers.
        bidirectional: Whether to read the rows upwards too.
    """
    channels, _, width = input_shape
    layer = nn.LSTM(channels * width, hidden, num_layers, batch_first=True, bidirectional=bidirectional)
    return Recurrent("lstm", layer, num_classes)
