"""Turns a criterion's scores into masks, and computes the sparsity at each point of a schedule.

Criteria are in trainer/criteria/.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.compression.parametrizations import Codebook, Mask, TrainedCodebook, parametrize_weight
from trainer.compression.weights import Weight
from trainer.mistakes import Mistake, nearest
from trainer.recipe.shelves import fed

# What a criterion may ask for (trainer/criteria/).
WORDS = ("weight", "alive", "parts", "input_axis", "cost", "gradient", "student", "images", "exclude")


def refuse_unknown(criterion: Callable, method: str) -> None:
    """Raises Mistake for a criterion that asks for what is none of `WORDS`. method: its name in the recipe."""
    for word in fed(criterion):
        if word not in WORDS:
            raise Mistake(f"method {method!r} asks for {word!r}{nearest(word, WORDS)}")


def ask(criterion: Callable, layer: Weight, alive: Tensor | None = None, **keys: Any) -> Any:
    """Calls a criterion (see trainer/criteria/) for one layer; returns its scores, or its mask and thresholds.

    alive: bool, of the weight's shape: which weights the criterion counts as not pruned; by default those that are not.
    Raises Mistake, with the layer's name, if the criterion refuses it or returns what is no score or mask of the weight's
    shape, and for an argument of an unknown name.
    """
    known = {
        "weight": lambda: layer.value.detach(),
        "alive": lambda: layer.alive if alive is None else alive,
        "parts": lambda: layer.parts,
        "input_axis": lambda: layer.input_axis,
        "cost": lambda: position_bits(layer.alive),
    }
    words = fed(criterion)
    for word in words:
        if word not in known:
            raise Mistake(f"method {criterion.__name__!r} asks for {word!r}{nearest(word, known)}")
    try:
        found = criterion(*(known[word]() for word in words), **keys)
    except Mistake as error:
        raise Mistake(f"layer {layer.name!r}: {error}") from None
    score = found[0] if isinstance(found, tuple) else found
    _expect_shape(score, layer.value, criterion)
    if score.isnan().any():
        raise Mistake(
            f"layer {layer.name!r}: method {criterion.__name__!r} returned NaN; numbers are allowed"
        )
    return found


def _expect_shape(score: Any, weight: Tensor, criterion: Callable) -> None:
    """Raises Mistake unless a criterion's score or mask is a tensor of the weight's shape: another might be broadcast."""
    if not isinstance(score, Tensor) or score.shape != weight.shape:
        got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise Mistake(
            f"method {criterion.__name__!r} returned {got}; the weight's shape {list(weight.shape)} is allowed"
        )


def score_masks(
    scores: Mapping[str, Tensor],
    alive: Mapping[str, Tensor | None],
    sparsity: Mapping[str, float],
    together: bool,
    parts: Mapping[str, int] | None = None,
) -> dict[str, tuple[Tensor, list[float]]]:
    """Makes masks that zero exactly round(sparsity x n) weights, the lowest scores first.

    Returns {layer: (mask, thresholds)}, where thresholds has the lowest kept score of each ranking. Pruned weights stay
    pruned; if there are more of them than asked for, no others are. Of equal scores the first in memory order go, so that
    the count is exact.

    Args:
        scores: {layer: score of the weight's shape}.
        alive: {layer: present mask}, None for a weight that is not pruned.
        sparsity: {layer: fraction of zeros}.
        together: Whether all layers are in one ranking (all sparsities are then the same number).
        parts: {layer: number of stacked matrices} (gates; query, key, value). Each has a ranking of its own, unless
            together; their counts add up to the layer's.
    """
    flat = {}
    for name, score in scores.items():
        score = score.detach().double().reshape(-1)
        mask = alive[name]
        if mask is not None:
            score = torch.where(mask.reshape(-1), score, -torch.inf)
        flat[name] = score
    if together:
        joined = torch.cat(list(flat.values()))
        mask, threshold = _keep_highest(joined, round(next(iter(sparsity.values())) * len(joined)))
        masks = mask.split([len(score) for score in flat.values()])
        return {n: (m.reshape(scores[n].shape), [threshold]) for n, m in zip(flat, masks, strict=True)}
    result = {}
    for name, score in flat.items():
        num_parts = parts[name] if parts else 1
        zeros = [round(sparsity[name] * len(score) * i / num_parts) for i in range(num_parts + 1)]
        found = [
            _keep_highest(part, zeros[i + 1] - zeros[i]) for i, part in enumerate(score.chunk(num_parts))
        ]
        mask = torch.cat([part_mask for part_mask, _ in found])
        result[name] = (mask.reshape(scores[name].shape), [threshold for _, threshold in found])
    return result


def _keep_highest(score: Tensor, zeros: int) -> tuple[Tensor, float]:
    """Returns a mask of all but the `zeros` lowest scores [n] (-inf: pruned, never kept), and the lowest kept score."""
    mask = score > -torch.inf
    if zeros:
        highest_out = score.kthvalue(zeros).values
        mask &= score > highest_out
        ties = (score == highest_out).nonzero().reshape(-1)
        stay = len(score) - zeros - int(mask.sum())
        if stay and highest_out > -torch.inf:
            mask[ties[len(ties) - stay :]] = True
    return mask, score[mask].min().item() if mask.any() else torch.inf


def cubic(final: float, progress: float, initial: float = 0.0) -> float:
    """Returns the sparsity at `progress` (0 to 1) of a gradual pruning (Zhu & Gupta 2017, To Prune, or Not to Prune).

    It is final + (initial - final) x (1 - progress)^3: fast at first, slow towards the end.
    """
    return final + (initial - final) * (1 - min(1.0, max(0.0, progress))) ** 3


def geometric(final: float, progress: float, initial: float = 0.0) -> float:
    """Returns the sparsity at `progress` (0 to 1) if every round prunes the same fraction of the remaining weights.

    These are the rounds of Frankle & Carbin 2019 (The Lottery Ticket Hypothesis): 1 - (1 - initial) x ratio^progress,
    where ratio = (1 - final) / (1 - initial).
    """
    if progress >= 1:
        return final  # a power would round
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** max(0.0, progress)


def refuse_shared(layer: Weight) -> None:
    """Raises Mistake for a weight with a codebook: it can no longer be pruned."""
    if isinstance(layer.parametrization, Codebook | TrainedCodebook):
        raise Mistake(
            f"layer {layer.name!r} shares its weights already: prune before sharing, or name it in exclude"
        )


def set_mask(layer: Weight, mask: Tensor) -> None:
    """Prunes a weight, in place. mask: bool of the weight's shape; it replaces an earlier one."""
    found = layer.parametrization
    if isinstance(found, Mask):
        found.mask.copy_(mask)
        return
    refuse_shared(layer)
    parametrize_weight(layer, Mask(mask))


@torch.no_grad()
def set_power(layers: Iterable[Weight], power: float) -> None:
    """Makes pruned weights be trained as t |t|^(power - 1) of another tensor t, in place; the weights stay as they are.

    Small weights then change slowly, so that more of them end near zero and can go (Schwarz et al. 2021, Powerpropagation: A
    Sparsity Inducing Weight Reparameterisation). Power 1 ends it, exactly.
    """
    for layer in layers:
        found, value = layer.parametrization, layer.value.clone()
        assert isinstance(found, Mask)
        found.power = power
        layer.parameter.copy_(value if power == 1 else value.sign() * value.abs().pow(1 / power))


def watch_gradients(layers: Iterable[Weight], criterion: Callable, **keys: Any) -> None:
    """Makes every later backward pass add the criterion's score to each layer's sum (`Mask.score`).

    Layers without a mask get one of ones. criterion: a function of `weight` and `gradient`, both of the weight's shape.
    Raises Mistake for one with other arguments.
    """
    words = fed(criterion)
    if set(words) != {"weight", "gradient"}:
        raise Mistake(
            f"method {criterion.__name__!r} asks for {', '.join(words)}: beside gradient for weight alone"
        )

    def score(weight: Tensor, gradient: Tensor) -> Tensor:
        given = {"weight": weight, "gradient": gradient}
        found = criterion(*(given[word] for word in words), **keys)
        _expect_shape(found, weight, criterion)
        return found

    for layer in layers:
        if layer.mask is None:
            set_mask(layer, layer.alive)
        found = layer.parametrization
        assert isinstance(found, Mask)
        found.watch(score, torch.zeros_like(layer.value.detach()))


def unwatch_gradients(layers: Iterable[Weight]) -> None:
    """Stops `watch_gradients` and drops the sums of scores; the masks stay."""
    for layer in layers:
        if isinstance(layer.parametrization, Mask):
            layer.parametrization.watch(None, None)


VALUE_BITS = 4.0  # bits of a surviving weight's shared value, sign and rank, besides its position


def position_bits(mask: Tensor) -> Tensor:
    """Returns the bits that a packed file spends on keeping each position instead of pruning it: float64, at least 1.

    These are the bits of the value, plus log2((1 - p) / p) for the probability p that the file's model gives to a
    weight at that position. As in `packing.masks`, the odds start from the density of the layer, and are shifted by how
    many more weights the column and the row hold than the density says, without the position itself. Rows are the
    first axis.
    """
    alive = mask.reshape(len(mask), -1).double()
    rows, columns = alive.shape
    density = (alive.sum() + 1) / (alive.numel() + 2)
    column = torch.log2((alive.sum(0) - alive + 1) / ((rows - 1) * density + 1))
    row = torch.log2((alive.sum(1, keepdim=True) - alive + 1) / ((columns - 1) * density + 1))
    odds = torch.log2(density / (1 - density)) + 0.7 * column + 0.6 * row
    return (VALUE_BITS - odds).clamp_min(1.0).reshape(mask.shape)


def zeros_left(layers: dict[str, Weight], target: Mapping[str, float], together: bool) -> dict[str, float]:
    """Returns the sparsity that an earlier stage left in each layer (or in all). Raises Mistake if `target` is lower."""
    dead = {name: 0.0 if layer.mask is None else (~layer.mask).sum().item() for name, layer in layers.items()}
    if together:
        fraction = sum(dead.values()) / sum(layer.value.numel() for layer in layers.values())
        found = dict.fromkeys(layers, fraction)
    else:
        found = {name: dead[name] / layer.value.numel() for name, layer in layers.items()}
    for name, layer in layers.items():
        most = found[name]
        if not together and layer.mask is not None:
            most = max((~part).double().mean().item() for part in layer.mask.chunk(layer.parts))
        if target[name] < most:
            who = "the layers have" if together else f"layer {name!r} has"
            who += " in one of its parts" * (most > found[name])
            raise Mistake(f"{who} {most * 100:.2f} % zeros already: sparsity {target[name]} asks for fewer")
    return found
