import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from trainer.projectors import full_precision


def weight_distribution(
    student_weight: Tensor, teacher_weight: Tensor, *, num_quantiles: PositiveInt = 256
) -> Tensor:
    """Asks a layer's weights for the shape of the teacher's: heavy tails, skew, gaps, wherever they are.

    The squared 2-Wasserstein distance between the two sets of numbers, each brought to mean 0 and standard
    deviation 1: mean over i of the squared difference of their i-th quantiles. The i-th of `num_quantiles`
    quantiles is the mean of the sorted numbers from floor(i n / num_quantiles) up to ceil((i + 1) n /
    num_quantiles), so that every weight gets a gradient, and layers of any two sizes compare. Mean and
    scale of the weights are left free; weights that are all equal count as zeros. Zero where student equals
    teacher. The tensors may have any shape.
    A loss of our own; for the distance in one dimension see Peyre, Cuturi 2019, "Computational Optimal
    Transport".
    """
    student = _quantiles(full_precision(student_weight), num_quantiles)
    teacher = _quantiles(full_precision(teacher_weight.detach()), num_quantiles)
    return F.mse_loss(student, teacher)


def _quantiles(weight: Tensor, num_quantiles: int) -> Tensor:
    values = weight.flatten()
    mean = values.mean()
    centred = values - mean
    variance = centred.square().mean()
    # What is left of equal weights is rounding, and blown up to a deviation of 1 it would be noise.
    rounding = (16 * torch.finfo(values.dtype).eps * mean).square()
    standard = centred * torch.where(variance > rounding, variance, 1).rsqrt()
    return F.adaptive_avg_pool1d(standard.sort().values[None], num_quantiles)[0]
