"""What a stage's checked settings say, whatever stage it is: its losses and trainings by their type, its answers by its hooks.

Beside its function a stage's file may define (each optional):

    check(settings)                        raises Mistake for settings that do not go together
    order(settings, before)                yields what is wrong after the stages `before` (their settings, in order), with
                                           'key: ' before it where it is about one key
    teaches(settings) -> bool              whether it may change the teacher (no, when it is not there)
    changes_student(settings) -> bool      whether it may change the student (yes, unless it teaches)
    seals(settings) -> bool                whether the student may not be changed after it (no)
    check_student(settings, student)       raises Mistake for a student it cannot work on, before anything is trained
    becomes(settings, student, spec, images) -> (student, spec)
                                           the network that later stages find; student is a copy, images an example batch
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.recipe.keys import EXCLUDE, Mark, StageKeys, TermKeys, Training
from trainer.recipe.shelves import beside, find


def name_of(stage: StageKeys) -> str:
    """The stage's name, of `python:module:name` the last part: what its folder and its lines are called."""
    return stage.stage.rpartition(":")[2]


def hook(stage: StageKeys, name: str) -> Callable | None:
    """What the stage's file defines beside the stage under this name; None where it does not."""
    return beside(find("stage", stage.stage), name)


def teaches(stage: StageKeys) -> bool:
    """Whether the stage may change the teacher."""
    answer = hook(stage, "teaches")
    return answer is not None and answer(stage)


def any_teaches(stages: Iterable[StageKeys]) -> bool:
    """Whether one of the stages may change the teacher."""
    return any(map(teaches, stages))


def changes_student(stage: StageKeys) -> bool:
    """Whether the stage may change the student."""
    answer = hook(stage, "changes_student")
    return not teaches(stage) if answer is None else answer(stage)


def seals(stage: StageKeys) -> bool:
    """Whether the student may not be changed after the stage."""
    answer = hook(stage, "seals")
    return answer is not None and answer(stage)


def order_faults(stage: StageKeys, before: Sequence[StageKeys]) -> Iterator[str]:
    """What is wrong with a stage after the stages before it."""
    order = hook(stage, "order")
    if order is not None:
        yield from order(stage, before)
    if changes_student(stage) and any(seals(earlier) for earlier in before):
        yield "changes the student after it was packed: the file would be another network's"


def losses_of(stage: StageKeys) -> Iterator[tuple[str, int, TermKeys]]:
    """(key, number, term) of all losses that the stage is given."""
    for key, value in _settings(stage):
        if isinstance(value, list):
            yield from (
                (key, number, term) for number, term in enumerate(value) if isinstance(term, TermKeys)
            )


def terms_of(stage: StageKeys) -> list[TermKeys]:
    """All losses that the stage is given."""
    return [term for _, _, term in losses_of(stage)]


def training_of(stage: StageKeys) -> Training | None:
    """How the stage trains; None where it does not."""
    return next((value for _, value in _settings(stage) if isinstance(value, Training)), None)


def files_of(stage: StageKeys) -> Iterator[tuple[str, Path]]:
    """(key, path) of the files that the stage reads."""
    return ((key, value) for key, value in _settings(stage) if isinstance(value, Path))


def marked(stage: StageKeys, mark: Mark) -> Iterator[tuple[str, Any]]:
    """(key, value) of the settings whose type is marked: `Exclude`, `per_layer(...)`."""
    for key, field in type(stage).model_fields.items():
        if mark in field.metadata:
            yield key, getattr(stage, key)


def excluded(stage: StageKeys) -> list[str] | None:
    """The layers that the stage leaves alone; None for a stage that does not work on layers."""
    return next((value for _, value in marked(stage, EXCLUDE)), None)


def _settings(stage: StageKeys) -> Iterator[tuple[str, Any]]:
    return ((key, getattr(stage, key)) for key in type(stage).model_fields)
