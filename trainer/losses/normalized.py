import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from trainer.mistakes import Mistake
from trainer.tensors import full_precision, without_class


def normalized(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: PositiveFloat = 1.5,
    temperature: PositiveFloat = 1.0,
) -> Tensor:
    """Soft labels in two parts, as cross entropies: of the true class, and of the others by themselves.

    target + gamma * T^2 * non-target. target: - p log q of the true class, with the teacher's probability p and the
    student's q, both at temperature 1. non-target: the cross entropy of the softmaxes at T over the K - 1 other
    classes, which sum to 1 for both networks. Mean over the batch, in nats. It is not zero where student equals
    teacher. labels are class ids [N]. The authors add cross-entropy on the labels, a term of its own here.
    Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
    Loss and Customized Soft Labels" (NKD).

    Args:
        gamma: Weight of the non-target part. 1.5 is the paper's.
        temperature: T, of the non-target part; 1 is the paper's on ImageNet.

    Raises:
        Mistake: For labels that are probabilities [N, K] (a mixed image has no one true class).
    """
    if labels.dim() != 1:
        raise Mistake(f"normalized: labels are {tuple(labels.shape)}; class ids [N] are needed (no mixup)")
    student, teacher = full_precision(student_logits), full_precision(teacher_logits.detach())
    sure = teacher.softmax(dim=1).gather(1, labels[:, None])
    target = -(sure * F.log_softmax(student, dim=1).gather(1, labels[:, None])).mean()
    others = F.softmax(without_class(teacher, labels) / temperature, dim=1)
    answers = F.log_softmax(without_class(student, labels) / temperature, dim=1)
    return target - gamma * temperature**2 * torch.sum(others * answers, dim=1).mean()
