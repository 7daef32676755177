import math

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.tensors import full_precision, same_size

_LEAST_VARIANCE = 1e-5


class variational(nn.Module):
    """Variational information distillation: the student's map should make the teacher's map likely.

    The teacher's map is modelled as Gaussian. Its mean is a regression from the student's map (three 1x1
    convolutions without bias, all of the teacher's width, ReLU between); its variance is one learned number per
    channel, softplus plus 1e-5. The loss is the negative log likelihood without its constant, ((mean -
    teacher)^2 / variance + log variance) / 2, mean over all elements and the batch; it may be negative. The
    larger map is pooled to the smaller's size first.

    init_variance: the variance at the start. Raises Mistake unless it is above 1e-5.
    Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer".
    """

    def __init__(
        self, student_map: torch.Size, teacher_map: torch.Size, *, init_variance: PositiveFloat = 5.0
    ) -> None:
        super().__init__()
        if init_variance <= _LEAST_VARIANCE:
            raise Mistake(f"init_variance: got {init_variance}; it must be above {_LEAST_VARIANCE}")
        width = teacher_map[1]
        self.regressor = nn.Sequential(
            nn.Conv2d(student_map[1], width, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=1, bias=False),
        )
        # The inverse of softplus, so that training starts at init_variance.
        start = init_variance - _LEAST_VARIANCE
        self.raw_variance = nn.Parameter(torch.full((width,), start + math.log(-math.expm1(-start))))

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        student, teacher = same_size(full_precision(student_map), full_precision(teacher_map.detach()))
        mean = full_precision(self.regressor(student))
        variance = (F.softplus(full_precision(self.raw_variance)) + _LEAST_VARIANCE).view(1, -1, 1, 1)
        return ((mean - teacher).square() / variance + variance.log()).mean() / 2
