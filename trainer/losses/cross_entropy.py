from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trainer.tensors import full_precision


def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    *,
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> Tensor:
    """Cross entropy of the student's softmax against the labels: what a network learns without a teacher.

    Mean over the batch, in nats. labels: class ids [N], or class probabilities [N, K]. class_weights: [K], then the
    mean is weighted by those of the labels (of class probabilities it is the sum, divided by N). label_smoothing:
    fraction of the target that is spread evenly over all K classes, the true one included, as in Szegedy et
    al. 2016, "Rethinking the Inception Architecture for Computer Vision".
    """
    logits = full_precision(student_logits)
    target = labels.to(logits.dtype) if labels.dim() == 2 else labels
    weights = None if class_weights is None else class_weights.to(logits)
    return F.cross_entropy(logits, target, weights, label_smoothing=label_smoothing)
