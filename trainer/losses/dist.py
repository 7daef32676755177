import math

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from trainer.mistakes import Mistake
from trainer.tensors import full_precision

LEAST_VARIATION = 0.01  # of a student's probabilities, relative to 1 / K


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: NonNegativeFloat = 1.0,
    gamma: NonNegativeFloat = 1.0,
    temperature: PositiveFloat = 1.0,
) -> Tensor:
    """Correlation of probabilities: the student's should correlate with the teacher's, not equal them.

    T^2 (beta * between + gamma * within). between: 1 - Pearson's correlation over the classes of a sample,
    mean over the samples; within: 1 - Pearson's correlation over the samples of a class, mean over the
    classes. Each part is in [0, 2]. The T^2 is the reference code's; the paper's formula has none, and at T
    = 1 they agree. As in the reference code, 1e-8 is added to the product of the norms: a sample or class
    whose probabilities hardly vary counts as uncorrelated. `within` uses this process's batch only, and is
    left out for a batch of one.
    The student's probabilities count by how much they vary, where that is less than 1 % of 1 / K (the norm of what
    varies is taken as at least that), so that a head of zeros gets no gradient of 1e8.
    Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (DIST).

    Args:
        beta: Weight of the part between classes.
        gamma: Weight of the part within a class.
        temperature: T, of both softmaxes.

    Raises:
        Mistake: If beta and gamma are both 0.
    """
    if beta == 0 and gamma == 0:
        raise Mistake("dist: beta and gamma are both 0: nothing is left of it")
    student = (full_precision(student_logits) / temperature).softmax(dim=1)
    teacher = (full_precision(teacher_logits.detach()) / temperature).softmax(dim=1)
    loss = beta * (1 - _pearson(student, teacher, over=1)).mean()
    if len(student) > 1:
        loss = loss + gamma * (1 - _pearson(student, teacher, over=0)).mean()
    return loss * temperature**2


def _pearson(student: Tensor, teacher: Tensor, over: int) -> Tensor:
    a = student - student.mean(dim=over, keepdim=True)
    b = teacher - teacher.mean(dim=over, keepdim=True)
    least = LEAST_VARIATION * math.sqrt(a.shape[over]) / a.shape[1]
    return (a * b).sum(dim=over) / (a.norm(dim=over).clamp_min(least) * b.norm(dim=over) + 1e-8)
