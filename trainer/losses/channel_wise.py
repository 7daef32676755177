import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from trainer.tensors import full_precision


def channel_wise(projected_map: Tensor, teacher_map: Tensor, *, temperature: PositiveFloat = 4.0) -> Tensor:
    """Channel-wise distillation: each channel should spread over the positions as the teacher's does.

    Every channel of both maps [N, Ct, h, w] becomes a distribution over its positions, by a softmax at the
    temperature; KL(teacher || student), summed over positions, mean over channels and batch, times the
    temperature squared, in nats. Blind to a constant added to a channel; zero where the maps are equal; 0 for
    a map of one position.
    Shu et al. 2021, "Channel-Wise Knowledge Distillation for Dense Prediction".
    """
    student = F.log_softmax(full_precision(projected_map).flatten(2) / temperature, dim=2)
    teacher = F.log_softmax(full_precision(teacher_map.detach()).flatten(2) / temperature, dim=2)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=2)
    return divergence.mean() * temperature**2
