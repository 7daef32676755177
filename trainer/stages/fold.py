"""Folds BatchNorm into the layers before it, so that fewer tensors are shared and packed."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trainer.compression import folding
from trainer.training.evaluate import apart, logits
from trainer.training.rows import keep_histogram, record
from trainer.training.run import Run

LOOKED_AT = 1000  # validation images whose outputs are compared


def order(_settings, before) -> Iterator[str]:
    if any(stage.stage == "share" for stage in before):
        yield "folds after sharing: fold first, then share"


def check_student(_settings, student: nn.Module) -> None:
    folding.can_fold(student)


def becomes(
    _settings, student: nn.Module, spec: dict[str, Any], images: Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    folding.refuse_unfoldable(student, images)
    return folding.fold(student, spec)


def fold(run: Run) -> None:
    """Folds BatchNorm away: the student becomes the network without it (of `batch_norm: false`), with the same outputs.

    Any network, of timm too, whose BatchNorm directly follows a convolution or a linear layer. Masks stay; the stage comes
    before `share`. The report's row has the largest difference of a logit (`max_difference`) and the number of changed
    predictions (`num_changed`) over 1,000 validation images. Raises Mistake for a student without BatchNorm that can be
    folded, and for shared weights.
    """
    run.student.to(run.accelerator.device).eval()
    before = logits(run, LOOKED_AT)
    run.student, run.student_spec = folding.fold(run.student, run.student_spec)
    record(run, "folded", **apart(before, logits(run, LOOKED_AT)))
    keep_histogram(run, "folded")
