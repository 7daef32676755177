"""Pruning, sharing and packing of anybody's `nn.Module`, without a recipe."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import compress, kmeans, packed
from trainer.files import write_bytes


def prune(
    model: nn.Module,
    sensitivity: float | Mapping[str, float] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    keep: Iterable[str] = (),
) -> dict[str, float]:
    """Prunes a network in place; training it afterwards leaves the zeros zero. Returns {layer: share of zeros}.

    Exactly one of: sensitivity (threshold = sensitivity x standard deviation of a layer's surviving weights, Han et al.
    2015) and sparsity (that share of each layer's weights, the smallest, becomes zero); a number or {layer: number}.
    """
    if (sensitivity is None) == (sparsity is None):
        raise ValueError("exactly one of sensitivity and sparsity is needed")
    places = compress.choose(compress.weights(model), keep)
    if sensitivity is not None:
        masks = compress.std_masks(places, compress.per_layer(places, sensitivity, "sensitivity"))
    else:
        target = compress.per_layer(places, sparsity, "sparsity")
        for name, share in target.items():
            if not 0 <= share < 1:
                raise ValueError(f"sparsity of {name!r}: got {share}; 0 up to, but not, 1 is allowed")
        scores = {name: place.value.detach().abs() for name, place in places.items()}
        alive, parts = {n: p.mask for n, p in places.items()}, {n: p.parts for n, p in places.items()}
        masks = compress.score_masks(scores, alive, target, together=False, parts=parts)
    for name, (mask, _) in masks.items():
        compress.set_mask(places[name], mask)
    return {name: 1 - mask.double().mean().item() for name, (mask, _) in masks.items()}


def share(model: nn.Module, bits: int | Mapping[str, int] = 5, keep: Iterable[str] = ()) -> dict[str, int]:
    """Makes each layer's non-zero weights share 2^bits values, in place; training it afterwards trains the values.

    The values are found by exact one-dimensional k-means and are representable in float16. Returns {layer: number of
    values}.
    """
    places = compress.choose(compress.weights(model), keep)
    shared = {}
    for name, b in compress.per_layer(places, bits, "bits").items():
        if not 1 <= b <= 16:
            raise ValueError(f"bits of {name!r}: got {b}; 1 to 16 are allowed")
        codes, centroids = compress.cluster(places[name], 2**b, kmeans.kmeans_optimal)
        shared[name] = codes, compress.round_to(centroids, "float16")
    for name, (codes, centroids) in shared.items():  # all or none: a layer that cannot be shared was found above
        compress.set_codebook(places[name], codes, centroids)
    return {name: len(codes[codes != 0].unique()) for name, (codes, _) in shared.items()}


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
    """Writes a network as one packed file, and returns its bytes.

    spec: {"model": name, settings} as in a recipe, for networks of the models shelf or timm: the file then rebuilds the
    network by itself. Without it `load(path, into=network)` brings the network. shape (C, H, W), mean, std, classes are kept for
    whoever predicts with the file.
    """
    facts = {"shape": list(shape), "mean": list(mean), "std": list(std), "classes": list(classes)}
    data = packed.encode(model, spec, facts)
    write_bytes(Path(path), data)
    return len(data)
