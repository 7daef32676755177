"""Folds BatchNorm into the layers before it: the same function from fewer tensors."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compression.parametrizations import Codebook, Mask
from trainer.compression.weights import Weight, weights_of
from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks
from trainer.networks.norms import adjoining, randomize_norms, remove_norms
from trainer.recipe import shelves


def norms(model: nn.Module) -> list[tuple[str, str]]:
    """Returns the pairs (layer, BatchNorm after it) of `Blocks.norms` that are not folded yet."""
    known = model.norms() if isinstance(model, Blocks) else []
    return [(layer, norm) for layer, norm in known if not isinstance(model.get_submodule(norm), nn.Identity)]


def can_fold(model: nn.Module) -> list[tuple[str, str]]:
    """Returns the pairs (layer, norm) that `fold` would fold: those that the network knows, else those that `adjoining` finds.

    Raises Mistake if there are none, or a weight is shared or tied.
    """
    pairs = norms(model) or adjoining(model)
    if not pairs:
        raise Mistake("the network has no BatchNorm after a layer that it could be folded into")
    by_module = _by_module(model)
    for layer, norm in pairs:
        weight = by_module[model.get_submodule(layer)]
        if len(weight.holders) > 1:
            tied = "" if weight.name == layer else f" is that of {weight.name!r} and"
            raise Mistake(
                f"layer {layer!r}: its weight{tied} is held {len(weight.holders)} times, so {norm!r} cannot be folded into "
                "it: a tied weight cannot take two scales"
            )
        if weight.mask is not None and not isinstance(weight.parametrization, Mask):
            raise Mistake(f"layer {layer!r} shares its weights already: fold before sharing")
    return pairs


def fold(model: nn.Module, spec: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Folds BatchNorm away by `fold_norms`; returns the network and its new spec.

    spec: {"model": name, settings} as in a recipe. The new one is that of `batch_norm: false`, or has "folded" for a network
    without this setting.
    """
    has_setting = bool(norms(model))
    spec = _without_sizes(spec, {norm for _, norm in can_fold(model)})
    spec = _without_setting(spec) if has_setting else {**spec, "folded": True}
    return fold_norms(model), spec


def refuse_unfoldable(model: nn.Module, images: Tensor) -> None:
    """Raises Mistake if folding changes the network's answers; the statistics are random numbers, on a copy.

    images: of any content, [N, C, H, W].
    """
    # On the CPU, because a GPU's convolutions round weights to 10 bits.
    copied, images = copy.deepcopy(model).cpu().eval(), images.cpu()
    randomize_norms(copied)
    with torch.no_grad():
        before = copied(images)
        difference = (before - fold_norms(copied)(images)).abs().max().item()
    if not difference <= 1e-3 * max(1.0, before.abs().max().item()):
        raise Mistake(
            "fold: a BatchNorm of the network does not directly follow the layer that stands before it, so it cannot be folded "
            f"into it (an answer would be {difference:.3g} off)"
        )


@torch.no_grad()
def fold_norms(model: nn.Module) -> nn.Module:
    """Folds BatchNorm into the layers before it, in place; returns the network.

    In evaluation mode the outputs stay the same up to rounding. Whole output channels are scaled, so masks do not change.
    Raises Mistake for a network that has nothing to fold, or whose weights are shared already or tied.
    """
    pairs = can_fold(model)
    by_module = _by_module(model)
    for layer, norm_name in pairs:
        module: Any = model.get_submodule(layer)
        norm: Any = model.get_submodule(norm_name)
        gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        scale = gain.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        shift = torch.zeros_like(scale) if norm.bias is None else norm.bias.double()
        before = torch.zeros_like(scale) if module.bias is None else module.bias.double()
        bias = shift + (before - norm.running_mean.double()) * scale
        weight = own_tensors(by_module[module])[0]
        shape = (-1,) + (1,) * (weight.dim() - 1)
        weight.copy_(
            weight.double() * scale.reshape(shape) + 0.0
        )  # + 0.0: a negative scale must leave no -0.0
        module.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
    remove_norms(model, pairs)
    return model


def _by_module(model: nn.Module) -> dict[nn.Module, Weight]:
    """Returns the weight of each layer, also of one whose weight goes by another layer's name."""
    holders = ((layer, holder) for layer in weights_of(model).values() for holder in layer.holders)
    return {module: layer for layer, (module, attribute) in holders if attribute == "weight"}


def _without_setting(spec: Mapping[str, Any]) -> dict[str, Any]:
    found = {**spec, "batch_norm": False}
    parameters = inspect.signature(shelves.find("model", spec["model"])).parameters
    if parameters["batch_norm"].default is False:
        del found["batch_norm"]
    return found


def _without_sizes(spec: Mapping[str, Any], norms: set[str]) -> dict[str, Any]:
    """Returns the spec without the sizes of norms, which removed channels have left there."""
    found = dict(spec)
    if "resized" in found:
        found["resized"] = {name: size for name, size in found["resized"].items() if name not in norms}
    return found


def own_tensors(layer: Weight) -> list[Tensor]:
    """Returns the tensors of the weight's shape that define it: itself, weight and mask, or the codes of a codebook."""
    module, attribute = layer.holders[0]
    found = layer.parametrization
    if found is None:
        return [getattr(module, attribute)]
    if isinstance(found, Codebook):
        return [found.codes]
    if isinstance(found, Mask):
        return [layer.parameter, found.mask]
    raise Mistake(f"layer {layer.name!r} is still deciding which values it shares")
