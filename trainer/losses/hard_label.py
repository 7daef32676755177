import torch.nn.functional as F
from torch import Tensor

from trainer.tensors import full_precision


def hard_label(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy of the student's softmax against the class that the teacher predicts.

    Mean over the batch, in nats. The teacher's confidence is not used; the first of equal logits counts. This
    is the hard-label distillation of Touvron et al. 2021, "Training data-efficient image transformers &
    distillation through attention" (DeiT).
    """
    return F.cross_entropy(full_precision(student_logits), teacher_logits.argmax(dim=1))
