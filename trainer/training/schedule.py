"""Computes the learning rate of a step."""

import math

from trainer.recipe.training import Training


def learning_rate(training: Training, step: int, steps_per_epoch: int) -> float:
    """Returns the learning rate of a step, counted from 0. A pure function: resuming needs no scheduler's state."""
    total = training.epochs * steps_per_epoch
    rise = training.warmup * steps_per_epoch
    if step < rise:
        return training.lr * (step + 1) / (rise + 1)
    if training.schedule == "constant":
        return training.lr
    if training.schedule == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in training.milestones or [])
        return training.lr * (0.1 if training.gamma is None else training.gamma) ** passed
    if training.schedule == "cosine":
        return training.lr * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2
    top = 0.3 * total
    if step < top:
        low, high, fraction = training.lr / 25, training.lr, step / top
    else:
        low, high, fraction = training.lr, training.lr / 1e4, (step - top) / max(1.0, total - 1 - top)
    return low + (high - low) * (1 - math.cos(math.pi * fraction)) / 2
