"""A network made ready to answer on a CPU: the same function up to rounding, sooner (`scripts/bench_inference.py`)."""

import copy
import platform
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from trainer import fold


def make_ready(network: nn.Module) -> nn.Module:
    """The network to ask in evaluation mode and without gradients: this one, or a copy without its BatchNorm.

    In place, if its weights are on a CPU: 2-D convolutions are laid out with channels last, and fully connected layers
    are multiplied by oneDNN wherever no gradient is wanted. Weights, statistics and their names stay as they are. A
    network that tells where BatchNorm can be folded away (`Staged.norms`) is copied for that: the copy has the same
    stages, and takes no part in what becomes of the original.
    """
    if any(tensor.device.type != "cpu" for tensor in network.state_dict().values()):
        return network
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        # One whose forward is someone's own already is left alone; so are subclasses, which may do more.
        elif type(module) is nn.Linear and "forward" not in vars(module) and _has_onednn():
            module.forward = partial(_linear, module)  # no closure: in a copy of the network it has the copy's layer
    if not fold.norms(network) or any(map(parametrize.is_parametrized, network.modules())):
        return network
    return fold.fold_norms(copy.deepcopy(network))


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    # torch multiplies by MKL, which uses half the width of the vector units of processors that are not Intel's. oneDNN
    # asks the processor what it can do; torch.compile calls it so too, where it compiles for inference.
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    single = x.dtype == layer.weight.dtype == torch.float32 and x.device.type == layer.weight.device.type == "cpu"
    if plain or torch.jit.is_tracing() or not single or x.dim() < 2 or x.numel() == 0:
        return F.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
