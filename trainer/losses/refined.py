import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from trainer.mistakes import Mistake
from trainer.tensors import full_precision, without_class

NEEDS_ALL_LOGITS = True  # the classes below the true one, which the highest logits do not tell apart


def refined(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: NonNegativeFloat = 1.0,
    beta: NonNegativeFloat = 4.0,
    temperature: PositiveFloat = 4.0,
) -> Tensor:
    """Soft labels in which the labels mend the teacher's mistakes.

    T^2 (alpha * confidence + beta * correlation). confidence: KL of (the teacher's highest probability, the rest) and
    the student's (true class, the rest): the student should be as sure of the truth as the teacher is of its answer,
    right or wrong. correlation: KL(teacher || student) of the softmaxes over the classes that the teacher holds less
    likely than the true one; 0 for a sample that has fewer than two such. Mean over the batch, in nats. Zero where
    student equals teacher and the teacher is right. labels are class ids [N].
    Sun et al. 2024, "Knowledge Distillation with Refined Logits" (RLD). The authors' code has a temperature for each
    part, and lets the loss grow over the first epochs (here a weight schedule of the term).

    Args:
        alpha: Weight of the confidence.
        beta: Weight of the correlation.
        temperature: T, of all softmaxes.

    Raises:
        Mistake: For labels that are probabilities [N, K] (a mixed image has no one true class), and if alpha
            and beta are both 0.
    """
    if alpha == 0 and beta == 0:
        raise Mistake("refined: alpha and beta are both 0: nothing is left of it")
    if labels.dim() != 1:
        raise Mistake(f"refined: labels are {tuple(labels.shape)}; class ids [N] are needed (no mixup)")
    student = full_precision(student_logits) / temperature
    teacher = full_precision(teacher_logits.detach()) / temperature
    confidence = F.kl_div(
        _sure(student, labels), _sure(teacher, teacher.argmax(dim=1)), reduction="batchmean", log_target=True
    )
    # Far below any logit, and finite: a row that is hidden as a whole is then uniform for both, which costs nothing.
    hidden = teacher >= teacher.gather(1, labels[:, None])
    least = torch.finfo(teacher.dtype).min / 2
    correlation = F.kl_div(
        F.log_softmax(student.masked_fill(hidden, least), dim=1),
        F.log_softmax(teacher.masked_fill(hidden, least), dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (alpha * confidence + beta * correlation) * temperature**2


def _sure(logits: Tensor, classes: Tensor) -> Tensor:
    """Returns log-probabilities [N, 2] of each sample's class and of any other."""
    others = without_class(logits, classes).logsumexp(dim=1, keepdim=True)
    return F.log_softmax(torch.cat([logits.gather(1, classes[:, None]), others], dim=1), dim=1)
