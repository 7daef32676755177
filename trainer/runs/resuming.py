"""What a run leaves after each stage, and how it goes on from there."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from trainer.compression.states import restore
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing.network import facts_of
from trainer.recipe.keys import Recipe
from trainer.recipe.stages import any_teaches, name_of
from trainer.recipe.text import RecipeError, dump, parse
from trainer.storage import checkpoint, files
from trainer.training.run import Run


def same_recipe(here: Path, path: Path, plain: dict[str, Any]) -> None:
    """Refuses a folder that another recipe has left something in; a start that came to nothing leaves but its recipe."""
    kept = here / "recipe.yaml"
    left = (here / "checkpoints").exists() or (here / "done").exists()
    if not kept.is_file() or not (left or kept.samefile(path)):
        return
    if parse(kept).plain != plain:
        raise RecipeError(
            f"{here}: holds a run of a different recipe (see {kept}); give this one another name (--name), "
            "another folder (--folder), or remove that run"
        )


def write_recipe(here: Path, recipe: Recipe, plain: dict[str, Any], changed: bool) -> None:
    """The recipe as run: the text that was read, or, where it was changed on the command line, what came of it."""
    text = recipe.written.source
    if changed:
        text = f"# {recipe.written.file.name} with changes from the command line\n" + dump(plain)
    files.write_bytes(here / "recipe.yaml", text.encode())


def same_beginning(run: Run, recipe: Recipe) -> None:
    """Raises Mistake when a run that goes on finds other images or another teacher than it began with."""
    told = {"images": "the training images are not those", "teacher": "the teacher is not the one"}
    facts: dict[str, Any] = {"images": [run.data.fingerprint, len(run.data.train)]}
    if run.teacher is not None and not any_teaches(recipe.stages):
        facts["teacher"] = run.teacher.fingerprint()
    begun = facts_of_beginning(run.folder)
    if begun:
        for what, fact in facts.items():
            if begun.get(what) != fact:
                raise Mistake(f"{run.folder}: {told[what]} that this run began with: give it another folder")
        return
    run.accelerator.wait_for_everyone()  # nothing is written before all have looked
    if run.accelerator.is_main_process:
        facts["threads"] = torch.get_num_threads()  # of the main process
        files.write_bytes(run.folder / "begun.json", json.dumps(facts, indent=1).encode())


def facts_of_beginning(here: Path) -> dict[str, Any]:
    """What a run that goes on began with; nothing where there is nothing to go on from."""
    path = here / "begun.json"
    return (
        json.loads(path.read_text(encoding="utf-8"))
        if path.is_file() and (here / "checkpoints").exists()
        else {}
    )


def stage_folder(run: Run, number: int, name: str) -> Path:
    return run.folder / "checkpoints" / f"{number:02d}-{name}"


def finish_stage(run: Run, teacher_fingerprint: str | None, seconds: float) -> None:
    """Keeps what the stage left: networks, rows, histograms; the training's own checkpoints are no longer needed."""
    folder = stage_folder(run, run.stage, run.stage_name)
    if run.accelerator.is_main_process:
        tensors = {"student": run.student.state_dict(), "learned": run.learned}
        about = {"student": {**facts_of(run.data), "net": run.student_spec}}
        if run.teacher is not None and run.teacher.version:
            for i, (network, member) in enumerate(
                zip(run.teacher.networks, run.teacher.members, strict=True)
            ):
                tensors[f"teacher-{i}"] = network.state_dict()
                seen = {} if member.mean is None else {"mean": member.mean, "std": member.std}
                about[f"teacher-{i}"] = {**facts_of(run.data), **seen, "net": member.spec}
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
    """Takes up what the newest finished stage left; returns the number of the first stage that is still to be run, and
    the seconds spent before. Raises Mistake when the teacher is another than it was.
    """
    for number in reversed(range(len(stages))):
        found = checkpoint.load(stage_folder(run, number, name_of(stages[number])))
        if found is None:
            continue
        tensors, facts = found
        if facts["student_spec"] != json.loads(
            json.dumps(run.student_spec)
        ):  # a stage has made it another network: folded it, or removed channels
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
