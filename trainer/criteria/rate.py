from torch import Tensor

from trainer.tensors import fraction_among_larger

SCHEDULES = ("cubic", "iterative")  # without a mask all positions cost the same
SCOPES = ("global", "layer")


def rate(weight: Tensor, parts: int, cost: Tensor) -> Tensor:
    """Weights go first that are worth little for the bits that their position takes in the packed file.

    The score is LAMP's over the square root of the position's bits. Of two weights worth the same the one in
    an emptier row and column goes first: rate-distortion's choice of what lowers the loss most a bit, in the sense of
    Oktay et al. 2020, "Scalable Model Compression by Entropy Penalized Reparameterization".
    """
    score = fraction_among_larger(weight.detach(), parts)
    return score / cost.to(score.dtype).sqrt()
