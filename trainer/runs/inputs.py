"""What the result of each stage depends on, as digests: a stage whose digest is known need not run again."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from trainer.data.images import Data, InMemory, Part, digest_of
from trainer.data.pictures import Pictures
from trainer.recipe.keys import Recipe, StageKeys
from trainer.recipe.shelves import methods_of, source_of
from trainer.recipe.stages import (
    changes_student,
    files_of,
    promotes,
    taught_alike,
    teaches,
    terms_of,
    training_of,
)
from trainer.recipe.terms import asked_of_teacher
from trainer.storage.weights_file import digest
from trainer.training.run import Run

WITHOUT_EFFECT = {"workers", "at_least"}  # settings that change no result


def only_teaches(stage: StageKeys) -> bool:
    """Returns whether the stage changes the teacher and nothing else."""
    return teaches(stage) and not changes_student(stage)


def inputs_of(run: Run, recipe: Recipe) -> list[str]:
    """Returns a digest for each stage, of everything that its result depends on. To be called before the first stage.

    That is its number, settings, files and code; the data, seed, precision and number of threads; the teacher as it is
    loaded or initialised, and the stages before that change it. A stage that does more than teach depends also on the
    student as it is initialised, on the stages before that change it, and on what is kept of the teacher's answers. What
    a run may go on without is not among it: see `on_machines`.
    """
    common = [
        _plain(recipe.data),
        _code_of(recipe.data),
        run.data.fingerprint,
        len(run.data.train),
        _contents(run.data),
        [run.data.mean, run.data.std],
        recipe.seed,
        [recipe.precision, recipe.tf32, recipe.cudnn_benchmark],
        torch.get_num_threads(),
    ]
    fingerprint = run.teacher.fingerprint() if run.teacher is not None else None
    teachers = [_plain(keys) for keys in recipe.teacher_entries]
    teacher = _digest(common, teachers, _code_of(recipe.teacher_entries), fingerprint)
    student = _digest(
        common,
        _plain(recipe.student),
        _code_of(recipe.student),
        digest(run.student.state_dict()),
        _kept_answers(recipe),
    )
    found = []
    for number, stage in enumerate(recipe.stages):
        depends = [teacher] if only_teaches(stage) else [teacher, student]
        files = [_digest_of_file(path) for _, path in files_of(stage)]
        found.append(_digest(number, _plain(stage), _code_of(stage), files, depends))
        if teaches(stage):
            teacher = found[-1]
        if changes_student(stage):
            student = found[-1]
    return found


def machine_of(run: Run) -> str:
    """Returns what of the machine results depend on, beside the digests: the number of processes and their devices."""
    return f"{run.accelerator.num_processes} x {run.accelerator.device.type}"


def on_machines(inputs: Sequence[str], machines: Sequence[str]) -> list[str]:
    """Returns the stages' digests with the machines that a run was on (`machine_of`), as its checkpoints have them.

    A run itself goes on on another machine. Another run takes over what was done wholly on a machine like its own.
    """
    return [f"{one} on {', '.join(machines)}" for one in inputs]


def labels_of(*parts: Part) -> str:
    """Returns a digest of the labels of some parts."""
    return hashlib.sha256(b"".join(part.labels.cpu().numpy().tobytes() for part in parts)).hexdigest()


def _contents(data: Data) -> list[str]:
    """Returns digests of the labels of all parts, and of what the fingerprint does not cover of their images."""
    parts = (data.train, data.validation, data.test)
    found = [labels_of(*parts)]
    for part in parts:
        # Training images in memory, which validation may have in common, are in the fingerprint, all of them.
        if part.images is not data.train.images or not isinstance(part.images, InMemory):
            found += _images_of(part)
    return found


def _images_of(part: Part) -> list[str]:
    """Returns digests of the images of a part.

    Those not in memory count by a sample, and by the names, sizes and times of change of their files.
    """
    images = part.images
    found = [images.states().changes] if isinstance(images, Pictures) else []
    return [*found, digest_of(images, part.ids)]


def measured_on(data: Data) -> dict[str, str]:
    """Returns a digest of the images of each part that the run is measured on and that is no part of the training images.

    The times of change of files do not count: copies of a folder may have others.
    """
    found = {}
    for what, part in (("validation", data.validation), ("test", data.test)):
        if part.images is not data.train.images:
            sizes = part.images.states().sizes if isinstance(part.images, Pictures) else None
            found[what] = _digest(sizes, len(part), digest_of(part.images, part.ids))
    return found


def num_equal(one: Sequence[str], other: Sequence[str]) -> int:
    """Returns how many of the first stages have equal digests."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _kept_answers(recipe: Recipe) -> list[Any]:
    """Returns what decides which of the teacher's answers are kept: a kept answer differs from a new one by rounding."""
    if recipe.cache == "off" or not (recipe.teacher_entries or any(map(promotes, recipe.stages))):
        return []
    cache = _plain(recipe.cache) if isinstance(recipe.cache, BaseModel) else recipe.cache
    found: list[Any] = []
    for stages in taught_alike(recipe.stages):
        terms = [term for stage in stages if training_of(stage) for term in terms_of(stage)]
        kinds = sorted({kind for term in terms for kind in asked_of_teacher([term])})
        maps = sorted({str(term.at) for term in terms if "maps" in asked_of_teacher([term])})
        if kinds:
            found += [cache, kinds, maps]
    return found or [cache, [], []]


def _code_of(settings: Any) -> list[str | None]:
    """Returns digests of the files that define what the settings name: losses, models, stages and others, of one's own too."""
    files = [source_of(method) for method in methods_of(settings)]
    return [None if file is None else _digest_of_file(file) for file in files]


def _plain(settings: BaseModel) -> dict[str, Any]:
    # By the type that a value has: by the declared type, a loss or a target would be without its own settings.
    return settings.model_dump(exclude=WITHOUT_EFFECT, serialize_as_any=True)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _digest_of_file(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
