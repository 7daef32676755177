"""What `trainer check --data` and `--build` say about a recipe before it is run."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from trainer.data.batches import make_data
from trainer.data.images import Data
from trainer.recipe.keys import Recipe
from trainer.recipe.recipe import read
from trainer.runs.checks import check_networks
from trainer.runs.opening import make_student, make_teacher


def check(
    path: str | Path,
    changes: dict[str, Any] | None = None,
    allow_python: bool = False,
    data: bool = False,
    build: bool = False,
) -> str:
    """Checks a recipe with its data, and on demand with its networks; returns what was found, as text.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'stages.1.training.epochs': 2, ...}.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.
        data: Whether the images of each class are listed.
        build: Whether the networks are built and every stage is rehearsed on examples, as `run` does before its first step.

    Raises:
        RecipeError: For a faulty recipe, and for what does not fit these networks or this data.
        Mistake: For data or weights that cannot be loaded.
    """
    recipe, _ = read(path, changes, allow_python)
    opened = make_data(recipe.data, torch.device("cpu"))
    parts = ["\n".join(opened.notes)] if opened.notes else []
    if data:
        parts.append(class_table(opened))
    if build:
        parts.append(_built(recipe, opened))
    return "\n".join(parts)


def class_table(data: Data) -> str:
    """Returns a table of the numbers of images of each class, in the training, validation and test part."""
    counts = [Counter(part.labels.tolist()) for part in (data.train, data.validation, data.test)]
    rows = [[name, *(count[number] for count in counts)] for number, name in enumerate(data.classes)]
    if any(count[-1] for count in counts):
        rows.append(["(no label)", *(count[-1] for count in counts)])
    rows.append(["all", *(count.total() for count in counts)])
    return tabulate(rows, headers=["class", "train", "validation", "test"], intfmt=",", disable_numparse=[0])


def _built(recipe: Recipe, data: Data) -> str:
    made = make_student(recipe, data)
    teacher, notes = make_teacher(recipe, data)
    notes = [*notes, *made.notes, *check_networks(recipe, made, data, teacher, "cpu")]
    networks = [] if teacher is None else teacher.networks
    for keys, network in zip(recipe.teacher_entries, networks, strict=True):
        notes.append(f"teacher {keys.model}: {_num_weights(network):,} weights")
    notes.append(f"student {recipe.student.model}: {_num_weights(made.network):,} weights")
    return "\n".join(notes)


def _num_weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
