from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from trainer.tensors import full_precision


class one_for_all(nn.Module):
    """One for all: blocks of the student and its own logits learn the teacher's, so that architectures may differ.

    A 1x1 convolution, ReLU, the mean over positions and a Linear layer (of each block its own) turn a block's map into
    logits (the authors use separable convolutions that halve the size, or attention blocks for transformers). The loss
    of such logits, and of the student's own, is - sum over classes of ((p + y)^gamma - y) log q, mean over the batch,
    where p and q are the softmaxes of the teacher and of the block at the temperature, and y is 1 for the true class.
    The sum over the blocks, plus `own` times the loss of the student's logits, as in the authors' code; there is no
    factor of temperature squared. labels: class ids (id -1, unlabelled, has no true class), or class probabilities,
    whose largest marks the true class.
    Hao et al. 2023, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
    Distillation".

    Args:
        gamma: Above 1 it raises the weight of the true class, the more the surer the teacher is of it, and
            lowers that of the others; 1 is plain soft cross entropy. The authors use 1.5 for ResNet-18 taught
            by DeiT on ImageNet; the default of their code is 1.
        temperature: Of both softmaxes.
        width: Channels before the Linear layer; None takes the larger of the map's and num_classes.
        own: Weight of the student's own logits beside the blocks.
    """

    def __init__(
        self,
        student_maps: list[torch.Size],
        num_classes: int,
        *,
        gamma: Annotated[float, Field(ge=1)] = 1.5,
        temperature: PositiveFloat = 1.0,
        width: PositiveInt | None = None,
        own: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__()
        widths = [width or max(shape[1], num_classes) for shape in student_maps]
        self.convs = nn.ModuleList(
            nn.Conv2d(shape[1], wide, kernel_size=1) for shape, wide in zip(student_maps, widths, strict=True)
        )
        self.linears = nn.ModuleList(nn.Linear(wide, num_classes) for wide in widths)
        self.gamma, self.temperature, self.own = gamma, temperature, own

    def forward(
        self, student_maps: list[Tensor], student_logits: Tensor, teacher_logits: Tensor, labels: Tensor
    ) -> Tensor:
        teacher = F.softmax(full_precision(teacher_logits.detach()) / self.temperature, dim=1)
        if labels.dim() == 2:
            labels = labels.argmax(dim=1)
        true = (labels[:, None] == torch.arange(teacher.shape[1], device=labels.device)).to(teacher.dtype)
        wanted = (teacher + true) ** self.gamma - true
        losses = [self.own * self._loss(student_logits, wanted)]
        for conv, linear, map_ in zip(self.convs, self.linears, student_maps, strict=True):
            hidden = full_precision(conv(full_precision(map_)).relu()).mean(dim=(2, 3))
            losses.append(self._loss(linear(hidden), wanted))
        return torch.stack(losses).sum()

    def _loss(self, logits: Tensor, wanted: Tensor) -> Tensor:
        student = F.log_softmax(full_precision(logits) / self.temperature, dim=1)
        return -(wanted * student).sum(dim=1).mean()
