from torch import Tensor

SCHEDULES = ("cubic",)  # without training steps there is no score


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """Prunes weights first that the training moves towards zero. Pruned ones may return while the sparsity still rises.

    The score is the sum of -w x gradient over the steps.
    Sanh, Wolf, Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning".
    """
    return -(weight.detach() * gradient.detach())
