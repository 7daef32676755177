from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Prunes the smallest weights first.

    The score is |w|.
    Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".
    """
    return weight.detach().abs()
