"""Guards against networks that have learnt nothing: teachers that would teach, students that would be made small."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compression.states import dense_state
from trainer.mistakes import Mistake, listed
from trainer.recipe.keys import Recipe, StageKeys
from trainer.recipe.stages import changes_student, name_of, needs_trained, teaches
from trainer.runs.orders import order_fault
from trainer.training.evaluate import guessing, normalized, percent_right, predict, teacher_answers, truth
from trainer.training.rows import record_teacher
from trainer.training.run import Run

HOW_TO_GO_ON = "train longer or with other settings, or give allow_untrained: true"


class Untrained(Mistake):
    """A network has not learnt what the rest of the recipe needs. The finished stages stand."""


def guard_teacher(run: Run) -> None:
    """Checks that a teacher which this run does not train is better than guessing, each of several alone; adds its row.

    Raises Mistake for one that is not.
    """
    for fault, cause in _teacher_faults(run):
        raise Mistake(fault + cause)
    if run.teacher is not None and run.teacher.classifies:
        record_teacher(run, "teacher")


def examine(run: Run, stage: StageKeys) -> None:
    """Examines the network that a stage has just changed; one that has learnt nothing gets a warning.

    The warning is printed, logged and kept in the stage's last row.
    """
    if teaches(stage):
        faults = [fault for fault, _ in _teacher_faults(run)]
    elif changes_student(stage):
        faults = list(_student_faults(run))
    else:
        return
    for fault in faults[:1]:
        if run.rows and run.rows[-1]["index"] == run.stage:
            run.rows[-1]["warning"] = fault
        run.log.warning(run.stage_name, fault)
        if run.accelerator.is_main_process:
            print(f"warning: stage {run.stage + 1} ({run.stage_name}): {fault}", flush=True)


def stop_untrained(run: Run, recipe: Recipe, number: int) -> None:
    """Raises Untrained, after stage `number`, if the recipe should not go on with these networks.

    Weights that are not finite stop it always; an accuracy below the stage's at_least, wherever that is given;
    without it, what `examine` found, before a stage that needs the network trained and unless the recipe allows it.
    """
    who = _who(recipe.stages[number])
    networks = [run.student] if who == "student" else getattr(run.teacher, "networks", [])
    if not all(map(_finite, networks)):
        message = f"the {who} has weights that are not finite after this stage: lower its learning rate, or clip the gradient"
        raise Untrained(recipe.fault(("stages", number), message))
    check_at_least(recipe, run.rows, number)
    if not recipe.allow_untrained:
        for fault in _found_untrained(recipe, run.rows, number + 1):
            raise Untrained(fault)


def check_at_least(recipe: Recipe, rows: Sequence[dict[str, Any]], number: int) -> None:
    """Raises Untrained if the last row of stage `number` has a lower validation accuracy than the stage's at_least."""
    stage = recipe.stages[number]
    if stage.at_least is None:
        return
    reached = [row["top1_validation"] for row in rows if row["index"] == number]
    if not reached:
        message = "at_least: has no effect: the stage adds no row to the report"
        raise Untrained(recipe.fault(("stages", number), message))
    top1 = math.nan if reached[-1] is None else reached[-1]  # of images without labels
    if not top1 >= stage.at_least:
        message = (
            f"at_least: the {_who(stage)} has {top1:.2f} % of the validation images right; "
            f"at_least asks for {stage.at_least:g} %"
        )
        raise Untrained(recipe.fault(("stages", number), message))


def _who(stage: StageKeys) -> str:
    return "teacher" if teaches(stage) else "student"


def _found_untrained(recipe: Recipe, rows: Sequence[dict[str, Any]], number: int) -> Iterator[str]:
    """Yields the faults of beginning stage `number`, if there is one, with the networks that the rows tell of."""
    for later in recipe.stages[number : number + 1]:
        for about, row in _standing(recipe, rows).items():
            stops = needs_trained(later) if about == "student" else not teaches(later)
            if stops and "warning" in row and recipe.stages[row["index"]].at_least is None:
                yield recipe.fault(("stages", number), f"not begun, as {row['warning']}: {HOW_TO_GO_ON}")


def warnings_of(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the warnings that hold of the teacher and the student as they are now, with their stages."""
    found = []
    for about, row in _standing(recipe, rows).items():
        said = [row["warning"]] if "warning" in row else []
        never = row.get("never_answered") or []
        # What has learnt nothing answers few classes, which is said already.
        if len(never) == 1 or (never and not said):
            said.append(f"the {about} never answers {listed(never)}, which the test split has images of")
        found += [f"stage {row['index'] + 1} ({name_of(recipe.stages[row['index']])}): {one}" for one in said]
    return found


def _standing(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns {"teacher" or "student": the last row of the last stage that changed it}."""
    found = {}
    for row in rows:
        stage = recipe.stages[row["index"]]
        if teaches(stage):
            found["teacher"] = row
        elif changes_student(stage):
            found["student"] = row
    return found


def _teacher_faults(run: Run) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, its cause) for each faulty network of the teacher.

    Its weights are not finite, its classes stand in another order than the data's, or its answers are guesses.
    """
    teacher = run.teacher
    assert teacher is not None
    part = teacher.images_of(run.data).validation
    if not teacher.classifies:
        if not _finite(teacher.network):
            yield "the teacher has weights that are not finite", ""
        return
    for number, network in enumerate(teacher.networks):

        def alone(images: Tensor, n: int = number, net: nn.Module = network) -> Tensor:
            return net(teacher.prepare(images, n))

        if len(teacher.networks) == 1:
            who, answers = "the teacher", teacher_answers(run, "validation")
            assert answers is not None
        else:
            who, answers = f"teachers[{number}]", predict(alone, part, run.accelerator)
        if not _finite(network):
            yield f"{who} has weights that are not finite", ""
        elif fault := order_fault(run, who, alone, answers):
            yield fault, ""
        elif guessed := _guessed(answers, part.labels):
            cause = "its head is untrained, its classes are others, or its images are normalised otherwise"
            yield f"{who} has {guessed}", f": {cause}"


def _student_faults(run: Run) -> Iterator[str]:
    """Yields what is wrong with the student: weights that are not finite, guesses, or less than half of the teacher."""
    if not _finite(run.student):
        yield "the student has weights that are not finite"
        return
    part, answers = run.data.validation, run.student_answers
    if answers is None:  # the stage has added no row
        answers = predict(normalized(run.student.eval(), run.data), part, run.accelerator)
    labels = truth(run, part)
    if guessed := _guessed(answers, labels):
        yield f"the student has {guessed}"
        return
    labelled = bool((part.labels >= 0).any())
    taught = (
        [row["top1_validation"] for row in run.rows if row["stage"] == "teacher"] if labelled else [100.0]
    )
    right = percent_right(answers, labels)
    if run.teacher is not None and taught and right < taught[-1] / 2:
        yield f"the student has {right:.2f} % of the validation images right, less than half of the teacher's {taught[-1]:.2f} %"


def _guessed(answers: Tensor, labels: Tensor) -> str:
    """Returns the words for answers that are no better than guesses; empty for others, and without labels."""
    right, (chance, better) = percent_right(answers, labels), guessing(answers, labels)
    if not right < better:
        return ""
    return f"{right:.2f} % of the {int((labels >= 0).sum()):,} validation images right, and guessing {chance:.2f} %"


def _finite(network: nn.Module) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in dense_state(network).values() if t.is_floating_point())
