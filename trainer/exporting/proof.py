"""Runs an export on all test images by its real runtime, and holds its answers against the student's."""

import math
from typing import Any

import numpy as np

from trainer.exporting.subject import Exported, Subject
from trainer.exporting.timing import latency

NEAR = 1e-4  # of the largest logit: two that are nearer may change places by rounding
FAR = 1e-2  # of the largest logit of all images: correct exports in float32 are below 1e-5 of it
SHOWN = 20  # images at a tie that are listed


def prove(subject: Subject, exported: Exported) -> dict[str, Any]:
    """Returns the numbers of an export's row: accuracy, agreement with the student, largest difference, latency.

    "top1" and "top1_student" (percent; NaN without labels), "agreement_student" (percent), "num_images", "num_near_ties" and "near_ties" (how
    many images changed their class at a tie, and the first of them), "max_difference" (of a logit; None where only classes
    can be compared), "latency_seconds" and "latency_p95_seconds" (one image; median and 95th percentile),
    "classes" (of all images).

    Raises RuntimeError, with the image, if the answers are not the student's, by the rule of `Exported.compared`.
    """
    answers, labels, right, students = [], [], [], []
    ties: list[int] = []
    wrong: list[int] = []
    largest, farthest, highest, seen = 0.0, 0, 0.0, 0
    first = None
    for images, known in subject.proof_batches(exported.batch):
        given = subject.normalized(images) if exported.takes == "normalized" else images
        first = given[:1] if first is None else first
        ours = np.asarray(exported.run(given))
        theirs = (
            exported.reference(given) if exported.reference else subject.logits(subject.normalized(images))
        )
        if ours.shape != theirs.shape:
            raise RuntimeError(f"it answers {ours.shape} where the student answers {theirs.shape}")
        if not np.isfinite(ours).all():
            raise RuntimeError(f"its logits are not finite, from image {seen} on")
        same = ours.argmax(1) == theirs.argmax(1)
        apart = np.abs(ours.astype(np.float64) - theirs).max(1)
        if apart.max() > largest:
            largest, farthest = float(apart.max()), seen + int(apart.argmax())
        highest = max(highest, float(np.abs(theirs).max()))
        bad = ~same if exported.compared == "float" else (ours != theirs).any(1)
        for number in np.flatnonzero(bad):
            (ties if exported.compared == "float" and _is_tie(theirs[number]) else wrong).append(
                seen + int(number)
            )
        answers.append(ours.argmax(1))
        right.append(same)
        students.append(theirs.argmax(1))
        labels.append(known)
        seen += len(images)
    if wrong and exported.compared != "measured":
        raise RuntimeError(
            f"its answers are not the student's for {len(wrong)} of {seen} images (the first: {wrong[:SHOWN]}); the largest "
            f"difference of a logit is {largest:.3g}"
        )
    if exported.compared == "float" and largest > FAR * highest:
        raise RuntimeError(
            f"its logits are not the student's: at image {farthest} of {seen} one is {largest:.3g} off; {FAR * highest:.3g} "
            f"is allowed ({FAR:g} of the largest logit)"
        )
    assert first is not None, "there are no images to prove it on"
    classes, truth = np.concatenate(answers), np.concatenate(labels)
    known = truth >= 0
    median, late = latency(exported.run, first)
    return {
        "top1": _percent(classes == truth, known),
        "top1_student": _percent(np.concatenate(students) == truth, known),
        "agreement_student": float(np.concatenate(right).mean() * 100),
        "num_images": seen,
        "random_inputs": subject.data is None,
        "num_near_ties": len(ties),
        "near_ties": ties[:SHOWN],
        "max_difference": largest,
        "latency_seconds": median,
        "latency_p95_seconds": late,
        "classes": classes,
    }


def _percent(right: np.ndarray, known: np.ndarray) -> float:
    return float(right[known].mean() * 100) if known.any() else math.nan


def _is_tie(logits: np.ndarray) -> bool:
    second, most = np.sort(logits.astype(np.float64))[-2:]
    return bool(most - second <= NEAR * np.abs(logits).max())
