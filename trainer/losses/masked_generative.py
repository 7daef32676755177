from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trainer.projectors import MapProjector
from trainer.tensors import full_precision, same_size


class masked_generative(nn.Module):
    """Masked generation: a small decoder must generate the teacher's map from the student's partly masked map.

    The student's map is masked at random, anew for every sample and call, by PyTorch's global generator. Two
    3x3 convolutions with a ReLU between them follow. The loss is the mean squared error against the teacher's
    map over all elements and the batch. If widths differ, a learned 1x1 convolution comes first; the larger
    map is pooled to the smaller's size.

    masked: whether whole channels or positions are set to zero. ratio: probability of each to be masked.

    The defaults are those of the authors' code for classification; for detection it masks positions at a ratio
    of 0.65. That code sums over the elements of a sample and weights by 7e-5: at 512 x 7 x 7 that is 1.76
    times this mean.
    Yang et al. 2022, "Masked Generative Distillation".
    """

    def __init__(
        self,
        student_map: torch.Size,
        teacher_map: torch.Size,
        *,
        masked: Literal["channels", "positions"] = "channels",
        ratio: Annotated[float, Field(ge=0, lt=1)] = 0.15,
    ) -> None:
        super().__init__()
        width = teacher_map[1]
        self.project = nn.Identity() if student_map[1] == width else MapProjector(student_map[1], width)
        self.generate = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
        )
        self.masked = masked
        self.ratio = ratio

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        student, teacher = same_size(full_precision(student_map), full_precision(teacher_map.detach()))
        student = self.project(student)
        samples, channels, height, width = student.shape
        shape = (samples, channels, 1, 1) if self.masked == "channels" else (samples, 1, height, width)
        kept = torch.rand(shape, device=student.device) >= self.ratio
        return F.mse_loss(full_precision(self.generate(student * kept)), teacher)
