"""What `trainer check --data`, `--build` and `--measure` say about a recipe before it is run."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from trainer.data.batches import batches, epoch_order, make_data, seed_of
from trainer.data.images import Data
from trainer.data.views import Views
from trainer.distillation.objective import Objective
from trainer.distillation.ratios import faults, ratios, weighs
from trainer.distillation.teacher import Teacher
from trainer.mistakes import printable
from trainer.recipe.keys import Recipe, StageKeys
from trainer.recipe.recipe import read
from trainer.recipe.stages import name_of, promotes, teaches, terms_of, training_of
from trainer.reporting.tables import weight_table
from trainer.runs.checks import check_networks
from trainer.runs.earlier import stage_folder
from trainer.runs.opening import make_student, make_teacher
from trainer.storage import checkpoint
from trainer.training.weights import Made


def check(
    path: str | Path,
    changes: dict[str, Any] | None = None,
    allow_python: bool = False,
    data: bool = False,
    build: bool = False,
    measure: Path | None = None,
) -> str:
    """Checks a recipe with its data, and on demand with its networks; returns what was found, as text.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'stages.1.training.epochs': 2, ...}.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.
        data: Whether the images of each class are listed.
        build: Whether the networks are built and every stage is rehearsed on examples, as `run` does before its first step.
        measure: The folder of runs, if it is also measured on one batch what each loss weighs (`distillation.ratios`). A
            teacher that the recipe trains is taken from its run there.

    Raises:
        RecipeError: For a faulty recipe, and for what does not fit these networks or this data.
        Mistake: For data or weights that cannot be loaded.
    """
    recipe, _ = read(path, changes, allow_python)
    opened = make_data(recipe.data, torch.device("cpu"))
    parts = ["\n".join(opened.notes)] if opened.notes else []
    if data:
        parts.append(class_table(opened))
    if build or measure is not None:
        made = make_student(recipe, opened)
        teacher, notes = make_teacher(recipe, opened)
        notes = [*notes, *made.notes, *check_networks(recipe, made, opened, teacher, "cpu")]
        if build:
            parts.append("\n".join([*notes, *_sizes(recipe, made, teacher)]))
        if measure is not None:
            parts.append(_measured(recipe, opened, made, teacher, measure / recipe.name))
    return "\n".join(parts)


def class_table(data: Data) -> str:
    """Returns a table of the numbers of images of each class, in the training, validation and test part."""
    counts = [Counter(part.labels.tolist()) for part in (data.train, data.validation, data.test)]
    rows: list[list] = [
        [printable(name, keep=""), *(count[number] for count in counts)]
        for number, name in enumerate(data.classes)
    ]
    if any(count[-1] for count in counts):
        rows.append(["(no label)", *(count[-1] for count in counts)])
    rows.append(["all", *(count.total() for count in counts)])
    return tabulate(rows, headers=["class", "train", "validation", "test"], intfmt=",", disable_numparse=[0])


def _sizes(recipe: Recipe, made: Made, teacher: Teacher | None) -> list[str]:
    networks = [] if teacher is None else teacher.networks
    lines = [
        f"teacher {keys.model}: {_num_weights(network):,} weights"
        for keys, network in zip(recipe.teacher_entries, networks, strict=True)
    ]
    return [*lines, f"student {recipe.student.model}: {_num_weights(made.network):,} weights"]


def _measured(recipe: Recipe, data: Data, made: Made, teacher: Teacher | None, run: Path) -> str:
    """Returns what the losses of each stage weigh for the student as it begins, measured on one batch of view 0."""
    lines, rows, views = _taught(recipe, teacher, run), [], Views(data)
    measured: set[str] = set()
    alike = _before_a_promotion(recipe)
    if len(alike) < len(recipe.stages):
        lines.append(
            f"from stages[{len(alike)}] on another teacher teaches, which is not there yet: not measured"
        )
    for number, stage in enumerate(alike):
        terms, training = terms_of(stage), training_of(stage)
        if not terms or training is None or teaches(stage) or repr(terms) in measured:
            continue
        measured.add(repr(terms))
        torch.manual_seed(seed_of(recipe.seed, number))
        objective = Objective(made.network, terms, data, teacher, num_epochs=training.epochs)
        if not weighs(objective):
            continue
        order = epoch_order(len(data.train), training.batch_size, seed_of(recipe.seed, number, 0), 0, 0, 1)
        images, labels, index = next(batches(data.train, order[:1], 0, torch.device("cpu"), views.cuts(0)))
        found = ratios(objective.train(), views.augmented(images, index, 0), labels, index, 0, find=True)
        kept = {name: {"weight": r.weight, "last": r.ratio} for name, r in found.items()}
        name = f"stages[{number}] {name_of(stage)}"
        rows.append({"stage": name, "ratios": kept})
        lines += [f"{name}: {term}: {fault}" for term, fault in faults(found)]
    return "\n".join([weight_table(rows), *lines] if rows else ["--measure: no loss compares with a teacher"])


def _taught(recipe: Recipe, teacher: Teacher | None, run: Path) -> list[str]:
    """Loads what the last stage that teaches has made of the teacher in a run; returns a line that says what was measured."""
    numbers = [number for number, stage in enumerate(_before_a_promotion(recipe)) if teaches(stage)]
    if teacher is None or not numbers:
        return []
    folder = stage_folder(run, numbers[-1], name_of(recipe.stages[numbers[-1]]))
    found = checkpoint.load(folder, dict[str, Any], ("teacher-0",)) if folder.is_dir() else None
    if found is None:
        return [
            f"the teacher has learnt nothing yet: it is measured as it begins, since {run} does not hold it"
        ]
    for number, network in enumerate(teacher.networks):
        network.load_state_dict(found[0][f"teacher-{number}"])
    return [f"the teacher is that of {run}"]


def _before_a_promotion(recipe: Recipe) -> list[StageKeys]:
    """Returns the stages in which the recipe's own teacher teaches its own student."""
    return list(itertools.takewhile(lambda stage: not promotes(stage), recipe.stages))


def _num_weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
