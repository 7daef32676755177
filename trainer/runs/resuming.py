"""The state that a run saves after each stage, and how a run resumes from it."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

import torch
from pydantic import PositiveInt
from torch import Tensor
from typing_extensions import TypedDict

from trainer.compression.states import restore
from trainer.distillation.teacher import promoted
from trainer.distributed import is_main, told
from trainer.mistakes import Mistake, say
from trainer.networks.build import build
from trainer.packing.network import facts_of
from trainer.recipe.keys import Recipe, StageKeys
from trainer.recipe.stages import any_teaches, name_of, promotes
from trainer.recipe.text import RecipeError, dump, parse
from trainer.runs.earlier import equal_stage, first_broken, set_aside, sources_of, stage_folder, take_over
from trainer.runs.inputs import (
    inputs_of,
    labels_of,
    machine_of,
    measured_on,
    num_equal,
    on_machines,
    only_teaches,
)
from trainer.runs.together import check_same
from trainer.storage import checkpoint, files, records
from trainer.training.run import Run


class _Beginning(TypedDict):
    """What a run records when it begins.

    The training images' digest and number and all labels' digest, the digests of the other images, the teacher's digest, the
    threads, the machines it was on (`machine_of`), the recipe, the digests of its stages (`inputs_of`), and the number of the
    stage from which all is to be run anew.
    """

    images: list[str | int]
    validation: NotRequired[str]
    test: NotRequired[str]
    teacher: NotRequired[str | None]
    threads: NotRequired[PositiveInt]
    machines: NotRequired[list[str]]
    recipe: NotRequired[dict[str, Any]]
    inputs: NotRequired[list[str]]
    anew: NotRequired[int]


class _Finished(TypedDict):
    """The facts of a stage's checkpoint."""

    rows: list[dict[str, Any]]
    layers: dict[str, dict[str, Any]]
    seconds: float
    teacher: str | None
    student_spec: dict[str, Any]
    teacher_version: int
    student_bytes: NotRequired[int]
    teacher_spec: NotRequired[dict[str, Any] | None]


class Plan(NamedTuple):
    """How a run begins.

    Attributes:
        plain: The recipe as plain values, with all changes.
        edited: Whether the command line changed it.
        changed: Whether the folder holds a run of another recipe.
        anew: Number of the stage from which all is run anew; None for no such wish.
        more: Further folders to take equal stages over from.
    """

    plain: dict[str, Any]
    edited: bool = False
    changed: bool = False
    anew: int | None = None
    more: Sequence[Path] = ()


def is_changed(here: Path, path: Path, plain: dict[str, Any]) -> bool:
    """Returns whether the folder holds a run of a recipe that would do something else.

    A folder with no more than a recipe, from a run that failed before its first checkpoint, holds none.

    Args:
        here: The run's folder.
        path: The recipe's file.
        plain: The recipe as plain values.
    """
    kept = here / "recipe.yaml"
    left = (here / "checkpoints").exists() or (here / "done").exists()
    if not kept.is_file() or not (left or kept.samefile(path)):
        return False
    begun = _begun(here).get("recipe") or parse(kept).plain
    return _without_guards(begun) != _without_guards(plain)


def _without_guards(plain: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe's plain values without those that only say when a run stops."""
    stages = [{k: v for k, v in stage.items() if k != "at_least"} for stage in plain["stages"]]
    return json.loads(json.dumps({**plain, "stages": stages, "allow_untrained": None}))


def is_finished(here: Path) -> bool:
    """Returns whether the folder holds a run that has ended and its report."""
    return (here / "report.json").is_file() and (here / "done").is_file()


def stage_number(recipe: Recipe, word: str) -> int:
    """Returns the number of the stage that a number (from 0) or a name says. Raises Mistake if there is none, or several."""
    names = [name_of(stage) for stage in recipe.stages]
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    known = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    if names.count(word) != 1:
        raise Mistake(
            f"--from {word}: {'several stages have' if word in names else 'no stage has'} that name; allowed: {known}"
        )
    return names.index(word)


def begin(run: Run, recipe: Recipe, plan: Plan) -> tuple[list[str], int]:
    """Prepares the run's folder for the first stage that is due.

    What a changed recipe no longer has, or is to be run anew, is moved to earlier/. Then equal stages of other runs are
    taken over, and the new recipe is written.

    Returns the stages' digests with the run's machines (`on_machines`), and the number of the first stage that may not be
    taken over.
    Raises Mistake when a resumed run has other images or another teacher than it began with.
    """
    here, stages, inputs = run.folder, recipe.stages, told(inputs_of(run, recipe))
    data = run.data
    labels = labels_of(data.train, data.validation, data.test)
    facts: dict[str, Any] = {"images": [data.fingerprint, len(data.train), labels], **measured_on(data)}
    if run.teacher is not None and not any_teaches(stages):
        facts["teacher"] = run.teacher.fingerprint()
    check_same(facts, "images or a teacher")
    begun, old = facts_of_beginning(here), told(_begun(here) if is_main() else {})
    anew = plan.anew
    if anew is None and not plan.changed and old.get("recipe") == json.loads(json.dumps(plan.plain)):
        anew = old.get("anew")  # what was to be run anew and was interrupted
    anew = len(stages) if anew is None else anew
    # An earlier version has not recorded all of them.
    others = [what for what, fact in facts.items() if what in begun and begun[what] != fact]
    if others and not plan.changed and plan.anew is None:
        messages = {
            "images": "the images or their labels are not those",
            "validation": "the validation images are not those",
            "test": "the test images are not those",
            "teacher": "the teacher is not the one",
        }
        raise Mistake(
            f"{here}: {messages[others[0]]} that this run began with: give it another folder, or run it anew (--fresh)"
        )
    starts = not begun or plan.changed or plan.anew is not None
    keep = num_equal(old.get("inputs") or [], inputs) if plan.changed or others else len(stages)
    if plan.changed or plan.anew is not None:
        keep = min(keep, anew)
    machine = machine_of(run)
    machines = list(begun.get("machines", [])) if keep else []
    if machine not in machines:
        if machines and machines[-1].split()[-1] != machine.split()[-1] and run.accelerator.is_main_process:
            say(f"{here}: began on {machines[-1]} and goes on on {machine}: rounding depends on it")
        machines.append(machine)
    if run.accelerator.is_main_process:
        if starts:
            if plan.changed or plan.anew is not None:
                target = set_aside(here, keep, _kept_recipe(here, old))
                run.log.begun(keep)
                if target is not None:
                    why = "another recipe" if plan.changed else f"run anew from stage {keep + 1}"
                    print(
                        f"{here}: {why}: what was there of the stages from {keep + 1} on is now in {target}",
                        flush=True,
                    )
            facts |= {
                "threads": torch.get_num_threads(),
                "machines": machines,
                "recipe": plan.plain,
                "inputs": inputs,
                "anew": anew,
            }
            records.write(here / "begun.json", facts, indent=1)
        elif machines != begun.get("machines"):
            records.write(here / "begun.json", old | {"machines": machines}, indent=1)
        write_recipe(here, recipe, plan)
        source = take_over(here, stages[:anew], on_machines(inputs, [machine]), sources_of(here, plan.more))
        if source is not None:
            print(
                f"{here}: {_counted(source.number + 1)} taken over from {source.folder}, as equal in settings and inputs",
                flush=True,
            )
    run.accelerator.wait_for_everyone()
    return on_machines(inputs, machines), anew


def _counted(number: int) -> str:
    return "the first stage is" if number == 1 else f"the first {number} stages are"


def _kept_recipe(here: Path, old: dict[str, Any]) -> bytes:
    """Returns the text of the recipe that the folder's run began with."""
    kept = here / "recipe.yaml"
    if "recipe" not in old:
        return kept.read_bytes() if kept.is_file() else b""
    try:
        same = json.loads(json.dumps(parse(kept).plain)) == old["recipe"]
    except RecipeError:
        same = False
    return kept.read_bytes() if same else dump(old["recipe"]).encode()


def write_recipe(here: Path, recipe: Recipe, plan: Plan) -> None:
    """Writes the recipe into the run's folder: its text, or its values if the command line changed some."""
    text = recipe.written.source
    if plan.edited:
        text = f"# {recipe.written.file.name} with changes from the command line\n" + dump(plan.plain)
    files.write_bytes(here / "recipe.yaml", text.encode())


def facts_of_beginning(here: Path) -> dict[str, Any]:
    """Returns what `begin` recorded; empty when there is no checkpoint to resume from.

    All processes must call this, and get what the main process finds.
    """
    return told(_begun(here) if is_main() and (here / "checkpoints").exists() else {})


def _begun(here: Path) -> dict[str, Any]:
    path = here / "begun.json"
    advice = "remove it: the run then goes on, without a check of its images and teacher"
    return dict(records.read(path, _Beginning, advice)) if path.is_file() else {}


def finish_stage(run: Run, inputs: Sequence[str], teacher_fingerprint: str | None, seconds: float) -> None:
    """Saves the checkpoint of a finished stage, and removes the checkpoints of its trainings.

    Args:
        run: The run: its networks, rows, layers and histograms are saved.
        inputs: The digests of all stages.
        teacher_fingerprint: The teacher's fingerprint, None without a teacher.
        seconds: Seconds spent since the run began.
    """
    folder = stage_folder(run.folder, run.stage, run.stage_name)
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
            "inputs": list(inputs[: run.stage + 1]),
            "teacher": teacher_fingerprint,
            "student_spec": run.student_spec,
            "teacher_version": run.teacher.version if run.teacher is not None else 0,
            "student_bytes": run.student_bytes,
            "teacher_spec": None if run.teacher is None else run.teacher.members[0].spec,
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
    due = len(stages)
    for number in reversed(range(len(stages))):
        folder = stage_folder(run.folder, number, name_of(stages[number]))
        found = checkpoint.load(folder, _Finished, ("student", "learned")) if number < due else None
        if found is None:
            continue
        tensors, facts = found
        broken = told(first_broken(run.folder, facts) if is_main() else None)
        if broken is not None and broken[0] <= number:
            due = broken[0]
            if is_main():
                say(
                    f"{broken[1]}: is gone or damaged; stage {due + 1} ({name_of(stages[due])}) makes it anew"
                )
            continue
        if not all(
            map(only_teaches, stages[: number + 1])
        ):  # else the recipe may have another student by now
            _restore_student(run, tensors, facts)
        run.learned = {key: t.to(run.accelerator.device) for key, t in tensors["learned"].items()}
        if any(map(promotes, stages[: number + 1])):
            _restore_promoted(run, facts)
        _restore_teacher(run, tensors, facts)
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
            tell_of_damage(run.folder, stages[:number])
        return number + 1, facts["seconds"]
    return 0, 0.0


def tell_of_damage(here: Path, stages: list) -> None:
    """Says which checkpoints of these first stages of a run, which are finished, are damaged."""
    for number, stage in enumerate(stages):
        if wrong := checkpoint.damage(stage_folder(here, number, name_of(stage))):
            say(f"{wrong}; this run does not need it any more, and --from {number} makes it anew")


def taught_already(
    run: Run, number: int, stage: StageKeys, inputs: Sequence[str], more: Iterable[Path]
) -> bool:
    """Takes over the teacher of an equal stage that only teaches, whatever the student was; returns whether there is one.

    Args:
        run: The run, before that stage.
        number: The stage's number.
        stage: The stage.
        inputs: The digests of all stages.
        more: Further folders to look into.
    """
    if not only_teaches(stage):
        return False
    folder = told(equal_stage(number, stage, inputs, sources_of(run.folder, more)) if is_main() else None)
    found = None if folder is None else checkpoint.load(folder, _Finished, ("student", "learned"))
    if found is None or found[0]["learned"]:
        return False
    tensors, facts = found
    _restore_teacher(run, tensors, facts)
    run.rows += [row for row in facts["rows"] if row["index"] == number]
    if run.accelerator.is_main_process:
        print(f"taken over from {folder}, as equal in settings and inputs", flush=True)
    return True


def _restore_student(run: Run, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    if facts["student_spec"] != json.loads(
        json.dumps(run.student_spec)
    ):  # a stage has changed the architecture: folded BatchNorm, or removed channels
        run.student_spec = facts["student_spec"]
        run.student = build(run.student_spec, run.data.shape, len(run.data.classes))
    restore(run.student, tensors["student"])
    run.student.to(run.accelerator.device)


def _restore_promoted(run: Run, facts: dict[str, Any]) -> None:
    """Puts the teacher that a stage made of a student in the place of the recipe's; `_restore_teacher` loads its weights."""
    run.student_bytes = facts["student_bytes"]
    made = build(facts["teacher_spec"], run.data.shape, len(run.data.classes)).to(run.accelerator.device)
    run.teacher = promoted(made, facts["teacher_spec"], run.data)


def _restore_teacher(run: Run, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    """Loads the teacher. Raises Mistake when it differs from the one that the run began with."""
    if run.teacher is None:
        return
    for i, network in enumerate(run.teacher.networks):
        if f"teacher-{i}" in tensors:
            network.load_state_dict(tensors[f"teacher-{i}"])
    run.teacher.version = facts["teacher_version"]
    if run.teacher.fingerprint() != facts["teacher"]:
        raise Mistake(
            f"{run.folder}: the teacher is not the one that this run began with: give it another folder"
        )
