"""Exports the teacher by onnxruntime, in float32 and in 8-bit integers, to say what a student is worth beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from trainer.data.images import Data
from trainer.distillation.teacher import Teacher
from trainer.exporting.export import export_all, subject_of
from trainer.recipe.recipe import targets_of

FLOAT, INT8 = "teacher_onnx", "teacher_int8"  # the rows


def teacher_rows(
    teacher: Teacher, data: Data, classes: np.ndarray, folder: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Exports the teacher's network to onnxruntime twice; returns the rows, as `export_all` does, and what is missing.

    Args:
        teacher: A teacher of one network.
        data: The run's data.
        classes: The teacher's answers to the test images, int64.
        folder: Where the folders of both are made.

    Raises:
        Mistake: For an operator that cannot be exported.
    """
    seen = teacher.images_of(data)
    member = teacher.members[0]
    subject = subject_of(
        teacher.network,
        seen.shape,
        mean=member.mean or teacher.mean,
        std=member.std or teacher.std,
        classes=data.classes,
        data=seen,
        teacher_classes=classes,
        reading=seen.reading,
    )
    targets = targets_of(
        [{"to": "onnx", "compressed": False, "folder": FLOAT}, {"to": "onnx_int8", "folder": INT8}]
    )
    rows, missing = export_all(subject, targets, folder, force=True)
    return [row | {"agreement_student": None} for row in rows], missing


def worth(student: Mapping[str, Any], teachers: Sequence[Mapping[str, Any]], labels: np.ndarray) -> str:
    """Returns a sentence: what the student's file, speed and accuracy are beside the teacher's.

    student: the row of an export. teachers: the rows of `teacher_rows`. The speed is compared with the quicker of them, bytes
    and accuracy with the one in 8-bit integers, where there is one. labels: of the test images, int64 [N]. Whether the two
    accuracies differ by more than chance is told by McNemar's exact test (1947) on the images that one alone gets right.
    """
    quicker = min(teachers, key=lambda row: row["latency_seconds"])
    small = next((row for row in teachers if row["stage"] == INT8), teachers[0])
    times = small["file_bytes"] / student["file_bytes"]
    right, other = student["classes"] == labels, small["classes"] == labels
    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    chance = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    size = f"1/{times:.1f} of" if times >= 1 else f"{1 / times:.1f} times"
    speed = quicker["latency_seconds"] / student["latency_seconds"]
    accuracy = ""
    if (labels >= 0).any():
        accuracy = f", {student['top1'] - small['top1']:+.2f} points "
        accuracy += f"({gained} images that it alone gets right, {lost} the teacher alone: McNemar's p = {chance:.2g})"
    return (
        f"beside the teacher in 8-bit integers: {size} its bytes{accuracy}; {speed:.2f} times as quick as the "
        f"quicker of the teacher's two ({quicker['stage']})"
    )
