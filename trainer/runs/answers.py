"""The cache of the teacher's answers in a run: whether it is used, where it lies and what it holds."""

import os
from pathlib import Path
from typing import Any

from trainer.data.fetch import cache_folder
from trainer.data.images import Data
from trainer.distillation.answers import Answers
from trainer.distillation.kept_gradient import least_cosine
from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake, say
from trainer.recipe.keys import Augment, CacheKeys, Recipe, StageKeys
from trainer.recipe.terms import asked_of_teacher
from trainer.recipe.text import RecipeError
from trainer.runs.earlier import stage_folder
from trainer.training.run import Run

ON_CPU = 128  # the most images that a teacher sees at once


def keep_answers(run: Run, recipe: Recipe, stages: list[StageKeys]) -> Answers | None:
    """Opens the cache of the teacher's answers for the given stages, or prints why there is none.

    The recipe's settings decide. Without any, the cache is in memory and holds the kinds of answers that serve the
    most stages and fit.

    Args:
        run: The run.
        recipe: Its recipe.
        stages: The stages that could use the cache.

    Returns:
        The cache; None when the recipe turns it off, no stage uses the teacher, or it would not help.

    Raises:
        RecipeError: When the recipe's settings cannot be satisfied.
    """
    teaching = _taught(stages)
    if recipe.cache == "off" or not teaching:
        return None
    if recipe.cache is not None:
        keys = recipe.cache if isinstance(recipe.cache, CacheKeys) else CacheKeys(where=recipe.cache)
        layers = _layers(run, keys, teaching)
        try:
            return _open(run, recipe, keys, layers, teaching)
        except Mistake as error:
            raise RecipeError(recipe.fault(("cache",), str(error))) from error
    refused = _never_seen_twice(run.data)
    for keys in [] if refused else _useful([asked_of_teacher(stage.losses) for stage in teaching]):
        layers = _layers(run, keys, teaching)
        try:
            return _open(run, recipe, keys, layers, teaching)
        except Mistake as error:
            refused = str(error)
    if run.accelerator.is_main_process:
        reason = refused or "every loss asks for more than logits"
        print(f"the teacher's answers are not kept: {reason}", flush=True)
    return None


def images_at_once(recipe: Recipe, num_processes: int, device: str) -> int | None:
    """Returns how many images the teacher sees in each forward pass, a function of the whole recipe; None if it teaches none.

    They are those of a process's largest batch. On a CPU, where more at once are no quicker, they are an equal part of
    it of at most 128.
    """
    batches = [stage.training.batch_size // num_processes for stage in _taught(recipe.stages)]
    if not batches:
        return None
    largest = max(1, *batches)
    return -(-largest // -(-largest // ON_CPU)) if device == "cpu" else largest


def _taught(stages: list[StageKeys]) -> list[Any]:
    """Returns the stages that learn from the teacher."""
    return [
        stage
        for stage in stages
        if getattr(stage, "training", None) and asked_of_teacher(getattr(stage, "losses", None) or [])
    ]


def share_answers(kept: Path, here: Path) -> None:
    """Links a folder of kept answers, of another run or made for several, into an unfinished run that has none."""
    link = here / "views"
    if link.is_symlink() and not link.exists():
        link.unlink()  # the other run has ended and removed its cache
    if kept.is_dir() and not link.exists() and not (here / "done").exists():
        here.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(kept, here))


def _never_seen_twice(data: Data) -> str:
    """Returns the reason why no image would be seen a second time; empty when some would."""
    if data.mixup or data.cutmix:
        return "mixed images are never seen twice"
    if data.augment != Augment() and data.views is None:
        return "data.views does not limit the views"
    return ""


def _useful(needed: list[set[str]]) -> list[CacheKeys]:
    """Returns the settings that serve at least one stage, those that serve the most first.

    needed: for each stage, the kinds of answers that it needs from the teacher.
    """
    embeddings, maps = (any(kind in kinds for kinds in needed) for kind in ("embedding", "maps"))
    combinations = dict.fromkeys([(embeddings, maps), (embeddings, False), (False, False)])
    settings = [CacheKeys(embeddings=e, maps=m) for e, m in combinations]
    return [keys for keys in settings if any(keys.serve(kinds) for kinds in needed)]


def _open(run: Run, recipe: Recipe, keys: CacheKeys, layers: list[str], teaching: list[StageKeys]) -> Answers:
    """Opens the cache, checks it against the teacher, and logs its size and its loss of precision.

    Raises Mistake when the cache cannot be used.
    """
    device, is_main = run.accelerator.device, run.accelerator.is_main_process
    assert run.teacher is not None
    cache = Answers(
        run.teacher,
        run.data,
        (cache_folder() if keys.where == "disk" else run.folder) / "views",
        keys,
        layers=layers,
        device=device,
        precision=recipe.precision,
    )
    begun = stage_folder(run.folder, run.stage, run.stage_name).glob("fit-*/*")
    if is_main and not cache.file.num_written and any(begun):
        say(
            f"{cache.file.folder}: the answers that stage {run.stage + 1} has learnt from are gone; "
            "they are computed anew; on a GPU last bits may differ"
        )
    with run.accelerator.autocast():
        cache.check()
        lost = cache.measure(min(256, run.data.train.at_once)) if is_main else {}
        if lost:
            cosine = least_cosine(cache, run.student, [stage.losses for stage in teaching], device)
            lost |= {} if cosine is None else {"cosine": cosine}
    run.log.numbers("cache", 0, num_bytes=cache.file.num_bytes, **lost)
    if is_main:
        losses = "".join(f"; {key} {value:.4g}" for key, value in lost.items())
        print(f"the teacher's answers are kept: {cache.describe()}{losses}", flush=True)
    return cache


def _layers(run: Run, keys: CacheKeys, stages: list[StageKeys]) -> list[str]:
    """Returns the teacher's layers whose maps the stages' losses compare; none when maps are not kept."""
    layers: dict[str, None] = {}
    for stage in stages if keys.maps else []:
        objective = Objective(run.student, stage.losses, run.data, run.teacher, device=run.accelerator.device)
        layers |= dict.fromkeys(objective.teacher_layers)
    return list(layers)
