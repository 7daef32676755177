"""Gathers what a run's page shows of the test images: confusion, disagreements, feature maps, and the file's bytes."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data.batches import batches
from trainer.data.images import Part, normalize
from trainer.distillation.pairing import pair
from trainer.mistakes import Mistake
from trainer.networks import features
from trainer.runs.showing import some_views
from trainer.storage import files
from trainer.training.evaluate import normalized, predict, teacher_answers
from trainer.training.run import Run

NUM_PICTURES, NUM_MAPS = 12, 4
SIDE = 128  # pixels of a view in the page
MOST_WEIGHTS = 1_000_000  # of a student that is written into its report: coding more takes minutes
CONFUSED = 8  # pairs of classes that are listed


def gather(run: Run, pictures: bool = True) -> dict[str, Any]:
    """Returns what the finished student and its teacher say of the test images. All processes call it together.

    Args:
        run: The run, after its last stage.
        pictures: Whether the user's images may be in it.

    Returns:
        "classes", their names; "confusion" [K][K], images by true class and answer; "per_class", a list of
        {"name", "images", "right", "answered"}; "confused", the commonest mistakes; "account", where each byte of the
        packed file goes, [] without one; "player", the student as a piece of HTML that answers, and "no_player", why there is
        none (one of them is None); "bare_player", the same without images. With pictures: "views", training images as the
        networks saw them, with the teacher's answers; "disagreements", images on which student and teacher differ, and
        "maps", what a pair of layers sees. Pictures are data addresses of PNG files.
    """
    data = run.data
    student = predict(normalized(run.student.eval(), data), data.test, run.accelerator)
    teacher = teacher_answers(run, "test")
    found: dict[str, Any] = {
        "classes": list(data.classes),
        "account": _account(run),
        "views": [],
        "disagreements": [],
        "maps": None,
        "player": None,
        "bare_player": None,
        "no_player": None,
    }
    if not run.accelerator.is_main_process:
        return found
    found["player"], found["bare_player"], found["no_player"] = _players(run, teacher, pictures)
    found |= _confusion(student.cpu(), data.test.labels.cpu(), data.classes)
    if pictures:
        found["views"] = [
            {
                "picture": picture(_small(one.picture)),
                "label": one.label,
                "teacher": one.answer,
                "share": one.share,
            }
            for one in some_views(data, run.teacher)
        ]
    if teacher is not None and pictures:
        apart = (student != teacher).nonzero().flatten().cpu()
        chosen = apart[torch.linspace(0, max(0, len(apart) - 1), min(NUM_PICTURES, len(apart))).long()]
        found["num_apart"] = len(apart)
        found["disagreements"] = [
            {
                "picture": picture(image),
                "label": data.classes[label] if label >= 0 else None,
                "student": data.classes[int(student[position])],
                "teacher": data.classes[int(teacher[position])],
            }
            for position, image, label in zip(
                chosen.tolist(), *_images(run, data.test, chosen)[:2], strict=True
            )
        ]
        found["maps"] = _maps(run)
    return found


def without_pictures(found: dict[str, Any]) -> dict[str, Any]:
    """Returns what `gather` found without the user's images."""
    return {**found, "views": [], "disagreements": [], "maps": None, "player": found["bare_player"]}


def _players(run: Run, teacher: Tensor | None, pictures: bool) -> tuple[str | None, str | None, str | None]:
    """Returns the packed student as HTML in which it answers, with images and without, or why it cannot stand in a page."""
    from trainer.exporting.export import check, subject_of  # here: torch.export takes seconds to import
    from trainer.exporting.player import player
    from trainer.exporting.script import script_of
    from trainer.recipe.recipe import targets_of

    if not any(row.get("file") for row in run.rows):
        return None, None, "the recipe packs no file"
    num_weights = sum(parameter.numel() for parameter in run.student.parameters())
    if num_weights > MOST_WEIGHTS:
        return None, None, f"it has {num_weights:,} weights, more than {MOST_WEIGHTS:,}"
    data = run.data
    try:
        subject = subject_of(
            run.student, data.shape, mean=data.mean, std=data.std, classes=data.classes, data=data, reading=data.reading,
            teacher_classes=None if teacher is None else teacher.cpu().numpy(),
        )  # fmt: skip
        check(targets_of(["page"]), subject.graph, has_data=True)
    except Mistake as error:
        return None, None, str(error)
    script = script_of(subject)
    return player(subject, script, NUM_PICTURES if pictures else 0), player(subject, script, 0), None


def _confusion(answers: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    num = len(classes)
    known = labels >= 0
    counts = torch.bincount(labels[known] * num + answers[known], minlength=num * num).reshape(num, num)
    wrong = counts.clone().fill_diagonal_(0)
    order = wrong.flatten().argsort(descending=True, stable=True)[:CONFUSED].tolist()
    return {
        "confusion": counts.tolist(),
        "per_class": [
            {"name": name, "images": images, "right": right, "answered": answered}
            for name, images, right, answered in zip(
                classes, counts.sum(1).tolist(), counts.diag().tolist(), counts.sum(0).tolist(), strict=True
            )
        ],
        "confused": [
            {"label": classes[at // num], "answer": classes[at % num], "images": int(wrong.flatten()[at])}
            for at in order
            if wrong.flatten()[at]
        ],
    }


def _images(run: Run, part: Part, positions: Tensor) -> tuple[Tensor, list[int], Tensor]:
    """Returns images uint8 [N, C, H, W], labels and index of some positions of a part."""
    if not len(positions):
        return torch.zeros(0, *run.data.shape, dtype=torch.uint8), [], positions
    [(images, labels, index)] = list(batches(part, [positions], 0, torch.device("cpu")))
    return images.cpu(), labels.tolist(), index


def _account(run: Run) -> list[dict[str, Any]]:
    """Returns where each byte of the last packed file goes; [] if the recipe packs none."""
    from trainer.packing import network as packed  # here: a recipe is read without the coder

    packs = [row["file"] for row in run.rows if row.get("file")]
    if not packs or not run.accelerator.is_main_process:
        return []
    path = run.folder / packs[-1]
    return packed.account(files.read_bytes(path), str(path))[0]


@torch.no_grad()
def _maps(run: Run) -> dict[str, Any] | None:
    """Returns the maps of the deepest pair of layers that still have positions, for a few test images.

    A map is drawn as the mean of its squared channels (Zagoruyko & Komodakis 2017), which needs no pairs of channels.
    """
    assert run.teacher is not None
    device = run.accelerator.device
    step = max(1, len(run.data.test) // NUM_MAPS)
    positions, teacher = torch.arange(0, len(run.data.test), step)[:NUM_MAPS], run.teacher
    images = _images(run, run.data.test, positions)[0].to(device)
    inputs = normalize(images.float() / 255, run.data.mean, run.data.std)
    larger = teacher.images_of(run.data)  # as the teacher sees them
    scaled = images if larger is run.data else _images(run, larger.test, positions)[0].to(device)
    scaled = scaled.float() / 255
    layers = pair(
        features.look(run.student, inputs),
        features.look(teacher.network, teacher.prepare(scaled)),
        run.data.shape[1],
    )
    layers = [(a, b) for a, b in layers if all(len(c.shape) == 3 and min(c.shape[1:]) > 1 for c in (a, b))]
    if not layers:
        return None
    of_student, of_teacher = layers[-1]
    with features.evaluating(run.student):
        seen = features.see(run.student, inputs, [of_student.name]).maps[of_student.name]
    taught = teacher.see(scaled, [of_teacher.name]).maps[of_teacher.name]
    return {
        "student_layer": of_student.name,
        "student_shape": list(of_student.shape),
        "teacher_layer": of_teacher.name,
        "teacher_shape": list(of_teacher.shape),
        "pictures": [
            {"picture": picture(image), "student": _heat(a), "teacher": _heat(b)}
            for image, a, b in zip(images.cpu(), seen, taught, strict=True)
        ],
    }


def _heat(map_: Tensor) -> str:
    from matplotlib import colormaps

    energy = map_.float().square().mean(0).cpu().numpy()
    energy = (energy - energy.min()) / (np.ptp(energy) or 1.0)
    return _png(Image.fromarray(colormaps["viridis"](energy, bytes=True)[..., :3]))


def _small(image: Tensor) -> Tensor:
    """Returns an image uint8 [C, H, W] with sides of at most `SIDE` pixels, which are enough to see what was augmented."""
    scale = min(1.0, SIDE / max(image.shape[1:]))
    if scale == 1:
        return image
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    return (
        torch.nn.functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
        .round()
        .byte()
    )


def picture(image: Tensor) -> str:
    """Returns an image uint8 [C, H, W], of one or three channels (else the first is shown), as a data address of a PNG."""
    if len(image) == 3:
        return _png(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
    return _png(Image.fromarray(image[0].contiguous().numpy()))


def _png(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
