import torch
from pydantic import PositiveFloat
from torch import Tensor

from trainer.mistakes import Mistake

AMOUNT = "sensitivity"
SCHEDULES = ("once", "cubic")


def std(
    weight: Tensor, alive: Tensor, parts: int, *, sensitivity: PositiveFloat
) -> tuple[Tensor, list[float]]:
    """Prunes weights whose magnitude is at most sensitivity x the standard deviation of the layer's surviving weights.

    The deviation is the population's (numpy's `std`). Each gate of a recurrent layer, and each of query, key and value of
    attention, has its own threshold. sensitivity: one for all layers, or {layer: value}.
    Raises Mistake for a layer whose surviving weights are all equal, and for a sensitivity that prunes every weight.
    Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".
    """
    masks, thresholds = [], []
    for part, alive_part in zip(weight.detach().chunk(parts), alive.chunk(parts), strict=True):
        survivors = part[alive_part]
        if survivors.numel() == 0 or not survivors.any():
            raise Mistake("no weights are left to prune: all are zero")
        if survivors.numel() > 1 and survivors.min() == survivors.max():
            raise Mistake(
                f"all weights left are {survivors[0].item():.3g}, so their standard deviation parts none "
                "from the others: name the layer in exclude"
            )
        threshold = sensitivity * survivors.double().std(correction=0).item()
        thresholds.append(threshold)
        masks.append(alive_part & (part.abs() > threshold))
    mask = torch.cat(masks)
    if not mask.any():
        raise Mistake(
            f"sensitivity {sensitivity} prunes every weight "
            f"(threshold {max(thresholds):.3g}, largest weight {weight.abs().max().item():.3g})"
        )
    return mask, thresholds
