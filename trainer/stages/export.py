"""Exports the packed student to where it must run, and proves each export there."""

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
BY_ONNXRUNTIME = ("onnx", "onnx_int8")
TEACHER_ROWS = ("teacher_onnx", "teacher_int8")  # the teacher's, for `teacher: true`


def check(settings) -> None:
    if settings.teacher and not any(target.to in BY_ONNXRUNTIME for target in settings.to):
        raise Mistake(
            "teacher: has no effect without onnx or onnx_int8 among the targets, to compare it with"
        )


def compares_teacher(settings) -> bool:
    return settings.teacher


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


def export(run: Run, *, to: Targets, teacher: bool = False) -> None:
    """Writes the packed student for each target, below runs/NAME/export/, and runs it there on the whole test set.

    to: names of the exports shelf, such as onnx, or mappings with the key `to` and the target's settings; `folder` in such a
    mapping names its folder. Each adds a row to the report: bytes, top-1, agreement with the decoded student and the teacher,
    largest difference of a logit, latency of one image.
    teacher: whether the teacher is exported too, by onnxruntime in float32 and in 8-bit integers (`onnx_int8`), to have its bytes,
    accuracy and latency beside the student's. It must be one network.
    Raises RuntimeError for an export whose answers are not the student's. A target whose program or package is not installed
    is left out, which is said; if all are, a Mistake says what to install.
    """
    from trainer.exporting.export import export_all, subject_of
    from trainer.exporting.teacher import worth

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
            packed=read_bytes(run.folder / file),
            data=run.data,
            teacher_classes=classes,
            reading=run.data.reading,
        )
        rows, missing = export_all(subject, to, run.folder / FOLDER, force=True)
        if teacher:
            beside, without = _teacher_rows(run, classes)
            for row in rows if beside else []:
                if row["target"] in BY_ONNXRUNTIME:
                    row["notes"].append(worth(row, beside, run.data.test.labels.cpu().numpy()))
            rows, missing = [*beside, *rows], [*missing, *without]
        for sentence in missing:
            print(f"not exported {sentence}", flush=True)
    rows, missing = told((rows, missing))
    if not rows:
        raise Mistake("\n".join(missing))
    for row in rows:
        answers = row.pop("classes")
        of_teacher = run.teacher is not None and row["stage"] in TEACHER_ROWS
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
                **counts(run.teacher.network if of_teacher and run.teacher is not None else run.student),
                "ratio_student": None if of_teacher else run.student_bytes / row["file_bytes"],
                "ratio_teacher": None if run.teacher is None else run.teacher.num_bytes / row["file_bytes"],
                **row,
            },
        )


def _teacher_rows(run: Run, classes: np.ndarray | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the teacher's rows and what is missing; neither, which is said, for one that cannot be exported."""
    from trainer.exporting.teacher import teacher_rows

    assert run.teacher is not None and classes is not None  # the recipe refuses `teacher` without one
    size = run.teacher.size
    if len(run.teacher.networks) > 1 or size not in (None, max(run.teacher.images_of(run.data).shape[1:])):
        print("the teacher is not exported: it is several networks, or resizes its images itself", flush=True)
        return [], []
    try:
        return teacher_rows(run.teacher, run.data, classes, run.folder / FOLDER)
    except Mistake as error:
        print(f"the teacher is not exported: {error}", flush=True)
        return [], []
