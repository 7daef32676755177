"""Finds out whether a teacher's classes stand in another order than the data's."""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.data.images import Part
from trainer.storage import files
from trainer.training.class_order import another_order
from trainer.training.evaluate import percent_right, predict
from trainer.training.run import Run

NUM_IMAGES = 500  # training images whose confusion is looked at
LONGEST = 120  # characters of the order in a message; a longer one is in a file


def order_fault(run: Run, who: str, network: Callable[[Tensor], Tensor], answers: Tensor) -> str | None:
    """Returns the words for a teacher whose classes stand in another order, with that order; None for others.

    Its answers to the validation images raise the suspicion, its confusion on training images confirms it.

    Args:
        run: The run.
        who: The teacher's name in the message.
        network: Maps images [N, C, H, W] in [0, 1] to logits [N, K].
        answers: Its classes for the validation images, int64 [N].
    """
    labels, classes = run.data.validation.labels, run.data.classes
    if another_order(answers, labels, len(classes)) is None:
        return None
    assert run.teacher is not None
    train = run.teacher.images_of(run.data).train
    ids = train.ids[:: max(1, len(train) // NUM_IMAGES)]
    part = Part(train.images, ids, train.workers)
    taught = predict(network, part, run.accelerator)
    order = another_order(taught, part.labels, len(classes))
    if order is None:
        return None
    right = percent_right(torch.tensor(order, device=taught.device)[taught], part.labels)
    names = json.dumps([classes[position] for position in order], ensure_ascii=False)
    text = f"classes: {names}" if len(names) <= LONGEST else f"classes: {order}"
    if len(text) > LONGEST:
        path = run.folder / "classes.yaml"
        if run.accelerator.is_main_process:
            files.write_bytes(path, f"classes: {names}\n".encode())
        text = f"the classes in {path}"
    return (
        f"{who} has {percent_right(answers, labels):.2f} % of the validation images right, since its classes stand in "
        f"another order: with {text} in its entry {right:.2f} % of {len(ids):,} training images are right"
    )
