"""Prunes, shares and packs any `nn.Module`, without a recipe."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from trainer.compression import kmeans
from trainer.compression.codebooks import cluster, set_codebook
from trainer.compression.masks import ask, refuse_shared, score_masks, set_mask
from trainer.compression.rounding import round_codebook
from trainer.compression.weights import Weight, choose, per_layer, weights_of
from trainer.criteria.magnitude import magnitude
from trainer.criteria.std import std
from trainer.mistakes import Mistake
from trainer.packing import network as packed
from trainer.storage.files import write_bytes


def prune(
    model: nn.Module,
    sensitivity: float | Mapping[str, float] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    exclude: Iterable[str] = (),
    keep: Iterable[str] | None = None,
) -> dict[str, float]:
    """Prunes a network in place; returns {layer: fraction of zeros}. Later training leaves the zeros zero.

    Exactly one of sensitivity and sparsity is given, as one number for all layers or {layer: number}.

    Args:
        model: The network. Its weights of two dimensions or more are pruned.
        sensitivity: Sets the threshold of a layer: sensitivity x standard deviation of its surviving weights
            (Han et al. 2015).
        sparsity: Fraction of each layer's weights, the smallest, that become zero.
        exclude: Layers to leave alone: 'first', 'last', a layer's name or a module's.
        keep: The old name of exclude.

    Raises:
        Mistake: For settings or layers that do not allow it. No layer is then pruned.
    """
    if (sensitivity is None) == (sparsity is None):
        raise Mistake("exactly one of sensitivity and sparsity is needed")
    layers = _chosen(model, exclude, keep)
    for layer in layers.values():  # all layers are checked before any is pruned
        refuse_shared(layer)
    if sensitivity is not None:
        factors = _numbers(layers, sensitivity, "sensitivity")
        for name, factor in factors.items():
            if not 0 < factor < math.inf:
                raise Mistake(f"sensitivity of {name!r}: got {factor}; a number above 0 is allowed")
        masks = {name: ask(std, layer, sensitivity=factors[name]) for name, layer in layers.items()}
    else:
        target = _numbers(layers, sparsity, "sparsity")
        for name, fraction in target.items():
            if not 0 <= fraction < 1:
                raise Mistake(f"sparsity of {name!r}: got {fraction}; 0 up to, but not, 1 is allowed")
        scores = {name: ask(magnitude, layer) for name, layer in layers.items()}
        alive, parts = {n: p.mask for n, p in layers.items()}, {n: p.parts for n, p in layers.items()}
        masks = score_masks(scores, alive, target, together=False, parts=parts)
        for name, (mask, _) in masks.items():
            if not mask.any():
                raise Mistake(
                    f"layer {name!r}: sparsity {target[name]} leaves none of its {mask.numel():,} weights"
                )
    for name, (mask, _) in masks.items():
        set_mask(layers[name], mask)
    return {name: 1 - mask.double().mean().item() for name, (mask, _) in masks.items()}


def share(
    model: nn.Module,
    bits: int | Mapping[str, int] = 5,
    exclude: Iterable[str] = (),
    codebook: Literal["float16", "float32"] = "float16",
    keep: Iterable[str] | None = None,
) -> dict[str, int]:
    """Makes each layer's non-zero weights share 2^bits values, in place; returns {layer: number of values}.

    The values are found by exact one-dimensional k-means. Later training trains the values, not the single
    weights.

    Args:
        model: The network. Its weights of two dimensions or more are shared; zeros stay zero.
        bits: One number from 1 to 16, or {layer: number}.
        exclude: Layers to leave alone: 'first', 'last', a layer's name or a module's.
        codebook: The type that the values are rounded to.
        keep: The old name of exclude.

    Raises:
        Mistake: For settings or layers that do not allow it. No layer is then shared.
    """
    if codebook not in ("float16", "float32"):
        raise Mistake(f"codebook: got {codebook!r}; 'float16' and 'float32' are allowed")
    layers = _chosen(model, exclude, keep)
    shared = {}
    for name, b in _numbers(layers, bits, "bits").items():
        if b not in range(1, 17):
            raise Mistake(f"bits of {name!r}: got {b}; whole numbers from 1 to 16 are allowed")
        codes, centroids = cluster(layers[name], 2 ** int(b), kmeans.kmeans_optimal)
        try:
            shared[name] = codes, round_codebook(centroids, codebook)
        except Mistake as error:
            raise Mistake(f"layer {name!r}: {error}") from None
    for name, (
        codes,
        centroids,
    ) in shared.items():  # all layers were checked above
        set_codebook(layers[name], codes, centroids)
    return {
        name: len(centroids[codes[codes != 0].unique() - 1].unique())
        for name, (codes, centroids) in shared.items()
    }


def _chosen(model: nn.Module, exclude: Iterable[str], keep: Iterable[str] | None) -> dict[str, Weight]:
    """Returns the network's weights by layer, without the excluded ones. Raises Mistake if none is left."""
    if keep is not None:
        warnings.warn("keep is called exclude now", DeprecationWarning, stacklevel=3)
        exclude = [*exclude, *([keep] if isinstance(keep, str) else keep)]
    layers = choose(weights_of(model), exclude)
    if not layers:
        raise Mistake(
            "there are no weights to work on: the network has none of two dimensions or more, or exclude names all"
        )
    return layers


def _numbers(layers: Mapping[str, Weight], setting: Any, what: str) -> dict[str, float]:
    """Returns a setting's number for each layer. Raises Mistake, naming it `what`, for other values."""
    found = per_layer(layers, setting, what)
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise Mistake(f"{what} of {name!r}: got {value!r}; a number is allowed")
    return found


@torch.no_grad()
def pack(
    model: nn.Module,
    path: str | Path,
    shape: Sequence[int] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    classes: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
) -> int:
    """Writes a network as one packed file; returns its size in bytes.

    Args:
        model: The network. Pruned and shared weights take few bytes.
        path: The file to write.
        shape: (C, H, W) of the images; needed with spec.
        mean: Of the images' normalisation, for each channel. Stored in the file, like std and classes, for
            prediction.
        std: Of the images' normalisation, for each channel.
        classes: Names of the classes.
        spec: {"model": name, settings} as in a recipe, for networks of the models shelf or timm. `load(path)`
            then rebuilds the network. Without spec, `load(path, into=network)` needs the network.

    Raises:
        Mistake: For a spec without a shape or without classes, for classes that are not a list, for tensors that cannot be
            packed, and if spec, shape and classes make another network than this.
    """
    if spec is not None and len(shape) != 3:
        raise Mistake(
            f"shape: got {tuple(shape)}; with a spec the images' (channels, height, width) are needed"
        )
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise Mistake(f"classes: got {classes!r}; a list of names is allowed")
    if spec is not None and not classes:
        raise Mistake(
            "classes: got none; with a spec their names are needed, since they are the network's outputs"
        )
    facts = {"shape": list(shape), "mean": list(mean), "std": list(std), "classes": list(classes)}
    try:
        data = packed.encode(model, spec, facts)
    except Mistake:
        raise
    except ValueError:
        _refuse_unfit(model, spec, facts)
        raise
    write_bytes(Path(path), data)
    return len(data)


def _refuse_unfit(model: nn.Module, spec: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> None:
    """Raises Mistake if spec, shape and classes make another network, which names what differs: it is built for that."""
    try:
        packed.can_encode(model, spec, facts)
    except Mistake as error:
        made_for = f"{len(facts['classes'])} classes and images of {'x'.join(map(str, facts['shape']))}"
        raise Mistake(f"for {made_for} {error}") from None
