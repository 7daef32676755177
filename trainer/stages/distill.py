"""Trains the student from the teacher: soft labels, feature maps, embeddings, weights."""

from typing import Annotated

from pydantic import Field

from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake
from trainer.recipe.keys import Term
from trainer.recipe.terms import needs_teacher
from trainer.recipe.training import Training
from trainer.training.fit import fit
from trainer.training.rows import keep_histogram, record
from trainer.training.run import Run


def check(settings) -> None:
    if not any(needs_teacher(term) for term in settings.losses):
        raise Mistake("no loss looks at the teacher: use stage train, or add one that does (kl, hint ...)")


def distill(run: Run, *, training: Training, losses: Annotated[list[Term], Field(min_length=1)]) -> None:
    """Trains the student by `losses` that compare it with the teacher (Hinton et al. 2015; Romero et al. 2015).

    Losses on the labels may be among them; at least one must use the teacher.
    """
    objective = Objective(
        run.student,
        losses,
        run.data,
        run.teacher,
        num_epochs=training.epochs,
        device=run.accelerator.device,
        cache=run.cache,
    )
    numbers = fit(run, objective, training)
    objective.finish()
    record(run, "distilled", numbers["train_seconds"], **numbers)
    keep_histogram(run, "dense")
