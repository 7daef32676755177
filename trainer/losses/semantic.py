from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.tensors import full_precision

NEEDS_ALL_LOGITS = True


class semantic(nn.Module):
    """Softmax regression: the teacher's classifier should give its own logits on the student's embedding.

    A learned Linear layer brings the student's embedding to the teacher's width. The loss is the mean squared
    error to the teacher's embedding (over batch and width), plus the mean squared error of the teacher's
    classifier on the projected embedding to the teacher's logits (over batch and classes), equally weighted as
    in the reference code. The classifier is frozen, and passes the gradient on. The paper's connector is a 1x1
    convolution with BatchNorm and ReLU on maps; pooled embeddings may be negative, so ours is linear.
    Yang et al. 2021, "Knowledge Distillation via Softmax Regression Representation Learning" (SRRL).
    """

    def __init__(self, student_embedding: torch.Size, teacher_embedding: torch.Size) -> None:
        super().__init__()
        self.projector = nn.Linear(student_embedding[1], teacher_embedding[1])

    def forward(
        self,
        student_embedding: Tensor,
        teacher_embedding: Tensor,
        teacher_logits: Tensor,
        teacher_head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        projected = self.projector(full_precision(student_embedding))
        logits = teacher_head(projected)
        features = F.mse_loss(full_precision(projected), full_precision(teacher_embedding.detach()))
        return features + F.mse_loss(full_precision(logits), full_precision(teacher_logits.detach()))
