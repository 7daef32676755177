"""How much each term of an objective weighs: the gradient that it gives the student, beside that of the labels.

A term's ratio is the norm of the gradient of the weighted term over the norm of the gradient of the labels' cross-entropy
(of weight 1, whether it is among the losses or not), both with respect to the trained weights of the student, in float32.
A term far above 1 drowns the labels; one far below does nothing. Where no term is on the labels, terms are judged beside
the first. What is measured changes nothing of a training.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.data.images import Data
from trainer.distillation.objective import Objective, labels_known
from trainer.distributed import summed
from trainer.mistakes import Mistake
from trainer.networks.features import Seen
from trainer.networks.output import described
from trainer.recipe.keys import WeightSchedule
from trainer.recipe.terms import TEACHER_WORDS

MOST_IMAGES = 128  # of a process's batch, which bounds the time of large batches
LEAST, MOST = 0.1, 10.0  # a term with a ratio outside is named


class Ratio(NamedTuple):
    """What a term weighs.

    Attributes:
        weight: Its weight at present.
        gradient: The norm of its gradient unweighted, in that of the labels' gradient.
        settled: Whether the weight is the one that the recipe asks for, not on its way there by a schedule.
        on_labels: Whether the term compares the student with the labels.
    """

    weight: float
    gradient: float
    settled: bool = True
    on_labels: bool = False

    @property
    def ratio(self) -> float:
        return self.weight * self.gradient

    @property
    def balanced(self) -> float | None:
        """The weight that would make the ratio 1; None for a term without a gradient."""
        return 1 / self.gradient if self.gradient else None

    def fault(self, other: float = 1.0, name: str = "the labels") -> str | None:
        """Says what is wrong with a gradient more than MOST or less than LEAST times another; None if nothing is.

        Args:
            other: The ratio of the other term, 1 for the labels.
            name: Of the other term.
        """
        if not self.weight or not self.settled or not math.isfinite(self.ratio):
            return None
        if self.balanced is None:
            return "it gives the student no gradient"
        beside = self.ratio / other if other else 1.0
        if LEAST <= beside <= MOST or not math.isfinite(beside):
            return None
        does = f"drowns {name}" if beside > MOST else "hardly counts"
        weight = self.balanced * other
        return f"its gradient is {beside:.3g} times {name}': it {does}; weight {weight:.3g} would make that 1"


def weighs(objective: Objective) -> bool:
    """Returns whether there is something to weigh: a term other than a single one on the labels."""
    return (
        len({bound.term for bound in objective.bound}) + len(objective.penalties) > 1
        or objective.teacher is not None
    )


def has_auto(objective: Objective) -> bool:
    """Returns whether the weight of a term is to be found."""
    return any(bound.is_found for bound in objective.bound)


def ratios(
    objective: Objective,
    images: Tensor,
    labels: Tensor,
    index: Tensor,
    view: int | None = None,
    epoch: float = 0.0,
    find: bool = False,
) -> dict[str, Ratio]:
    """Returns the ratio of each term of the recipe, for the first images of a batch; all pairs of layers of a loss count together.

    All processes must call this with their parts of a batch, and get the same. Buffers and random generators are left as
    they are.

    Args:
        objective: The objective, in the mode in which it is to be measured.
        images, labels, index, view, epoch: As for `Objective.forward`.
        find: Whether weights that the recipe gives as ratios are set by this batch.

    Raises:
        Mistake: For a weight to be found of a term that has no gradient.
    """
    # Mixed images of a larger size are made for the whole batch.
    most = len(images) if objective.mixed_pictures is not None else MOST_IMAGES
    of_labels, gradients = _norms(objective, images[:most], labels[:most], index[:most], view, epoch)
    found = {name: norm / of_labels for name, norm in gradients.items()} if of_labels else {}
    if find:
        for bound in objective.bound:
            if bound.is_found and bound.term in found:
                if not found[bound.term]:
                    raise Mistake(
                        f"loss {bound.term!r}: no weight gives it a ratio: it has no gradient to the student"
                    )
                bound.balanced.fill_(1 / found[bound.term])
    weights = {bound.term: float(bound.weight_at(epoch, objective.num_epochs)) for bound in objective.bound}
    weights |= {name: weight for name, (weight, _) in objective.penalties.items()}
    on_the_way = {
        bound.term
        for bound in objective.bound
        if isinstance(bound.weight, WeightSchedule)
        and bound.weight.at(epoch, objective.num_epochs) != bound.weight.full
    }
    on_labels = {
        bound.term
        for bound in objective.bound
        if "labels" in bound.asks and not TEACHER_WORDS & set(bound.asks)
    }
    return {
        name: Ratio(weights[name], norm, name not in on_the_way, name in on_labels)
        for name, norm in found.items()
    }


def faults(found: Mapping[str, Ratio]) -> Iterator[tuple[str, str]]:
    """Yields (term, what is wrong) for each term whose gradient is out of bounds: beside the labels, else the first term."""
    other, beside = 1.0, "the labels"
    if not any(ratio.on_labels for ratio in found.values()):
        beside = next(iter(found), "")
        other = found[beside].ratio if found else 1.0
    for name, ratio in found.items():
        if (fault := ratio.fault(other, beside)) is not None:
            yield name, fault


def refuse_without_gradient(objective: Objective, data: Data) -> None:
    """Raises Mistake for a term that is no scalar, or has a weight and does not depend on the student's weights.

    Found with random images.
    """
    parameters = _trained(objective)
    with _unchanged(objective), torch.enable_grad():
        images, labels, index = objective.example(data)
        student, teacher = objective.see(images, index, None)
        for bound in objective.bound:
            arguments = objective.feed(bound, student, teacher, labels, index, 0.0)
            value: Any = bound.function(*arguments)
            if not isinstance(value, Tensor) or value.dim():
                raise Mistake(
                    f"loss {bound.term!r} returned {described(value)}; a tensor of one number is allowed"
                )
            if bound.weight != 0 and all(part is None for part in _gradient(value, parameters)):
                raise Mistake(
                    f"loss {bound.term!r} gives the student no gradient: it has no ratio, and no effect"
                )


def _norms(
    objective: Objective, images: Tensor, labels: Tensor, index: Tensor, view: int | None, epoch: float
) -> tuple[float, dict[str, float]]:
    """Returns the norm of the labels' gradient and that of each term, both of the batch of all processes.

    Terms on labels are left out where no image of the batch has one.
    """
    parameters = _trained(objective)
    with _unchanged(objective), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        student, teacher = objective.see(images, index, view)
        classifies = objective.teacher is not None and objective.teacher.classifies
        of_labels = _norm(_gradient(_on_labels(student, teacher if classifies else None, labels), parameters))
        wanted: dict[str, Tensor] = {}
        given = dict.fromkeys((bound.term for bound in objective.bound), 0)
        for bound in objective.bound:
            arguments = objective.feed(bound, student, teacher, labels, index, epoch)
            value = bound.function(*arguments) if arguments else 0.0 * student.logits.sum()
            wanted[bound.term] = wanted[bound.term] + value if bound.term in wanted else value
            given[bound.term] += bool(arguments)
        wanted |= {name: penalty() for name, (_, penalty) in objective.penalties.items()}
        norms = {name: _norm(_gradient(value, parameters)) for name, value in wanted.items()}
        everywhere = summed(torch.tensor(list(given.values()), device=images.device, dtype=torch.float32))
        lacking = {name for name, number in zip(given, everywhere.tolist(), strict=True) if not number}
        return of_labels, {name: norm for name, norm in norms.items() if name not in lacking}


def _trained(objective: Objective) -> list[nn.Parameter]:
    return [parameter for parameter in objective.student.parameters() if parameter.requires_grad]


def _gradient(value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(parameters)
    return list(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))


def _norm(gradient: list[Tensor | None]) -> float:
    """Returns the norm of the sum of all processes' gradients."""
    parts = [part.reshape(-1).float() for part in gradient if part is not None]
    return float(summed(torch.cat(parts)).norm()) if parts else 0.0


def _on_labels(student: Seen, teacher: Seen | None, labels: Tensor) -> Tensor:
    """Returns the cross-entropy on the labels; the teacher's classes, or else the student's own, stand for those that lack."""
    logits = student.logits
    known = labels_known(labels)
    if not known.any():
        taught = logits if teacher is None else teacher.logits
        labels = (taught if taught.shape == logits.shape else logits).argmax(1)
        return F.cross_entropy(logits, labels)
    labels = labels[known]
    return F.cross_entropy(logits[known], labels.to(logits.dtype) if labels.dim() == 2 else labels)


@contextlib.contextmanager
def _unchanged(objective: Objective) -> Iterator[None]:
    """Brings buffers (statistics, memory banks) and random generators back to what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    try:
        device = next(objective.student.parameters()).device
        own = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(own, device_type=device.type if own else "cuda"):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
