"""Tables of the student layers and teacher layers that a recipe's losses compare."""

from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from trainer.data.batches import make_data
from trainer.distillation.objective import Objective
from trainer.recipe.recipe import read
from trainer.recipe.stages import terms_of
from trainer.runs.checks import check_networks
from trainer.runs.opening import make_student, make_teacher


def pairs(path: str | Path, changes: dict[str, Any] | None = None, allow_python: bool = False) -> str:
    """Returns tables of the paired layers as text; stages with the same pairs have one table together.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'stages.1.training.epochs': 2, ...}.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.

    Raises:
        RecipeError: For a faulty recipe, and for layers that do not exist or cannot be paired.
    """
    recipe, _ = read(path, changes, allow_python)
    data = make_data(recipe.data, torch.device("cpu"))
    student = make_student(recipe, data)
    teacher, _ = make_teacher(recipe, data)
    check_networks(recipe, student, data, teacher, "cpu")
    tables: dict[str, list[str]] = {}  # {table: its stages}; often several stages have the same losses
    for number, stage in enumerate(recipe.stages):
        terms = terms_of(stage)
        objective = Objective(student.network, terms, data, teacher) if terms else None
        rows = objective.pairs() if objective else []
        shown = [
            {
                key: "x".join(map(str, value)) if isinstance(value, tuple) else value
                for key, value in row.items()
            }
            for row in rows
        ]
        if rows:
            assert objective is not None
            table = "\n".join([tabulate(shown, headers="keys"), *objective.left_out])
            tables.setdefault(table, []).append(f"stages[{number}] {stage.stage}")
    if not tables:
        return f"{path}: no loss compares layers"
    return "\n".join(f"{', '.join(stages)}\n{table}\n" for table, stages in tables.items())
