import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from trainer.tensors import full_precision

NEEDS_ALL_LOGITS = True


def logit_standardized(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: PositiveFloat = 2.0
) -> Tensor:
    """Soft labels of z-scored logits, so that the student need not match the size of the teacher's logits.

    Each row of logits is standardised to mean 0 and standard deviation 1 over the classes (unbiased, plus
    1e-7). The loss is KL(teacher || student) at the temperature, times the temperature squared, summed over
    classes, mean over the batch, in nats. Zero where the student's logits are a + b times the teacher's, b >
    0. A row of equal logits counts as uniform; its gradient is finite but large (1e7 times the softmax's).
    Sun et al. 2024, "Logit Standardization in Knowledge Distillation".
    """
    student = F.log_softmax(_standardize(full_precision(student_logits)) / temperature, dim=1)
    teacher = F.log_softmax(_standardize(full_precision(teacher_logits.detach())) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def _standardize(logits: Tensor) -> Tensor:
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)
