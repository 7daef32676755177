"""Sets the least useful weights to zero and lets the rest recover."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from trainer import compress
from trainer.context import Run
from trainer.evaluate import keep_histogram, record
from trainer.fit import Training, fit
from trainer.objective import Objective, Term, TermKeys

Sparsity = Annotated[float, Field(gt=0, lt=1)]


def check(settings) -> None:
    if settings.method == "std":
        if settings.sensitivity is None:
            raise ValueError("method 'std' needs sensitivity (threshold = sensitivity x standard deviation of a layer)")
        if settings.sparsity is not None:
            raise ValueError("sparsity has no effect with method 'std'; sensitivity decides")
        if settings.scope is not None:
            raise ValueError("scope has no effect with method 'std'; its thresholds are each layer's own")
    else:
        if settings.sensitivity is not None:
            raise ValueError(f"sensitivity has no effect with method {settings.method!r}; sparsity decides")
        if settings.sparsity is None:
            raise ValueError(f"method {settings.method!r} needs sparsity, the share of weights that become zero")
        if settings.scope == "global" and isinstance(settings.sparsity, dict):
            raise ValueError("scope 'global' has one sparsity for all layers; per layer is scope 'layer'")
    if settings.schedule == "cubic" and settings.training is None:
        raise ValueError("schedule 'cubic' prunes during a training: training is needed")
    if settings.schedule == "once" and (settings.ramp is not None or settings.every is not None):
        raise ValueError("ramp and every have no effect with schedule 'once'; 'cubic' has them")
    if settings.training is None and settings.losses:
        raise ValueError("losses have no effect without training")


def prune(
    run: Run,
    *,
    method: Literal["std", "magnitude", "lamp"] = "std",
    sensitivity: PositiveFloat | dict[str, PositiveFloat] | None = None,
    sparsity: Sparsity | dict[str, Sparsity] | None = None,
    scope: Literal["layer", "global"] | None = None,
    schedule: Literal["once", "cubic"] = "once",
    ramp: Sparsity | None = None,
    every: PositiveInt | None = None,
    keep: list[str] = [],
    training: Training | None = None,
    losses: list[Term] | None = None,
) -> dict:
    """Prunes the student's weights and trains the survivors, the pruned ones held at zero.

    method: `std` prunes below sensitivity x standard deviation of the layer's surviving weights (Han et al. 2015),
    `magnitude` the smallest, `lamp` those of the lowest LAMP score (Lee et al. 2021; global). sensitivity, sparsity: one
    for all layers or {layer: value}. scope: rank weights within each `layer` (magnitude's own) or over all (`global`,
    lamp's own). schedule: `once` before the training, or `cubic`: tightened every `every` steps (50) over the first
    `ramp` (0.6) of it (Zhu & Gupta 2017). keep: layers left alone ('first', 'last' or names).
    Raises ValueError for a layer that does not exist or would lose all its weights.
    """
    scope = scope or ("global" if method == "lamp" else "layer")
    places = compress.choose(compress.weights(run.student), keep)
    if not places:
        raise ValueError("keep leaves no layer to prune")
    target = compress.per_layer(places, sensitivity if method == "std" else sparsity, "sensitivity" if method == "std" else "sparsity")
    thresholds: dict[str, list[float]] = {}

    def tighten(progress: float) -> None:
        wanted = {n: compress.cubic(t, progress) if schedule == "cubic" else t for n, t in target.items()}
        if method == "std":
            masks = compress.std_masks(places, wanted)
        else:
            score = compress.lamp_scores if method == "lamp" else torch.abs
            scores = {name: score(place.value.detach()) for name, place in places.items()}
            alive = {name: place.mask for name, place in places.items()}
            masks = compress.score_masks(scores, alive, wanted, together=scope == "global")
        for name, (mask, found) in masks.items():
            if run.accelerator.num_processes > 1:  # decided on the main process
                told = mask.to(run.accelerator.device, torch.uint8)
                torch.distributed.broadcast(told, src=0)
                mask = told.bool()
            if not mask.any():
                raise ValueError(f"layer {name!r} would lose all its weights: ask for less, or name it in keep")
            compress.set_mask(places[name], mask.to(places[name].value.device))
            thresholds[name] = found

    run.student.to(run.accelerator.device)
    numbers: dict = {}
    if schedule == "once":
        tighten(1.0)
        record(run, "pruned", method=method)
        keep_histogram(run, "pruned")
    else:
        for place in places.values():
            if place.mask is None:
                compress.set_mask(place, torch.ones_like(place.value, dtype=torch.bool))
    if training is not None:
        objective = Objective(
            run.student, losses or [TermKeys(loss="cross_entropy")], run.data, run.teacher,
            num_epochs=training.epochs, device=run.accelerator.device,
        )

        def gradually(step: int, num_steps: int) -> None:
            last = max(1, int(num_steps * (ramp or 0.6)))
            if step <= last and (step % (every or 50) == 0 or step == last):
                tighten(step / last)

        numbers = fit(run, objective, training, gradually if schedule == "cubic" else None)
        objective.finish()
        record(run, "recovered", numbers["train_seconds"], method=method, **numbers)
        keep_histogram(run, "recovered")
    for name, place in places.items():
        if not thresholds:  # resumed after the last tightening: the masks are in the checkpoint
            break
        run.layers.setdefault(name, {})["thresholds"] = thresholds[name]
    return numbers
