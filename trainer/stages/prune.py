"""Sets the least useful weights to zero, or takes whole channels out, and lets the rest recover."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from trainer import scores
from trainer.compression import channels, masks
from trainer.compression.masks import (
    cubic,
    forget_movement,
    geometric,
    refuse_shared,
    score_masks,
    set_mask,
    std_masks,
    watch_movement,
)
from trainer.compression.states import bake, dense_state
from trainer.compression.weights import Weight, choose, per_layer, weights_of
from trainer.data.images import normalize
from trainer.distillation.objective import Objective
from trainer.distributed import broadcast
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.networks.sizes import sizes_of
from trainer.recipe.keys import Term, TermKeys, Training
from trainer.training.fit import fit
from trainer.training.rows import keep_histogram, record
from trainer.training.run import Run

Sparsity = Annotated[float, Field(gt=0, lt=1)]
Pattern = Annotated[str, Field(pattern=r"^[0-9]+:[0-9]+$")]
Rounds = Annotated[int, Field(ge=2)]

# The schedules of each method. Movement has no score before a training, rate no mask to estimate costs from.
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
            raise Mistake(f"{key} has no effect with {why}")

    if method == "std":
        has_no_effect("sparsity", "method 'std'; sensitivity decides")
        if settings.sensitivity is None:
            raise Mistake(
                "method 'std' needs sensitivity (threshold = sensitivity x standard deviation of a layer)"
            )
        has_no_effect("scope", "method 'std'; its thresholds are each layer's own")
    elif method == "n_m":
        has_no_effect("sparsity", "method 'n_m'; pattern decides")
        has_no_effect("scope", "method 'n_m'; its groups are each layer's own")
        if settings.pattern is None:
            raise Mistake("method 'n_m' needs pattern, such as '2:4': 2 of every 4 weights are kept")
        n, m = map(int, settings.pattern.split(":"))
        if not 0 < n < m:
            raise Mistake(
                f"pattern: got {settings.pattern!r}; N of every M weights are kept, so N is at least 1 and "
                "less than M"
            )
    elif settings.sparsity is None:
        what = "channels that are removed" if method == "channels" else "weights that become zero"
        raise Mistake(f"method {method!r} needs sparsity, the share of {what}")
    if method != "std":
        has_no_effect(
            "sensitivity", f"method {method!r}; {'pattern' if method == 'n_m' else 'sparsity'} decides"
        )
    if method != "n_m":
        has_no_effect("pattern", f"method {method!r}; 'n_m' has it")
    if isinstance(settings.sparsity, dict) and (settings.scope or _scope(method)) == "global":
        raise Mistake("scope 'global' has one sparsity for all layers; per layer is scope 'layer'")
    if schedule not in SCHEDULES[method]:
        raise Mistake(
            f"method {method!r} has no schedule {schedule!r}; it has {', '.join(SCHEDULES[method])}"
        )
    if schedule != "once" and settings.training is None:
        raise Mistake(f"schedule {schedule!r} prunes during a training: training is needed")
    if schedule != "cubic":
        has_no_effect("ramp", f"schedule {schedule!r}; 'cubic' has it")
        has_no_effect("every", f"schedule {schedule!r}; 'cubic' has it")
    if schedule != "iterative":
        has_no_effect("rounds", f"schedule {schedule!r}; 'iterative' has it")
        has_no_effect("rewind", f"schedule {schedule!r}; 'iterative' has it")
    if settings.training is None and settings.losses:
        raise Mistake("losses have no effect without training")
    if method == "channels" and not channels.installed():
        raise Mistake(channels.INSTALL)


def check_student(settings, student: nn.Module) -> None:
    """What only the network shows, known before the first training: layers that a method cannot prune."""
    if settings.method == "channels":
        channels.check(student)
    if settings.method == "n_m":
        for place in choose(weights_of(student), settings.keep).values():
            _n_m_mask(place, settings.pattern)


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
) -> None:
    """Prunes the student's weights and trains the survivors, the pruned ones held at zero.

    method, what goes first:
    `std` weights below sensitivity x standard deviation of the layer's surviving ones (Han et al. 2015);
    `magnitude` the smallest; `lamp` those of the lowest LAMP score (Lee et al. 2021);
    `movement` those that a training moves towards zero (Sanh et al. 2020; they may come back while it
    tightens);
    `rate` those of the lowest LAMP score for the root of the bits that their position costs in the file;
    `n_m` all but the N largest of every M along a layer's inputs, as `pattern: "2:4"` (Mishra et al. 2021);
    `channels` whole channels of the least L2 norm: layers really become smaller (Fang et al. 2023). This
    needs the package torch-pruning.
    sensitivity, sparsity: one for all layers or {layer: value}; sparsity is the share of zeros (of channels
    removed). Gates of a recurrent layer, and query, key and value of attention, are layers of their own to
    `std` and in a ranking within a `layer`. scope: rank within each `layer`, or all together (`global`: the
    default of lamp and rate).
    schedule: `once` before the training; `cubic`, tightened every `every` steps (50) over the first `ramp`
    (0.6) of it (Zhu & Gupta 2017); `iterative`, in `rounds` (3) that each prune the same share of what is
    left and then train, with `rewind` from the weights that the stage began with (Frankle & Carbin 2019;
    Renda et al. 2020).
    keep: layers left alone ('first', 'last' or names).
    Raises Mistake for a layer that does not exist, is frozen, has weights that are not finite or all zero,
    or would lose all its weights.
    """
    run.student.to(run.accelerator.device)
    places = _prunable(run, keep)
    if method == "channels":
        _remove_channels(run, places, sparsity, together=scope == "global")
        _told(run, "pruned", method)
        _recover(run, "recovered", method, training, losses)
        return
    decide = _decision(
        run, places, method, sensitivity or sparsity or pattern, schedule, scope or _scope(method)
    )

    def tighten(progress: float) -> None:
        for name, (mask, found) in decide(progress).items():
            _set_mask(run, places[name], mask)
            run.layers.setdefault(name, {})["thresholds"] = found

    if schedule == "once":
        tighten(1.0)
        _told(run, "pruned", method)
        _recover(run, "recovered", method, training, losses)
    elif schedule == "cubic":
        for place in places.values():
            if place.mask is None:
                set_mask(place, torch.ones_like(place.value, dtype=torch.bool))

        def gradually(step: int, num_steps: int) -> bool:
            last = int(num_steps * (ramp or 0.6))
            if step == last or step < last and step % (every or 50) == 0:
                tighten(step / last if last else 1.0)
            return step < last

        _recover(run, "recovered", method, training, losses, gradually)
    else:
        began = {key: tensor.clone() for key, tensor in dense_state(run.student).items()}
        num_rounds = rounds or 3
        for number in range(1, num_rounds + 1):
            which = f" {number}/{num_rounds}" if number < num_rounds else ""
            tighten(number / num_rounds)
            if rewind:
                masks.rewind(run.student, began)
            _told(run, "pruned" + which, method)
            _recover(run, "recovered" + which, method, training, losses)
    if method == "movement":
        forget_movement(places.values())


def _prunable(run: Run, keep: list[str]) -> dict[str, Weight]:
    places = choose(weights_of(run.student), keep)
    if not places:
        raise Mistake("keep leaves no layer to prune")
    for name, place in places.items():
        refuse_shared(place)
        if not place.value.any():
            raise Mistake(
                f"layer {name!r} has no weights left to prune: all are zero (name it in keep to spare it)"
            )
    return places


def _decision(
    run: Run, places: dict[str, Weight], method: str, setting, schedule: str, scope: str
) -> Callable[[float], dict[str, tuple[Tensor, list[float]]]]:
    """The function that gives {layer: (mask, thresholds)} at a progress (0 to 1) of the schedule."""
    if method == "n_m":
        return lambda _: {name: (_n_m_mask(place, setting), []) for name, place in places.items()}
    if method == "std":
        sensitivity = per_layer(places, setting, "sensitivity")
        return lambda progress: std_masks(
            places, {name: cubic(value, progress) for name, value in sensitivity.items()}
        )
    target = per_layer(places, setting, "sparsity")
    together = scope == "global"
    initial = _zeros(places, target, together)
    before = {name: None if place.mask is None else place.mask.clone() for name, place in places.items()}
    parts = {name: place.parts for name, place in places.items()}
    course = geometric if schedule == "iterative" else cubic
    if method == "movement":
        watch_movement(places.values())

    def score(place: Weight) -> Tensor:
        if method == "magnitude":
            return scores.magnitude(place.value)
        if method == "movement":
            return place.parametrization.score
        lamp = scores.lamp(place.value, place.parts)
        return lamp if method == "lamp" or place.mask is None else scores.rate(lamp, place.mask)

    def decide(progress: float) -> dict[str, tuple[Tensor, list[float]]]:
        # By movement a weight may come back, but not one that an earlier stage pruned.
        alive = before if method == "movement" else {name: place.mask for name, place in places.items()}
        wanted = {name: course(value, progress, initial[name]) for name, value in target.items()}
        return score_masks({n: score(p) for n, p in places.items()}, alive, wanted, together, parts)

    return decide


def _n_m_mask(place: Weight, pattern: str) -> Tensor:
    n, m = map(int, pattern.split(":"))
    try:
        mask = scores.n_m_mask(place.value, n, m, place.input_axis)
    except Mistake as error:
        raise Mistake(f"layer {place.name!r}: {error}: name it in keep to leave it alone") from None
    return mask if place.mask is None else mask & place.mask


def _zeros(places: dict[str, Weight], target: dict[str, float], together: bool) -> dict[str, float]:
    """The sparsity that an earlier stage left, in each layer (or in all). Raises Mistake where no more is
    asked for.
    """
    dead = {name: 0.0 if place.mask is None else (~place.mask).sum().item() for name, place in places.items()}
    if together:
        share = sum(dead.values()) / sum(place.value.numel() for place in places.values())
        found = dict.fromkeys(places, share)
    else:
        found = {name: dead[name] / place.value.numel() for name, place in places.items()}
    for name, place in places.items():
        most = found[name]
        if not together and place.mask is not None:
            most = max((~part).double().mean().item() for part in place.mask.chunk(place.parts))
        if target[name] < most:
            where = "the layers have" if together else f"layer {name!r} has"
            raise Mistake(f"{where} {most * 100:.2f} % zeros already: sparsity {target[name]} asks for fewer")
    return found


def _set_mask(run: Run, place: Weight, mask: Tensor) -> None:
    mask = broadcast(mask.to(run.accelerator.device, torch.uint8)).bool()  # as the main process decides
    if not mask.any():
        raise Mistake(f"layer {place.name!r} would lose all its weights: ask for less, or name it in keep")
    set_mask(place, mask.to(place.value.device))


def _remove_channels(run: Run, places: dict[str, Weight], sparsity, together: bool) -> None:
    every = weights_of(run.student)
    masked = [name for name, place in every.items() if place.mask is not None]
    classifier = list(every)[-1]
    smaller = {name: place for name, place in places.items() if name != classifier}
    if not smaller:
        raise Mistake("keep leaves no layer whose channels can be removed (the classifier's stay)")
    if isinstance(sparsity, dict):
        shares = per_layer(places, sparsity, "sparsity")
        sparsity = {name: shares[name] for name in smaller}
    images = torch.rand(2, *run.data.shape, generator=torch.Generator().manual_seed(0)).to(
        run.accelerator.device
    )
    bake(run.student)
    found = channels.remove(
        run.student,
        normalize(images, run.data.mean, run.data.std),
        sparsity,
        keep=[name for name in every if name not in smaller],
        together=together,
    )
    for (
        tensor
    ) in run.student.state_dict().values():  # all have chosen from equal weights; the main one's word counts
        broadcast(tensor)
    for name, place in weights_of(run.student).items():
        if name in masked:
            set_mask(place, place.value != 0)
    spec = {**run.student_spec, "resized": {**run.student_spec.get("resized", {}), **found}}
    with torch.device("meta"):
        rebuilt = build(spec, run.data.shape, len(run.data.classes))
    if sizes_of(rebuilt) != sizes_of(run.student):
        raise Mistake("method 'channels': this network cannot be rebuilt from the sizes of its layers")
    run.student_spec = spec


def _told(run: Run, label: str, method: str, seconds: float = 0.0, **numbers) -> None:
    record(run, label, seconds, method=method, **numbers)
    keep_histogram(run, label.split()[0])


def _recover(
    run: Run,
    label: str,
    method: str,
    training: Training | None,
    losses: list[Term] | None,
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
    )
    numbers = fit(run, objective, training, before_step)
    objective.finish()
    _told(run, label, method, numbers["train_seconds"], **numbers)
