"""Reads any stage's checked settings: its losses, training and layers by their types, and its hooks.

Beside its function a stage's file may define (each optional):

    check(settings)                        raises Mistake for settings that contradict each other
    order(settings, before)                yields what is wrong after the stages `before` (their settings, in order, from the
                                           one on that put the present student in its place); a message about one key begins
                                           with 'key: '
    teaches(settings) -> bool              whether it may change the teacher (default: no)
    promotes(settings) -> bool             whether the present student becomes the teacher, which it teaches then (default: no)
    renews_student(settings) -> bool       whether a new student takes the present one's place (default: no)
    changes_student(settings) -> bool      whether it may change the student (default: yes, unless it teaches)
    seals(settings) -> bool                whether later stages must not change the student (default: no)
    settles(settings) -> bool              whether later stages may only pack and export the student (default: no)
    needs_trained(settings) -> bool        whether it is refused for a student that has learnt nothing (default: no)
    learns_labels(settings) -> bool        whether it leaves out training images without a label, where others have one (default: no)
    compares_teacher(settings) -> bool     whether it needs a teacher beside the student (default: no)
    check_student(settings, student)       raises Mistake for a student it cannot work on, before anything is trained
    check_student_after(settings, student, before)
                                           like check_student, for what depends on the stages `before` too
    becomes(settings, student, spec, images) -> (student, spec)
                                           the network that later stages find; student is a copy, images an example batch
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer.recipe.keys import EPOCHS, EXCLUDE, Mark, StageKeys, TermKeys
from trainer.recipe.shelves import beside, find
from trainer.recipe.training import Training


def name_of(stage: StageKeys) -> str:
    """Returns the stage's name for folders and logs: of `python:module:name` the last part."""
    return stage.stage.rpartition(":")[2]


def hook(stage: StageKeys, name: str) -> Callable | None:
    """Returns what the stage's file defines beside the stage as `name`; None if it does not."""
    return beside(find("stage", stage.stage), name)


def teaches(stage: StageKeys) -> bool:
    """Returns whether the stage may change the teacher."""
    answer = hook(stage, "teaches")
    return answer is not None and answer(stage)


def promotes(stage: StageKeys) -> bool:
    """Returns whether the stage makes the present student the teacher."""
    answer = hook(stage, "promotes")
    return answer is not None and answer(stage)


def renews_student(stage: StageKeys) -> bool:
    """Returns whether the stage puts a new student in the present one's place."""
    answer = hook(stage, "renews_student")
    return answer is not None and answer(stage)


def of_present_student(stages: Sequence[StageKeys]) -> Sequence[StageKeys]:
    """Returns the stages from the last one on that put a new student in its place; all of them if none did."""
    first = max((number for number, stage in enumerate(stages) if renews_student(stage)), default=0)
    return stages[first:]


def learns_labels(stage: StageKeys) -> bool:
    """Returns whether the stage leaves out training images without a label, where others have one."""
    answer = hook(stage, "learns_labels")
    return answer is not None and answer(stage)


def any_teaches(stages: Iterable[StageKeys]) -> bool:
    """Returns whether one of the stages may change the teacher that the recipe names, before another takes its place."""
    named = itertools.takewhile(lambda stage: not promotes(stage), stages)
    return any(map(teaches, named))


def taught_alike(stages: Sequence[StageKeys], number: int = 0) -> Iterator[list[StageKeys]]:
    """Yields the stages from `number` on, in groups between those that teach: in each group the teacher is the same."""
    group: list[StageKeys] = []
    for stage in stages[number:]:
        if teaches(stage):
            yield group
            group = []
        else:
            group.append(stage)
    yield group


def changes_student(stage: StageKeys) -> bool:
    """Returns whether the stage may change the student."""
    answer = hook(stage, "changes_student")
    return not teaches(stage) if answer is None else answer(stage)


def seals(stage: StageKeys) -> bool:
    """Returns whether later stages must not change the student."""
    answer = hook(stage, "seals")
    return answer is not None and answer(stage)


def settles(stage: StageKeys) -> bool:
    """Returns whether later stages may only pack and export the student."""
    answer = hook(stage, "settles")
    return answer is not None and answer(stage)


def needs_trained(stage: StageKeys) -> bool:
    """Returns whether the stage is refused for a student that has learnt nothing."""
    answer = hook(stage, "needs_trained")
    return answer is not None and answer(stage)


def compares_teacher(stage: StageKeys) -> bool:
    """Returns whether the stage needs a teacher to hold the student against."""
    answer = hook(stage, "compares_teacher")
    return answer is not None and answer(stage)


def order_faults(stage: StageKeys, before: Sequence[StageKeys]) -> Iterator[str]:
    """Yields what is wrong with a stage after the stages `before`."""
    order = hook(stage, "order")
    if order is not None:
        yield from order(stage, of_present_student(before))
    if changes_student(stage) and any(seals(earlier) for earlier in before):
        yield "changes the student after it was packed: the file would be another network's"
    elif changes_student(stage) and not seals(stage):
        for earlier in before:
            if settles(earlier) and not settles(stage):
                yield f"changes the student after {name_of(earlier)}: only pack and export may follow it"


def losses_of(stage: StageKeys) -> Iterator[tuple[str, int, TermKeys]]:
    """Yields (key, number, term) of all losses in the stage's settings."""
    for key, value in _settings(stage):
        if isinstance(value, list):
            yield from (
                (key, number, term) for number, term in enumerate(value) if isinstance(term, TermKeys)
            )


def terms_of(stage: StageKeys) -> list[TermKeys]:
    """Returns all losses in the stage's settings."""
    return [term for _, _, term in losses_of(stage)]


def training_of(stage: StageKeys) -> Training | None:
    """Returns the stage's training; None if it has none."""
    return next((value for _, value in _settings(stage) if isinstance(value, Training)), None)


def largest_batch(stages: Iterable[StageKeys]) -> int | None:
    """Returns the images of the largest batch that the stages train with; None without a training."""
    return max((each.batch_size for each in map(training_of, stages) if each is not None), default=None)


def files_of(stage: StageKeys) -> Iterator[tuple[str, Path]]:
    """Yields (key, path) of the files that the stage reads."""
    return ((key, value) for key, value in _settings(stage) if isinstance(value, Path))


def marked(settings: BaseModel, mark: Mark) -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of the settings whose type has the mark (`EXCLUDE`, `PER_LAYER`, `EPOCHS`)."""
    for key, field in type(settings).model_fields.items():
        if mark in field.metadata:
            yield key, getattr(settings, key)


def stretched(settings: Any, plain: Any, factor: float) -> Any:
    """Returns plain settings in which everything that is counted in epochs (`EPOCHS`) is `factor` times as much, at least 1.

    Whole numbers are rounded down. A default that is counted in epochs is stretched too.

    Args:
        settings: The settings, checked.
        plain: The same as plain values.
        factor: At least 1.
    """
    if isinstance(settings, list) and isinstance(plain, list):
        return [stretched(one, own, factor) for one, own in zip(settings, plain, strict=True)]
    if not isinstance(settings, BaseModel) or not isinstance(plain, dict):
        return plain
    found = {key: stretched(getattr(settings, key), value, factor) for key, value in plain.items()}
    return found | {key: _times(value, factor) for key, value in marked(settings, EPOCHS) if value}


def _times(epochs: Any, factor: float) -> Any:
    if isinstance(epochs, list):
        return [_times(one, factor) for one in epochs]
    # What is a whole number but for rounding stays it.
    return epochs * factor if isinstance(epochs, float) else max(1, math.floor(epochs * factor + 1e-6))


def excluded(stage: StageKeys) -> list[str] | None:
    """Returns the layers that the stage leaves alone; None for a stage without that setting."""
    return next((value for _, value in marked(stage, EXCLUDE)), None)


def _settings(stage: StageKeys) -> Iterator[tuple[str, Any]]:
    return ((key, getattr(stage, key)) for key in type(stage).model_fields)
