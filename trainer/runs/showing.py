"""Shows some training images as a run sees them: a few views of each, the true class, and what the teacher says."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.data.batches import make_data
from trainer.data.images import Data
from trainer.data.views import Views
from trainer.distillation.teacher import Teacher
from trainer.recipe.recipe import Recipe, read
from trainer.recipe.stages import any_teaches
from trainer.reporting import drawing
from trainer.runs.opening import make_teacher

NUM_VIEWS = 12
VIEWS_OF_AN_IMAGE = 3


class Shown(NamedTuple):
    """A view of a training image.

    picture: uint8 [C, H, W]. label: its class, None for an unlabelled image. answer: the teacher's class, and share: the
    probability that it gives it; None without a teacher.
    """

    picture: Tensor
    label: str | None
    answer: str | None
    share: float | None


@torch.no_grad()
def some_views(data: Data, teacher: Teacher | None) -> list[Shown]:
    """Returns twelve views of evenly spaced training images, three or fewer of each; fewer of fewer images.

    The teacher sees them as in training: the same views, in its own size.
    """
    views = Views(data)
    numbers = list(dict.fromkeys(views.number(epoch, 0) for epoch in range(VIEWS_OF_AN_IMAGE)))
    count = min(NUM_VIEWS // len(numbers), len(data.train))
    chosen = torch.linspace(0, len(data.train) - 1, count).long()
    index, labels = data.train.ids[chosen], data.train.labels[chosen].tolist()
    device = None if teacher is None else next(teacher.network.parameters()).device
    found: list[list[Shown]] = [[] for _ in chosen]
    for number in numbers:
        images = (views.of(index, number) * 255).round().byte().cpu()
        answers: list[tuple[str | None, float | None]] = [(None, None)] * count
        if teacher is not None and teacher.classifies:
            seen = Views(teacher.images_of(data)).of(index, number).to(device)
            shares, classes = teacher.see(seen).logits.softmax(1).max(1)
            answers = [
                (data.classes[k], share) for k, share in zip(classes.tolist(), shares.tolist(), strict=True)
            ]
        for of_image, image, label, answer in zip(found, images, labels, answers, strict=True):
            of_image.append(Shown(image, data.classes[label] if label >= 0 else None, *answer))
    return [one for of_image in found for one in of_image]


def show(
    path: str | Path, changes: dict[str, Any] | None = None, allow_python: bool = False
) -> tuple[bytes, str | None]:
    """Returns a PNG picture of `some_views` of a recipe, and why the teacher's answers are not in it (None if they are).

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'data.augment.shift': 2, ...}.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.

    Raises:
        RecipeError: For a faulty recipe.
        Mistake: For data or weights that cannot be loaded.
    """
    recipe, _ = read(path, changes, allow_python)
    data = make_data(recipe.data, torch.device("cpu"))
    teacher, reason = _taught_teacher(recipe, data)
    return picture_of(some_views(data, teacher), recipe.name), reason


def _taught_teacher(recipe: Recipe, data: Data) -> tuple[Teacher | None, str | None]:
    """Returns the teacher, or None and the reason if it knows nothing yet."""
    if not recipe.teacher_entries:
        return None, "the recipe has no teacher"
    if not all(keys.head for keys in recipe.teacher_entries):
        return None, "head: false leaves the teacher's answers out"
    if any_teaches(recipe.stages):
        return None, "the recipe trains its teacher: the answers stand in the report of a run"
    return make_teacher(recipe, data)[0], None


def picture_of(shown: list[Shown], name: str) -> bytes:
    """Returns a PNG picture of views in a grid, with the true class and the teacher's answer below each."""
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    axes = drawing.grid(rows, columns, (1.5, 1.5), (0.25, 0.55), 0.5)
    figure = axes.flat[0].figure
    figure.subplots_adjust(left=0.1 / figure.get_figwidth())  # nothing is written on the axes
    for axis in axes.flat:
        axis.axis("off")
    for axis, one in zip(axes.flat, shown, strict=False):
        pixels = one.picture.permute(1, 2, 0).numpy()
        axis.imshow(
            pixels if pixels.shape[2] == 3 else np.repeat(pixels[:, :, :1], 3, 2), interpolation="nearest"
        )
        axis.text(0, -0.04, said(one), transform=axis.transAxes, va="top", fontsize=7, color=drawing.INK)
    drawing.title(figure, f"{name}: views of training images")
    return drawing.png(figure)


def said(one: Shown) -> str:
    """Returns the lines below a view."""
    lines = [_short(one.label or "unlabelled")]
    if one.answer is not None:
        lines.append(f"teacher: {_short(one.answer)} {100 * (one.share or 0):.0f} %")
    return "\n".join(lines)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
