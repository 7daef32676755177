"""Splits images off a labelled set: of each class the same fraction, and never one image of a group without the others."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.mistakes import Mistake


def split_off(
    labels: Tensor,
    amount: float | int,
    seed: list[int],
    groups: Tensor | None = None,
    leave_one: bool = True,
) -> Tensor:
    """Chooses the images that are held out, class by class, at random but the same on every machine.

    Args:
        labels: int64 [N], -1 for images without a label. They are held out only if no image has one.
        amount: A fraction gives of each class so many of its images, at least one. A whole number is shared among the
            classes by their sizes, each getting one at least if there are enough for all.
        seed: Of the order in which they are taken.
        groups: int64 [N]. Images of one group stay together; a group is of its first image's class. By default each
            image is its own.
        leave_one: Whether the last group of a class stays, so that a class of one group gives none.

    Returns:
        bool [N]. With groups it may be a few images more or fewer than asked for, because a group is taken whole.
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
        middle = np.cumsum(sizes[one]) - sizes[one] / 2
        middle[:1] = 0 if wanted else np.inf  # a class that should give any gives its first group
        held_out[one[middle < wanted]] = True
        if leave_one:
            held_out[one[-1]] = False
    return torch.from_numpy(held_out[group_of])


def most_held_out(labels: Tensor, groups: Tensor | None = None) -> int:
    """Returns how many images can be held out of these (int64 [N], see `split_off`) if each class keeps its smallest group."""
    _, first, sizes = np.unique(
        np.arange(len(labels)) if groups is None else groups.numpy(), return_index=True, return_counts=True
    )
    label = labels.numpy()[first]
    if (label >= 0).any():
        label, sizes = label[label >= 0], sizes[label >= 0]
    return int(sizes.sum()) - sum(int(sizes[label == one].min()) for one in np.unique(label))


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
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return counts


def groups_of(files: list[str], inside: list[str], group: str | None) -> Tensor:
    """Returns the number of each image's group, int64 [N].

    Args:
        files: The images' paths.
        inside: Their paths below the folder that was named, with / between the parts.
        group: `parent`, for those of one subfolder, or a regular expression, for those with the same match in `inside`
            (of its first group, if it has one); an image without a match is alone, as all are for None.

    Raises:
        Mistake: For an expression that is none, or matches nothing.
    """
    if group is None:
        return torch.arange(len(files))
    if group == "parent":
        names = [str(Path(file).parent) for file in files]
        return torch.from_numpy(np.unique(names, return_inverse=True)[1])
    try:
        matches = [re.search(group, path) for path in inside]
    except re.error as error:
        raise Mistake(f"group: {group!r} is no regular expression: {error}") from None
    if not any(matches):
        raise Mistake(f"group: {group!r} matches none of the paths, such as {inside[0]!r}")
    keys = [
        (1, str(at)) if match is None else (0, match[1] if match.re.groups else match[0])
        for at, match in enumerate(matches)
    ]
    number = {key: at for at, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([number[key] for key in keys])
