"""Sets the least useful weights to zero, or takes whole channels out, and lets the rest recover."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from trainer import channels, compress, scores, teacher
from trainer.compress import Place
from trainer.context import Run
from trainer.evaluate import keep_histogram, record
from trainer.fit import Training, fit
from trainer.objective import Objective, Term, TermKeys

Sparsity = Annotated[float, Field(gt=0, lt=1)]
Pattern = Annotated[str, Field(pattern=r"^[0-9]+:[0-9]+$")]
Rounds = Annotated[int, Field(ge=2)]

# The schedules of each method. Movement has no score before there was a training, rate no mask to estimate costs from.
SCHEDULES = {
    "std": ("once", "cubic"),
    "magnitude": ("once", "cubic", "iterative"),
    "lamp": ("once", "cubic", "iterative"),
    "movement": ("cubic",),
    "rate": ("cubic", "iterative"),
    "n_m": ("once",),
    "channels": ("once",),
}
TOGETHER = ("lamp", "rate")  # methods whose scores of different layers are made to be compared


def check(settings) -> None:
    method, schedule = settings.method, settings.schedule

    def has_no_effect(key: str, why: str) -> None:
        if getattr(settings, key) not in (None, False):
            raise ValueError(f"{key} has no effect with {why}")

    if method == "std":
        has_no_effect("sparsity", "method 'std'; sensitivity decides")
        if settings.sensitivity is None:
            raise ValueError("method 'std' needs sensitivity (threshold = sensitivity x standard deviation of a layer)")
        has_no_effect("scope", "method 'std'; its thresholds are each layer's own")
    elif method == "n_m":
        has_no_effect("sparsity", "method 'n_m'; pattern decides")
        has_no_effect("scope", "method 'n_m'; its groups are each layer's own")
        if settings.pattern is None:
            raise ValueError("method 'n_m' needs pattern, such as '2:4': 2 of every 4 weights are kept")
        n, m = map(int, settings.pattern.split(":"))
        if not 0 < n < m:
            raise ValueError(f"pattern: got {settings.pattern!r}; N of every M weights are kept, so N is at least 1 and "
                             "less than M")
    elif settings.sparsity is None:
        what = "channels that are removed" if method == "channels" else "weights that become zero"
        raise ValueError(f"method {method!r} needs sparsity, the share of {what}")
    if method != "std":
        has_no_effect("sensitivity", f"method {method!r}; {'pattern' if method == 'n_m' else 'sparsity'} decides")
    if method != "n_m":
        has_no_effect("pattern", f"method {method!r}; 'n_m' has it")
    if isinstance(settings.sparsity, dict) and (settings.scope or _scope(method)) == "global":
        raise ValueError("scope 'global' has one sparsity for all layers; per layer is scope 'layer'")
    if schedule not in SCHEDULES[method]:
        raise ValueError(f"method {method!r} has no schedule {schedule!r}; it has {', '.join(SCHEDULES[method])}")
    if schedule != "once" and settings.training is None:
        raise ValueError(f"schedule {schedule!r} prunes during a training: training is needed")
    if schedule != "cubic":
        has_no_effect("ramp", f"schedule {schedule!r}; 'cubic' has it")
        has_no_effect("every", f"schedule {schedule!r}; 'cubic' has it")
    elif settings.training.keep == "best" or settings.training.patience is not None:
        raise ValueError("with schedule 'cubic' the weights of the best epoch may be those of a smaller sparsity: "
                         "leave out training's keep: best and patience")
    if schedule != "iterative":
        has_no_effect("rounds", f"schedule {schedule!r}; 'iterative' has it")
        has_no_effect("rewind", f"schedule {schedule!r}; 'iterative' has it")
    if settings.training is None and settings.losses:
        raise ValueError("losses have no effect without training")
    if method == "channels" and not channels.installed():
        raise ValueError(channels.INSTALL)


def _scope(method: str) -> str:
    return "global" if method in TOGETHER else "layer"


def prune(
    run: Run,
    *,
    method: Literal["std", "magnitude", "lamp", "movement", "rate", "n_m", "channels"] = "std",
    sensitivity: PositiveFloat | dict[str, PositiveFloat] | None = None,
    sparsity: Sparsity | dict[str, Sparsity] | None = None,
    pattern: Pattern | None = None,
    scope: Literal["layer", "global"] | None = None,
    schedule: Literal["once", "cubic", "iterative"] = "once",
    ramp: Sparsity | None = None,
    every: PositiveInt | None = None,
    rounds: Rounds | None = None,
    rewind: bool = False,
    keep: list[str] = [],
    training: Training | None = None,
    losses: list[Term] | None = None,
) -> dict:
    """Prunes the student's weights and trains the survivors, the pruned ones held at zero.

    method, what goes first:
    `std` weights below sensitivity x standard deviation of the layer's surviving ones (Han et al. 2015);
    `magnitude` the smallest; `lamp` those of the lowest LAMP score (Lee et al. 2021);
    `movement` those that a training moves towards zero (Sanh et al. 2020; they may come back while it tightens);
    `rate` those of the lowest LAMP score for the root of the bits that their position costs in the file;
    `n_m` all but the N largest of every M along a layer's inputs, as `pattern: "2:4"` (Mishra et al. 2021);
    `channels` whole channels of the least L2 norm: layers really become smaller (Fang et al. 2023). This needs the
    package torch-pruning.
    sensitivity, sparsity: one for all layers or {layer: value}; sparsity is the share of zeros (of channels removed).
    Gates of a recurrent layer, and query, key and value of attention, are layers of their own to `std` and in a ranking
    within a `layer`. scope: rank within each `layer`, or all together (`global`: the default of lamp and rate).
    schedule: `once` before the training; `cubic`, tightened every `every` steps (50) over the first `ramp` (0.6) of it
    (Zhu & Gupta 2017); `iterative`, in `rounds` (3) that each prune the same share of what is left and then train,
    with `rewind` from the weights that the stage began with (Frankle & Carbin 2019; Renda et al. 2020).
    keep: layers left alone ('first', 'last' or names).
    Raises ValueError for a layer that does not exist, is frozen, has weights that are not finite or all zero, or would
    lose all its weights.
    """
    places = _prunable(run, keep)
    run.student.to(run.accelerator.device)
    if method == "channels":
        _remove_channels(run, places, sparsity, scope == "global", keep)
        record(run, "pruned", method=method)
        keep_histogram(run, "pruned")
        return _recover(run, "recovered", method, training, losses) if training is not None else {}
    together = (scope or _scope(method)) == "global"
    decide = _decision(run, places, method, sensitivity, sparsity, pattern, schedule, together)
    thresholds: dict[str, list[float]] = {}

    def tighten(progress: float) -> None:
        masks = {name: mask for name, (mask, _) in decide(progress).items()} if run.accelerator.is_main_process else {}
        _put_on(run, places, masks)

    def tighten(progress: float) -> None:
        masks = decide(progress)
        thresholds.update({name: found for name, (_, found) in masks.items()})
        _set(run, places, {name: mask for name, (mask, _) in masks.items()})

    numbers: dict = {}
    if schedule == "once":
        tighten(1.0)
        record(run, "pruned", method=method)
        keep_histogram(run, "pruned")
        if training is not None:
            numbers = _recover(run, "recovered", method, training, losses)
    elif schedule == "cubic":
        for place in places.values():
            if place.mask is None:
                compress.set_mask(place, torch.ones_like(place.value, dtype=torch.bool))

        def gradually(step: int, num_steps: int) -> None:
            last = max(1, int(num_steps * (ramp or 0.6)))
            if step <= last and (step % (every or 50) == 0 or step == last):
                tighten(step / last)

        numbers = _recover(run, "recovered", method, training, losses, gradually)
    else:
        began = {key: tensor.clone() for key, tensor in compress.dense_state(run.student).items()} if rewind else {}
        num_rounds = rounds or 3
        for number in range(1, num_rounds + 1):
            tighten(number / num_rounds)
            compress.rewind(run.student, began)
            told = f" {number}/{num_rounds}" if number < num_rounds else ""
            record(run, "pruned" + told, method=method)
            keep_histogram(run, "pruned")
            fitted = _recover(run, "recovered" + told, method, training, losses)
            for key in ("epochs", "steps", "train_seconds"):
                fitted[key] += numbers.get(key, 0)
            numbers = fitted
    if method == "movement":
        compress.forget_movement(places.values())
    for name, found in thresholds.items():  # none, where a resumed training was past its last tightening
        run.layers.setdefault(name, {})["thresholds"] = found
    return numbers
