"""Trains the teacher or the student on labels, or loads a checkpoint and checks its accuracy."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake
from trainer.recipe.keys import Term, TermKeys
from trainer.recipe.stages import changes_student
from trainer.recipe.terms import needs_teacher
from trainer.recipe.training import Training
from trainer.training.class_order import in_order
from trainer.training.fit import fit
from trainer.training.rows import keep_histogram, record, record_teacher
from trainer.training.run import Run
from trainer.training.weights import Made, load_weights


def check(settings) -> None:
    if (settings.training is None) == (settings.checkpoint is None):
        raise Mistake("exactly one of training and checkpoint is needed")
    if settings.checkpoint is None and (settings.prefix is not None or settings.use_ema):
        raise Mistake("prefix and use_ema have no effect without checkpoint")
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


def learns_labels(_settings) -> bool:
    return True


def train(
    run: Run,
    *,
    who: Literal["teacher", "student"] = "student",
    training: Training | None = None,
    losses: list[Term] | None = None,
    checkpoint: Path | None = None,
    prefix: str | None = None,
    use_ema: bool = False,
) -> None:
    """Trains the teacher or the student on labels, or loads a checkpoint.

    Args:
        who: `student`, or `teacher`; of several teachers each is trained.
        training: How to train.
        losses: By default cross-entropy.
        checkpoint: The weights to load instead of training.
        prefix, use_ema: What of the checkpoint to take (`training.weights`).

    Raises:
        Mistake: If the checkpoint does not fit.
    """
    losses = losses or [TermKeys(loss="cross_entropy")]
    teacher = run.teacher if who == "teacher" else None
    assert teacher is not None or who == "student"
    networks = [run.student] if teacher is None else teacher.networks
    each: list[dict] = []
    for number, network in enumerate(networks):
        if checkpoint is not None:
            _load(run, who, number, checkpoint, prefix, use_ema)
            continue
        assert training is not None
        network.requires_grad_(True)
        data = run.data
        run.data = data.labelled_alone()
        prepare = None
        if teacher is not None:
            prepare = functools.partial(teacher.prepare, number=number)
            run.data = run.data.at_size(
                teacher.members[number].size, teacher.filter
            )  # as it will see them when it teaches
        try:
            objective = Objective(
                network,
                losses,
                run.data,
                num_epochs=training.epochs,
                device=run.accelerator.device,
                prepare=prepare,
            )
            fitted = fit(run, objective, training)
        finally:
            run.data = data
        each.append(fitted)
        network.eval()
        if teacher is not None:
            network.requires_grad_(False)
    numbers = each[0] if len(each) == 1 else _in_sum(each)
    if teacher is not None:
        teacher.version += 1
        record_teacher(run, "teacher", numbers.get("train_seconds", 0.0), **numbers)
    else:
        record(run, "trained", numbers.get("train_seconds", 0.0), **numbers)
        keep_histogram(run, "dense")


def _in_sum(trainings: list[dict]) -> dict:
    """Returns the numbers of several teachers' trainings (`fit`) together: sums, the most epochs, each one's best epoch."""
    if not trainings:
        return {}
    sums = {key: sum(one[key] for one in trainings) for key in ("steps", "train_seconds")}
    images = sum(one["images_per_second"] * one["train_seconds"] for one in trainings)
    best = {key: [one[key] for one in trainings] for key in trainings[0] if key.startswith("best_")}
    return {
        **trainings[-1],
        **sums,
        **best,
        "epochs": max(one["epochs"] for one in trainings),
        "images_per_second": images / sums["train_seconds"],
    }


def _load(run: Run, who: str, number: int, path: Path, prefix: str | None, use_ema: bool) -> None:
    names = run.data.classes
    classes = len(names)
    if who == "student":
        made = load_weights(run.student, run.student_spec, run.data.shape, classes, path, prefix, use_ema)
        made = in_order(made, None, names, run.data.shape, "student")
        _say(run, made)
        run.student, run.student_spec = made.network.to(run.accelerator.device), made.spec
        return
    assert run.teacher is not None
    network, member = run.teacher.networks[number], run.teacher.members[number]
    shape = (run.data.shape[0], member.size, member.size) if member.size else run.data.shape
    made = load_weights(network, member.spec, shape, classes, path, prefix, use_ema)
    if made.network is not network:
        raise Mistake(f"{path}: has removed channels: name it as the teacher's own checkpoint")
    # What the teacher's entry says is of the weights that it names; a file that has recorded its own classes knows better.
    given = None if made.facts.get("classes") else member.classes
    _say(run, in_order(made, given, names, shape, "teacher"))


def _say(run: Run, made: Made) -> None:
    if run.accelerator.is_main_process:
        for note in made.notes:
            print(note, flush=True)
