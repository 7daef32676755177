from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from trainer.tensors import full_precision


def multi_level(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (2.0, 3.0, 4.0, 5.0, 6.0),
) -> Tensor:
    """Aligns the probabilities of student and teacher by sample, by pairs of samples and by pairs of classes.

    Three terms are summed over the temperatures T, where P [N, K] are the probabilities at T:
    instance: KL(teacher || student) T^2, summed over classes, mean over the batch, in nats;
    batch: the squared difference of P P^T (similarity of samples), summed over the N x N pairs, / N;
    class: the squared difference of P^T P (similarity of classes), summed over the K x K pairs, / K.
    The scale is the reference code's: for a batch twice as long the batch term is twice and the class term
    four times as large. Pairs are those of this process's batch. Zero where student equals teacher.

    temperatures: the T of the sum. They are the logit part of the paper's prediction augmentation. The
    reference code also teaches a second, strongly augmented view of each image, and weights some terms by
    the fraction of samples or classes that the teacher is less sure of (always about a half). Here the views
    are the data's, and every term counts in full.
    Jin, Wang, Lin 2023, "Multi-level Logit Distillation" (MLKD).
    """
    num_samples, num_classes = student_logits.shape
    student_logits, teacher_logits = full_precision(student_logits), full_precision(teacher_logits.detach())
    loss = student_logits.new_zeros(())
    # Autocast would compute the products of probabilities in half precision.
    with torch.autocast(student_logits.device.type, enabled=False):
        for temperature in temperatures:
            log_student = F.log_softmax(student_logits / temperature, dim=1)
            log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
            divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
            loss = loss + divergence * temperature**2
            student, teacher = log_student.exp(), log_teacher.exp()
            loss = loss + (student @ student.T - teacher @ teacher.T).square().sum() / num_samples
            loss = loss + (student.T @ student - teacher.T @ teacher).square().sum() / num_classes
    return loss
