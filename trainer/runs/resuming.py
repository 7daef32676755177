"""The state that a run saves after each stage, and how a run resumes from it."""

import json
import shutil
from pathlib import Path
from typing import Any, NotRequired

import torch
from pydantic import PositiveInt
from typing_extensions import TypedDict

from trainer.compression.states import restore
from trainer.distributed import is_main, told
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing.network import facts_of
from trainer.recipe.keys import Recipe
from trainer.recipe.stages import any_teaches, name_of
from trainer.recipe.text import RecipeError, dump, parse
from trainer.runs.together import check_same
from trainer.storage import checkpoint, files, records
from trainer.training.run import Run


class _Beginning(TypedDict):
    """What a run records when it begins: the images' digest and number, the teacher's digest, the threads."""

    images: list[str | int]
    teacher: NotRequired[str | None]
    threads: NotRequired[PositiveInt]


class _Finished(TypedDict):
    """The facts of a stage's checkpoint."""

    rows: list[dict[str, Any]]
    layers: dict[str, dict[str, Any]]
    seconds: float
    teacher: str | None
    student_spec: dict[str, Any]
    teacher_version: int


def same_recipe(here: Path, path: Path, plain: dict[str, Any]) -> None:
    """Raises RecipeError when the folder holds a run of another recipe.

    A folder with no more than a recipe, from a run that failed before its first checkpoint, is accepted.

    Args:
        here: The run's folder.
        path: The recipe's file.
        plain: The recipe as plain values.
    """
    kept = here / "recipe.yaml"
    left = (here / "checkpoints").exists() or (here / "done").exists()
    if not kept.is_file() or not (left or kept.samefile(path)):
        return
    if _without_guards(parse(kept).plain) != _without_guards(plain):
        raise RecipeError(
            f"{here}: holds a run of a different recipe (see {kept}); give this one another name (--name), "
            "another folder (--folder), or remove that run"
        )


def _without_guards(plain: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe's plain values without those that only say when a run stops."""
    stages = [{k: v for k, v in stage.items() if k != "at_least"} for stage in plain["stages"]]
    return {**plain, "stages": stages, "allow_untrained": None}


def is_finished(here: Path) -> bool:
    """Returns whether the folder holds a run that has ended and its report."""
    return (here / "report.json").is_file() and (here / "done").is_file()


def write_recipe(here: Path, recipe: Recipe, plain: dict[str, Any], changed: bool) -> None:
    """Writes the recipe into the run's folder: its text, or its values if the command line changed some.

    Args:
        here: The run's folder.
        recipe: The recipe.
        plain: The recipe as plain values, with all changes.
        changed: Whether the command line changed it.
    """
    text = recipe.written.source
    if changed:
        text = f"# {recipe.written.file.name} with changes from the command line\n" + dump(plain)
    files.write_bytes(here / "recipe.yaml", text.encode())


def same_beginning(run: Run, recipe: Recipe) -> None:
    """Records the images and the teacher of a new run; checks those of a resumed run.

    Raises Mistake when a resumed run has other images or another teacher than it began with.
    """
    messages = {"images": "the training images are not those", "teacher": "the teacher is not the one"}
    facts: dict[str, Any] = {"images": [run.data.fingerprint, len(run.data.train)]}
    if run.teacher is not None and not any_teaches(recipe.stages):
        facts["teacher"] = run.teacher.fingerprint()
    check_same(facts, "images or a teacher")
    begun = facts_of_beginning(run.folder)
    if begun:
        for what, fact in facts.items():
            if begun.get(what) != fact:
                raise Mistake(
                    f"{run.folder}: {messages[what]} that this run began with: give it another folder"
                )
        return
    if run.accelerator.is_main_process:
        facts["threads"] = torch.get_num_threads()  # of the main process
        files.write_bytes(run.folder / "begun.json", json.dumps(facts, indent=1).encode())


def facts_of_beginning(here: Path) -> dict[str, Any]:
    """Returns what `same_beginning` recorded; empty when there is no checkpoint to resume from.

    All processes must call this, and get what the main process finds.
    """
    path = here / "begun.json"
    found: dict[str, Any] = {}
    if is_main() and path.is_file() and (here / "checkpoints").exists():
        advice = f"remove {path}: the run then goes on, without a check of its images and teacher"
        found = records.read(path, _Beginning, advice)
    return told(found)


def stage_folder(run: Run, number: int, name: str) -> Path:
    """Returns the folder of a stage's checkpoint."""
    return run.folder / "checkpoints" / f"{number:02d}-{name}"


def finish_stage(run: Run, teacher_fingerprint: str | None, seconds: float) -> None:
    """Saves the checkpoint of a finished stage, and removes the checkpoints of its trainings.

    Args:
        run: The run: its networks, rows, layers and histograms are saved.
        teacher_fingerprint: The teacher's fingerprint, None without a teacher.
        seconds: Seconds spent since the run began.
    """
    folder = stage_folder(run, run.stage, run.stage_name)
    if run.accelerator.is_main_process:
        tensors = {"student": run.student.state_dict(), "learned": run.learned}
        about = {"student": {**facts_of(run.data), "net": run.student_spec}}
        if run.teacher is not None and run.teacher.version:
            for i, (network, member) in enumerate(
                zip(run.teacher.networks, run.teacher.members, strict=True)
            ):
                tensors[f"teacher-{i}"] = network.state_dict()
                own: dict[str, Any] = {} if member.mean is None else {"mean": member.mean, "std": member.std}
                if member.size:
                    own["shape"] = [run.data.shape[0], member.size, member.size]
                about[f"teacher-{i}"] = {**facts_of(run.data), **own, "net": member.spec}
        for moment, layers in run.histograms.items():
            tensors[f"weights-{moment}"] = {name: torch.from_numpy(array) for name, array in layers.items()}
        facts = {
            "step": 0,
            "rows": run.rows,
            "layers": run.layers,
            "seconds": seconds,
            "teacher": teacher_fingerprint,
            "student_spec": run.student_spec,
            "teacher_version": run.teacher.version if run.teacher is not None else 0,
        }
        checkpoint.save(folder, tensors, facts, keep=1, about=about)
        for training in folder.glob("fit-*"):
            shutil.rmtree(training)
    run.accelerator.wait_for_everyone()


def resume(run: Run, stages: list) -> tuple[int, float]:
    """Loads the checkpoint of the newest finished stage into the run.

    Returns:
        The number of the first stage that is not done, and the seconds spent before.

    Raises:
        Mistake: When the teacher differs from the one that the run began with.
    """
    for number in reversed(range(len(stages))):
        folder = stage_folder(run, number, name_of(stages[number]))
        found = checkpoint.load(folder, _Finished, ("student", "learned"))
        if found is None:
            continue
        tensors, facts = found
        if facts["student_spec"] != json.loads(
            json.dumps(run.student_spec)
        ):  # a stage has changed the architecture: folded BatchNorm, or removed channels
            run.student_spec = facts["student_spec"]
            run.student = build(run.student_spec, run.data.shape, len(run.data.classes))
        restore(run.student, tensors["student"])
        run.student.to(run.accelerator.device)
        run.learned = {key: t.to(run.accelerator.device) for key, t in tensors["learned"].items()}
        for i, network in enumerate(run.teacher.networks if run.teacher is not None else []):
            if f"teacher-{i}" in tensors:
                network.load_state_dict(tensors[f"teacher-{i}"])
        if run.teacher is not None:
            run.teacher.version = facts["teacher_version"]
            if run.teacher.fingerprint() != facts["teacher"]:
                raise Mistake(
                    f"{run.folder}: the teacher is not the one that this run began with: give it another folder"
                )
        run.rows, run.layers = facts["rows"], facts["layers"]
        run.histograms = {
            key.removeprefix("weights-"): {n: t.numpy() for n, t in layers.items()}
            for key, layers in tensors.items()
            if key.startswith("weights-")
        }
        if run.accelerator.is_main_process:
            print(
                f"{run.folder}: going on after stage {number + 1} of {len(stages)} ({name_of(stages[number])})",
                flush=True,
            )
        return number + 1, facts["seconds"]
    return 0, 0.0
