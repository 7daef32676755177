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

    With P the probabilities [N, K] at a temperature T, the sum over the temperatures of
    instance: KL(teacher || student) T^2, summed over classes, mean over the batch, in nats;
    batch: the squared difference of P P^T (which samples look alike), summed over the N x N pairs, / N;
    class: the squared difference of P^T P (which classes go together), summed over the K x K pairs, / K.
    This is the reference code's scale: of a batch twice as long the batch term is twice, the class term
    four times as large. Pairs are those of this process's batch. Zero where student equals teacher.
    Of the paper's prediction augmentation this is the part on logits, the several temperatures. The
    reference code also teaches a second, strongly augmented view of each image, and weighs some terms by
    the share of samples or classes the teacher is less sure of (always about a half); here the views are
    the data's, and every term counts in full.
    Jin, Wang, Lin 2023, "Multi-level Logit Distillation" (MLKD).
    """
    num_samples, num_classes = student_logits.shape
    student_logits, teacher_logits = full_precision(student_logits), full_precision(teacher_logits.detach())
    loss = student_logits.new_zeros(())
    # Autocast would take the products of probabilities back to half precision.
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
