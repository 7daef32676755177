import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from trainer.tensors import full_precision


def teacher_temperature(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: PositiveFloat = 4.0,
    weighted: bool = False,
) -> Tensor:
    """Soft labels of the teacher alone at a temperature: the student is compared as it answers, at temperature 1.

    KL(teacher at T || student at 1), summed over classes, mean over the batch, in nats, without a factor of T. Against
    `kl` this adds a reward for a Rényi entropy of the student's answer: it is kept from being too sure. At T = 1 it is
    `kl`. Zero where the student's logits are the teacher's divided by T, up to a constant of each sample.
    Zheng and Yang 2024, "Knowledge Distillation Based on Transformed Teacher Matching" (TTM, and WTTM if weighted).

    Args:
        temperature: T; the paper's exponent gamma is 1 / T.
        weighted: Whether each sample counts by the sum over classes of its teacher's probabilities to the power 1 / T.
            That is 1 for a teacher that is sure, and K^(1 - 1/T) for one that finds all K classes equally likely.
    """
    logits = full_precision(teacher_logits.detach())
    student = F.log_softmax(full_precision(student_logits), dim=1)
    teacher = F.log_softmax(logits / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    if weighted:
        power_sum = (logits / temperature).logsumexp(dim=1) - logits.logsumexp(dim=1) / temperature
        divergence = divergence * power_sum.exp()
    return divergence.mean()
