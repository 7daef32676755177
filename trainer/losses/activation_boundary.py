import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from trainer.projectors import ConvNorm
from trainer.tensors import full_precision, same_size


class activation_boundary(nn.Module):
    """Activation boundaries: the student's neurons should be on and off where the teacher's are, by a margin.

    A connector (1x1 convolution and batch normalisation) brings the student's map to the teacher's width; the
    larger map is pooled to the smaller's size. A response s costs (s - margin)^2 if the teacher is positive
    and s is not above the margin, (s + margin)^2 if the teacher is not positive and s is not below -margin,
    else nothing. Mean over all elements; the authors' code sums over them, divides by batch and weights by
    3 / 1000.

    The loss is made for maps before the ReLU. After the ReLU the teacher's zeros are its inactive neurons, so
    the target is the same; pooling a larger teacher map then widens the active regions, because any active
    neuron makes the mean positive (`at: {NAME:input: NAME:input}` names what a ReLU is given).

    In the paper it initialises the student: a stage with this loss alone comes first, then one on the labels. Beside
    the labels it is another method.
    Heo et al. 2019, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons".
    """

    def __init__(
        self, student_map: torch.Size, teacher_map: torch.Size, *, margin: PositiveFloat = 1.0
    ) -> None:
        super().__init__()
        self.connector = ConvNorm(student_map[1], teacher_map[1])
        self.margin = margin

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        student = self.connector(full_precision(student_map))
        student, teacher = same_size(student, full_precision(teacher_map.detach()))
        # How far the response is on the wrong side of its margin.
        short = torch.where(teacher > 0, self.margin - student, self.margin + student)
        return short.clamp(min=0).square().mean()
