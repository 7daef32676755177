from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from trainer.mistakes import Mistake
from trainer.projectors import map_projectors
from trainer.tensors import full_precision, same_size


class vit_features(nn.Module):
    """Features of vision transformers: the first blocks are mimicked, the last is generated from its visible tokens.

    alpha * mimicked + beta * generated. mimicked: the mean squared error between the maps of student and teacher, mean
    over all pairs but the last. generated: half of the last map's positions, drawn anew for every sample and call by
    PyTorch's global generator, are replaced by a learned token; two 3x3 convolutions with a ReLU between them make the
    teacher's map of it, and their mean squared error counts at the replaced positions. If widths differ, a learned
    1x1 convolution (of each pair its own) brings the student's map to the teacher's; the larger map is pooled to the
    smaller's size. The authors take the first two blocks and the last: at: {blocks.0: blocks.0, blocks.1: blocks.1,
    blocks.11: blocks.11}; `at: auto` takes up to four, evenly spaced.

    The authors' code sums over elements: with its weights 3e-5 and 3e-6 and a teacher of 196 tokens of width 768 it is
    9 times this loss. Class and distillation tokens are left out, as there.
    Yang et al. 2022, "ViTKD: Practical Guidelines for ViT Feature Knowledge Distillation".

    alpha: weight of the mimicked maps. beta: weight of the generated map. ratio: fraction of the positions that are
    replaced, at least one. Raises Mistake for one pair of layers.
    """

    def __init__(
        self,
        student_maps: list[torch.Size],
        teacher_maps: list[torch.Size],
        *,
        alpha: PositiveFloat = 1.0,
        beta: PositiveFloat = 0.05,
        ratio: Annotated[float, Field(gt=0, lt=1)] = 0.5,
    ) -> None:
        super().__init__()
        if len(student_maps) < 2:
            raise Mistake(
                f"vit_features: got {len(student_maps)} pair of layers; 2 or more are needed, of which the last is generated"
            )
        self.projectors = map_projectors(student_maps, teacher_maps)
        width = teacher_maps[-1][1]
        self.token = nn.Parameter(torch.zeros(width))
        self.generate = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
        )
        self.alpha, self.beta, self.ratio = alpha, beta, ratio

    def forward(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> Tensor:
        pairs = [
            same_size(full_precision(project(full_precision(student))), full_precision(teacher.detach()))
            for project, student, teacher in zip(self.projectors, student_maps, teacher_maps, strict=True)
        ]
        mimicked = torch.stack(
            [(student - teacher).square().mean() for student, teacher in pairs[:-1]]
        ).mean()
        student, teacher = pairs[-1]
        hidden = self._hidden(student)
        visible = torch.where(hidden, self.token.to(student.dtype)[:, None, None], student)
        wrong = (full_precision(self.generate(visible)) - teacher).square().mean(dim=1, keepdim=True)
        return self.alpha * mimicked + self.beta * (wrong * hidden).sum() / hidden.sum()

    def _hidden(self, map_: Tensor) -> Tensor:
        """Returns bool [N, 1, H, W], True at as many random positions of each sample."""
        samples, _, height, width = map_.shape
        positions = height * width
        num_hidden = max(1, positions - int(positions * (1 - self.ratio)))
        rank = torch.rand(samples, positions, device=map_.device).argsort(dim=1).argsort(dim=1)
        return (rank < num_hidden).view(samples, 1, height, width)
