import torch.nn.functional as F
from torch import Tensor

from trainer.tensors import full_precision


def hint(projected_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Hints: mean squared error between the projected student map and the teacher's map.

    Both [N, Ct, h, w]; mean over all elements, the batch included. Zero where they are equal.
    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets".
    """
    return F.mse_loss(full_precision(projected_map), full_precision(teacher_map.detach()))
