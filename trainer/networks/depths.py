"""Finds how deep in a network each of its parameters lies, for learning rates that differ with the depth."""

from typing import Any

from torch import nn

from trainer.networks import features

#: Modules that only hold others, in their order.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def depths(network: nn.Module) -> dict[str, int]:
    """Returns {parameter's name: depth}, from 0 for the first layer; the classifier has the greatest depth.

    timm's networks say themselves which parameters belong to one layer (`group_matcher`). In others the layers are
    the children of the network, those of a Sequential or a list among them; a norm belongs to the layer before it.
    """
    if hasattr(network, "group_matcher"):
        from timm.models import group_parameters  # here, since it takes seconds

        answering: Any = network
        return group_parameters(network, answering.group_matcher(coarse=False), reverse=True)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found: dict[str, int] = {}
    depth = 0
    for layer in _layers(network):
        own = [names[id(p)] for p in layer.parameters() if id(p) in names and names[id(p)] not in found]
        is_norm = all(p.ndim <= 1 for p in layer.parameters())
        if not own:
            continue
        if found and not is_norm:
            depth += 1
        found |= dict.fromkeys(own, depth)
    # What the network itself owns beside its children (a class token) comes first.
    return {name: found.get(name, 0) for name in names.values()}


def _layers(network: nn.Module) -> list[nn.Module]:
    """Returns the network's layers in the order of their definition."""
    head = {id(p) for classifier in features.classifiers(network) for p in classifier.parameters()}
    layers = _opened(list(network.children()))
    while True:
        body = [layer for layer in layers if any(id(p) not in head for p in layer.parameters())]
        # A network in a wrapper, or a backbone beside a head: its own layers are meant.
        if len(body) != 1 or not list(body[0].children()):
            return layers
        at = next(i for i, layer in enumerate(layers) if layer is body[0])
        layers[at : at + 1] = _opened(list(body[0].children()))


def _opened(modules: list[nn.Module]) -> list[nn.Module]:
    """Returns the modules, with the content of containers in place of these."""
    layers = []
    for module in modules:
        layers += _opened(list(module.children())) if isinstance(module, CONTAINERS) else [module]
    return layers
