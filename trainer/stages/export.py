"""Exports the packed student to where it must run, and proves each export there."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from trainer.compression.weights import counts
from trainer.distributed import told
from trainer.mistakes import Mistake
from trainer.recipe.stages import seals
from trainer.recipe.targets import Targets
from trainer.storage.files import read_bytes
from trainer.training.evaluate import teacher_answers
from trainer.training.rows import add_row
from trainer.training.run import Run

# exporting is imported where it is used: a recipe is read without torch.export.


FOLDER = "export"  # below the run's


def order(_settings, before) -> Iterator[str]:
    if not any(seals(stage) for stage in before):
        yield "exports the packed student: a stage pack before it is needed"


def changes_student(_settings) -> bool:
    return False


def becomes(
    settings, student: nn.Module, spec: dict[str, Any], images: Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    from trainer.exporting.export import check, subject_of

    check(settings.to, subject_of(student, images.shape[1:]).graph, has_data=True)
    return student, spec


def export(run: Run, *, to: Targets) -> None:
    """Writes the packed student for each target, below runs/NAME/export/, and runs it there on the whole test set.

    to: names of the exports shelf, such as onnx, or mappings with the key `to` and the target's settings; `folder` in such a
    mapping names its folder. Each adds a row to the report: bytes, top-1, agreement with the decoded student and the teacher,
    largest difference of a logit, latency of one image.
    Raises RuntimeError for an export whose answers are not the student's. A target whose program or package is not installed
    is left out, which is said; if all are, a Mistake says what to install.
    """
    from trainer.exporting.export import export_all, subject_of

    taught = teacher_answers(run, "test")
    classes = None if taught is None else taught.cpu().numpy()
    rows: list[dict[str, Any]] = []
    missing: list[str] = []
    if run.accelerator.is_main_process:
        file = next(row["file"] for row in reversed(run.rows) if row.get("file"))
        subject = subject_of(
            run.student,
            run.data.shape,
            mean=run.data.mean,
            std=run.data.std,
            classes=run.data.classes,
            sha256=hashlib.sha256(read_bytes(run.folder / file)).hexdigest(),
            data=run.data,
            teacher_classes=classes,
            reading=run.data.reading,
        )
        rows, missing = export_all(subject, to, run.folder / FOLDER, force=True)
        for sentence in missing:
            print(f"not exported {sentence}", flush=True)
    rows, missing = told((rows, missing))
    if not rows:
        raise Mistake("\n".join(missing))
    for row in rows:
        answers = row.pop("classes")
        if run.accelerator.is_main_process:
            print(
                *(f"{row['stage']}: {note}" for note in row["notes"]), sep="\n", end="\n" * bool(row["notes"])
            )
        add_row(
            run,
            {
                "index": run.stage,
                "folder": FOLDER,
                "top1_validation": None,
                "agreement": None if classes is None else float(np.mean(answers == classes) * 100),
                **counts(run.student),
                "ratio_student": run.student_bytes / row["file_bytes"],
                "ratio_teacher": None if run.teacher is None else run.teacher.num_bytes / row["file_bytes"],
                **row,
            },
        )
