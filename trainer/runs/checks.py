"""What only the networks know, checked before the first step of training."""

import copy
import inspect
import math
from collections.abc import Iterator

import torch
from torch import nn

from trainer.compression import folding
from trainer.compression.weights import Weight, choose, matching, weights_of
from trainer.data.images import Data
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.networks.build import spec
from trainer.recipe import shelves
from trainer.recipe.keys import Recipe, StageKeys
from trainer.recipe.text import RecipeError
from trainer.training.evaluate import percent_right, predict, teacher_answers
from trainer.training.rows import record_teacher
from trainer.training.run import Run


def taught_here(stages: list) -> bool:
    return any(s.stage == "train" and s.who == "teacher" for s in stages)


def guard_teacher(run: Run) -> None:
    """A teacher that was not taught here is examined before it teaches, each of several by itself.

    Raises Mistake when one only guesses.
    """
    guide, part = run.teacher, run.data.validation
    several = len(guide.networks) > 1
    chance = 1 / len(run.data.classes)
    doubt = 3 * math.sqrt(chance * (1 - chance) / max(1, int((part.labels >= 0).sum())))
    for number, network in enumerate(guide.networks):
        if several:
            answers = predict(
                lambda images, n=number, net=network: net(guide.prepare(images, n)), part, run.accelerator
            )
        else:
            answers = teacher_answers(run, "validation")
        share = percent_right(answers, part.labels) / 100
        if share < max(chance + doubt, 1.2 * chance):
            who = f"teachers[{number}]" if several else "the teacher"
            raise Mistake(
                f"{who} has {share * 100:.2f} % of the validation images right, and guessing {chance * 100:.2f} %: its head "
                "is untrained, its classes are others, or its images are normalised otherwise"
            )
    record_teacher(run, "teacher")


def check_layers(
    recipe: Recipe, student: nn.Module, data: Data, guide: Teacher | None, device: torch.device | str
) -> None:
    """What only the networks know, checked before the first step of training: layers, pairs, what losses can be fed.

    Raises RecipeError with all faults.
    """
    faults = []
    places = weights_of(student)
    seen = set()
    for number, stage in enumerate(recipe.stages):
        if stage.stage in ("prune", "share"):
            faults += [
                recipe.fault(("stages", number, *below), told) for below, told in _layer_faults(stage, places)
            ]
        check_student = getattr(inspect.getmodule(shelves.find("stage", stage.stage)), "check_student", None)
        if check_student is not None and not any(f"stages[{number}]" in fault for fault in faults):
            try:
                check_student(stage, student)
            except Mistake as error:
                faults.append(recipe.fault(("stages", number), str(error)))
            else:
                if stage.stage == "fold":  # what comes after it finds another network
                    student = folding.fold(copy.deepcopy(student), spec(recipe.student))[0]
        terms = getattr(stage, "losses", None) or []
        if not terms and getattr(stage, "training", None) and not data.labelled:
            told = "learns from labels where no losses are given, and the training images have none"
            faults.append(recipe.fault(("stages", number), told))
        for n, term in enumerate(terms):
            if repr(term) in seen:  # mostly the same terms in every stage
                continue
            seen.add(repr(term))
            try:
                Objective(student, [term], data, guide, device=device).rehearse(data)
            except Mistake as error:
                faults.append(recipe.fault(("stages", number, "losses", n), str(error)))
    if faults:
        raise RecipeError("\n".join(faults))


def _layer_faults(stage: StageKeys, places: dict[str, Weight]) -> Iterator[tuple[tuple, str]]:
    """Layers that a stage names and the student has not, or that it should name and does not."""
    settings = {
        key: getattr(stage, key)
        for key in ("keep", "sensitivity", "sparsity", "bits", "values")
        if hasattr(stage, key)
    }
    unknown = False
    for key, setting in settings.items():
        for number, name in enumerate(setting) if isinstance(setting, (list, dict)) else ():
            if key == "keep" and name in ("first", "last"):
                continue
            try:
                matching(places, name)
            except Mistake as error:
                unknown = True
                yield (key, number if key == "keep" else name), str(error)
    if unknown:
        return
    try:
        chosen = choose(places, stage.keep)
    except Mistake as error:
        yield ("keep",), str(error)
        return
    if not chosen:
        yield ("keep",), f"leaves no layer to {stage.stage}"
    for key, setting in settings.items():
        if isinstance(setting, dict):
            named = {name: matching(places, name) for name in setting}
            for name, layers in named.items():
                if not set(layers) & set(chosen):
                    yield (key, name), "has no effect: the layer is in keep"
            missing = [layer for layer in chosen if layer not in sum(named.values(), [])]
            if missing:
                yield (key,), f"nothing is given for {', '.join(missing)} (name them here or in keep)"
    groups = getattr(stage, "groups", None)
    for name, place in chosen.items() if groups else ():
        if len(place.value) % groups:
            yield (
                ("groups",),
                f"got {groups}; the {len(place.value)} rows of layer {name!r} do not split into so many",
            )
