from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from trainer.tensors import full_precision


def binary_cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    sum_classes: bool = False,
) -> Tensor:
    """Binary cross entropy of the student's sigmoids against one-hot labels: a yes or no for each class.

    Mean over the batch and over the classes, in nats. labels: class ids [N], or class probabilities [N, K].

    label_smoothing: fraction of the target that is spread evenly over all K classes, for ids and for
    probabilities alike. sum_classes: sum over the classes instead of their mean (K times as much).
    Wightman, Touvron, Jegou 2021, "ResNet strikes back".
    """
    logits = full_precision(student_logits)
    num_classes = logits.shape[1]
    target = (labels if labels.dim() == 2 else F.one_hot(labels, num_classes)).to(logits.dtype)
    target = (1 - label_smoothing) * target + label_smoothing / num_classes
    loss = F.binary_cross_entropy_with_logits(logits, target)
    return loss * num_classes if sum_classes else loss
