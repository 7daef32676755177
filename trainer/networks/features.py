"""Reads logits, pooled embedding and feature maps from one forward pass of any network.

timm's models are read through `forward_intermediates` and `forward_head`. Our own networks have the same two calls
(`Blocks`). Forward hooks on dotted module names serve any other `nn.Module`, and any layer that is not a block. A map is
the layer's own output, also where the network then changes that tensor in place. `NAME:input` is a module's input.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.networks.blocks import Blocks, as_map, kept
from trainer.networks.output import answer, one_of

INPUT = ":input"  # at the end of a module's name: what the module is given, instead of what it returns


class Seen(NamedTuple):
    """Results of one forward pass: logits [N, K], embedding [N, D] or None, maps {layer: [N, C, H, W]} in the order asked.

    outputs: of a network that returns several, those asked for, {number or name: output}.
    """

    logits: Tensor
    embedding: Tensor | None
    maps: dict[str, Tensor]
    outputs: Mapping[int | str, Tensor] = {}


class Layer(NamedTuple):
    """A layer with a feature map: its name and the shape (C, H, W) of the map for the run's images."""

    name: str
    shape: tuple[int, ...]


def block_names(model: nn.Module) -> list[str]:
    """Returns the names of the model's blocks, shallow first; [] for a plain `nn.Module` without timm's feature calls."""
    if isinstance(model, Blocks):
        return [name for name, _ in model.blocks()]
    if not (hasattr(model, "forward_intermediates") and hasattr(model, "forward_head")):
        return []
    info = getattr(model, "feature_info", None)
    if info is None:
        return []
    # A list of dicts in most families, a FeatureInfo object in a few.
    entries = info if isinstance(info, list) else info.info
    names = [entry["module"] for entry in entries]
    # A few families give several blocks one module name (CoaT), or none (TResNet): those get their number.
    return [name if name and names.count(name) == 1 else f"stage{i}" for i, name in enumerate(names)]


def see(
    model: nn.Module,
    images: Tensor,
    layers: Sequence[str] = (),
    embedding: bool = False,
    outputs: Sequence[int | str] = (),
    head: bool = True,
) -> Seen:
    """Runs one forward pass; returns logits, the maps of `layers`, the embedding if asked, and further `outputs`.

    Args:
        model: Any network that maps images to logits.
        images: [N, C, H, W], normalised.
        layers: Names of blocks (`block_names`), dotted names of modules, or those with `:input` at the end.
        embedding: Whether to return the pooled embedding [N, D] before the classifier.
        outputs: Numbers or names among several outputs. Each is the logits where the network returns one tensor.

        head: Whether what the network returns are logits. If not, the embedding of a network without timm's calls is what
            its last Linear layer is given if that layer makes the answer, else the answer itself.

    Raises:
        Mistake: For a layer that does not exist or is not called, and for an embedding of a network without a
            Linear layer.
    """
    if not layers and not embedding and not outputs:
        return Seen(model(images), None, {})
    names = block_names(model)
    indices = sorted({names.index(layer) for layer in layers if layer in names})
    hooked = [layer for layer in layers if layer not in names]
    seen: dict[str, Tensor] = {}
    handles = []
    returned: list[Any] = []
    try:
        for layer in hooked:
            handles.append(_watch(model, layer, seen))
        if outputs:  # first, before the hook that takes one of them
            handles.append(model.register_forward_hook(lambda _m, _i, o: returned.append(o), prepend=True))
        if names:
            answering: Any = model  # timm's calls, which `block_names` has found
            extra = {} if isinstance(model, Blocks) else {"norm": False, "output_fmt": "NCHW"}
            if indices:
                final, found = answering.forward_intermediates(images, indices=indices, **extra)
                seen.update({names[i]: as_map(m) for i, m in zip(indices, found, strict=True)})
            else:
                final = answering.forward_features(images)
            returned.append(answering.forward_head(final))
            logits = answer(model, returned[-1])
            pooled = answering.forward_head(final, pre_logits=True) if embedding else None
        else:
            last = _last_linear(model) if embedding and (head or _linears(model)) else None
            inputs: list[Tensor] = []
            made: list[Any] = []
            if last is not None:
                handles.append(last.register_forward_pre_hook(lambda _, args: inputs.append(kept(args[0]))))
                handles.append(last.register_forward_hook(lambda _m, _i, output: made.append(output)))
            logits = model(images)
            if embedding and not head and not any(output is logits for output in made):
                inputs = [logits]
            pooled = inputs[0].flatten(1) if inputs else None
    finally:
        for handle in handles:
            handle.remove()
    for layer in hooked:
        if layer not in seen:
            raise Mistake(f"layer {layer!r} is not called in the forward pass, so it has no map")
    maps = {layer: seen[layer] for layer in layers}
    return Seen(logits, pooled, maps, {output: one_of(returned[-1], output) for output in outputs})


def head(model: nn.Module) -> nn.Module:
    """Returns the classifier: the module that maps the pooled embedding [N, D] to logits [N, K].

    Raises Mistake for a network with several classifiers (DeiT-distilled, LeViT), none of which alone gives the logits.
    """
    if not hasattr(model, "get_classifier"):
        return _last_linear(model)
    answering: Any = model
    classifier = answering.get_classifier()
    if not isinstance(classifier, nn.Module):
        raise Mistake(f"{type(model).__name__} has several classifiers; none alone gives its logits")
    # In some families the classifier starts with the pooling, or is a 1 x 1 convolution; our embedding is pooled and flat.
    classifier = getattr(classifier, "fc", classifier)
    if isinstance(classifier, nn.Conv2d):
        return nn.Sequential(nn.Unflatten(1, (classifier.in_channels, 1, 1)), classifier, nn.Flatten())
    return classifier


def classifiers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of the head: one classifier, or several (DeiT-distilled). Raises Mistake if there is none."""
    if not hasattr(model, "get_classifier"):
        return [_last_linear(model)]
    answering: Any = model
    found = answering.get_classifier()
    return list(found) if isinstance(found, tuple | list) else [found]


def _last_linear(model: nn.Module) -> nn.Linear:
    linears = _linears(model)
    if not linears:
        raise Mistake(
            f"{type(model).__name__} has no Linear layer, so it has no embedding before a classifier"
        )
    return linears[-1]


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def module_of(layer: str) -> str:
    """Returns the name of the module that a layer's name means: that of `NAME:input` without its end."""
    return layer.removesuffix(INPUT)


def _watch(model: nn.Module, layer: str, seen: dict[str, Tensor]):
    modules, name = dict(model.named_modules()), module_of(layer)
    if name not in modules or not name:
        raise Mistake(
            f"there is no layer {layer!r}; there are {', '.join(block_names(model) or list(modules)[1:])}"
        )

    def keep(found: Any) -> None:
        seen[layer] = kept(as_map(_first(found)))

    if name != layer:
        return modules[name].register_forward_pre_hook(lambda _module, inputs: keep(inputs))
    return modules[name].register_forward_hook(lambda _module, _inputs, output: keep(output))


def _first(found: Any) -> Any:
    """Returns the first of several outputs or inputs; what is not in a tuple as it is."""
    return found[0] if isinstance(found, tuple) and found else found


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode inside the `with` block, and restores each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def look(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None) -> list[Layer]:
    """Returns layers with the shapes of their maps, from one forward pass in evaluation mode.

    layers: names as in `see`; None takes all blocks, or for a plain `nn.Module` the direct children that return a map.
    """
    with evaluating(model):
        if layers is None:
            layers = block_names(model)
        if not layers:
            layers = _children_with_maps(model, images)
        maps = see(model, images, layers).maps
    return [Layer(name, tuple(map_.shape[1:])) for name, map_ in maps.items()]


def _children_with_maps(model: nn.Module, images: Tensor) -> list[str]:
    found: list[str] = []

    def keep(name: str):
        def hook(_module: nn.Module, _inputs, output) -> None:
            output = _first(output)
            if isinstance(output, Tensor) and output.dim() in (2, 3, 4) and name not in found:
                found.append(name)

        return hook

    handles = [child.register_forward_hook(keep(name)) for name, child in model.named_children()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    # The last child is the classifier; its output is the logits.
    return found[:-1]
