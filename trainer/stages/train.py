"""Teaches the teacher or the student from labels, or loads a checkpoint and checks its accuracy."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake
from trainer.networks.build import load_weights
from trainer.recipe.keys import Term, TermKeys, Training
from trainer.recipe.stages import changes_student
from trainer.recipe.terms import needs_teacher
from trainer.training.fit import fit
from trainer.training.rows import keep_histogram, record, record_teacher
from trainer.training.run import Run

Percent = Annotated[float, Field(ge=0, le=100)]


def check(settings) -> None:
    if (settings.training is None) == (settings.checkpoint is None):
        raise Mistake("exactly one of training and checkpoint is needed")
    if settings.checkpoint is not None and settings.losses:
        raise Mistake("losses have no effect with checkpoint: nothing is trained")
    for term in settings.losses or []:
        if needs_teacher(term):
            raise Mistake(f"loss {term.loss!r} needs a teacher: use stage distill")


def order(settings, before) -> Iterator[str]:
    if settings.checkpoint is not None and not teaches(settings) and any(map(changes_student, before)):
        yield "checkpoint: replaces what the stages before have made of the student"


def teaches(settings) -> bool:
    return settings.who == "teacher"


def train(
    run: Run,
    *,
    who: Literal["teacher", "student"] = "student",
    training: Training | None = None,
    losses: list[Term] | None = None,
    checkpoint: Path | None = None,
    at_least: Percent | None = None,
) -> None:
    """Trains on labels (cross-entropy, or the `losses` given), or loads `checkpoint`.

    at_least: percent of the validation images that must then be right; fewer is an error. Of several teachers each
    is trained. Raises Mistake when the accuracy is missed or the checkpoint does not fit.
    """
    losses = losses or [TermKeys(loss="cross_entropy")]
    teacher = run.teacher if who == "teacher" else None
    assert teacher is not None or who == "student"
    networks = [run.student] if teacher is None else teacher.networks
    numbers: dict = {}
    for number, network in enumerate(networks):
        if checkpoint is not None:
            load_weights(network, checkpoint)
            continue
        assert training is not None
        prepare = None if teacher is None else (lambda images, n=number: teacher.prepare(images, n))
        network.requires_grad_(True)
        objective = Objective(
            network,
            losses,
            run.data,
            num_epochs=training.epochs,
            device=run.accelerator.device,
            prepare=prepare,
        )
        fitted = fit(run, objective, training)
        numbers = {
            k: fitted[k] + numbers.get(k, 0) if k in ("epochs", "steps", "train_seconds") else v
            for k, v in fitted.items()
        }
        network.eval()
        if teacher is not None:
            network.requires_grad_(False)
    if teacher is not None:
        teacher.version += 1
        row = record_teacher(run, "teacher", numbers.get("train_seconds", 0.0), **numbers)
    else:
        row = record(run, "trained", numbers.get("train_seconds", 0.0), **numbers)
        keep_histogram(run, "dense")
    if at_least is not None and not row["top1_validation"] >= at_least:
        raise Mistake(
            f"the {who} has {row['top1_validation']:.2f} % of the validation images right; at_least asks for {at_least} %"
        )
