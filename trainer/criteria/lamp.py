from torch import Tensor

from trainer.tensors import fraction_among_larger

SCOPES = ("global", "layer")  # its scores are comparable between layers


def lamp(weight: Tensor, parts: int) -> Tensor:
    """Prunes weights first that are small relative to the larger weights of their layer.

    The score is w^2 over the sum of the squares of the layer's weights as large or larger, in float64. Each layer's
    largest weight has the score 1, so scores of different layers are comparable.
    Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning" (LAMP).
    """
    return fraction_among_larger(weight.detach(), parts)
