import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from trainer.distributed import gather_batch
from trainer.tensors import full_precision, unit_length


def correlation(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    *,
    gamma: PositiveFloat = 0.4,
    order: PositiveInt = 2,
    gather: bool = False,
) -> Tensor:
    """Correlation congruence: the samples of a batch should be as similar to each other as they are to the teacher.

    Similarity is a Gaussian kernel of the embeddings, scaled to L2 length 1, where exp(-gamma |x - y|^2) =
    exp(-2 gamma) exp(2 gamma x.y); the second exponential is its Taylor series up to `order`, exp(-2 gamma)
    sum_p (2 gamma x.y)^p / p!. The loss is the squared difference of the student's and the teacher's kernels,
    mean over all N^2 pairs, each sample with itself included. An embedding of zeros has x.y = 0. The widths
    of the embeddings may differ. Zero where student equals teacher.
    Peng et al. 2019, "Correlation Congruence for Knowledge Distillation" (CC): its kernel with P = 2, gamma
    = 0.4.

    Args:
        gamma: Inverse width of the kernel.
        order: Highest power of the Taylor series.
        gather: Whether pairs are formed over the batches of all processes, or within each process's batch.
    """
    student, teacher = full_precision(student_embedding), full_precision(teacher_embedding.detach())
    if gather:
        student, teacher = gather_batch(student), gather_batch(teacher)
    # Autocast would compute the cosines in half precision.
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(_kernel(student, gamma, order), _kernel(teacher, gamma, order))


def _kernel(embedding: Tensor, gamma: float, order: int) -> Tensor:
    unit = unit_length(embedding)
    exponent = 2 * gamma * (unit @ unit.T)
    series: Any = sum(exponent**p / math.factorial(p) for p in range(order + 1))
    return math.exp(-2 * gamma) * series
