from torch import Tensor

from trainer.tensors import fraction_among_larger

SCOPES = ("global", "layer")  # scores of different layers are made to be compared


def lamp(weight: Tensor, parts: int) -> Tensor:
    """Weights go first that are small against what else is left of their layer.

    The score is w^2 over the sum of the squares of the layer's weights as large or larger, in float64. Scores of
    different layers can be compared: each layer's largest weight has the score 1.
    Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning" (LAMP).
    """
    return fraction_among_larger(weight.detach(), parts)
