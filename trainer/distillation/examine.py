"""The networks as they are found before a training: what they give for example images, and which layers they have."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.data.images import Data
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.networks import features
from trainer.networks.features import Layer
from trainer.recipe import shelves
from trainer.recipe.keys import TermKeys
from trainer.recipe.terms import EMBEDDINGS, MAP_LISTS, MAPS, wants


class Networks(NamedTuple):
    """The student and the teacher that losses are bound to.

    prepare: turns images in [0, 1] into what the student sees. images: example images [2, C, H, W] in [0, 1].
    student_layers, teacher_layers: the layers that `at: auto` chooses from, where a loss looks at maps; else none.
    shapes: of the logits and embeddings for the example images, by the losses' word for them.
    """

    student: nn.Module
    prepare: Callable[[Tensor], Tensor]
    teacher: Teacher | None
    images: Tensor
    student_layers: list[Layer]
    teacher_layers: list[Layer]
    shapes: dict[str, torch.Size]


def examine(
    student: nn.Module,
    prepare: Callable[[Tensor], Tensor],
    teacher: Teacher | None,
    terms: Sequence[TermKeys],
    data: Data,
    device: torch.device,
) -> Networks:
    """Looks at both networks with example images, as the terms will look at them. Moves the student to the device.

    Raises Mistake for networks that do not give one logit for each class, or lack the classifier that a loss uses.
    """
    asked = set().union(*(wants(term) for term in terms))
    images, num_classes = example_images(data, device), len(data.classes)
    student.to(device)
    embedding = bool(EMBEDDINGS & asked)
    seen = look(student, prepare(images), embedding, num_classes, "the student")
    examples = {"student_logits": seen.logits, "student_embedding": seen.embedding}
    for number, network in enumerate(teacher.networks if teacher is not None else []):
        assert teacher is not None
        who = "the teacher" if len(teacher.networks) == 1 else f"teachers[{number}]"
        seen = look(network, teacher.prepare(images, number), embedding and number == 0, num_classes, who)
        if number == 0:
            examples |= {"teacher_logits": seen.logits, "teacher_embedding": seen.embedding}
    finishes = any(hasattr(shelves.find("loss", term.loss), "finish") for term in terms)
    if "teacher_head" in asked or finishes:
        assert teacher is not None
        check_head(teacher.network, teacher.prepare(images), "the teacher")
    if finishes:
        check_head(student, prepare(images), "the student")
    student_layers, teacher_layers = [], []
    if (MAPS | MAP_LISTS) & asked:
        student_layers = features.look(student, prepare(images))
        assert teacher is not None
        teacher_layers = features.look(teacher.network, teacher.prepare(images))
    shapes = {word: tensor.shape for word, tensor in examples.items() if tensor is not None}
    return Networks(student, prepare, teacher, images, student_layers, teacher_layers, shapes)


def example_images(data: Data, device: torch.device | str) -> Tensor:
    """Two made-up images [2, C, H, W] in [0, 1], always the same."""
    return torch.rand(2, *data.shape, generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def look(network: nn.Module, images: Tensor, embedding: bool, num_classes: int, who: str) -> features.Seen:
    """What a network gives for images, in evaluation mode. Raises Mistake unless it is one logit for each class."""
    try:
        with features.evaluating(network):
            seen = features.see(network, images, embedding=embedding)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        size = "x".join(map(str, images.shape[1:]))
        cure = "; resize gives it larger ones" if who != "the student" else ""
        raise Mistake(f"{who} cannot look at images of {size}{cure}: {error}") from error
    if not isinstance(seen.logits, Tensor) or seen.logits.dim() != 2:
        got = f"{tuple(seen.logits.shape)}" if isinstance(seen.logits, Tensor) else type(seen.logits).__name__
        raise Mistake(f"{who} gives {got}; logits [N, {num_classes}] are needed")
    if seen.logits.shape[1] != num_classes:
        raise Mistake(f"{who} knows {seen.logits.shape[1]} classes and the data has {num_classes}")
    if embedding and seen.embedding is None:
        raise Mistake(f"{who} does not call the classifier its embedding would be looked for in front of")
    return seen


@torch.no_grad()
def check_head(network: nn.Module, images: Tensor, who: str) -> None:
    """Raises Mistake unless the classifier alone turns the embedding into the logits (VOLO adds a second one's)."""
    try:
        with features.evaluating(network):
            seen = features.see(network, images, embedding=True)
            given = features.head(network)(seen.embedding)
    except Mistake as error:
        raise Mistake(f"{who}: {error}") from None
    if given.shape != seen.logits.shape or not torch.allclose(given, seen.logits, rtol=1e-3, atol=1e-3):
        raise Mistake(
            f"{who}'s logits are not what its classifier makes of its embedding alone: a second classifier, a scale or "
            "a layer after it comes in, so no loss that uses the classifier by itself can be had with it"
        )
