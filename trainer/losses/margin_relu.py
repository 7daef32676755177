import torch
from torch import Tensor, nn

from trainer.distributed import gather_batch
from trainer.projectors import ConvNorm
from trainer.tensors import full_precision, same_size


class margin_relu(nn.Module):
    """Overhaul of feature distillation: match the teacher where it is active, stay below it elsewhere.

    A connector (1x1 convolution and batch normalisation) brings the student's map to the teacher's width; the
    larger map is pooled to the smaller's size. The target is max(teacher, margin). The margin is one number
    <= 0 per channel, the mean of the channel's negative responses. The squared difference counts except where
    the target is not positive and the student is already below it (partial L2). Mean over all elements; the
    authors' code sums over them, divides by batch and by 1000.

    The authors compute the margin from the teacher's BatchNorm. Here the teacher may be any network, so the
    margin is the mean of the negative responses seen in training so far, over all processes (each must call
    forward equally often), kept in buffers. The loss is made for maps before the ReLU: maps after it have no
    negative responses, the margin is 0, and only the partial L2 is left (`at: {NAME:input: NAME:input}` names what a
    ReLU is given).
    Heo et al. 2019, "A Comprehensive Overhaul of Feature Distillation".
    """

    margin: Tensor
    num_negative: Tensor

    def __init__(self, student_map: torch.Size, teacher_map: torch.Size) -> None:
        super().__init__()
        self.connector = ConvNorm(student_map[1], teacher_map[1])
        self.register_buffer("margin", torch.zeros(teacher_map[1]))
        self.register_buffer("num_negative", torch.zeros(teacher_map[1], dtype=torch.int64))

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        teacher_map = full_precision(teacher_map.detach())
        if self.training:
            self._learn_margin(teacher_map)
        student, teacher = same_size(self.connector(full_precision(student_map)), teacher_map)
        target = torch.maximum(teacher, self.margin.to(teacher.dtype).view(1, -1, 1, 1))
        counts = (student > target) | (target > 0)
        return ((student - target).square() * counts).mean()

    @torch.no_grad()
    def _learn_margin(self, teacher_map: Tensor) -> None:
        negative = teacher_map < 0
        total = (teacher_map * negative).sum(dim=(0, 2, 3))
        count = negative.sum(dim=(0, 2, 3)).to(total.dtype)
        total, count = gather_batch(torch.stack([total, count])[None]).sum(dim=0)
        self.num_negative += count.long()
        self.margin += (total - count * self.margin) / self.num_negative.clamp(min=1)
