import torch
from torch import Tensor

from trainer.tensors import full_precision, same_size, unit_length


def neuron_selectivity(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Neuron selectivity: the channels of both networks should be active at the same positions.

    The loss is the squared maximum mean discrepancy between two sets, the student's channels and the
    teacher's, each a vector over the positions scaled to L2 length 1, with the polynomial kernel (x . y)^2.
    Widths may differ; the larger map is pooled to the smaller's size first. Mean over the pairs of channels
    and the batch. A channel of zeros has kernel 0 with every other. Zero where the two sets are the same.
    Huang and Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer".
    """
    student, teacher = same_size(full_precision(student_map), full_precision(teacher_map.detach()))
    student, teacher = unit_length(student.flatten(2)), unit_length(teacher.flatten(2))
    with torch.autocast(student.device.type, enabled=False):  # half precision drowns the differences
        num_positions = student.shape[2]
        if num_positions < max(student.shape[1], teacher.shape[1]):
            return _by_positions(student, teacher)
        return _kernel(student, student) + _kernel(teacher, teacher) - 2 * _kernel(student, teacher)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.transpose(1, 2)).square().mean()


def _by_positions(student: Tensor, teacher: Tensor) -> Tensor:
    """Computes the same number from matrices [N, HW, HW] instead of [N, C, C].

    The mean over channels c of (x_c . y)^2 is y' G y, where G is the mean of x_c x_c'. So the discrepancy is
    the squared Frobenius distance of the two networks' G. This saves memory in deep layers of wide networks (2048
    channels, 49 positions).
    """
    student = student.transpose(1, 2) @ student / student.shape[1]
    teacher = teacher.transpose(1, 2) @ teacher / teacher.shape[1]
    return (student - teacher).square().sum(dim=(1, 2)).mean()
