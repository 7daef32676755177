import torch
from torch import Tensor

from trainer.distributed import gather_batch
from trainer.tensors import full_precision, unit_length


def similarity(student_map: Tensor, teacher_map: Tensor, *, gather: bool = False) -> Tensor:
    """Similarity preserving: samples that are similar to the teacher should be similar to the student.

    Each network's map is flattened to Q [N, CHW]; the rows of Q Q' [N, N] are scaled to L2 length 1. The loss
    is the squared Frobenius distance of the two matrices, divided by N^2. Widths and sizes may differ; nothing
    is pooled. A sample whose map is all zeros has a row of zeros. Zero where student equals teacher.

    gather: whether pairs are formed over the batches of all processes, or within each process's batch; the
    loss then depends on the number of processes.
    Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation".
    """
    student, teacher = full_precision(student_map).flatten(1), full_precision(teacher_map.detach()).flatten(1)
    if gather:
        student, teacher = gather_batch(student), gather_batch(teacher)
    return (_likeness(student) - _likeness(teacher)).square().mean()


def _likeness(features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):  # products over a whole map overflow float16
        return unit_length(features @ features.T)
