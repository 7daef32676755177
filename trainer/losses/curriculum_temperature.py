import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from trainer.recipe.keys import EPOCHS
from trainer.tensors import full_precision


class curriculum_temperature(nn.Module):
    """Soft labels at a learned temperature that makes the student's task harder.

    KL(teacher || student) at T, times T^2; summed over classes, mean over the batch, in nats. T = start + span *
    sigmoid(t) for all samples, with one learned number t, which starts at 1 (T = 15.6 by default). t ascends the
    loss that the student descends: its gradient is reversed and multiplied by a strength that grows by a cosine
    from 0 at epoch 0 to 1 at `warm_up_epochs`. The reference code steps the strength once an epoch, counted from
    1; here it grows with every step. The run's optimizer updates t, without weight decay (unless `decay_all`).
    Li et al. 2023, "Curriculum Temperature for Knowledge Distillation" (CTKD), the global variant.

    Args:
        start: Lower bound of the temperature.
        span: Upper bound less lower bound.
        warm_up_epochs: Epochs until the gradient of t has full strength.
    """

    def __init__(
        self,
        *,
        start: PositiveFloat = 1.0,
        span: PositiveFloat = 20.0,
        warm_up_epochs: Annotated[PositiveFloat, EPOCHS] = 10.0,
    ) -> None:
        super().__init__()
        self.start = start
        self.span = span
        self.warm_up_epochs = warm_up_epochs
        self.raw_temperature = nn.Parameter(torch.ones(()))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, epoch: float) -> Tensor:
        strength = (1 - math.cos(math.pi * min(epoch / self.warm_up_epochs, 1.0))) / 2
        # The value of raw_temperature, and -strength times its gradient.
        raw: Tensor = self.raw_temperature
        raw = raw + (1 + strength) * (raw.detach() - raw)
        temperature = self.start + self.span * torch.sigmoid(raw)
        student = F.log_softmax(full_precision(student_logits) / temperature, dim=1)
        teacher = F.log_softmax(full_precision(teacher_logits.detach()) / temperature, dim=1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
