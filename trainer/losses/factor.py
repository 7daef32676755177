from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from trainer.tensors import full_precision, same_size, unit_length


class factor(nn.Module):
    """Factor transfer: a translator of the student's map learns the code that an autoencoder makes of the teacher's.

    The paraphraser is a convolutional autoencoder of the teacher's map; its code, round(rate x Ct) channels,
    is the teacher's factor. The translator (three 3x3 convolutions with leaky ReLU, as the encoder) makes the
    student's factor. The larger map is pooled to the smaller's size first. The loss is the absolute
    difference of the two factors, each flattened and scaled to L2 length 1 per sample, mean over elements and
    batch, plus reconstruction_weight times the mean squared error of the reconstruction.

    The paper trains the paraphraser beforehand and then freezes it. Here it learns beside the student, from
    the reconstruction alone (the student's term sends it no gradient), so early factors are those of an
    untrained encoder and the target drifts while it learns. The decoder ends without a ReLU, so that maps
    before a ReLU can be reconstructed.
    Kim, Park, Kwak 2018, "Paraphrasing Complex Network: Network Compression via Factor Transfer".

    rate: channels of the factor as a fraction of the teacher's. reconstruction_weight: the default makes the
    reconstruction count once if the term has the authors' weight of 500.
    """

    def __init__(
        self,
        student_map: torch.Size,
        teacher_map: torch.Size,
        *,
        rate: Annotated[float, Field(gt=0, le=1)] = 0.5,
        reconstruction_weight: PositiveFloat = 0.002,
    ) -> None:
        super().__init__()
        width = max(1, round(rate * teacher_map[1]))
        self.encoder = _encoder(teacher_map[1], width)
        self.decoder = nn.Sequential(
            _conv(width, width),
            nn.LeakyReLU(0.1),
            _conv(width, teacher_map[1]),
            nn.LeakyReLU(0.1),
            _conv(teacher_map[1], teacher_map[1]),
        )
        self.translator = _encoder(student_map[1], width)
        self.reconstruction_weight = reconstruction_weight

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        student, teacher = same_size(full_precision(student_map), full_precision(teacher_map.detach()))
        code = self.encoder(teacher)
        reconstruction = F.mse_loss(full_precision(self.decoder(code)), teacher)
        transfer = F.l1_loss(_factor(self.translator(student)), _factor(code.detach()))
        return transfer + self.reconstruction_weight * reconstruction


def _conv(width: int, out_width: int) -> nn.Conv2d:
    return nn.Conv2d(width, out_width, kernel_size=3, padding=1)


def _encoder(width: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(width, width),
        nn.LeakyReLU(0.1),
        _conv(width, out_width),
        nn.LeakyReLU(0.1),
        _conv(out_width, out_width),
        nn.LeakyReLU(0.1),
    )


def _factor(code: Tensor) -> Tensor:
    return unit_length(full_precision(code).flatten(1))
