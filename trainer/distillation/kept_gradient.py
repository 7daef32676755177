"""Compares the gradients that losses give with the teacher's kept answers and with its own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.data.images import Data
from trainer.distillation.answer_record import pack, record_of, restore
from trainer.distillation.answers import Answers
from trainer.distillation.objective import Objective
from trainer.distillation.ratios import has_auto, ratios
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.networks.features import Seen, evaluating
from trainer.recipe.keys import CacheKeys, TermKeys
from trainer.recipe.terms import wants

NUM_IMAGES = 16  # random ones, with which a loss is tried before the training
LEAST_COSINE = 0.5
MOST_LENGTH = 2.0  # ratio of the lengths of the two gradients, either way


class Comparison(NamedTuple):
    """cosine: between the student's gradients with kept and with live answers. length: the first's length, in the second's."""

    cosine: float
    length: float


class _Given:
    """Answers to one batch, in the place of a cache."""

    num_computed = 0

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def keeps(self, _layers: Sequence[str], _embedding: bool) -> bool:
        return True

    def see(self, *_: object) -> Seen:
        return self.seen


def compared(
    objective: Objective, images: Tensor, labels: Tensor, index: Tensor, live: Seen, kept: Seen
) -> Comparison:
    """Returns how the student's gradients of a batch differ between two answers of the teacher.

    Args:
        objective: The losses; one without state that is worth keeping, since some losses change theirs.
        images: [N, C, H, W] in [0, 1].
        labels: [N].
        index: [N] sample ids.
        live: The teacher's own answers, with all that the losses take.
        kept: Those that the cache gives.
    """
    own, other = (_gradient(objective, images, labels, index, seen).double() for seen in (live, kept))
    length = own.norm()
    if not length or not other.norm():
        return Comparison(1.0 if torch.equal(own, other) else 0.0, 1.0 if torch.equal(own, other) else 0.0)
    return Comparison(torch.dot(own, other).div(length * other.norm()).item(), (other.norm() / length).item())


def least_cosine(
    cache: Answers, student: nn.Module, stages: Sequence[Sequence[TermKeys]], device: torch.device | str
) -> float | None:
    """Returns the least cosine of the student's gradients with kept and with live answers, over the losses of some stages.

    It is measured on some training images in view 0. Stages that the cache does not serve are left out; None without any.
    """
    cosines = []
    for terms in stages:
        with torch.random.fork_rng(_own(device)):
            objective = Objective(student, terms, cache.data, cache.teacher, device=device)
        if cache.keeps(*objective.see_teacher):
            images, index, live, kept = cache.example(min(64, cache.data.train.at_once))
            labels = cache.data.train.labels[: len(index)].to(device)
            if has_auto(objective):
                with evaluating(objective):
                    ratios(objective, images, labels, index, find=True)
            cosines.append(compared(objective, images, labels, index, live, kept).cosine)
    return min(cosines, default=None)


def _own(device: torch.device | str) -> list[torch.device]:
    """Returns the GPU whose random generator a comparison uses; without a name torch would take all, and open each of them."""
    device = torch.device(device)
    return [device] if device.type == "cuda" else []


def refuse_misled(
    student: nn.Module,
    terms: Sequence[TermKeys],
    data: Data,
    teacher: Teacher,
    keys: CacheKeys,
    device: torch.device | str,
) -> None:
    """Raises Mistake for a loss that a cache of the highest logits would mislead, found by the student's gradient.

    The logits are random, with the scale of a trained network's: the teacher may not be trained yet.
    """
    if keys.top is None or keys.top > len(data.classes) - 2:  # the cache itself refuses that
        return
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(NUM_IMAGES, len(data.classes), generator=random)
    logits[torch.arange(NUM_IMAGES), torch.arange(NUM_IMAGES) % len(data.classes)] += 8
    images = torch.rand(NUM_IMAGES, *data.shape, generator=random).to(device)
    index = data.train.ids[torch.arange(NUM_IMAGES) % len(data.train)].to(device)
    labels = data.train.labels[torch.arange(NUM_IMAGES) % len(data.train)].to(device)
    for term in terms:
        if "teacher_logits" not in wants(term):
            continue
        with torch.random.fork_rng(_own(device)):
            torch.manual_seed(0)  # of what a loss learns
            objective = Objective(
                student, [term.model_copy(update={"weight": 1.0})], data, teacher, device=device
            )
            with torch.no_grad():
                live = teacher.see(images, *objective.see_teacher)._replace(logits=logits.to(device))
                record = record_of(Seen(live.logits, None, {}), getattr(torch, keys.type), keys.top)
                kept = live._replace(logits=restore(record, pack(record, Seen(live.logits, None, {}))))
            found = compared(objective, images, labels, index, live, kept)
        if found.cosine < LEAST_COSINE or not 1 / MOST_LENGTH < found.length < MOST_LENGTH:
            raise Mistake(
                f"loss {term.loss!r} takes the values of all logits, and the cache keeps the {keys.top} highest of "
                f"{len(data.classes)}: its gradient would be {found.length:.3g} times as long, with a cosine of "
                f"{found.cosine:.2f} to the right one. Leave out cache.top"
            )


def _gradient(objective: Objective, images: Tensor, labels: Tensor, index: Tensor, seen: Seen) -> Tensor:
    parameters = [parameter for parameter in objective.student.parameters() if parameter.requires_grad]
    cache = objective.cache
    objective.cache = _Given(seen)  # type: ignore[assignment]  # it has what is asked of one here
    try:
        with torch.enable_grad(), evaluating(objective):
            loss = objective(images, labels, index, 0)["loss"]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        objective.cache = cache
    return torch.cat([gradient.detach().float().reshape(-1) for gradient in found if gradient is not None])
