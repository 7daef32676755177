"""How much a batch's labels count in their optimizer step, which several batches and processes may share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.distillation.objective import labels_known


def label_shares(
    labels: Tensor,
    orders: Sequence[Sequence[Tensor]],
    accumulate: int,
    rank: int,
    weights: Tensor | None = None,
    mixed: bool = False,
) -> list[tuple[float, float]]:
    """Returns what the means over a batch's labels are multiplied by, for each batch of a process.

    A loss on labels is a mean over those images of its batch that have one, or is weighted by their classes. Batches are
    added up by their numbers of images. Multiplied so, the sum is the mean over all labels of the step, as in one batch;
    where all images have a label and weigh the same, both factors are 1.

    Args:
        labels: int64 [number of training images], -1 for none.
        orders: The positions of the images of each batch of an epoch, for each process.
        accumulate: How many batches make a step.
        rank: The process.
        weights: [K] of the classes; None where all weigh the same.
        mixed: Whether each batch is mixed with its own reverse (`batches.mix`): a mixed image has a label if both had.

    Returns:
        (factor of plain means, factor of means weighted by class) of each batch.
    """
    labels = labels.cpu()
    of_class = (torch.ones(int(labels.max()) + 1) if weights is None else weights.cpu()).double()

    def amount(positions: Tensor) -> Tensor:
        own = labels[positions]
        known = labels_known(own)
        if mixed:
            known = known & known.flip(0)
        return torch.stack([known.sum().double(), of_class[own.clamp(min=0)][known].sum()])

    found = torch.stack([torch.stack([amount(positions) for positions in order]) for order in orders])
    shares = []
    for number, positions in enumerate(orders[rank]):
        first = number - number % accumulate
        of_step = found[:, first : first + accumulate].sum((0, 1))
        images = sum(len(each) for each in orders[rank][first : first + accumulate])
        factor = found[rank, number] * (len(orders) * images / len(positions)) / of_step
        shares.append(tuple(factor.nan_to_num(1.0).tolist()))  # no label in all of the step
    return shares
