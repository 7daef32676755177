import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from trainer.distributed import gather_batch
from trainer.mistakes import Mistake
from trainer.tensors import full_precision, unit_length


class contrastive(nn.Module):
    """Contrastive distillation: the student's embedding of a sample should be near the teacher's, far from others.

    A learned Linear layer brings each embedding to `dim` numbers of L2 length 1. A memory bank of each network
    holds the last embedding of every training sample. Noise-contrastive estimation classifies the entries of the
    teacher's bank, given the student's embedding: the entry at the sample's own index is positive,
    `num_negatives` others are noise, drawn uniformly with replacement. The same holds for the teacher's embedding
    and the student's bank. The loss is the sum of both sides, summed over the negatives, mean over the batch, in
    nats. The first batch sets the normalising constants.

    Banks and constants are buffers that change in training mode only: 2 x num_samples x dim numbers in every
    checkpoint. Every process applies the batches of all processes, so banks that start equal (as under DDP) stay
    equal. Negatives come from torch's global generator. A step needs batch x num_samples memory and a copy of the
    banks. Negatives may be of the sample's own class: the reference code's `relax` mode. Its default, `exact`, draws
    negatives of other classes, and needs labels.
    Tian, Krishnan, Isola 2020, "Contrastive Representation Distillation" (CRD).

    Args:
        dim: Width of the compared embeddings.
        num_negatives: Number of noise samples; None takes 16384, or all other samples of a smaller set.
        temperature: Divides the similarities.
        momentum: Fraction that a bank's entry keeps of its old value when its sample is seen.

    Raises:
        Mistake: For a training set of one sample, or one with fewer than num_negatives others.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_constants: Tensor
    num_updates: Tensor

    def __init__(
        self,
        student_embedding: torch.Size,
        teacher_embedding: torch.Size,
        num_samples: int,
        *,
        dim: PositiveInt = 128,
        num_negatives: PositiveInt | None = None,
        temperature: PositiveFloat = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    ) -> None:
        super().__init__()
        if num_samples < 2:
            raise Mistake(f"contrastive: {num_samples} training samples; at least 2 are needed")
        if num_negatives is None:
            num_negatives = min(16384, num_samples - 1)
        if num_negatives > num_samples - 1:
            raise Mistake(
                f"contrastive: num_negatives: got {num_negatives}; a training set of {num_samples} samples "
                f"allows at most {num_samples - 1}"
            )
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.momentum = momentum
        self.embed_student = nn.Linear(student_embedding[1], dim)
        self.embed_teacher = nn.Linear(teacher_embedding[1], dim)
        # Rows of about length 1, as the entries will have.
        bound = math.sqrt(3 / dim)
        self.register_buffer("student_bank", torch.empty(num_samples, dim).uniform_(-bound, bound))
        self.register_buffer("teacher_bank", torch.empty(num_samples, dim).uniform_(-bound, bound))
        self.register_buffer("log_constants", torch.zeros(2))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, student_embedding: Tensor, teacher_embedding: Tensor, index: Tensor) -> Tensor:
        # Half precision is too coarse for similarities divided by a small temperature.
        with torch.autocast(student_embedding.device.type, enabled=False):
            student = unit_length(self.embed_student(full_precision(student_embedding)))
            teacher = unit_length(self.embed_teacher(full_precision(teacher_embedding.detach())))
            seen = self._own_and_negatives(index)
            scores = [
                _scores(student, self.teacher_bank, seen) / self.temperature,
                _scores(teacher, self.student_bank, seen) / self.temperature,
            ]
            log_constants = self._constants(scores)
            loss: Any = sum(self._estimate(s - c) for s, c in zip(scores, log_constants, strict=True))
        if self.training:
            self._remember(student.detach(), teacher.detach(), index, log_constants)
        return loss

    def _own_and_negatives(self, index: Tensor) -> Tensor:
        """Indices [N, 1 + num_negatives]: the sample's own, then others."""
        others = len(self.student_bank) - 1
        drawn = torch.randint(others, (len(index), self.num_negatives), device=index.device)
        own = index[:, None]
        return torch.cat([own, drawn + (drawn >= own)], dim=1)

    @torch.no_grad()
    def _constants(self, scores: list[Tensor]) -> Tensor:
        """Returns logarithms [2] of the sum over the training set, estimated from the first batch's scores."""
        means = torch.stack([s.flatten().logsumexp(0) - math.log(s.numel()) for s in scores])
        if self.training:
            means = gather_batch(means[None]).mean(dim=0)
        fresh = means + math.log(len(self.student_bank))
        return torch.where(self.num_updates == 0, fresh, self.log_constants)

    def _estimate(self, log_probabilities: Tensor) -> Tensor:
        # Log odds that an index belongs to the sample, against num_negatives draws of uniform noise.
        odds = log_probabilities - math.log(self.num_negatives / len(self.student_bank))
        return -(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(dim=1)).mean()

    @torch.no_grad()
    def _remember(self, student: Tensor, teacher: Tensor, index: Tensor, log_constants: Tensor) -> None:
        index = gather_batch(index)
        # The last of a repeated sample counts; an indexed write alone would pick one in no defined order.
        position = torch.arange(len(index), device=index.device)
        last = torch.zeros(len(self.student_bank), dtype=torch.int64, device=index.device)
        last = last.scatter_reduce(0, index, position, "amax")[index]
        for bank, embedding in ((self.student_bank, student), (self.teacher_bank, teacher)):
            new = gather_batch(embedding)[last]
            bank[index] = unit_length(self.momentum * bank[index] + (1 - self.momentum) * new)
        self.log_constants.copy_(log_constants)
        self.num_updates += 1


def _scores(embedding: Tensor, bank: Tensor, seen: Tensor) -> Tensor:
    # All similarities first: far less memory than gathering a row of the bank for each negative.
    # The copy is needed because the bank changes before the backward pass.
    return (embedding @ bank.clone().T).gather(1, seen)
