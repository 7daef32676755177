"""Makes a layer's weights share few values, found by k-means or trained."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainer.compression.parametrizations import (
    Codebook,
    EvenCodebook,
    TrainedCodebook,
    bake_weight,
    parametrize_weight,
)
from trainer.compression.weights import Weight
from trainer.mistakes import Mistake


def set_codebook(layer: Weight, codes: Tensor, centroids: Tensor) -> None:
    """Makes a weight share values, in place. Code 0 replaces an earlier mask.

    codes: integers of the weight's shape. centroids: [k] or [groups, k], see `Codebook`.
    """
    value = layer.value.detach()
    if layer.parametrization is not None:
        bake_weight(layer)
    parametrize_weight(layer, Codebook(codes.to(value.device), centroids.to(value.device, value.dtype)))


def open_codebook(layer: Weight, codes: Tensor, centroids: Tensor, code_cost: float = 0.0) -> None:
    """Makes a weight share values, in place, with codes that are chosen anew at every step (`TrainedCodebook`).

    The latent weights start from the present weight.

    Args:
        layer: The weight.
        codes: The first codes, as `cluster` returns them.
        centroids: The first centroids, as `cluster` returns them.
        code_cost: Cost of a code's bit, in mean squares of the surviving weights of its group.
    """
    value = layer.value.detach().clone()
    if layer.parametrization is not None:
        bake_weight(layer)
    centroids = torch.atleast_2d(centroids.to(value.device, value.dtype))
    codes = codes.to(value.device)
    blocks = [block[block != 0] for block in value.chunk(len(centroids))]
    mean_square = torch.stack([b.square().mean() if len(b) else b.new_zeros(()) for b in blocks])[:, None]
    trained = TrainedCodebook(codes != 0, centroids, code_cost * mean_square)
    trained.count_bits(codes)
    parametrize_weight(layer, trained)


def open_even_codebook(layer: Weight, num_values: int, round_step: Callable[[Tensor], Tensor]) -> None:
    """Makes a weight take multiples of a trained step, in place (`EvenCodebook`). Pruned weights stay zero.

    The first step is 2 x mean |weight| / sqrt(num_values / 2) (Esser et al. 2020), or smaller if the largest value would
    then lie beyond all weights.

    Args:
        layer: The weight.
        num_values: Values besides zero, an even number.
        round_step: Rounds the step, during training too.

    Raises:
        Mistake: For a weight whose values are all zero.
    """
    value, alive = layer.value.detach().clone(), layer.alive.clone()
    if not value.any():
        raise Mistake(f"layer {layer.name!r} has no weights left to share: all are zero")
    if layer.parametrization is not None:
        bake_weight(layer)
    half, sizes = num_values // 2, value[alive].abs()
    step = torch.minimum(2 * sizes.mean() / math.sqrt(half), sizes.max() / half)
    parametrize_weight(layer, EvenCodebook(alive, step, num_values, round_step))


def close_codebook(layer: Weight) -> tuple[Tensor, Tensor]:
    """Returns the present codes and centroids of a weight's open codebook, for `set_codebook`."""
    trained = layer.parametrization
    assert isinstance(trained, TrainedCodebook)
    centroids = trained.centroids.detach().clone()
    codes = trained.codes(layer.parameter)
    return codes, centroids if len(centroids) > 1 else centroids[0]


def code_entropy(layers: Iterable[Weight]) -> Tensor:
    """Returns the mean bits of a surviving weight's code over all open codebooks, by their soft entropy (differentiable)."""
    bits: Any = 0.0
    number = 0
    for layer in layers:
        trained = layer.parametrization
        assert isinstance(trained, TrainedCodebook)
        bits = bits + trained.entropy(layer.parameter)
        number += len(trained.positions)
    return bits / number


def cluster(
    layer: Weight,
    num_values: int,
    method: Callable[..., np.ndarray] | None = None,
    groups: int = 1,
    importance: Tensor | None = None,
    code_cost: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Clusters a weight's surviving values by k-means; returns codes (int32, the weight's shape) and centroids.

    Code 0 is zero, code 1 + c is centroid c of centroids.flatten(). centroids are [k], or [groups, k] for several groups.
    A group with fewer distinct survivors than `num_values` keeps them exactly; unused entries of its codebook are zero.
    k is `num_values`, or if all groups have fewer survivors the largest number of them.

    Args:
        layer: The weight.
        num_values: k, the number of centroids of each group.
        method: A function of `kmeans`; None takes the exact one.
        groups: Number of equal blocks of rows (first axis) with a codebook each.
        importance: Factor on the squared error of each value, of the weight's shape (squared gradients, say: Choi et
            al. 2017, Towards the Limit of Network Quantization).
        code_cost: Cost of a bit of a code's ideal length, in mean squares of the survivors. Fewer values may then be
            best. About 0.05 at 3 bits takes as much off the entropy as it adds to the error.

    Raises:
        Mistake: For a weight whose values are all zero or not finite, for rows that do not split into the groups, and
            for an importance of zeros.
    """
    from trainer.compression import kmeans  # here: a recipe is read without it

    value = layer.value.detach().cpu().float()
    if len(value) % groups:
        raise Mistake(f"layer {layer.name!r}: {len(value)} rows do not split into {groups} equal groups")
    if not torch.isfinite(value).all():
        raise Mistake(f"layer {layer.name!r} has weights that are not finite")
    if not value.any():
        raise Mistake(f"layer {layer.name!r} has no weights left to share: all are zero")
    num_values = max(1, min(num_values, most_survivors(value, groups)))
    codes = torch.zeros(value.shape, dtype=torch.int32)
    centroids = torch.zeros(groups, num_values)
    blocks = zip(value.chunk(groups), codes.chunk(groups), strict=True)
    importances = _damped(layer, importance).chunk(groups) if importance is not None else [None] * groups
    for number, ((block, block_codes), weight) in enumerate(zip(blocks, importances, strict=True)):
        alive = block != 0
        survivors = block[alive].numpy()
        if survivors.size == 0:
            continue
        settings: dict[str, Any] = {} if weight is None else {"weights": weight[alive].numpy()}
        cost = code_cost * float(np.mean(survivors.astype(np.float64) ** 2 * settings.get("weights", 1.0)))
        extra: dict[str, Any] = {"code_cost": cost} if code_cost else {}
        found = (method or kmeans.kmeans_optimal)(survivors, num_values, **settings, **extra)
        chosen = kmeans.assign(survivors, found)
        for _ in range(10 if code_cost else 0):
            before, bits = chosen, kmeans.code_lengths(chosen, len(found))
            chosen = _cheapest(survivors, found, bits * cost, settings.get("weights"))
            if np.array_equal(before, chosen):
                break
        centroids[number, : len(found)] = torch.from_numpy(np.asarray(found, dtype=np.float32))
        block_codes[alive] = torch.from_numpy(chosen.astype(np.int32)) + 1 + number * num_values
    return codes, centroids if groups > 1 else centroids[0]


def most_survivors(value: Tensor, groups: int = 1) -> int:
    """Returns how many weights are not zero in the group of rows that has the most of them."""
    return max(int(block.count_nonzero()) for block in value.chunk(groups))


def _damped(layer: Weight, importance: Tensor) -> Tensor:
    """Adds a thousandth of the mean importance: a weight without a gradient in a few batches is not worth nothing."""
    importance = importance.detach().cpu().double()
    if not importance.any():
        raise Mistake(
            f"layer {layer.name!r}: no gradient reaches its weights, so none is more important than others; "
            "exclude leaves the layer alone"
        )
    return importance + 1e-3 * importance.mean()


def _cheapest(
    values: np.ndarray, centroids: np.ndarray, prices: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """Returns for each value the code of the least weight x squared distance + price."""
    from trainer.compression import kmeans

    if weights is None:
        return kmeans.assign(values, centroids, code_bits=prices, code_cost=1.0)
    least, chosen = np.full(values.shape, np.inf), np.zeros(values.shape, np.int32)
    for code, (centroid, price) in enumerate(zip(centroids.astype(np.float64), prices, strict=True)):
        total = weights * (values - centroid) ** 2 + price
        chosen[total < least] = code
        least = np.minimum(least, total)
    return chosen


def centroid_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trainable tensors of all shared weights: centroids and latent weights, without weight decay (`NoDecay`)."""
    found = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(
            module[0], Codebook | TrainedCodebook
        ):
            for parameter in module.parameters():
                found[id(parameter)] = parameter
    return list(found.values())
