"""The things a run carries: the data, the networks, the folder, and where it stands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.data.images import Data


@dataclass
class Run:
    """One run of a recipe, handed from stage to stage.

    folder: runs/NAME. teacher: None where the recipe has none. student_bytes: of the student as it was built, dense (0:
    as it is). stage: position of the stage now running. rows and layers are what the report says, histograms the
    weights of its plots. answers: the teacher's classes for whole parts of the data. cache: its kept answers to the
    training images, None where they are not kept.
    seconds_before: what earlier sessions of the run took. allow_python: whether the recipe may name `python:module:name`.
    learned: projectors and other learned parts of losses, handed from stage to stage.
    """

    name: str
    folder: Path
    seed: int
    accelerator: Any
    data: Data
    student: nn.Module
    student_spec: dict
    teacher: Any
    log: Any
    recipe_path: Path
    student_bytes: int = 0
    allow_python: bool = False
    seconds_before: float = 0.0
    stage: int = 0
    stage_name: str = ""
    num_fits: int = 0
    rows: list[dict] = field(default_factory=list)
    layers: dict[str, dict] = field(default_factory=dict)
    histograms: dict[str, dict] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[tuple, Tensor] = field(default_factory=dict)
    cache: Any = None
