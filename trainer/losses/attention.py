from typing import Annotated

from pydantic import Field
from torch import Tensor

from trainer.tensors import full_precision, same_size, unit_length


def attention(
    student_map: Tensor, teacher_map: Tensor, *, power: Annotated[float, Field(ge=1)] = 2.0
) -> Tensor:
    """Attention transfer: squared difference between the two networks' attention maps.

    An attention map is the mean over channels of |x|^power, flattened and scaled to L2 length 1 per sample,
    so widths may differ; the larger map is pooled to the smaller's size first. Mean over positions and batch,
    as in the authors' code (which weights it by 1000). A map of zeros has an attention map of zeros.
    Zagoruyko and Komodakis 2017, "Paying More Attention to Attention".
    """
    student, teacher = same_size(full_precision(student_map), full_precision(teacher_map.detach()))
    return (_attention(student, power) - _attention(teacher, power)).square().mean()


def _attention(map_: Tensor, power: float) -> Tensor:
    return unit_length(map_.abs().pow(power).mean(dim=1).flatten(1))
