import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from trainer.projectors import ConvNorm
from trainer.tensors import full_precision, same_size


class review(nn.Module):
    """Knowledge review: the student's deeper layers help its shallower ones to learn the teacher's maps.

    From the deepest pair to the shallowest, attention fuses the student's map (after a 1x1 convolution to
    `width` channels) with the fused map of the next deeper pair (enlarged by nearest neighbour). A 3x3
    convolution of the fused map is compared with the teacher's map. The comparison is hierarchical: the
    weighted mean of the mean squared errors at full size, weight 1, and of both maps pooled to 4x4, 2x2 and
    1x1, weights 1/2, 1/4, 1/8 in the order used; sizes not smaller than the map are left out. Mean over
    elements and batch, summed over the pairs.

    Batch normalisation follows each convolution but the attention's. If sizes differ, the larger map is
    pooled to the smaller's size (the authors enlarge or shrink the student's to the teacher's). The authors
    add the pooled embedding as one more pair, and let the loss's weight grow over the first epochs (here a
    weight schedule of the term). Their maps are those before the last ReLU of each group; `at: auto` takes maps after
    it, and `at: {NAME:input: NAME:input}` names what a ReLU is given.

    width: channels inside the fusion; None takes those of the student's deepest map, at most 512.
    Chen et al. 2021, "Distilling Knowledge via Knowledge Review".
    """

    def __init__(
        self,
        student_maps: list[torch.Size],
        teacher_maps: list[torch.Size],
        *,
        width: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        width = width or min(512, student_maps[-1][1])
        self.narrow = nn.ModuleList(ConvNorm(shape[1], width) for shape in student_maps)
        self.attend = nn.ModuleList(nn.Conv2d(2 * width, 2, kernel_size=1) for _ in student_maps[:-1])
        self.widen = nn.ModuleList(ConvNorm(width, shape[1], kernel_size=3) for shape in teacher_maps)

    def forward(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
        losses, below = [], None
        for level in reversed(range(len(student_maps))):
            fused = self.narrow[level](full_precision(student_maps[level]))
            if below is not None:
                below = F.interpolate(below, fused.shape[2:], mode="nearest")
                weights = self.attend[level](torch.cat([fused, below], dim=1)).sigmoid()
                fused = fused * weights[:, :1] + below * weights[:, 1:]
            student, teacher = same_size(fused, full_precision(teacher_maps[level].detach()))
            losses.append(_hierarchical(self.widen[level](student), teacher))
            below = fused
        return torch.stack(losses).sum()


def _hierarchical(student: Tensor, teacher: Tensor) -> Tensor:
    height, width = student.shape[2:]
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for level in (4, 2, 1):
        if level >= max(height, width):
            continue
        size = (min(level, height), min(level, width))
        weight /= 2
        total += weight
        difference = F.adaptive_avg_pool2d(student, size) - F.adaptive_avg_pool2d(teacher, size)
        loss = loss + weight * difference.square().mean()
    return loss / total
