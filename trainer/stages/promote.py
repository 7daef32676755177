"""Makes the student the teacher of the stages that follow."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trainer.compression.states import dense_bytes
from trainer.distillation.teacher import copy_layers, dense_copy, promoted
from trainer.mistakes import Mistake
from trainer.recipe.keys import Student, StudentKeys
from trainer.recipe.stages import changes_student as changes
from trainer.recipe.stages import renews_student as renews
from trainer.recipe.stages import training_of
from trainer.training.rows import record_teacher
from trainer.training.run import Run
from trainer.training.weights import Made, create


def order(_settings, before) -> Iterator[str]:
    trained = any(changes(stage) and training_of(stage) is not None for stage in before)
    if not trained and not any(renews(stage) and _knows(stage.student) for stage in before):
        yield "makes the student the teacher, and no stage before it trains this student"


def teaches(_settings) -> bool:
    return True


def promotes(_settings) -> bool:
    return True


def renews_student(settings) -> bool:
    return settings.student is not None


def changes_student(_settings) -> bool:
    return True  # its result depends on the student's weights, also where the student stays


def needs_trained(_settings) -> bool:
    return True


def becomes(
    settings, student: nn.Module, spec: dict[str, Any], images: Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    if settings.student is None:
        return student, spec
    channels, height, width = images.shape[1:]
    shape, num_classes = (channels, height, width), student(images).shape[1]
    made = _made(settings.student, dense_copy(student, spec, shape, num_classes), shape, num_classes)
    return made.network.to(images.device), made.spec


def promote(run: Run, *, student: Student | None = None) -> None:
    """Makes the student, as it is now, the teacher; a new student may take its place.

    A chain of teachers: with a smaller `student` the present one is its assistant (Mirzadeh et al. 2020, "Improved
    Knowledge Distillation via Teacher Assistant"), with one of the same size the new student is born again (Furlanello et
    al. 2018, "Born-Again Neural Networks"). Without `student` the present one goes on, and has itself as the teacher: a
    small one, which costs little, for pruning and sharing. Later rows of the report compare with the new teacher.

    student: the next student, as in the recipe's `student`: initialised anew, or loaded from its checkpoint.
    """
    before = run.teacher.version if run.teacher is not None else 0
    teacher = promoted(run.student, run.student_spec, run.data)
    teacher.version = before + 1
    if student is not None:
        made = _made(student, teacher.network, run.data.shape, len(run.data.classes))
        run.student, run.student_spec = made.network.to(run.accelerator.device), made.spec
        run.student_bytes = dense_bytes(run.student)
        if run.accelerator.is_main_process:
            for note in made.notes:
                print(note, flush=True)
    run.teacher = teacher
    run.learned.clear()  # projectors lead to the earlier teacher
    run.layers.clear()
    record_teacher(run, "teacher")


def _knows(keys: StudentKeys) -> bool:
    """Returns whether a student begins with weights that were trained."""
    return bool(keys.checkpoint or keys.from_teacher or getattr(keys, "pretrained", False))


def _made(keys: StudentKeys, teacher: nn.Module, shape: tuple[int, int, int], num_classes: int) -> Made:
    """Returns the next student. Raises Mistake when it cannot be made."""
    made = create(keys, shape, num_classes, True, "student")
    if keys.from_teacher and not copy_layers(made.network, teacher):
        raise Mistake(
            "student: from_teacher: has no effect: no layer of the student is of a kind that the teacher has"
        )
    return made
