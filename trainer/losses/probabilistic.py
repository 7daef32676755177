import torch
from torch import Tensor

from trainer.distributed import gather_batch
from trainer.tensors import full_precision, unit_length


def probabilistic(student_embedding: Tensor, teacher_embedding: Tensor, *, gather: bool = False) -> Tensor:
    """Asks for the teacher's neighbourhoods: how likely each sample of the batch picks each other one.

    The cosine of two embeddings, scaled to [0, 1], is their affinity (1/2 for an embedding of zeros); a
    sample's affinities over their sum are probabilities. KL(teacher || student) of these, 1e-7 added to
    both, in nats: the mean over all N^2 pairs, the sample with itself included, as the reference code does
    (so it shrinks as 1/N against the KL of a sample). The widths of the embeddings may differ. Zero where
    student equals teacher, and for a batch of one. gather: over the batches of all processes; without it,
    over the pairs within each process's batch.
    Passalis, Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer" (PKT).
    """
    student, teacher = full_precision(student_embedding), full_precision(teacher_embedding.detach())
    if gather:
        student, teacher = gather_batch(student), gather_batch(teacher)
    # Autocast would take the cosines back to half precision.
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = _neighbours(student), _neighbours(teacher)
    return (teacher * torch.log((teacher + 1e-7) / (student + 1e-7))).mean()


def _neighbours(embedding: Tensor) -> Tensor:
    unit = unit_length(embedding)
    # By rounding (TF32's above all) a cosine may be below -1, and a negative affinity has no logarithm.
    affinity = ((unit @ unit.T + 1) / 2).clamp(min=0)
    return affinity / affinity.sum(dim=1, keepdim=True)
