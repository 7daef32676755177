from torch import Tensor

from trainer.tensors import fraction_among_larger

SCHEDULES = ("cubic", "iterative")  # without a mask all positions cost the same bits
SCOPES = ("global", "layer")


def rate(weight: Tensor, parts: int, cost: Tensor) -> Tensor:
    """Prunes weights first that are worth little for the bits that their position takes in the packed file.

    The score is LAMP's divided by the square root of the position's bits. Of two weights with the same LAMP score the
    one in an emptier row and column goes first. This trades rate against distortion, in the sense of
    Oktay et al. 2020, "Scalable Model Compression by Entropy Penalized Reparameterization".
    """
    score = fraction_among_larger(weight.detach(), parts)
    return score / cost.to(score.dtype).sqrt()
