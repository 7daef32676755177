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
    """Relational distillation: distances between two samples and angles between three should match the teacher's.

    distance * (smooth L1 of the pairwise distances, each network's divided by the mean of its non-zero ones)
    + angle * (smooth L1 of the cosines of the angle at i between j and k). Mean over all N^2 pairs and all
    N^3 triples, equal samples included, as in the reference code. The widths of the embeddings may differ.
    Memory is O(N^2 D + N^3). Zero for a batch of one or two, whose geometry is always the same.
    Park et al. 2019, "Relational Knowledge Distillation" (RKD).

    Args:
        distance: Weight of the distances.
        angle: Weight of the angles.
        gather: Whether pairs are formed over the batches of all processes, or within each process's batch.

    Raises:
        Mistake: If distance and angle are both 0.
    """
    if distance == 0 and angle == 0:
        raise Mistake("relational: distance and angle are both 0: nothing is left of it")
    student, teacher = full_precision(student_embedding), full_precision(teacher_embedding.detach())
    if gather:
        student, teacher = gather_batch(student), gather_batch(teacher)
    # Autocast would compute the cosines in half precision.
    with torch.autocast(student.device.type, enabled=False):
        student_distances, student_cosines = _geometry(student)
        teacher_distances, teacher_cosines = _geometry(teacher)
    return distance * F.smooth_l1_loss(student_distances, teacher_distances) + angle * F.smooth_l1_loss(
        student_cosines, teacher_cosines
    )


def _geometry(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Returns distances [N, N] over their mean, and cosines [N, N, N] at the first sample between the other two."""
    difference = embedding[None] - embedding[:, None]
    square = difference.square().sum(dim=2)
    # The square root has no gradient at 0, and below the smallest normal number one that overflows: samples that are
    # equal, or as good as, get 1, and afterwards the distance 0.
    apart = square >= torch.finfo(square.dtype).tiny
    length = torch.where(apart, square, 1).sqrt()
    distances = length * apart
    mean = distances.sum() / apart.sum().clamp(min=1)
    direction = difference / length[:, :, None]
    return distances / torch.where(mean > 0, mean, 1), direction @ direction.transpose(1, 2)
