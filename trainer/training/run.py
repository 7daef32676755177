"""The state of a run: its data, networks, folder and position in the recipe."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from trainer.compression.states import dense_bytes
from trainer.data.images import Data
from trainer.distillation.answers import Answers
from trainer.distillation.teacher import Teacher
from trainer.training.bar import Bar
from trainer.training.stopping import Stop

if TYPE_CHECKING:  # a recipe is read without them
    from accelerate import Accelerator

    from trainer.reporting.log import Log


@dataclass
class Run:
    """One run of a recipe. It is complete when it is made, and each stage gets it.

    Attributes:
        name: The recipe's name.
        folder: runs/NAME.
        seed: The recipe's seed.
        accelerator: Accelerate's.
        data: The images.
        student: The student; stages change or replace it.
        student_spec: {"model": name, settings}, from which `networks.build` builds the student.
        teacher: None if the recipe has none.
        log: The record of numbers and rows.
        student_bytes: Bytes of the first student, dense.
        allow_python: Whether the recipe may name `python:module:name`.
        seconds_before: Duration of earlier sessions of the run.
        stage: Number of the running stage, from 0.
        stage_name: Its name.
        num_fits: How many trainings the running stage has begun.
        rows: The report's rows.
        layers: The report's facts of each layer.
        histograms: {moment: {layer: weights}} for the report's plots.
        learned: Projectors and other learned tensors of losses, for later stages.
        answers: What the teacher answers, by part of the data and the teacher's version (`evaluate.answered`).
        student_answers: The student's classes for the validation images at the last row, None if not known.
        cache: The teacher's kept answers to the training images, None if they are not kept.
        stop: Whether the program was told to end.
        bar: How far the recipe is.
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
    answers: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    student_answers: Tensor | None = None
    cache: Answers | None = None
    stop: Stop = field(default_factory=Stop)
    bar: Bar = field(default_factory=Bar)

    def __post_init__(self) -> None:
        self.student_bytes = dense_bytes(self.student)

    def log_numbers(self, step: int, **values: Any) -> None:
        """Logs the values of one step of the training that the stage has begun last."""
        self.log.numbers(self.stage_name, step, index=self.stage, fit=self.num_fits - 1, **values)

    @property
    def recipe_path(self) -> Path:
        """The run's copy of its recipe."""
        return self.folder / "recipe.yaml"
