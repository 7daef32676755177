"""Folds BatchNorm into the layers before it, so that there is less to share and to pack."""

import torch
from torch import nn

from trainer import fold as folding
from trainer.context import Run
from trainer.evaluate import keep_histogram, record, student_view

LOOKED_AT = 1000  # validation images whose outputs are compared


def check_student(_settings, student: nn.Module) -> None:
    folding.can_fold(student)


def fold(run: Run) -> None:
    """Turns the student into the network of `batch_norm: false` with the same outputs; before `share`, masks stay.

    Told are the largest difference of a logit and of how many the prediction changed, over 1,000 validation images.
    Raises Mistake for a student that has no such twin (lenet5 and separable have), and for shared weights.
    """
    run.student.to(run.accelerator.device).eval()
    before = _logits(run)
    run.student, run.student_spec = folding.fold(run.student, run.student_spec)
    after = _logits(run)
    numbers = {
        "max_difference": (before - after).abs().max().item(),
        "num_changed": int((before.argmax(1) != after.argmax(1)).sum()),
    }
    record(run, "folded", **numbers)
    keep_histogram(run, "folded")


@torch.no_grad()
def _logits(run: Run) -> torch.Tensor:
    images, _, _ = run.data.validation.__getitems__(torch.arange(min(LOOKED_AT, len(run.data.validation))))
    view = student_view(run, run.student)
    return torch.cat([view(part.to(run.accelerator.device).float() / 255) for part in images.split(250)])
