"""Examines student and teacher before a training: the shapes of their outputs for example images, and their layers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.data.images import Data
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.networks import features
from trainer.networks.features import Layer
from trainer.networks.output import described, needs_logits
from trainer.recipe import shelves
from trainer.recipe.keys import TermKeys
from trainer.recipe.terms import EMBEDDINGS, MAP_LISTS, MAPS, asks_answers, wants

#: What a network raises that cannot work on its input.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Networks(NamedTuple):
    """The student and the teacher that losses are bound to.

    Attributes:
        student: The student.
        prepare: Turns images in [0, 1] into the student's input.
        teacher: The teacher, None without one.
        images: Example images [2, C, H, W] in [0, 1].
        student_layers: The layers that `at: auto` chooses from; [] if no loss takes maps.
        teacher_layers: Likewise, the teacher's.
        shapes: Of the logits and embeddings for the example images, by the names of the losses' arguments.
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
    """Runs both networks on example images and collects what binding the terms needs. Moves the student to the device.

    Args:
        student: The student.
        prepare: Turns images in [0, 1] into the student's input.
        teacher: The teacher, None without one.
        terms: The losses, which decide whether embeddings and maps are needed.
        data: The shape of the images and the classes.
        device: Of the training.

    Raises:
        Mistake: For networks that do not return one logit for each class, or lack the classifier that a loss uses.
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
        known = num_classes if teacher.classifies else None
        seen = look(network, teacher.prepare(images, number), embedding and number == 0, known, who)
        if number == 0:
            examples |= {"teacher_logits": seen.logits, "teacher_embedding": seen.embedding}
    if teacher is not None and not teacher.classifies:
        for term in terms:
            if asks_answers(term):
                raise Mistake(f"loss {term.loss!r} asks for the teacher's logits, and the teacher has none")
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
    """Returns two random images [2, C, H, W] in [0, 1], always the same."""
    return torch.rand(2, *data.shape, generator=torch.Generator().manual_seed(0)).to(device)


@torch.no_grad()
def look(
    network: nn.Module, images: Tensor, embedding: bool, num_classes: int | None, who: str
) -> features.Seen:
    """Returns a network's outputs for images [N, C, H, W], in evaluation mode.

    num_classes: None for a network whose answers are no logits. who: its name in messages. Raises Mistake for a network
    that fails or does not return logits [N, num_classes], or any tensor for None.
    """
    try:
        with features.evaluating(network):
            seen = features.see(network, images, embedding=embedding, head=num_classes is not None)
    except Mistake as error:
        raise Mistake(f"{who}: {error}" if not str(error).startswith("output: ") else str(error)) from error
    except FAILURES as error:
        size = "x".join(map(str, images.shape[1:]))
        cure = "; resize gives it larger ones" if who != "the student" else ""
        raise Mistake(f"{who} cannot look at images of {size}{cure}: {error}") from error
    if num_classes is None:
        if not isinstance(seen.logits, Tensor):
            raise Mistake(
                f"{who} gives {described(seen.logits)}; a tensor is needed (output: NUMBER or NAME in its entry)"
            )
        return seen
    if not isinstance(seen.logits, Tensor) or seen.logits.dim() != 2:
        raise Mistake(needs_logits(f"{who} gives", seen.logits, num_classes))
    if seen.logits.shape[1] != num_classes:
        cure = "" if who == "the student" else "; head: false in its entry leaves its answers out"
        raise Mistake(f"{who} knows {seen.logits.shape[1]} classes and the data has {num_classes}{cure}")
    if embedding and seen.embedding is None:
        raise Mistake(f"{who} does not call the classifier its embedding would be looked for in front of")
    return seen


@torch.no_grad()
def check_head(network: nn.Module, images: Tensor, who: str) -> None:
    """Raises Mistake unless the classifier alone turns the embedding into the logits (VOLO adds those of a second one)."""
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
