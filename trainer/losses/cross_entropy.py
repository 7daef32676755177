from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trainer.tensors import full_precision


def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> Tensor:
    """Cross entropy of the student's softmax against the labels: what a network learns without a teacher.

    Mean over the batch, in nats. labels: class ids [N], or class probabilities [N, K]. label_smoothing:
    fraction of the target that is spread evenly over all K classes, the true one included, as in Szegedy et
    al. 2016, "Rethinking the Inception Architecture for Computer Vision".
    """
    logits = full_precision(student_logits)
    target = labels.to(logits.dtype) if labels.dim() == 2 else labels
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
