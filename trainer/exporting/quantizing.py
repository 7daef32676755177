"""Puts quantizers where a network's layers read maps, and finds their first steps from images."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compression import folding
from trainer.compression.integers import CENTRE, best_exponent
from trainer.compression.parametrizations import Codebook
from trainer.compression.weights import weights_of
from trainer.exporting.graph import Graph
from trainer.exporting.integer_steps import IMAGE, images_read, redundant, steps_of
from trainer.exporting.tracing import trace
from trainer.mistakes import Mistake
from trainer.networks.blocks import Mean
from trainer.networks.norms import give_bias
from trainer.networks.quantizers import HIGHEST, NAME, Quantizer, quantizers, set_quantizer

READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, Mean)
SAMPLE = 1 << 18  # values of a map that its first step is found from


def quantized(
    student: nn.Module,
    spec: dict[str, Any],
    shape: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a network whose layers read rounded maps, and its spec; BatchNorm is folded away first.

    The steps of all maps but the image's are still 1: see `calibrate`. In place, but for what folding makes anew.

    Args:
        student: The network.
        spec: What it is built from.
        shape: (C, H, W) of the images.
        mean, std: Of their normalisation.

    Raises:
        Mistake: For a network that integers cannot compute, with the layer.
    """
    if quantizers(student):
        raise Mistake("the student is quantized already")
    if folding.norms(student):
        student, spec = folding.fold(student, spec)
    modules = {name: module for name, module in student.named_modules() if name}
    for module in modules.values():
        if isinstance(module, READERS) or _is_block(module):
            set_quantizer(module, Quantizer(0, CENTRE))
    graph = trace(student, shape)
    for name in redundant(graph):
        set_quantizer(modules[_owner(name)], None)
    called = {node.layer for node in graph.nodes if node.op == "quantize"}
    for name, _ in quantizers(student).items():
        if f"{name}.{NAME}" not in called:
            set_quantizer(modules[name], None)
    exponent = -round(math.log2(HIGHEST * sum(std) / len(std)))
    zero = min(HIGHEST, max(0, round(HIGHEST * sum(mean) / len(mean))))
    for name in images_read(graph):
        set_quantizer(modules[_owner(name)], Quantizer(exponent, zero, mean, std))
    given: list[str] = []
    for step in steps_of(trace(student, shape)):
        if step.x.name != IMAGE:
            continue
        if step.node.op not in ("conv", "linear"):
            raise Mistake(f"layer {step.node.layer!r}: the image is read by {step.node.op}, not by a layer")
        module = student.get_submodule(step.node.layer)
        if module.bias is None and any(zero != HIGHEST * value for value in mean):
            give_bias(module)  # which `fit_first_layers` shifts
            given.append(step.node.layer)
    if given:
        spec = {**spec, "biased": given}
    return student, with_maps(student, spec)


def with_maps(student: nn.Module, spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the spec of a quantized network, with its steps as they are now."""
    return {**spec, "maps": {name: one.settings() for name, one in quantizers(student).items()}}


def _is_block(module: nn.Module) -> bool:
    """Whether a module holds others and says itself how they are called: it may read its input twice."""
    return any(True for _ in module.children()) and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _owner(name: str) -> str:
    return name.removesuffix(f".{NAME}")


@torch.no_grad()
def fit_first_layers(student: nn.Module, graph: Graph) -> None:
    """Scales the weights of the layers that read the image to its step, and shifts their biases, in place.

    The layers then compute from whole pixels what they computed from normalised ones, but at a padded border: there a pixel
    is the one grey value that stands for 0, where it was each channel's mean. That is up to half a grey value off for one
    channel, or for channels of one mean, and up to 11 for those of ImageNet: a border of a fresh 3 x 3 convolution's map,
    whose spread is 0.7, is then up to 0.2 off. Shared weights get one factor for all channels.
    """
    layers, by_layer = weights_of(student), quantizers(student)
    for step in steps_of(graph):
        if step.x.name != IMAGE:
            continue
        quantizer = next(one for one in by_layer.values() if one.mean)
        layer, module = layers[step.node.layer], student.get_submodule(step.node.layer)
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (quantizer.mean, quantizer.std))
        factor = 1 / (HIGHEST * std * 2.0**quantizer.exponent)
        shift = (quantizer.zero / HIGHEST - mean) / std
        weight = layer.value.detach().double()
        groups = getattr(module, "groups", 1)
        size = len(mean) // groups  # channels that an output reads
        first = torch.arange(len(weight)) // (len(weight) // groups) * size
        read = first[:, None] + torch.arange(size)  # which, of each output
        bias: Any = module.bias
        if bias is not None:
            sums = weight.reshape(len(weight), size, -1).sum(2)
            bias.add_((sums * shift[read].to(weight)).sum(1).to(bias.dtype))
        parameter = layer.parameter
        if isinstance(layer.parametrization, Codebook):
            parameter.mul_(factor.mean().item())
        else:
            scaled = parameter.reshape(len(weight), size, -1) * factor[read].to(parameter)[..., None]
            parameter.copy_(scaled.reshape(parameter.shape))


@torch.no_grad()
def calibrate(student: nn.Module, batches: Iterable[Tensor], run: Callable[[Tensor], Any]) -> None:
    """Sets the steps of all maps but the image's to those of the least squared error, in place.

    Args:
        student: The network, with its quantizers.
        batches: Images [N, C, H, W].
        run: Runs the network on a batch.
    """
    modules = dict(student.named_modules())
    found = {name: one for name, one in quantizers(student).items() if not one.mean}
    seen: dict[str, list[Tensor]] = {name: [] for name in found}
    handles = []
    for name in found:
        set_quantizer(modules[name], None)

        def keep(_module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            seen[name].append(inputs[0].detach().flatten().clone())

        handles.append(modules[name].register_forward_pre_hook(keep))
    try:
        for images in batches:
            run(images)
    finally:
        for handle in handles:
            handle.remove()
    for name, values in seen.items():
        sample = torch.cat(values)
        zero = CENTRE if sample.min() < 0 else 0
        sample = sample[:: max(1, len(sample) // SAMPLE)]
        set_quantizer(modules[name], Quantizer(best_exponent(sample, zero), zero))
