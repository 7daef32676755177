import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from trainer.tensors import full_precision

NEEDS_ALL_LOGITS = True
LEAST_DEVIATION = 0.03  # of a student's logits


def logit_standardized(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: PositiveFloat = 2.0
) -> Tensor:
    """Soft labels of z-scored logits, so that the student need not match the size of the teacher's logits.

    Each row of logits is standardised to mean 0 and standard deviation 1 over the classes (unbiased, plus
    1e-7). The loss is KL(teacher || student) at the temperature, times the temperature squared, summed over
    classes, mean over the batch, in nats. Zero where the student's logits are a + b times the teacher's, b >
    0. The student's standard deviation counts as at least 0.03, so that a head of zeros, whose logits are all equal,
    counts as uniform and gets no gradient of 1e7.
    Sun et al. 2024, "Logit Standardization in Knowledge Distillation".
    """
    student = F.log_softmax(
        _standardize(full_precision(student_logits), LEAST_DEVIATION) / temperature, dim=1
    )
    teacher = F.log_softmax(_standardize(full_precision(teacher_logits.detach()), 0.0) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def _standardize(logits: Tensor, least: float) -> Tensor:
    deviation = logits.std(dim=1, keepdim=True).clamp_min(least)
    return (logits - logits.mean(dim=1, keepdim=True)) / (deviation + 1e-7)
