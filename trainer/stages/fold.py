"""Folds BatchNorm into the layers before it, so that there is less to share and to pack."""

from torch import nn

from trainer.compression import folding
from trainer.training.evaluate import apart, logits
from trainer.training.rows import keep_histogram, record
from trainer.training.run import Run

LOOKED_AT = 1000  # validation images whose outputs are compared


def check_student(_settings, student: nn.Module) -> None:
    folding.can_fold(student)


def fold(run: Run) -> None:
    """Turns the student into the network of `batch_norm: false` with the same outputs; before `share`, masks stay.

    Told are the largest difference of a logit and of how many the prediction changed, over 1,000 validation images.
    Raises Mistake for a student that has no such twin (lenet5 and separable have), and for shared weights.
    """
    run.student.to(run.accelerator.device).eval()
    before = logits(run, LOOKED_AT)
    run.student, run.student_spec = folding.fold(run.student, run.student_spec)
    record(run, "folded", **apart(before, logits(run, LOOKED_AT)))
    keep_histogram(run, "folded")
