from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from trainer.tensors import full_precision


class one_for_all(nn.Module):
    """One for all: a block of the student learns the teacher's logits, so that architectures may differ.

    Each block of the student has its own instance. A 1x1 convolution, ReLU, the mean over positions and a
    Linear layer turn its map into logits (the authors use separable convolutions that halve the size, or
    attention blocks for transformers). The loss is - sum over classes of ((p + y)^gamma - y) log q, mean over
    the batch, where p and q are the softmaxes of the teacher and of the block at the temperature, and y is 1
    for the true class. There is no factor of temperature squared, as in the authors' code. labels: class ids
    (id -1, unlabelled, has no true class), or class probabilities, whose largest marks the true class.
    Hao et al. 2023, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
    Distillation".

    Args:
        gamma: Above 1 it raises the weight of the true class, the more the surer the teacher is of it, and
            lowers that of the others; 1 is plain soft cross entropy. The authors use 1.5 for ResNet-18 taught
            by DeiT on ImageNet; the default of their code is 1.
        temperature: Of both softmaxes.
        width: Channels before the Linear layer; None takes the larger of the map's and num_classes.
    """

    def __init__(
        self,
        student_map: torch.Size,
        num_classes: int,
        *,
        gamma: Annotated[float, Field(ge=1)] = 1.5,
        temperature: PositiveFloat = 1.0,
        width: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        width = width or max(student_map[1], num_classes)
        self.conv = nn.Conv2d(student_map[1], width, kernel_size=1)
        self.linear = nn.Linear(width, num_classes)
        self.gamma = gamma
        self.temperature = temperature

    def forward(self, student_map: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        logits = self.linear(full_precision(self.conv(full_precision(student_map)).relu()).mean(dim=(2, 3)))
        student = F.log_softmax(full_precision(logits) / self.temperature, dim=1)
        teacher = F.softmax(full_precision(teacher_logits.detach()) / self.temperature, dim=1)
        if labels.dim() == 2:
            labels = labels.argmax(dim=1)
        true = (labels[:, None] == torch.arange(teacher.shape[1], device=labels.device)).to(teacher.dtype)
        return -(((teacher + true) ** self.gamma - true) * student).sum(dim=1).mean()
