"""Finds and removes the BatchNorm of networks that have no setting for it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.mistakes import Mistake

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def adjoining(model: nn.Module) -> list[tuple[str, str]]:
    """Returns the pairs (layer, BatchNorm with statistics whose module comes next and has as many channels).

    It goes by the order of the modules, which need not be that of the calls: `compression.folding.refuse_unfoldable` tells.
    """
    found, layer = [], None
    for name, module in model.named_modules():
        if layer and name.startswith(f"{layer[0]}."):
            continue  # its parametrizations
        if isinstance(module, _BatchNorm):
            if layer and module.running_mean is not None and layer[1] == module.num_features:
                found.append((layer[0], name))
            layer = None
        elif isinstance(module, _LAYERS):
            layer = name, module.out_features if isinstance(module, nn.Linear) else module.out_channels
        elif not any(module.children()) and not isinstance(module, nn.Identity):
            layer = None  # an activation, say, is between them
    return found


def remove_norms(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Replaces each norm by what else it does (timm's have an activation inside), in place, and gives its layer a bias."""
    for layer, norm_name in pairs:
        module, norm = model.get_submodule(layer), model.get_submodule(norm_name)
        give_bias(module)
        owner, _, name = norm_name.rpartition(".")
        rest = [part for _, part in norm.named_children()]
        setattr(model.get_submodule(owner), name, nn.Sequential(*rest) if rest else nn.Identity())


def give_bias(module: nn.Module) -> None:
    """Gives a layer without a bias one of zeros, in place."""
    if module.bias is None:
        weight: Any = module.weight
        module.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=weight.requires_grad)


def give_biases(model: nn.Module, names: Any) -> None:
    """Gives the layers of these names biases of zeros, in place.

    Raises Mistake for names that are not of layers: anyone may have written them.
    """
    modules = dict(model.named_modules())
    for name in names if isinstance(names, list | tuple) else [names]:
        if not isinstance(name, str) or not isinstance(modules.get(name), _LAYERS):
            raise Mistake(f"biased: the network has no layer {name!r}")
        give_bias(modules[name])


@torch.no_grad()
def randomize_norms(model: nn.Module) -> None:
    """Gives every BatchNorm statistics, gains of both signs and offsets, from a seed of its own."""
    generator = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(drawn(module.running_mean) * 0.1)
            assert module.running_var is not None
            module.running_var.copy_(1 + drawn(module.running_var).abs())
            if module.affine:
                gains = drawn(module.weight)
                module.weight.copy_(torch.where(gains < 0, gains - 0.5, gains + 0.5))
                module.bias.copy_(drawn(module.bias) * 0.1)
