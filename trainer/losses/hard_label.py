import torch.nn.functional as F
from torch import Tensor

from trainer.tensors import full_precision


def hard_label(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy of the student's softmax against the class the teacher finds likeliest.

    Mean over the batch, in nats. The teacher's certainty is not used; of equal logits the first class
    counts. Hard-label distillation of Touvron et al. 2021, "Training data-efficient image transformers &
    distillation through attention" (DeiT).
    """
    return F.cross_entropy(full_precision(student_logits), teacher_logits.argmax(dim=1))
