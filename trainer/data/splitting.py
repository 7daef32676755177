"""Splits images off a labelled set: of each class the same fraction, and never one image of a group without the others."""

import numpy as np
import torch
from torch import Tensor


def split_off(labels: Tensor, amount: float | int, seed: list[int], groups: Tensor | None = None) -> Tensor:
    """Chooses the images that are held out, class by class, at random but the same on every machine.

    Args:
        labels: int64 [N], -1 for images without a label. They are held out only if no image has one.
        amount: A fraction gives of each class so many of its images, at least one. A whole number is shared among the
            classes by their sizes, each getting one at least if there are enough for all.
        seed: Of the order in which they are taken.
        groups: int64 [N]. Images of one group stay together; a group is of its first image's class. By default each
            image is its own.

    Returns:
        bool [N]. The last group of a class stays, so a class of one group gives none. With groups it may be a few more
        images than asked for, because a group is taken whole.
    """
    names, first, group_of, sizes = np.unique(
        np.arange(len(labels)) if groups is None else groups.numpy(),
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    label = labels.numpy()[first]
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(names))
    order = order[np.argsort(label[order], kind="stable")]  # class by class, at random within one
    if (label >= 0).any():
        order = order[label[order] >= 0]
    _, starts = np.unique(label[order], return_index=True)
    held_out = np.zeros(len(names), dtype=bool)
    members = np.split(order, starts[1:])
    totals = np.array([sizes[one].sum() for one in members])
    for one, wanted in zip(members, _wanted(totals, amount, draw), strict=True):
        before = np.cumsum(sizes[one]) - sizes[one]
        held_out[one[:-1][before[:-1] < wanted]] = True
    return torch.from_numpy(held_out[group_of])


def _wanted(totals: np.ndarray, amount: float | int, draw: np.random.Generator) -> np.ndarray:
    """Returns how many images each class should give, int [K]."""
    if isinstance(amount, float):
        return np.array([max(1, round(amount * int(total))) for total in totals])
    exact = totals * (amount / totals.sum())
    counts = np.maximum(np.floor(exact).astype(int), int(amount >= len(totals)))
    # The rest goes to those with the largest remainders; what the smallest got too much is taken from the others.
    nearest = np.lexsort((draw.random(len(totals)), counts - exact))
    short = amount - int(counts.sum())
    counts[nearest[: max(short, 0)]] += 1
    for _ in range(-short):
        counts[np.argmax(counts - exact * (counts > 1))] -= 1
    return counts
