import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from trainer.tensors import full_precision


def channel_wise(projected_map: Tensor, teacher_map: Tensor, *, temperature: PositiveFloat = 4.0) -> Tensor:
    """Channel-wise distillation: each channel should be distributed over the positions as the teacher's is.

    A softmax at the temperature turns every channel of both maps [N, Ct, h, w] into a distribution over its
    positions. The loss is KL(teacher || student), summed over positions, mean over channels and batch, times
    the temperature squared, in nats. A constant added to a channel does not change it. Zero where the maps
    are equal, and for maps of one position.
    Shu et al. 2021, "Channel-Wise Knowledge Distillation for Dense Prediction".
    """
    student = F.log_softmax(full_precision(projected_map).flatten(2) / temperature, dim=2)
    teacher = F.log_softmax(full_precision(teacher_map.detach()).flatten(2) / temperature, dim=2)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=2)
    return divergence.mean() * temperature**2
