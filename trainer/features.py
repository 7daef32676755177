"""What a network sees: logits, pooled embedding and feature maps of one forward pass.

timm's networks are read through `forward_intermediates` and `forward_head`, our own small nets answer the same two
calls (`Staged`), and forward hooks on dotted module names serve any other `nn.Module` and any layer that is no stage.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.mistakes import Mistake


class Seen(NamedTuple):
    """One forward pass: logits [N, K], embedding [N, D] or None, maps {layer: [N, C, H, W]} in the order asked."""

    logits: Tensor
    embedding: Tensor | None
    maps: dict[str, Tensor]


class Layer(NamedTuple):
    """A layer that can be looked at: its name and the shape (C, H, W) of its map for the run's images."""

    name: str
    shape: tuple[int, int, int]


def as_map(tensor: Tensor) -> Tensor:
    """Any layer's output as a map: [N, D] becomes [N, D, 1, 1], a sequence [N, T, D] becomes [N, D, T, 1]."""
    if not isinstance(tensor, Tensor):
        raise Mistake(f"a layer's output of type {type(tensor).__name__} is no feature map: a tensor is")
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() == 2:
        return tensor[:, :, None, None]
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).unsqueeze(-1)
    raise Mistake(f"a layer's output of {tensor.dim()} dimensions is no feature map: 2, 3 or 4 are")


def max_pool(x: Tensor) -> Tensor:
    """Max pooling of 2 x 2 windows, [N, C, H, W] to [N, C, H // 2, W // 2]: `max_pool2d(x, 2)` to the bit.

    Where no gradient is wanted on a CPU it is made of plain maxima, which take a tenth of the time. A network that is
    traced, to be compiled or exported, keeps its pooling.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or x.device.type != "cpu" or torch.is_grad_enabled() and x.requires_grad:
        return functional.max_pool2d(x, 2)
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    rows = torch.maximum(x[:, :, 0:height:2, :width], x[:, :, 1:height:2, :width])
    return torch.maximum(rows[..., 0::2], rows[..., 1::2])


class Staged(nn.Module):
    """A network written as a chain of named stages; answers the calls that timm's models answer.

    A subclass defines `stages()`, a list of (name, function), each fed the one before's output, and
    `forward_head(x, pre_logits=False)`, which turns the last stage's output into logits [N, K], or with `pre_logits`
    into the pooled embedding [N, D].
    """

    def stages(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        raise NotImplementedError(f"{type(self).__name__} does not list its stages")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no head")

    def chain(self) -> list[str]:
        """Names of the learned layers where each feeds the next one only, by way of ReLU and pooling; [] elsewhere.

        A depthwise convolution without bias feeds the next directly. The order of the units between two such layers is
        free, and those that are dead can be dropped: see `fold.tidy`.
        """
        return []

    def norms(self) -> list[tuple[str, str]]:
        """(layer, BatchNorm that directly follows it) where the network of `batch_norm: false` is what folding gives."""
        return []

    def forward_features(self, x: Tensor) -> Tensor:
        for _, stage in self.stages():
            x = stage(x)
        return x

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The last stage's output, and the maps of the stages in `indices` (all of them for None)."""
        maps = []
        for number, (_, stage) in enumerate(self.stages()):
            x = stage(x)
            if indices is None or number in indices:
                maps.append(as_map(x))
        return x, maps

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def stage_names(model: nn.Module) -> list[str]:
    """Names of the model's stages, shallow first; empty for a plain `nn.Module` without timm's calls."""
    if isinstance(model, Staged):
        return [name for name, _ in model.stages()]
    if not (hasattr(model, "forward_intermediates") and hasattr(model, "forward_head")):
        return []
    info = getattr(model, "feature_info", None)
    if info is None:
        return []
    # A list of dicts in most families, a FeatureInfo object in a few.
    entries = info if isinstance(info, list) else info.info
    names = [entry["module"] for entry in entries]
    # A few families give several stages one module name (CoaT), or none (TResNet): those are known by their number.
    return [name if name and names.count(name) == 1 else f"stage{i}" for i, name in enumerate(names)]


def see(model: nn.Module, images: Tensor, layers: Sequence[str] = (), embedding: bool = False) -> Seen:
    """Logits, and where asked the embedding and the maps of `layers`, of one forward pass.

    images: [N, C, H, W], normalised. layers: names of stages (`stage_names`) or dotted names of modules.
    Raises Mistake for a layer that does not exist, or an embedding asked of a net that does not tell its head.
    """
    if not layers and not embedding:
        return Seen(model(images), None, {})
    names = stage_names(model)
    indices = sorted({names.index(layer) for layer in layers if layer in names})
    hooked = [layer for layer in layers if layer not in names]
    seen: dict[str, Tensor] = {}
    handles = []
    try:
        for layer in hooked:
            handles.append(_watch(model, layer, seen))
        if names:
            extra = {} if isinstance(model, Staged) else {"norm": False, "output_fmt": "NCHW"}
            if indices:
                final, found = model.forward_intermediates(images, indices=indices, **extra)
                seen.update({names[i]: as_map(m) for i, m in zip(indices, found, strict=True)})
            else:
                final = model.forward_features(images)
            logits = model.forward_head(final)
            pooled = model.forward_head(final, pre_logits=True) if embedding else None
        else:
            head = _last_linear(model) if embedding else None
            inputs: list[Tensor] = []
            if head is not None:
                handles.append(head.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
            logits = model(images)
            pooled = inputs[0].flatten(1) if inputs else None
    finally:
        for handle in handles:
            handle.remove()
    for layer in hooked:
        if layer not in seen:
            raise Mistake(f"layer {layer!r} is not called in the forward pass, so it has no map")
    return Seen(logits, pooled, {layer: seen[layer] for layer in layers})


def head(model: nn.Module) -> nn.Module:
    """The classifier: the module that maps the pooled embedding [N, D] to logits [N, K].

    Raises Mistake for a net with several classifiers (DeiT-distilled, LeViT): none alone gives the logits.
    """
    if not hasattr(model, "get_classifier"):
        return _last_linear(model)
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Module):
        raise Mistake(f"{type(model).__name__} has several classifiers; none alone gives its logits")
    # In some families it starts with the pooling, or is a 1 x 1 convolution: the embedding is pooled and flat.
    classifier = getattr(classifier, "fc", classifier)
    if isinstance(classifier, nn.Conv2d):
        return nn.Sequential(nn.Unflatten(1, (classifier.in_channels, 1, 1)), classifier, nn.Flatten())
    return classifier


def _last_linear(model: nn.Module) -> nn.Linear:
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise Mistake(f"{type(model).__name__} has no Linear layer, so it has no embedding before a classifier")
    return linears[-1]


def _watch(model: nn.Module, layer: str, seen: dict[str, Tensor]):
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        raise Mistake(f"there is no layer {layer!r}; there are {', '.join(stage_names(model) or list(modules)[1:])}")

    def keep(_module: nn.Module, _inputs, output) -> None:
        seen[layer] = as_map(output[0] if isinstance(output, tuple) else output)

    return modules[layer].register_forward_hook(keep)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode while this lasts, and then in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def look(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None) -> list[Layer]:
    """The layers with the shapes of their maps, by one dry forward in evaluation mode; all stages for None.

    A plain `nn.Module` has no stages: its direct children that give a map are taken instead.
    """
    with evaluating(model):
        if layers is None:
            layers = stage_names(model)
        if not layers:
            layers = _children_with_maps(model, images)
        maps = see(model, images, layers).maps
    return [Layer(name, tuple(map_.shape[1:])) for name, map_ in maps.items()]


def _children_with_maps(model: nn.Module, images: Tensor) -> list[str]:
    found: list[str] = []

    def keep(name: str):
        def hook(_module: nn.Module, _inputs, output) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor) and output.dim() in (2, 3, 4) and name not in found:
                found.append(name)
        return hook

    handles = [child.register_forward_hook(keep(name)) for name, child in model.named_children()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    # The last child is the classifier: what it gives are the logits.
    return found[:-1]


def pair(student: Sequence[Layer], teacher: Sequence[Layer], image_size: int) -> list[tuple[Layer, Layer]]:
    """Which student layer looks at which teacher layer, without anybody typing it.

    Layers whose maps shrink (convolutional nets) are known by their stride: of each stride the deepest layer is
    taken, and pairs have the same stride, or the nearest one in octaves. Where either net keeps one size
    throughout (ViT, MLP, fully connected), layers are matched by their fraction of the depth.
    Each student layer appears once, shallow first, and teacher layers never go backwards.
    """
    if not student or not teacher:
        return []
    if _shrinks(student) and _shrinks(teacher):
        by_stride = {_octave(layer, image_size): layer for layer in teacher}  # a later layer replaces an earlier
        students = {_octave(layer, image_size): layer for layer in student}
        pairs = []
        for octave, layer in sorted(students.items()):
            nearest = min(by_stride, key=lambda o: (abs(o - octave), -o))
            pairs.append((layer, by_stride[nearest]))
        return pairs
    count = min(len(student), len(teacher), 4)
    return [(_at_depth(student, (i + 1) / count), _at_depth(teacher, (i + 1) / count)) for i in range(count)]


def _shrinks(layers: Sequence[Layer]) -> bool:
    return len({layer.shape[1] for layer in layers}) > 1


def _octave(layer: Layer, image_size: int) -> float:
    return round(math.log2(image_size / max(1, layer.shape[1])) * 2) / 2


def _at_depth(layers: Sequence[Layer], fraction: float) -> Layer:
    return layers[max(0, round(fraction * len(layers)) - 1)]
