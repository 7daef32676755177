"""Sets the least useful weights to zero, or removes whole channels, and trains the rest."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from trainer.compression.masks import (
    ask,
    cubic,
    geometric,
    refuse_shared,
    refuse_unknown,
    score_masks,
    set_mask,
    set_power,
    unwatch_gradients,
    watch_gradients,
    zeros_left,
)
from trainer.compression.parametrizations import Mask
from trainer.compression.states import dense_state, rewind_weights
from trainer.compression.weights import Weight, choose, per_layer, weights_of
from trainer.data.images import normalize
from trainer.distillation.objective import Objective, example_images
from trainer.distributed import broadcast
from trainer.mistakes import Mistake, nearest
from trainer.networks.build import build
from trainer.networks.sizes import sizes_of
from trainer.recipe.keys import PER_LAYER, Exclude, StageKeys, Term, TermKeys
from trainer.recipe.shelves import OnShelf, beside, fed, fields, find
from trainer.recipe.training import Training
from trainer.training.fit import fit
from trainer.training.rows import keep_histogram, record
from trainer.training.run import Run

Sparsity = Annotated[float, Field(gt=0, lt=1)]
Rounds = Annotated[int, Field(ge=2)]
Power = Annotated[float, Field(gt=1, le=8)]
Masks = dict[str, tuple[Tensor, list[float]]]

SCHEDULES = ("once", "cubic", "iterative")
SCOPES = ("layer", "global")


def method_keys(criterion: Callable) -> dict[str, tuple[Any, Any]]:
    """Returns the recipe keys of a criterion: its own, and `sparsity` and `scope` if it returns scores."""
    keys = fields(criterion)
    amount = beside(criterion, "AMOUNT")
    if amount is not None:
        kind, default = keys[amount]
        either = kind | dict[str, kind]  # type: ignore[valid-type]  # it is made here, as the criterion runs
        keys[amount] = (Annotated[either, PER_LAYER], default)
    elif not _resizes(criterion):
        scopes = beside(criterion, "SCOPES") or SCOPES
        keys["sparsity"] = (Annotated[Sparsity | dict[str, Sparsity], PER_LAYER], ...)
        keys["scope"] = (Literal[scopes], scopes[0])
    return keys


def check(settings: StageKeys) -> None:
    method, schedule = settings.method, settings.schedule
    criterion = find("method", method)
    refuse_unknown(criterion, method)
    # Before the first step there is no gradient, and all scores would be equal.
    schedules = beside(criterion, "SCHEDULES") or (("cubic",) if "gradient" in fed(criterion) else SCHEDULES)
    if schedule not in schedules:
        raise Mistake(f"method {method!r} has no schedule {schedule!r}; it has {', '.join(schedules)}")
    if isinstance(getattr(settings, "sparsity", None), dict) and settings.scope == "global":
        raise Mistake("scope 'global' has one sparsity for all layers; per layer is scope 'layer'")
    if schedule != "once" and settings.training is None:
        raise Mistake(f"schedule {schedule!r} prunes during a training: training is needed")
    for key, needed in (
        ("ramp", "cubic"),
        ("every", "cubic"),
        ("powerpropagation", "cubic"),
        ("rounds", "iterative"),
        ("rewind", "iterative"),
    ):
        if schedule != needed and getattr(settings, key) not in (None, False):
            raise Mistake(f"{key} has no effect with schedule {schedule!r}; {needed!r} has it")
    if settings.training is None and settings.losses:
        raise Mistake("losses have no effect without training")


def needs_trained(_settings: StageKeys) -> bool:
    return True


def order(settings: StageKeys, before: Sequence[StageKeys]) -> Iterator[str]:
    if any(stage.stage == "share" for stage in before):
        yield "prunes after sharing: prune first, then share"
    asked = _asked_of(settings)
    for stage in before:
        earlier = _asked_of(stage) if stage.stage == settings.stage else None
        if asked and earlier and asked[1:] == earlier[1:] and asked[0] < earlier[0]:
            yield f"sparsity: got {asked[0]}; an earlier stage leaves {earlier[0]}, and zeros stay zero: more is allowed"


def _asked_of(settings: StageKeys) -> tuple[float, str, list[str]] | None:
    """Returns the part of zeros, the scope and the layers left alone of a stage that asks for one part of all; None for others."""
    if _resizes(find("method", settings.method)) or not isinstance(
        getattr(settings, "sparsity", None), float
    ):
        return None
    return settings.sparsity, settings.scope, sorted(settings.exclude)


def check_student(settings: StageKeys, student: nn.Module) -> None:
    criterion = find("method", settings.method)
    own = beside(criterion, "check_student")
    if own is not None:
        own(settings, student)
    if beside(criterion, "AMOUNT") is not None:
        # It makes the masks itself: what it refuses of any weights at all, it refuses before anything is trained.
        keys = {name: getattr(settings, name) for name in fields(criterion)}
        layers = choose(weights_of(_of_extremes(student)), settings.exclude)
        _decision(layers, criterion, "once", keys)(1.0)


@torch.no_grad()
def _of_extremes(student: nn.Module) -> nn.Module:
    """Returns a copy whose weights are small but for one in each part.

    No weights reach further beyond their standard deviation, so what prunes all of these prunes all of any. What the
    untrained weights do says nothing: uniform ones end at 1.7 deviations, trained ones at ten and more.
    """
    student = copy.deepcopy(student)
    for weight in weights_of(student).values():
        if weight.parametrization is None:
            for part in weight.parameter.chunk(weight.parts):
                part.copy_(torch.linspace(1e-3, 2e-3, part.numel()).view_as(part))
                part.view(-1)[-1] = 1.0
    return student


def becomes(
    settings: StageKeys, student: nn.Module, spec: dict[str, Any], images: Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    criterion = find("method", settings.method)
    if not _resizes(criterion):
        return student, spec
    keys = {name: getattr(settings, name) for name in fields(criterion)}
    with torch.no_grad():
        num_classes = student.eval()(images).shape[-1]
    return student, _smaller(criterion, student, spec, images, settings.exclude, keys, num_classes)


def prune(
    run: Run,
    *,
    method: Annotated[str, OnShelf("method")] = "std",
    schedule: Literal["once", "cubic", "iterative"] = "once",
    ramp: Sparsity | None = None,
    every: PositiveInt | None = None,
    powerpropagation: Power | None = None,
    rounds: Rounds | None = None,
    rewind: bool = False,
    exclude: Exclude = [],
    training: Training | None = None,
    losses: list[Term] | None = None,
    **keys: Any,
) -> None:
    """Prunes the student's weights and trains the survivors; pruned weights stay zero.

    Args:
        method: The criterion, a file of trainer/criteria/, which says what is pruned first. It has its own keys. A
            criterion with scores also has sparsity, the fraction of zeros (for all layers, or {layer: value}), and
            scope: weights are ranked within each `layer` or over all layers (`global`). Each gate of a recurrent layer,
            and each of query, key and value, has its own ranking within a `layer`.
        schedule: `once` before the training; `cubic`, gradually during the training (Zhu & Gupta 2017); `iterative`, in
            rounds that each prune the same fraction of the remaining weights and then train (Frankle & Carbin 2019).
        ramp: Fraction of the training after which `cubic` is done (0.6).
        every: Steps between two masks of `cubic` (50).
        powerpropagation: `cubic` trains each weight as t |t|^(p - 1) of another tensor t, p being this number, so that small weights
            change slowly and more of them end near zero (Schwarz et al. 2021, Powerpropagation): 2 or so. By default the weight itself is trained.
        rounds: Number of rounds of `iterative` (3).
        rewind: Whether each round of `iterative` trains from the weights at the start of the stage (Renda et al. 2020).
        exclude: Layers to leave alone: 'first', 'last' or names.
        training: How to train; without it the survivors are not trained.
        losses: Of the training; by default cross-entropy.

    Raises:
        Mistake: For a layer that does not exist, is frozen, has weights that are not finite or all zero, or would lose
            all its weights.
    """

    criterion = find("method", method)
    keys = _with_defaults(criterion, keys)
    run.student.to(run.accelerator.device)
    layers = _prunable(run.student, exclude)
    if _resizes(criterion):
        _make_smaller(run, criterion, exclude, keys)
        _record(run, "pruned", method)
        _recover(run, "recovered", method, training, losses)
        return
    decide = _decision(layers, criterion, schedule, keys)

    def tighten(progress: float) -> None:
        for name, (mask, thresholds) in decide(progress).items():
            _set_mask(run, layers[name], mask)
            run.layers.setdefault(name, {})["thresholds"] = thresholds

    if schedule == "once":
        tighten(1.0)
        _record(run, "pruned", method)
        _recover(run, "recovered", method, training, losses)
    elif schedule == "cubic":
        for layer in layers.values():
            if layer.mask is None:
                set_mask(layer, layer.alive)

        def gradually(step: int, num_steps: int) -> bool:
            last = int(num_steps * (ramp or 0.6))
            if step == last or step < last and step % (every or 50) == 0:
                tighten(step / last if last else 1.0)
            return step < last

        if powerpropagation:
            set_power(layers.values(), powerpropagation)
        _recover(run, "recovered", method, training, losses, before_step=gradually)
        if powerpropagation:
            set_power(layers.values(), 1.0)
    else:
        began = {key: tensor.clone() for key, tensor in dense_state(run.student).items()}
        num_rounds = rounds or 3
        for number in range(1, num_rounds + 1):
            which = f" {number}/{num_rounds}" if number < num_rounds else ""
            tighten(number / num_rounds)
            if rewind:
                rewind_weights(run.student, began)
            _record(run, "pruned" + which, method)
            _recover(run, "recovered" + which, method, training, losses)
    unwatch_gradients(layers.values())


def _with_defaults(criterion: Callable, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a criterion's keys, with defaults for those that a caller in Python left out. Raises Mistake for others."""
    allowed = method_keys(criterion)
    for key in keys:
        if key not in allowed:
            raise Mistake(f"method {criterion.__name__!r} has no key {key!r}{nearest(key, allowed)}")
    for key, (_, default) in allowed.items():
        if default is ... and key not in keys:
            raise Mistake(f"method {criterion.__name__!r} needs {key}")
    return {key: default for key, (_, default) in allowed.items()} | dict(keys)


def _resizes(criterion: Callable) -> bool:
    """Returns whether a criterion makes the network itself smaller."""
    return "student" in fed(criterion)


def _prunable(student: nn.Module, exclude: Sequence[str]) -> dict[str, Weight]:
    layers = choose(weights_of(student), exclude)
    if not layers:
        raise Mistake("exclude leaves no layer to prune")
    for name, layer in layers.items():
        refuse_shared(layer)
        if not layer.value.any():
            raise Mistake(
                f"layer {name!r} has no weights left to prune: all are zero (name it in exclude to spare it)"
            )
    return layers


def _decision(
    layers: dict[str, Weight], criterion: Callable, schedule: str, keys: Mapping[str, Any]
) -> Callable[[float], Masks]:
    """Returns a function of the schedule's progress (0 to 1) that returns {layer: (mask, thresholds)}."""
    amount = beside(criterion, "AMOUNT")
    if amount is None:
        return _ranking(layers, criterion, schedule, keys)
    settings = per_layer(layers, keys[amount], amount)
    others = {name: value for name, value in keys.items() if name != amount}
    # A gradual schedule judges all weights that it began with, its own zeros too: the deviation of what it has left would
    # rise with every mask, and the threshold with it.
    began = {name: layer.alive.clone() for name, layer in layers.items()}

    def decide(progress: float) -> Masks:
        found = {}
        for name, layer in layers.items():
            setting = settings[name]
            if isinstance(setting, Real):
                setting = cubic(float(setting), progress)
            mask, thresholds = ask(criterion, layer, began[name], **others, **{amount: setting})
            found[name] = mask & layer.alive, thresholds
        return found

    return decide


def _ranking(
    layers: dict[str, Weight], criterion: Callable, schedule: str, keys: Mapping[str, Any]
) -> Callable[[float], Masks]:
    """Does the same as `_decision` for a criterion that returns scores."""

    target = per_layer(layers, keys["sparsity"], "sparsity")
    together = keys["scope"] == "global"
    others = {name: value for name, value in keys.items() if name not in ("sparsity", "scope")}
    initial = zeros_left(layers, target, together)
    before = {name: None if layer.mask is None else layer.mask.clone() for name, layer in layers.items()}
    parts = {name: layer.parts for name, layer in layers.items()}
    course = geometric if schedule == "iterative" else cubic
    adds_up = "gradient" in fed(criterion)
    if adds_up:
        watch_gradients(layers.values(), criterion, **others)

    def decide(progress: float) -> Masks:
        if adds_up:
            # This stage's pruned weights may return if their scores rise, an earlier stage's may not.
            alive, scores = before, {}
            for name, layer in layers.items():
                found = layer.parametrization
                assert isinstance(found, Mask) and found.score is not None
                scores[name] = found.score
        else:
            alive = {name: layer.mask for name, layer in layers.items()}
            scores = {name: ask(criterion, layer, **others) for name, layer in layers.items()}
        wanted = {name: course(value, progress, initial[name]) for name, value in target.items()}
        return score_masks(scores, alive, wanted, together, parts)

    return decide


def _set_mask(run: Run, layer: Weight, mask: Tensor) -> None:

    mask = broadcast(mask.to(run.accelerator.device, torch.uint8)).bool()  # as the main process decides
    if not mask.any():
        raise Mistake(f"layer {layer.name!r} would lose all its weights: ask for less, or name it in exclude")
    set_mask(layer, mask.to(layer.value.device))


def _make_smaller(run: Run, criterion: Callable, exclude: Sequence[str], keys: Mapping[str, Any]) -> None:
    """Makes the student smaller by the criterion, in place. Raises Mistake if its sizes cannot rebuild the network."""

    images = normalize(example_images(run.data, run.accelerator.device), run.data.mean, run.data.std)
    num_classes = len(run.data.classes)
    spec = _smaller(criterion, run.student, run.student_spec, images, exclude, keys, num_classes)
    for tensor in run.student.state_dict().values():  # all processes use the main one's choice
        broadcast(tensor)
    run.student_spec = spec


def _smaller(
    criterion: Callable,
    student: nn.Module,
    spec: Mapping[str, Any],
    images: Tensor,
    exclude: Sequence[str],
    keys: Mapping[str, Any],
    num_classes: int,
) -> dict[str, Any]:
    """Makes a student smaller by the criterion, in place; returns its new spec. Raises Mistake if that cannot rebuild it."""
    given = {"student": student, "images": images, "exclude": exclude}
    sizes = criterion(*(given[word] for word in fed(criterion)), **keys)
    spec = {**spec, "resized": {**spec.get("resized", {}), **sizes}}
    channels, height, width = images.shape[1:]
    with torch.device("meta"):
        rebuilt = build(spec, (channels, height, width), num_classes)
    if sizes_of(rebuilt) != sizes_of(student):
        raise Mistake(
            f"method {criterion.__name__!r}: this network cannot be rebuilt from the sizes of its layers"
        )
    return spec


def _record(run: Run, label: str, method: str, seconds: float = 0.0, **numbers: Any) -> None:

    record(run, label, seconds, method=method, **numbers)
    keep_histogram(run, label.split()[0])


def _recover(
    run: Run,
    label: str,
    method: str,
    training: Training | None,
    losses: list[TermKeys] | None,
    before_step: Callable[[int, int], bool] | None = None,
) -> None:

    if training is None:
        return
    objective = Objective(
        run.student,
        losses or [TermKeys(loss="cross_entropy")],
        run.data,
        run.teacher,
        num_epochs=training.epochs,
        device=run.accelerator.device,
        cache=run.cache,
    )
    numbers = fit(run, objective, training, before_step)
    objective.finish()
    _record(run, label, method, numbers["train_seconds"], **numbers)
