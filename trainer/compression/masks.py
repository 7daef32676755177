"""Masks: which weights stay, and how sparse a network is at each moment of a schedule.

Sources: Han et al. 2015 (std x sensitivity), Zhu & Gupta 2017 (cubic schedule).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainer.compression.parametrizations import Codebook, Mask, TrainedCodebook, parametrize_weight
from trainer.compression.weights import Weight
from trainer.mistakes import Mistake


def std_masks(
    places: Mapping[str, Weight], sensitivity: Mapping[str, float]
) -> dict[str, tuple[Tensor, list[float]]]:
    """Masks by threshold = sensitivity x standard deviation of the layer's surviving weights (Han et al. 2015).

    Returns {layer: (mask, thresholds)}; the gates of a recurrent layer and query, key and value of attention have a
    threshold each. Weights of magnitude above the threshold stay. The deviation is the population's (numpy's `std`).
    """
    masks = {}
    for name, place in places.items():
        alive = place.mask
        parts, thresholds = [], []
        value = place.value.detach()
        alive = torch.ones_like(value, dtype=torch.bool) if alive is None else alive
        for part, alive_part in zip(value.chunk(place.parts), alive.chunk(place.parts), strict=True):
            survivors = part[alive_part]
            if survivors.numel() == 0 or not survivors.any():
                raise Mistake(f"layer {name!r} has no weights left to prune: all are zero")
            if survivors.numel() > 1 and survivors.min() == survivors.max():
                raise Mistake(
                    f"layer {name!r}: all weights left are {survivors[0].item():.3g}, so their standard deviation parts none "
                    "from the others: name the layer in keep"
                )
            threshold = sensitivity[name] * survivors.double().std(correction=0).item()
            thresholds.append(threshold)
            parts.append(alive_part & (part.abs() > threshold))
        mask = torch.cat(parts)
        if not mask.any():
            raise Mistake(
                f"layer {name!r}: sensitivity {sensitivity[name]} prunes every weight "
                f"(threshold {max(thresholds):.3g}, largest weight {value.abs().max().item():.3g})"
            )
        masks[name] = (mask, thresholds)
    return masks


def score_masks(
    scores: Mapping[str, Tensor],
    alive: Mapping[str, Tensor | None],
    sparsity: Mapping[str, float],
    together: bool,
    parts: Mapping[str, int] | None = None,
) -> dict[str, tuple[Tensor, list[float]]]:
    """Masks that zero exactly round(sparsity x n) weights, the lowest scores first; a dead weight stays dead.

    together: one ranking over all layers (then all sparsities are the same number); otherwise one a layer, or of each
    of the `parts` stacked in it (gates; query, key, value), whose counts then add up to the layer's. Of equal scores
    the first in the weight's order go, so that the count is exact. Where more are dead already than are asked for,
    those are all the zeros. Returns {layer: (mask, [the lowest score kept, of each ranking])}.
    """
    flat = {}
    for name, score in scores.items():
        score = score.detach().double().reshape(-1)
        if alive[name] is not None:
            score = torch.where(alive[name].reshape(-1), score, -torch.inf)
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
    """All but the `zeros` lowest of flat scores (-inf: dead, never kept), and the lowest of those kept."""
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
    """The sparsity at `progress` (0 to 1) of a gradual pruning (Zhu & Gupta 2017, To Prune, or Not to Prune).

    final + (initial - final) x (1 - progress)^3: fast while there is much to choose from, slow towards the end.
    """
    return final + (initial - final) * (1 - min(1.0, max(0.0, progress))) ** 3


def geometric(final: float, progress: float, initial: float = 0.0) -> float:
    """The sparsity at `progress` (0 to 1) of rounds that each prune the same share of the weights then left.

    As the rounds of Frankle & Carbin 2019 (The Lottery Ticket Hypothesis): 1 - (1 - initial) x rest^progress.
    """
    if progress >= 1:
        return final  # without the rounding of a power
    return 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** max(0.0, progress)


def refuse_shared(place: Weight) -> None:
    """Raises Mistake for a weight that shares its values: it can be pruned no more."""
    if isinstance(place.parametrization, Codebook | TrainedCodebook):
        raise Mistake(
            f"layer {place.name!r} shares its weights already: prune before sharing, or name it in keep"
        )


def set_mask(place: Weight, mask: Tensor) -> None:
    """Prunes a weight, in place; a mask that is there already is replaced."""
    found = place.parametrization
    if isinstance(found, Mask):
        found.mask.copy_(mask)
        return
    refuse_shared(place)
    parametrize_weight(place, Mask(mask))


def watch_movement(places: Iterable[Weight]) -> None:
    """From now on every backward pass adds to the movement scores of these weights; unpruned ones get a mask of ones."""
    for place in places:
        if place.mask is None:
            set_mask(place, torch.ones_like(place.value, dtype=torch.bool))
        place.parametrization.score = torch.zeros_like(place.value.detach())


def forget_movement(places: Iterable[Weight]) -> None:
    """Drops the movement scores; the masks stay."""
    for place in places:
        place.parametrization.score = None
