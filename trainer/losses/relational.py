import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from trainer.distributed import gather_batch
from trainer.mistakes import Mistake
from trainer.tensors import full_precision


def relational(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    *,
    distance: NonNegativeFloat = 25.0,
    angle: NonNegativeFloat = 50.0,
    gather: bool = False,
) -> Tensor:
    """Asks for the teacher's geometry of the batch: distances between two samples, angles between three.

    distance * (smooth L1 of the pairwise distances, each network's divided by the mean of its own that are
    not zero) + angle * (smooth L1 of the cosines of the angle at i between j and k). Means over all N^2
    pairs and all N^3 triples, equal samples included, as the reference code does. The widths of the
    embeddings may differ; needs O(N^2 D + N^3) memory. Zero for a batch of one or two, which has no shape.
    gather: over the batches of all processes; without it, over the pairs within each process's batch.
    Park et al. 2019, "Relational Knowledge Distillation" (RKD).
    """
    if distance == 0 and angle == 0:
        raise Mistake("relational: distance and angle are both 0: nothing is left of it")
    student, teacher = full_precision(student_embedding), full_precision(teacher_embedding.detach())
    if gather:
        student, teacher = gather_batch(student), gather_batch(teacher)
    # Autocast would take the cosines back to half precision.
    with torch.autocast(student.device.type, enabled=False):
        student_distances, student_cosines = _geometry(student)
        teacher_distances, teacher_cosines = _geometry(teacher)
    return distance * F.smooth_l1_loss(student_distances, teacher_distances) + angle * F.smooth_l1_loss(
        student_cosines, teacher_cosines
    )


def _geometry(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [N, N] over their mean, and cosines [N, N, N] at the first sample between the other two."""
    difference = embedding[None] - embedding[:, None]
    square = difference.square().sum(dim=2)
    apart = square > 0
    # The root has no slope at 0: equal samples take a detour, and their distance is put back to 0.
    length = torch.where(apart, square, 1).sqrt()
    distances = length * apart
    mean = distances.sum() / apart.sum().clamp(min=1)
    direction = difference / length[:, :, None]
    return distances / torch.where(mean > 0, mean, 1), direction @ direction.transpose(1, 2)
