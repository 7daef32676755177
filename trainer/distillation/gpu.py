"""Prepares a network for fast inference on a GPU: the same function up to rounding."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from trainer.compression import folding

_IN_HALF = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def make_ready(network: nn.Module, half: torch.dtype | None) -> nn.Module:
    """Returns a copy to use in evaluation mode without gradients; the network itself if it is parametrized.

    BatchNorm is folded where that is possible (`Blocks.norms`), and 2-D convolutions have the channels-last layout. The copy
    does not follow later changes of the network.

    Args:
        network: The network.
        half: The type of the autocast that the copy is used in, None outside of autocast. Weights of convolutions and
            fully connected layers are kept in it: autocast would convert them in every forward pass, to the same values.
    """
    if any(map(parametrize.is_parametrized, network.modules())):
        return network
    ready = copy.deepcopy(network)
    if folding.norms(ready):
        ready = folding.fold_norms(ready)
    for module in ready.modules():
        if half is not None and type(module) in _IN_HALF:
            module.to(half)
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return ready
