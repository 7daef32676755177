"""Binds losses to the layers that they compare."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.compression.weights import Weight, weights_of
from trainer.data.images import Data
from trainer.distillation.examine import Networks
from trainer.distillation.pairing import map_pairs, weight_pairs
from trainer.mistakes import Mistake
from trainer.networks import features
from trainer.networks.features import Layer
from trainer.projectors import EmbeddingProjector, MapProjector
from trainer.recipe import shelves
from trainer.recipe.keys import TermKeys, WeightSchedule
from trainer.recipe.terms import MAP_LISTS, MAPS, WEIGHTS, wants
from trainer.tensors import same_size

Pairs = list[tuple[Layer, Layer]]  # (student's layer, teacher's layer)


class Bound(nn.Module):
    """One loss with its projector, for one pair of layers, several pairs together, or none.

    Args:
        name: Of the term in logs, such as hint/layer3; what is before the slash is the recipe's term, `term`.
        function: The loss; its positional arguments are `asks`.
        asks: Names of the tensors that the loss takes.
        pairs: The pairs of layers.
        weight: Of the term: a number or a schedule.
        projector: Maps the student's map or embedding to the teacher's width.
        weights: For losses on weights, the student's and the teacher's.
        output: Which of the student's several outputs the loss takes as its logits; None for the answer.
    """

    balanced: Tensor

    def __init__(
        self,
        name: str,
        function: Callable,
        asks: list[str],
        pairs: Pairs,
        weight: float | WeightSchedule,
        projector: nn.Module | None = None,
        weights: tuple[Weight, Weight] | None = None,
        output: int | str | None = None,
    ) -> None:
        super().__init__()
        self.name, self.function, self.asks, self.pairs, self.weight = name, function, asks, pairs, weight
        self.projector, self.weights, self.output = projector, weights, output
        self.term = name.partition("/")[0]
        self.is_found = isinstance(weight, WeightSchedule) and weight.ratio is not None
        if self.is_found:  # by `ratios`, as the weight of ratio 1; a buffer, so that checkpoints keep it
            self.register_buffer("balanced", torch.ones(()))

    def weight_at(self, epoch: float, num_epochs: float) -> float | Tensor:
        """Returns the term's weight after `epoch` epochs of a stage of `num_epochs`."""
        if not isinstance(self.weight, WeightSchedule):
            return self.weight
        at: float | Tensor = self.weight.at(epoch, num_epochs)
        return at * self.balanced if self.is_found else at


class Binding(NamedTuple):
    """All bound terms, and a line for each pair of layers that `at: auto` leaves out."""

    bounds: list[Bound]
    left_out: list[str]


def bind_all(terms: Sequence[TermKeys], networks: Networks, data: Data) -> Binding:
    """Binds every term to its layers, in order; a second term of the same loss is called LOSS_2.

    A loss on layers is bound once for each pair, a loss on lists of maps once for all its pairs. A pair whose maps have
    one position is left out where the loss is constant on such maps.

    Raises:
        Mistake: For a layer that does not exist, layers that cannot be paired, and pairs named in `at`, or all pairs,
            on which the loss is constant.
    """
    counts: dict[str, int] = {}
    found: list[Bound] = []
    left_out: list[str] = []
    for term in terms:
        counts[term.loss] = counts.get(term.loss, 0) + 1
        name = term.loss if counts[term.loss] == 1 else f"{term.loss}_{counts[term.loss]}"
        asks = wants(term)
        pairs = _pairs(term, asks, networks)
        alone = not MAP_LISTS & set(asks)
        bounds: list[Bound] = []
        constant: list[Bound] = []
        for group in [[pair] for pair in pairs] if pairs and alone else [pairs]:
            own_name = f"{name}/{group[0][0].name}" if group and alone else name
            bound = _bind(term, own_name, asks, group, networks, data)
            (constant if _is_constant(bound) else bounds).append(bound)
        if constant and (not bounds or term.at not in (None, "auto")):
            [(student, teacher)] = constant[0].pairs
            raise Mistake(
                f"at: loss {term.loss!r} is constant on maps of one position, such as {student.name!r} with "
                f"{teacher.name!r}: name layers with larger maps, or leave the loss out"
            )
        for bound in constant:
            [(student, teacher)] = bound.pairs
            left_out.append(
                f"{name}: {student.name} and {teacher.name} are left out: on maps of one position the loss is constant"
            )
        found += bounds
    return Binding(found, left_out)


@torch.no_grad()
def _is_constant(bound: Bound) -> bool:
    """Returns whether a loss on one pair of maps of one position is the same number for every student's map.

    Its learned parameters are drawn at random, since they may start from zero.
    """
    if not (MAPS & set(bound.asks) and set(bound.asks) <= MAPS | {"epoch"}):
        return False
    [(student, teacher)] = bound.pairs
    if min(student.shape[1], teacher.shape[1]) * min(student.shape[2], teacher.shape[2]) > 1:
        return False
    found = copy.deepcopy(bound).cpu().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.normal_(generator=generator)
    values = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(3):
            torch.manual_seed(0)  # of losses that draw numbers themselves
            student_map = torch.randn(2, *student.shape, generator=generator)
            teacher_map = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))
            available = {"student_map": student_map, "teacher_map": teacher_map, "epoch": 0.0}
            if found.projector is not None:
                small, available["teacher_map"] = same_size(student_map, teacher_map)
                available["projected_map"] = found.projector(small)
            try:
                values.append(float(found.function(*(available[word] for word in found.asks))))
            except (IndexError, RuntimeError, TypeError, ValueError):
                return False  # the rehearsal of the objective says what is wrong
    return max(values) - min(values) <= 1e-6 * (1 + abs(values[0]))


def pair_table(bounds: Iterable[Bound]) -> list[dict[str, Any]]:
    """Returns a row for each pair of layers: term, layer and shape of student and teacher, projector."""
    return [
        {
            "term": bound.name,
            "student": student.name,
            "student_shape": student.shape,
            "teacher": teacher.name,
            "teacher_shape": teacher.shape,
            "projector": type(bound.projector).__name__ if bound.projector else "-",
        }
        for bound in bounds
        for student, teacher in bound.pairs
    ]


def _pairs(term: TermKeys, asks: list[str], networks: Networks) -> Pairs:
    if WEIGHTS & set(asks):
        assert networks.teacher is not None
        return weight_pairs(networks.student, networks.teacher.network, term.at)
    if (MAPS | MAP_LISTS) & set(asks):
        return map_pairs(networks, term.at)
    if term.at is not None:
        raise Mistake(f"at: loss {term.loss!r} looks at no layers (it wants {', '.join(asks)})")
    return []


def _bind(term: TermKeys, name: str, asks: list[str], pairs: Pairs, networks: Networks, data: Data) -> Bound:
    on_weights = bool(WEIGHTS & set(asks))
    shapes = networks.shapes | (_map_shapes(pairs) if pairs and not on_weights else {})
    # The loss first, then its projector: both may draw their weights at random.
    function = _function(term, shapes, data)
    projector: nn.Module | None = None
    if "projected_map" in asks:
        projector = MapProjector(pairs[0][0].shape[0], pairs[0][1].shape[0])
    if "projected_embedding" in asks:
        projector = EmbeddingProjector(shapes["student_embedding"][1], shapes["teacher_embedding"][1])
    weights = None
    if on_weights:
        assert networks.teacher is not None
        [(student_layer, teacher_layer)] = pairs
        of_student, of_teacher = weights_of(networks.student), weights_of(networks.teacher.network)
        weights = (of_student[student_layer.name], of_teacher[teacher_layer.name])
    if hasattr(function, "finish"):
        # A student that `finish` will refuse after the training is refused now.
        assert networks.teacher is not None
        head = features.head(networks.teacher.network)
        function.to(networks.images.device).finish(copy.deepcopy(networks.student), head)
    weight = WeightSchedule(ratio=1.0) if term.weight == "auto" else term.weight
    return Bound(name, function, asks, pairs, weight, projector, weights, term.output)


def _function(term: TermKeys, shapes: dict[str, Any], data: Data) -> Any:
    """Returns the term's loss with its settings: a module if the loss is a class, else a partial function."""
    function, settings = shelves.find("loss", term.loss), shelves.own_settings(term, TermKeys)
    if not inspect.isclass(function):
        return functools.partial(function, **settings)
    given = shapes | {"num_samples": len(data.train), "num_classes": len(data.classes)}
    return function(*(given[word] for word in shelves.built_with(function)), **settings)


def _map_shapes(pairs: Pairs) -> dict[str, Any]:
    """Returns the shapes of the pairs' maps, by the names of a loss's arguments."""
    student_maps = [torch.Size((2, *layer.shape)) for layer, _ in pairs]
    teacher_maps = [torch.Size((2, *layer.shape)) for _, layer in pairs]
    return {
        "student_maps": student_maps,
        "teacher_maps": teacher_maps,
        "student_map": student_maps[0],
        "teacher_map": teacher_maps[0],
    }
