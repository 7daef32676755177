"""What a run carries: the data, the networks, the folder, and where it stands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from trainer.compression.states import dense_bytes
from trainer.data.images import Data
from trainer.distillation.answers import Answers
from trainer.distillation.teacher import Teacher

if TYPE_CHECKING:  # a recipe is read without them
    from accelerate import Accelerator

    from trainer.reporting.log import Log


@dataclass
class Run:
    """One run of a recipe, complete when it is made, handed from stage to stage.

    folder: runs/NAME. student_spec: what `networks.build` makes the student of. teacher: None where the recipe has
    none. student_bytes: of the student as it was when the run was made, dense. allow_python: whether the recipe may
    name `python:module:name`. seconds_before: what earlier sessions of the run took.
    stage: position of the stage now running. num_fits: how many trainings it has begun. rows and layers are what the
    report says, histograms the weights of its plots. learned: projectors and other learned parts of losses, handed
    from stage to stage. answers: the teacher's classes, by part of the data and the teacher's version. cache: its kept
    answers to the training images, None where they are not kept.
    """

    name: str
    folder: Path
    seed: int
    accelerator: "Accelerator"
    data: Data
    student: nn.Module
    student_spec: dict[str, Any]
    teacher: Teacher | None
    log: "Log"
    student_bytes: int = field(init=False)
    allow_python: bool = False
    seconds_before: float = 0.0
    stage: int = 0
    stage_name: str = ""
    num_fits: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    histograms: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    cache: Answers | None = None

    def __post_init__(self) -> None:
        self.student_bytes = dense_bytes(self.student)

    @property
    def recipe_path(self) -> Path:
        """The recipe as it is run."""
        return self.folder / "recipe.yaml"
