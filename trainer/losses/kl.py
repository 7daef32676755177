import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from trainer.tensors import full_precision


def kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: PositiveFloat = 4.0) -> Tensor:
    """Soft labels: KL(teacher || student) of the softmaxes at a temperature, times the temperature squared.

    Summed over classes, mean over the batch ("batchmean"), in nats. The factor keeps gradients of different
    temperatures comparable. Zero where student equals teacher. A place to start, by recipes/RESULTS.md: `weight: auto`
    beside the labels, at T = 4.
    Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".
    """
    student = F.log_softmax(full_precision(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(full_precision(teacher_logits.detach()) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
