import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from trainer.tensors import full_precision


class weight_distribution(nn.Module):
    """Weight distribution: a layer's weights should be distributed like the teacher's, up to mean and scale.

    The loss is the squared 2-Wasserstein distance between the two sets of numbers, each standardised to mean 0
    and standard deviation 1: the mean over i of the squared difference of their i-th quantiles. The i-th of
    `num_quantiles` quantiles is the mean of the sorted numbers from floor(i n / num_quantiles) up to ceil((i +
    1) n / num_quantiles). So every weight gets a gradient, and layers of any two sizes and shapes can be
    compared. Weights that are all equal count as zeros. Zero where student equals teacher. The class has no
    parameters; it caches the quantiles of an unchanged teacher's weight, because sorting takes the most time.
    This loss is our own; for the distance in one dimension see Peyre, Cuturi 2019, "Computational Optimal
    Transport".
    """

    def __init__(self, *, num_quantiles: PositiveInt = 256) -> None:
        super().__init__()
        self.num_quantiles = num_quantiles
        self._known: tuple[Tensor, int, Tensor] | None = None

    def forward(self, student_weight: Tensor, teacher_weight: Tensor) -> Tensor:
        student = _quantiles(full_precision(student_weight), self.num_quantiles)
        return F.mse_loss(student, self._of_teacher(teacher_weight))

    def _of_teacher(self, weight: Tensor) -> Tensor:
        # `_version` counts the in-place changes of a tensor.
        if self._known is None or self._known[0] is not weight or self._known[1] != weight._version:
            quantiles = _quantiles(full_precision(weight.detach()), self.num_quantiles)
            self._known = (weight, weight._version, quantiles)
        return self._known[2]


def _quantiles(weight: Tensor, num_quantiles: int) -> Tensor:
    values = weight.flatten()
    # Exact, since it is a power of two: the squares of numbers near 1e-20 would leave float32.
    exponent = torch.frexp(values.detach().abs().max()).exponent.clamp(-125, 125)
    values = values * torch.exp2(-exponent.to(values.dtype))
    mean = values.mean()
    centred = values - mean
    variance = centred.square().mean()
    # The deviation of equal weights is rounding error, which must not be scaled up to 1.
    rounding = (16 * torch.finfo(values.dtype).eps * mean).square()
    standard = centred * torch.where(variance > rounding, variance, 1).rsqrt()
    return F.adaptive_avg_pool1d(standard.sort().values[None], num_quantiles)[0]
