"""Computes a network's predictions, accuracy and logits, with each image counted once."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.data.batches import batches
from trainer.data.images import Data, InMemory, Part, normalize
from trainer.distributed import summed
from trainer.training.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def predict(network: Callable[[Tensor], Tensor], part: Part, accelerator: "Accelerator") -> Tensor:
    """Returns the class that a network predicts for each image of a part: int64 [len(part)]; see `answered`."""
    return answered(network, part, accelerator)[0]


@torch.no_grad()
def answered(
    network: Callable[[Tensor], Tensor], part: Part, accelerator: "Accelerator"
) -> tuple[Tensor, Tensor]:
    """Returns what a network answers to each image of a part: its class, and the place of the true class.

    The processes divide the batches among them, and each gets all answers.

    Args:
        network: Maps images [N, C, H, W] in [0, 1] to logits [N, K].
        part: The images.
        accelerator: The run's.

    Returns:
        The predicted classes, int64 [len(part)]; and how many classes have a higher logit than the label, int64
        [len(part)], K for an image without a label.
    """
    network = sparing(network)
    order = measured_order(part)[accelerator.process_index :: accelerator.num_processes]
    found = torch.zeros(2, len(part), dtype=torch.long, device=accelerator.device)
    with _repeatable():
        for positions, (images, labels, _) in zip(
            order, batches(part, order, part.workers, accelerator.device), strict=True
        ):
            logits = network(images.float() / 255)
            above = (logits > logits.gather(1, labels.clamp(min=0)[:, None])).sum(1)
            at = positions.to(accelerator.device)
            found[0, at], found[1, at] = logits.argmax(-1), above.where(labels >= 0, logits.shape[1])
    classes, places = summed(found)
    return classes, places


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """Has cuDNN choose its algorithms without timing them: what another process measures again must be the same."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def measured_order(part: Part, most: int | None = None) -> list[Tensor]:
    """Returns the positions of each batch in which a part, or its first `most` images, is measured."""
    small = isinstance(part.images, InMemory) and part.images.images.shape[2] <= 64
    return list(torch.arange(len(part))[:most].split(min(1000 if small else 128, part.at_once)))


def sparing(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns a network that computes a batch in smaller and smaller parts when memory runs out, from then on.

    network: maps images [N, ...] to outputs [N, ...], each of its own image alone.
    """
    most: int | None = None

    def outputs(images: Tensor) -> Tensor:
        nonlocal most
        while True:
            size = min(len(images), most or len(images))
            try:
                if size == len(images):
                    return network(images)
                return torch.cat([network(part) for part in images.split(size)])
            except (MemoryError, RuntimeError) as error:
                if size == 1 or not _ran_out(error):
                    raise
            most = size // 2  # outside the handler: the error holds what was computed
            if images.device.type != "cpu":
                torch.get_device_module(images.device).empty_cache()
            logger.warning("memory ran out: from here on %d images are measured at a time", most)

    return outputs


def _ran_out(error: BaseException) -> bool:
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error) for w in words)


def percent_right(answers: Tensor, labels: Tensor) -> float:
    """Returns the percentage of answers that equal the label. Images without a label do not count; NaN if none has one."""
    labels = labels.to(answers.device)
    known = labels >= 0
    if not known.any():
        return float("nan")
    return (answers[known] == labels[known]).double().mean().item() * 100


def balanced_accuracy(answers: Tensor, labels: Tensor) -> float:
    """Returns the mean over the classes of the percentage of their images that are right: each class counts alike.

    Classes without images do not count; NaN if no image has a label.
    """
    labels = labels.to(answers.device)
    shares = [
        percent_right(answers[labels == label], labels[labels == label])
        for label in labels.unique()
        if label >= 0
    ]
    return sum(shares) / len(shares) if shares else float("nan")


def guessing(answers: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns the accuracy that these answers would have if dealt out at random, and the least that is better; in percent.

    With a_k images of class k, named b_k times, random dealing is right for sum(a_k b_k) / n of the images on average
    (Cohen 1960): the share of the class that a network always names, or 1 / K if classes are equally frequent. Better is
    what random dealing reaches with a probability of about 1 % (the normal approximation of its exact variance), if that
    is also half as much again, or a tenth of the way to 100 %. Of few images half of the way to 100 % is enough.
    Images without a label do not count; NaN if none has one.
    """
    labels = labels.to(answers.device)
    known = labels >= 0
    n = float(known.sum())
    if not n:
        return float("nan"), float("nan")
    num_classes = int(max(answers.max(), labels.max())) + 1
    a, b = (t[known].bincount(minlength=num_classes).double() for t in (labels, answers))
    both = (a * b).sum().item()
    variance = (both**2 + n**2 * both - n * (a * b * (a + b)).sum().item()) / (n**3 * max(n - 1, 1.0)) / n
    chance = both / n**2
    margin = max(2.33 * max(variance, 0.0) ** 0.5, min(chance / 2, (1 - chance) / 10))
    return chance * 100, (chance + min(margin, (1 - chance) / 2)) * 100


def teacher_answers(run: Run, part_name: str) -> Tensor | None:
    """Returns the teacher's classes for a part ('validation', 'test'), computed once; None without one that classifies."""
    found = teacher_answered(run, part_name)
    return None if found is None else found[0]


def teacher_answered(run: Run, part_name: str) -> tuple[Tensor, Tensor] | None:
    """Returns what `answered` returns of the teacher for a part, computed once; None without one that classifies."""
    teacher = run.teacher
    if teacher is None or not teacher.classifies:
        return None
    key = (part_name, teacher.version)
    if key not in run.answers:
        part = getattr(teacher.images_of(run.data), part_name)
        run.answers[key] = answered(lambda images: teacher.see(images).logits, part, run.accelerator)
    return run.answers[key]


def truth(run: Run, part: Part) -> Tensor:
    """Returns the labels of a part, or the teacher's classes if none of its images has a label."""
    if (part.labels >= 0).any():
        return part.labels
    answers = teacher_answers(run, "validation" if part is run.data.validation else "test")
    return part.labels if answers is None else answers


def normalized(network: nn.Module, data: Data) -> Callable[[Tensor], Tensor]:
    """Returns the network as a function of images in [0, 1], with the data's normalisation."""
    return lambda images: network(normalize(images, data.mean, data.std))


@torch.no_grad()
def logits(run: Run, most: int | None = None) -> Tensor:
    """Returns the student's logits [N, K] for the validation images, or for the first `most` of them."""
    part, device = run.data.validation, run.accelerator.device
    network = sparing(normalized(run.student.eval(), run.data))
    order = measured_order(part, most)
    return torch.cat(
        [network(images.float() / 255) for images, _, _ in batches(part, order, part.workers, device)]
    )


def apart(before: Tensor, after: Tensor) -> dict[str, float]:
    """Returns max_difference, the largest difference of a logit, and num_changed, the number of changed predictions."""
    return {
        "max_difference": (before - after).abs().max().item(),
        "num_changed": int((before.argmax(1) != after.argmax(1)).sum()),
    }
