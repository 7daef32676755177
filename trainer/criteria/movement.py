from torch import Tensor

SCHEDULES = ("cubic",)  # there is no score before a training


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """Weights go first that a training moves towards zero; they may come back while the masks tighten.

    The score of a step is -w x gradient, and the steps add up.
    Sanh, Wolf, Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning".
    """
    return -(weight.detach() * gradient.detach())
