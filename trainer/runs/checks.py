"""Checks that need the networks, made before the first step of training."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from trainer.compression.weights import Weight, choose, matching, weights_of
from trainer.data.batches import num_batches
from trainer.data.images import Data, InMemory, normalize
from trainer.distillation.examine import example_images
from trainer.distillation.kept_gradient import refuse_misled
from trainer.distillation.objective import Objective
from trainer.distillation.ratios import refuse_without_gradient
from trainer.distillation.teacher import Teacher, promoted
from trainer.mistakes import Mistake
from trainer.packing.network import can_encode, facts_of
from trainer.recipe.keys import EXCLUDE, PER_LAYER, CacheKeys, Recipe, StageKeys
from trainer.recipe.stages import (
    any_teaches,
    excluded,
    hook,
    losses_of,
    marked,
    of_present_student,
    promotes,
    teaches,
    terms_of,
    training_of,
)
from trainer.recipe.text import RecipeError
from trainer.runs.rehearsal import rehearse
from trainer.training.weights import Made


def check_networks(
    recipe: Recipe, made: Made, data: Data, teacher: Teacher | None, device: torch.device | str
) -> list[str]:
    """Checks what needs the networks, and rehearses every stage on examples; returns notes for the user.

    Both networks run in the modes that are used (`runs.rehearsal`). Names and pairs of layers, the inputs of the losses,
    what stages make of the student, and its packed file are checked.

    Args:
        recipe: The recipe.
        made: The student.
        data: The data.
        teacher: The teacher, None without one.
        device: Where the networks are.

    Raises:
        RecipeError: With all faults found.
    """
    notes = _rehearse_networks(recipe, made, data, teacher, device)
    faults: list[str] = []
    rehearsed: set[str] = set()
    student, spec = made.network, made.spec
    for number, stage in enumerate(recipe.stages):
        path = ("stages", number)
        found = [recipe.fault((*path, *below), message) for below, message in _layer_faults(stage, student)]
        if not found:
            try:
                if promotes(
                    stage
                ):  # the network before the stage, also where the stage puts another in its place
                    teacher, rehearsed = promoted(student, spec, data), set()
                student, spec = _after(recipe, number, student, spec, data)
            except Mistake as error:
                found.append(recipe.fault(path, str(error)))
        if not terms_of(stage) and training_of(stage) is not None and not data.labelled:
            message = "learns from labels where no losses are given, and the training images have none"
            found.append(recipe.fault(path, message))
        for key in _judging(stage):
            if not (data.validation.labels >= 0).any() and not (teacher and teacher.classifies):
                message = (
                    "chooses by the validation images, of which none has a label, nor has the teacher classes"
                )
                found.append(recipe.fault((*path, "training", key), message))
        for key, n, term in losses_of(stage):
            if repr(term) in rehearsed:  # mostly the same terms in every stage
                continue
            rehearsed.add(repr(term))
            try:
                objective = Objective(student, [term], data, teacher, device=device)
                objective.rehearse(data)
                refuse_without_gradient(objective, data)
                if teacher is not None and isinstance(recipe.cache, CacheKeys):
                    refuse_misled(student, [term], data, teacher, recipe.cache, device)
            except Mistake as error:
                found.append(recipe.fault((*path, key, n), str(error)))
        faults += found
    if faults:
        raise RecipeError("\n".join(faults))
    return notes


def _rehearse_networks(
    recipe: Recipe, made: Made, data: Data, teacher: Teacher | None, device: torch.device | str
) -> list[str]:
    """Rehearses the student, its packed file, and each teacher; returns notes. Raises RecipeError with all faults."""
    notes, faults, num_classes = [], [], len(data.classes)
    images = example_images(data, device)
    networks = [] if teacher is None else teacher.networks
    for number, network in enumerate(networks):
        assert teacher is not None
        path = ("teacher",) if len(networks) == 1 else ("teachers", number)
        who = "the teacher" if len(networks) == 1 else f"teachers[{number}]"
        try:
            prepared = teacher.prepare(images, number)
            known = num_classes if teacher.classifies else None
            notes += rehearse(network, prepared, known, who, any_teaches(recipe.stages))
        except Mistake as error:
            faults.append(recipe.fault(path, str(error)))
    try:
        prepared = normalize(images, data.mean, data.std)
        made.network.to(device)
        notes += rehearse(made.network, prepared, num_classes, "the student", _learns(recipe.stages))
        can_encode(made.network, made.spec, facts_of(data))
    except Mistake as error:
        faults.append(recipe.fault(("student",), str(error)))
    if faults:
        raise RecipeError("\n".join(faults))
    return notes


def _judging(stage: StageKeys) -> list[str]:
    """Returns the keys of a stage's training that choose by the validation accuracy."""
    training = training_of(stage)
    if training is None:
        return []
    return ["keep"] * (training.keep == "best") + ["patience"] * bool(training.patience)


def _learns(stages: Sequence[StageKeys]) -> bool:
    """Returns whether one of the stages trains the student."""
    return any(training_of(stage) is not None and not teaches(stage) for stage in stages)


def without_effect(recipe: Recipe, data: Data, num_processes: int) -> Iterator[str]:
    """Yields a line for each setting that has no effect on these images, or less than it says."""
    for key in ("workers", "store") if _all_in_memory(data) else ():
        if key in recipe.data.model_fields_set and getattr(recipe.data, key) not in (0, "auto", "off"):
            yield recipe.fault(("data", key), "has no effect: the images are in memory")
    if data.mixed and data.partly_labelled:
        share = float((data.train.labels >= 0).float().mean())
        message = (
            f"mixes images with and without a label: {share:.0%} have one, and a mixed image only if both had, about "
            f"{share**2:.1%}"
        )
        yield recipe.fault(("data", "mixup" if data.mixup else "cutmix"), message)
    num_images = len(data.train)
    for number, stage in enumerate(recipe.stages):
        training = training_of(stage)
        if training is None:
            continue
        path = ("stages", number, "training")
        of_an_epoch = num_batches(num_images, training.batch_size, num_processes)
        if "batch_size" in training.model_fields_set and training.batch_size > num_images:
            message = (
                f"got {training.batch_size}, and there are {num_images} training images: all are one batch"
            )
            yield recipe.fault((*path, "batch_size"), message)
        if training.accumulate > of_an_epoch:
            message = f"got {training.accumulate}, and an epoch has {of_an_epoch} batches: a step ends with the epoch"
            yield recipe.fault((*path, "accumulate"), message)


def _all_in_memory(data: Data) -> bool:
    return all(isinstance(part.images, InMemory) for part in (data.train, data.validation, data.test))


def _after(
    recipe: Recipe, number: int, student: nn.Module, spec: dict[str, Any], data: Data
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the student as the stage of this number leaves it, and its spec.

    Raises Mistake when the stage cannot work on this student, or leaves one that fails or cannot be packed.
    """
    stage, before = recipe.stages[number], of_present_student(recipe.stages[:number])
    check_student, becomes = hook(stage, "check_student"), hook(stage, "becomes")
    if check_student is not None:
        check_student(stage, student)
    check_student_after = hook(stage, "check_student_after")
    if check_student_after is not None:
        check_student_after(stage, student, before)
    if becomes is None:
        return student, spec
    device = next(student.parameters()).device
    images = normalize(example_images(data, device), data.mean, data.std)
    after, spec = becomes(stage, copy.deepcopy(student), spec, images)
    is_trained = _learns(recipe.stages[number:])
    rehearse(after, images, len(data.classes), "the student after this stage", is_trained)
    can_encode(after, spec, facts_of(data))
    return after, spec


def _layer_faults(stage: StageKeys, student: nn.Module) -> Iterator[tuple[tuple, str]]:
    """Yields the faults of a stage's layer names: unknown layers, layers without effect, and missing ones."""
    exclude = excluded(stage)
    if exclude is None:
        return
    layers = weights_of(student)
    [(key, _)] = marked(stage, EXCLUDE)
    per_layer = {name: value for name, value in marked(stage, PER_LAYER) if isinstance(value, dict)}
    unknown = [
        *_unknown(layers, key, {n: name for n, name in enumerate(exclude) if name not in ("first", "last")}),
        *(
            fault
            for name, value in per_layer.items()
            for fault in _unknown(layers, name, {layer: layer for layer in value})
        ),
    ]
    yield from unknown
    if unknown:
        return
    try:
        chosen = choose(layers, exclude)
    except Mistake as error:
        yield (key,), str(error)
        return
    if not chosen:
        yield (key,), f"leaves no layer to {stage.stage}"
    for name, value in per_layer.items():
        named = {layer: matching(layers, layer) for layer in value}
        for layer, meant in named.items():
            if not set(meant) & set(chosen):
                yield (name, layer), f"has no effect: the layer is in {key}"
        missing = [layer for layer in chosen if layer not in sum(named.values(), [])]
        if missing:
            yield (name,), f"nothing is given for {', '.join(missing)} (name them here or in {key})"


def _unknown(layers: dict[str, Weight], key: str, named: dict[Any, str]) -> Iterator[tuple[tuple, str]]:
    """Yields the faults of names that no layer has; named: {path below the key: name}."""
    for below, name in named.items():
        try:
            matching(layers, name)
        except Mistake as error:
            yield (key, below), str(error)
