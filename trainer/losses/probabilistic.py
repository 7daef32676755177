import torch
from torch import Tensor

from trainer.distributed import gather_batch
from trainer.tensors import full_precision, unit_length


def probabilistic(student_embedding: Tensor, teacher_embedding: Tensor, *, gather: bool = False) -> Tensor:
    """Probabilistic transfer: each sample should have the same neighbours in the batch as in the teacher's embedding.

    The cosine of two embeddings, scaled to [0, 1], is their affinity (1/2 for an embedding of zeros). A
    sample's affinities divided by their sum are probabilities. The loss is KL(teacher || student) of these,
    1e-7 added to both, in nats, mean over all N^2 pairs, each sample with itself included, as in the reference
    code (so it is 1/N of a sample's KL). The widths of the embeddings may differ. Zero where student equals
    teacher, and for a batch of one.

    gather: whether pairs are formed over the batches of all processes, or within each process's batch.
    Passalis, Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer" (PKT).
    """
    student, teacher = full_precision(student_embedding), full_precision(teacher_embedding.detach())
    if gather:
        student, teacher = gather_batch(student), gather_batch(teacher)
    # Autocast would compute the cosines in half precision.
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = _neighbours(student), _neighbours(teacher)
    return (teacher * torch.log((teacher + 1e-7) / (student + 1e-7))).mean()


def _neighbours(embedding: Tensor) -> Tensor:
    unit = unit_length(embedding)
    # Rounding (of TF32 above all) may bring a cosine below -1, and a negative affinity has no logarithm.
    affinity = ((unit @ unit.T + 1) / 2).clamp(min=0)
    return affinity / affinity.sum(dim=1, keepdim=True)
