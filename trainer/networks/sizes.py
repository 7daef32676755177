"""Reads the sizes of a network's layers, and cuts a network down to given sizes."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from trainer.mistakes import Mistake


def sizes_of(model: nn.Module) -> dict[str, list[int]]:
    """Returns {layer: [outputs, inputs]} for convolutions and linear layers, {layer: [channels]} for normalizations."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            found[name] = [module.out_channels, module.in_channels]
        elif isinstance(module, nn.Linear):
            found[name] = [module.out_features, module.in_features]
        elif isinstance(module, _BatchNorm):
            found[name] = [module.num_features]
        elif isinstance(module, nn.LayerNorm):
            found[name] = list(module.normalized_shape)
    return found


def resize(model: nn.Module, wanted: Mapping[str, Any]) -> None:
    """Cuts layers down to the wanted sizes (see `sizes_of`), in place; the leading channels stay.

    A depthwise convolution stays depthwise. Raises Mistake for a layer that does not exist, is of another kind, or is
    smaller than wanted.
    """
    have, modules = sizes_of(model), dict(model.named_modules())
    if not isinstance(wanted, Mapping):
        raise Mistake(f"sizes of layers: got {wanted!r}; {{layer: [outputs, inputs]}} is allowed")
    for name, size in wanted.items():
        if name not in have:
            raise Mistake(
                f"sizes of layers: the network has no convolution, linear or normalization layer {name!r}"
            )
        fits = isinstance(size, list | tuple) and len(size) == len(have[name])
        if not fits or not all(
            type(n) is int and 0 < n <= most for n, most in zip(size, have[name], strict=True)
        ):
            raise Mistake(f"sizes of layer {name!r}: got {size!r}; at most {have[name]} is allowed")
        module = modules[name]
        if isinstance(module, _ConvNd):
            outputs, inputs = size
            if 1 < module.groups == module.in_channels:
                module.groups = inputs
            if inputs % module.groups or outputs % module.groups:
                raise Mistake(f"sizes of layer {name!r}: {size} do not split into its {module.groups} groups")
            first, second = (inputs, outputs) if isinstance(module, _ConvTransposeNd) else (outputs, inputs)
            _cut(module, "weight", first, second // module.groups)
            _cut(module, "bias", outputs)
            module.out_channels, module.in_channels = outputs, inputs
        elif isinstance(module, nn.Linear):
            _cut(module, "weight", *size)
            _cut(module, "bias", size[0])
            module.out_features, module.in_features = size
        else:
            for attribute in ("weight", "bias", "running_mean", "running_var"):
                _cut(module, attribute, *size)
            if isinstance(module, _BatchNorm):
                module.num_features = size[0]
            else:
                module.normalized_shape = tuple(size)


def _cut(module: nn.Module, attribute: str, *leading: int) -> None:
    tensor = getattr(module, attribute, None)
    if tensor is None:
        return
    small = tensor.detach()[tuple(slice(0, n) for n in leading)].clone()
    if isinstance(tensor, nn.Parameter):
        small = nn.Parameter(small, requires_grad=tensor.requires_grad)
    setattr(module, attribute, small)
