"""Measures the networks after a stage, and adds rows to the report."""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from trainer.compression import weights
from trainer.compression.weights import weights_of
from trainer.mistakes import listed
from trainer.reporting.tables import FURTHER, percent
from trainer.training.evaluate import (
    answered,
    balanced_accuracy,
    normalized,
    percent_right,
    predict,
    teacher_answered,
    teacher_answers,
)
from trainer.training.run import Run

MANY_CLASSES = 50  # from so many on the five likeliest say more than the likeliest alone


def record(run: Run, label: str, seconds: float = 0.0, **numbers) -> dict:
    """Measures the student and adds a row to the report; returns the row. The test split is read only here.

    Args:
        run: The run.
        label: The row's name, such as 'pruned'.
        seconds: How long the training before the row took.
        numbers: Further entries of the row.
    """
    from trainer.packing import network as packed  # here: a recipe is read without the coder

    started = time.monotonic()
    run.student.eval()
    network = normalized(run.student, run.data)
    answers, places = answered(network, run.data.test, run.accelerator)
    answers_validation = predict(network, run.data.validation, run.accelerator)
    run.student_answers = answers_validation
    taught = teacher_answers(run, "test")
    counts = weights.counts(run.student)
    file_bytes = len(packed.encode(run.student, run.student_spec, packed.facts_of(run.data)))
    row = {
        "stage": label,
        "index": run.stage,
        "top1": percent_right(answers, run.data.test.labels),
        **by_class(answers, places, run.data.test.labels, run.data.classes),
        "top1_validation": percent_right(answers_validation, run.data.validation.labels),
        "agreement": None if taught is None else (answers == taught).double().mean().item() * 100,
        **counts,
        "file_bytes": file_bytes,
        "ratio_student": run.student_bytes / file_bytes,
        "ratio_teacher": None if run.teacher is None else run.teacher.num_bytes / file_bytes,
        "seconds": seconds,
        "measure_seconds": time.monotonic() - started,
        **numbers,
    }
    return add_row(run, row)


def record_teacher(run: Run, label: str, seconds: float = 0.0, **numbers) -> dict:
    """Measures the teacher and adds its row, with the bytes of its dense weights; see `record`."""
    found, validation = teacher_answered(run, "test"), teacher_answers(run, "validation")
    assert run.teacher is not None and found is not None and validation is not None
    test, places = found
    networks = nn.ModuleList(run.teacher.networks)
    row = {
        "stage": label,
        "index": run.stage,
        "top1": percent_right(test, run.data.test.labels),
        **by_class(test, places, run.data.test.labels, run.data.classes),
        "top1_validation": percent_right(validation, run.data.validation.labels),
        "agreement": 100.0,
        **weights.counts(networks),
        "file_bytes": run.teacher.num_bytes,
        "ratio_student": None,
        "ratio_teacher": 1.0,
        "seconds": seconds,
        **numbers,
    }
    return add_row(run, row)


def by_class(answers: Tensor, places: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Returns what a row says of a test split besides its top-1 accuracy, each where it says more than that.

    Args:
        answers: The predicted classes, int64 [N].
        places: How many classes have a higher logit than the label, int64 [N].
        labels: int64 [N], -1 for images without a label.
        classes: Their names.

    Returns:
        "balanced", the mean accuracy of the classes in percent, if one has half as many images again as another;
        "top5", in percent, of at least `MANY_CLASSES` classes; "never_answered", the names of the classes that have
        images and are never the answer.
    """
    found: dict[str, Any] = {}
    labels = labels.to(answers.device)
    counts = labels[labels >= 0].bincount(minlength=len(classes))
    there = counts > 0
    if there.any() and counts.max() >= 1.5 * counts[there].min():
        found["balanced"] = balanced_accuracy(answers, labels)
    if there.any() and len(classes) >= MANY_CLASSES:
        found["top5"] = (places[labels >= 0] < 5).double().mean().item() * 100
    missing = there & (answers.bincount(minlength=len(classes)) == 0)
    if missing.any():
        found["never_answered"] = [classes[number] for number in missing.nonzero().flatten().tolist()]
    return found


def add_row(run: Run, row: dict) -> dict:
    """Adds a row to the report and the log, and prints it; returns the row."""
    run.rows.append(row)
    run.log.row(row)
    if run.accelerator.is_main_process:
        further = "".join(f"  {name} {row[key]:.2f} %" for key, name in FURTHER.items() if key in row)
        agreement = "" if row.get("agreement") is None else f"  agreement {row['agreement']:.2f} %"
        right = percent(row["top1"])
        print(
            f"== {row['stage']}: top-1 {right}{further}{agreement}  "
            f"sparsity {row['sparsity'] * 100:.2f} %  {row['file_bytes']:,} bytes",
            flush=True,
        )
        if "never_answered" in row:
            print(f"   never the answer: {listed(row['never_answered'])}", flush=True)
    return row


def keep_histogram(run: Run, moment: str) -> None:
    """Copies the layers' weights for the report's histograms. moment: 'dense', 'pruned', ..."""
    run.histograms[moment] = {
        name: layer.value.detach().float().cpu().numpy().ravel().copy()
        for name, layer in weights_of(run.student).items()
    }
