"""GRU: reads an image row by row, as a sequence."""

from pydantic import PositiveInt
from torch import nn

from trainer.networks.recurrent import Recurrent


def gru(
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    hidden: PositiveInt = 128,
    num_layers: PositiveInt = 1,
    bidirectional: bool = False,
) -> nn.Module:
    """A gated recurrent unit network (Cho et al. 2014) and a linear classifier.

    A step is one row of the image: H steps of C * W values. hidden: units of each layer and direction.
    num_layers: layers on top of each other. bidirectional: read downwards and upwards.
    One stage, gru: the top layer's outputs [N, H, D] (as a map [N, D, H, 1]). The embedding is the last
    step's output, of both directions where there are two.
    """
    channels, _, width = input_shape
    layer = nn.GRU(channels * width, hidden, num_layers, batch_first=True, bidirectional=bidirectional)
    return Recurrent("gru", layer, num_classes)
