"""Prepares a network for fast inference on a CPU: the same function up to rounding (`scripts/bench_inference.py`)."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from trainer.compression import folding
from trainer.distillation.onednn import attach


def make_ready(network: nn.Module) -> nn.Module:
    """Returns the network to use in evaluation mode without gradients: this one, or a copy with its BatchNorm folded.

    If its weights are on a CPU, the network is changed in place: 2-D convolutions get the channels-last layout, and fully
    connected layers are multiplied by oneDNN when no gradient is needed. Weights, statistics and their names stay. A
    network whose BatchNorm can be folded (`Blocks.norms`) is copied for that. The copy has the same blocks, and does not
    follow later changes of the original.
    """
    if not is_on(network):
        return network
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    attach(network, learning=False)
    if not folding.norms(network) or any(map(parametrize.is_parametrized, network.modules())):
        return network
    return folding.fold_norms(copy.deepcopy(network))


def is_on(network: nn.Module) -> bool:
    """Returns whether all of a network is on a CPU."""
    return all(tensor.device.type == "cpu" for tensor in network.state_dict().values())
