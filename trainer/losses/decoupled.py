import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from trainer.mistakes import Mistake
from trainer.tensors import full_precision, without_class


def decoupled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: NonNegativeFloat = 1.0,
    beta: NonNegativeFloat = 8.0,
    temperature: PositiveFloat = 4.0,
) -> Tensor:
    """Soft labels in two parts: the probability of the true class, and the distribution over the other classes.

    T^2 (alpha * target + beta * non-target). target: KL(teacher || student) of (true class, any other);
    non-target: KL(teacher || student) of the softmax over the K - 1 other classes. Mean over the batch, in
    nats. Zero where student equals teacher. labels are class ids [N]. The paper's warm-up over 20 epochs is a
    weight schedule of the term.
    Zhao et al. 2022, "Decoupled Knowledge Distillation" (DKD).

    Args:
        alpha: Weight of the target part.
        beta: Weight of the non-target part.
        temperature: T, of both softmaxes.

    Raises:
        Mistake: For labels that are probabilities [N, K] (a mixed image has no one true class), and if alpha
            and beta are both 0.
    """
    if alpha == 0 and beta == 0:
        raise Mistake("decoupled: alpha and beta are both 0: nothing is left of it")
    if labels.dim() != 1:
        raise Mistake(f"decoupled: labels are {tuple(labels.shape)}; class ids [N] are needed (no mixup)")
    student, student_others = _split(full_precision(student_logits) / temperature, labels)
    teacher, teacher_others = _split(full_precision(teacher_logits.detach()) / temperature, labels)
    target = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    non_target = F.kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
    return (alpha * target + beta * non_target) * temperature**2


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of (true class, any other) [N, 2], and of the other classes alone [N, K - 1]."""
    others = without_class(logits, labels)
    pair = torch.cat([logits.gather(1, labels[:, None]), others.logsumexp(dim=1, keepdim=True)], dim=1)
    return F.log_softmax(pair, dim=1), F.log_softmax(others, dim=1)
