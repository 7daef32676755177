from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.projectors import map_projectors
from trainer.tensors import full_precision, same_size


class fsp(nn.Module):
    """Flow of the solution procedure: products of one layer's channels with those of the next should match.

    The flow between two consecutive paired layers is the matrix [C1, C2] of the channels' products, averaged
    over positions (the larger of the two maps is pooled to the smaller's size). The loss is the squared
    difference between the student's and the teacher's flow, mean over matrix elements and batch, summed over
    the flows. Student and teacher may differ in size. If their widths differ, a learned 1x1 convolution brings
    the student's map to the teacher's width (in the paper widths must be equal); otherwise the loss has no
    parameters. Raises Mistake for fewer than two pairs of layers.

    In the paper it initialises the student: a stage with this loss alone comes first, then one on the labels. Beside
    the labels it is another method.
    Yim et al. 2017, "A Gift from Knowledge Distillation".
    """

    def __init__(self, student_maps: list[torch.Size], teacher_maps: list[torch.Size]) -> None:
        super().__init__()
        if len(student_maps) < 2:
            raise Mistake(
                f"fsp: got {len(student_maps)} pair of layers; a flow is between two layers, so 2 or more"
            )
        self.projectors = map_projectors(student_maps, teacher_maps)

    def forward(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
        student_maps = [
            full_precision(project(full_precision(map_)))
            for project, map_ in zip(self.projectors, student_maps, strict=True)
        ]
        teacher_maps = [full_precision(map_.detach()) for map_ in teacher_maps]
        flows = zip(pairwise(student_maps), pairwise(teacher_maps), strict=True)
        return torch.stack([_difference(student, teacher) for student, teacher in flows]).sum()


def _difference(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the mean square of the student's flow less the teacher's."""
    with torch.autocast(student[0].device.type, enabled=False):  # sums over all positions overflow float16
        (a, b), (c, d) = _scaled(*student), _scaled(*teacher)
        if a.shape[2] + c.shape[2] >= min(a.shape[1], b.shape[1]):
            return (a @ b.transpose(1, 2) - c @ d.transpose(1, 2)).square().mean()
        # With few positions the flows [C1, C2] need not be made: the difference is X Y' with X = [a c] and
        # Y = [b -d], and its squares sum to the sum of (X'X)(Y'Y), matrices of positions by positions.
        if a.shape == c.shape:
            # (a - c) b' + c (b - d)' is the same difference, and does not cancel large numbers.
            a, d = a - c, d - b
        x, y = torch.cat([a, c], dim=2), torch.cat([b, -d], dim=2)
        square = (x.transpose(1, 2) @ x) * (y.transpose(1, 2) @ y)
        return F.relu(square.sum(dim=(1, 2))).mean() / (a.shape[1] * b.shape[1])


def _scaled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two layers' maps as [N, C, HW], the first divided by the number of positions."""
    a, b = (map_.flatten(2) for map_ in same_size(a, b))
    return a / a.shape[2], b
