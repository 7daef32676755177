"""A network made ready to answer on a CPU: the same function up to rounding, sooner (`scripts/bench_inference.py`)."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from trainer.compression import folding
from trainer.distillation.onednn import attach


def make_ready(network: nn.Module) -> nn.Module:
    """The network to ask in evaluation mode and without gradients: this one, or a copy without its BatchNorm.

    In place, if its weights are on a CPU: 2-D convolutions are laid out with channels last, and fully connected layers
    are multiplied by oneDNN wherever no gradient is wanted. Weights, statistics and their names stay as they are. A
    network that tells where BatchNorm can be folded away (`Blocks.norms`) is copied for that: the copy has the same
    stages, and takes no part in what becomes of the original.
    """
    if any(tensor.device.type != "cpu" for tensor in network.state_dict().values()):
        return network
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    attach(network, learning=False)
    if not folding.norms(network) or any(map(parametrize.is_parametrized, network.modules())):
        return network
    return folding.fold_norms(copy.deepcopy(network))
