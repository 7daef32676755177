"""Weighs the terms of a training as it goes on, and finds the weights that the recipe gives as ratios."""

from torch import Tensor

from trainer.distillation.ratios import Ratio, faults, has_auto, ratios, weighs
from trainer.training.state import State

FINDING = (0, 1, 2, 4, 8, 16, 32, 64)  # steps at which such weights are set; the last one counts from then on
LEAST_STEPS = 100  # between the measurements of two epochs: one takes as long as two steps


def weigh_if_due(state: State, images: Tensor, labels: Tensor, index: Tensor, view: int | None) -> None:
    """Measures the terms' ratios in a batch before a step, if it is time: at the start of an epoch, or to find weights.

    The ratios are logged and kept in the tally, first and last; a term out of bounds is named once, after the first steps.
    """
    finds = has_auto(state.objective) and (state.step in FINDING or _lacks_one(state))
    if not (finds or _epoch_is_due(state)) or not weighs(state.objective):
        return
    # What is frozen for DDP's sake, and would count in one process; and what will be trained after the first epochs.
    later = state.frozen.parameters if state.frozen is not None and state.syncs_by_hand else []
    frozen = [*state.unused, *later]
    for parameter in frozen:
        parameter.requires_grad_(True)
    epoch = state.step / state.steps_per_epoch
    found = ratios(state.objective, images, labels, index, view, epoch, finds)
    for parameter in frozen:
        parameter.requires_grad_(False)
    _keep(state, found)


def _lacks_one(state: State) -> bool:
    """Returns whether a weight is to be found that no batch could tell yet: none had an image with a label."""
    known = state.tally.get("ratios", {})
    return any(bound.is_found and bound.term not in known for bound in state.objective.bound)


def _epoch_is_due(state: State) -> bool:
    """Returns whether an epoch starts, and so many steps after the last epoch that was due; a function of the step alone."""
    step, before = state.step, state.step - state.steps_per_epoch
    return step % state.steps_per_epoch == 0 and step // LEAST_STEPS > before // LEAST_STEPS


def _keep(state: State, found: dict[str, Ratio]) -> None:
    run, kept = state.run, state.tally.setdefault("ratios", {})
    for name, ratio in found.items():
        first = kept.get(name, {"first": ratio.ratio})["first"]
        kept[name] = {"weight": ratio.weight, "first": first, "last": ratio.ratio}
    run.log_numbers(state.step, **{f"ratio/{name}": r.ratio for name, r in found.items()})
    # The ratios of a network at its random start say little of what follows.
    is_early = state.step < min(FINDING[-1], state.num_steps // 2)
    for name, fault in () if is_early else faults(found):
        if name not in state.named:
            state.named.add(name)
            run.log.warning(run.stage_name, f"{name}: {fault}")
            run.accelerator.print(f"{run.stage_name}: {name}: {fault}", flush=True)
