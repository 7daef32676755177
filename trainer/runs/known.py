"""Finds the mean, standard deviation, size and filter of the images that a loaded network was trained on.

In this order: what the recipe says, what our own checkpoint recorded, timm's configuration, the data's.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from trainer.data.batches import batches
from trainer.data.images import Data
from trainer.data.reading import FILTERS
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.recipe.keys import ModelKeys, TeacherKeys
from trainer.storage import records
from trainer.storage.weights_file import digest
from trainer.training.evaluate import percent_right
from trainer.training.weights import Made

NUM_IMAGES = 500  # validation images that two normalisations are compared on
MEASURED = "normalisation.json"  # in the run's folder: what was measured before


class Looks(NamedTuple):
    """A normalisation, and who says so. mean, std: for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


def known_size(facts: Mapping[str, Any], key: str, shape: tuple[int, int, int]) -> int | None:
    """Returns the side of a network's images, of facts that give (C, H, W) under a key; None if it is the data's.

    Sides that differ from each other are not taken.
    """
    size = list(facts.get(key) or ())[1:]
    square = len(size) == 2 and size[0] == size[1]
    return int(size[0]) if square and tuple(size) != tuple(shape[1:]) else None


def known_filter(keys: ModelKeys, made: Made) -> str | None:
    """Returns the filter with which the images of a loaded network were resized; None if nothing is known."""
    if "reading" in made.facts:
        return dict(made.facts["reading"] or {}).get("filter", "bicubic")
    config = getattr(made.network, "pretrained_cfg", None) or {}
    loaded = keys.checkpoint is not None or getattr(keys, "pretrained", False)
    found = config.get("interpolation") if loaded else None
    return found if found in FILTERS else None


def known_looks(keys: ModelKeys, made: Made, channels: int) -> Looks | None:
    """Returns the normalisation that a loaded network's checkpoint or timm's configuration says; None for an untrained one."""
    config = getattr(made.network, "pretrained_cfg", None) or {}
    loaded = keys.checkpoint is not None or getattr(keys, "pretrained", False)
    for facts, source in ((made.facts, "its checkpoint"), (config if loaded else {}, "timm")):
        mean, std = (_of_channels(facts.get(key), channels) for key in ("mean", "std"))
        if mean is not None and std is not None:
            return Looks(mean, std, source)
    return None


def _of_channels(values: Sequence[float] | None, channels: int) -> tuple[float, ...] | None:
    """Returns one value for each channel: grey images get the mean of the colours', colours all get the grey one's."""
    values = tuple(values or ())
    if len(values) == channels:
        return values
    if len(values) == 3 and channels == 1:
        return (sum(values) / 3,)
    return values * channels if len(values) == 1 else None


def looks_of(
    keys: ModelKeys, made: Made, data: Data, who: str, folder: Path | None, writes: bool = True
) -> tuple[Looks | None, list[str]]:
    """Returns the normalisation for a network for which the recipe gives none, and notes for the user.

    If what is known differs from the data's own, both are measured on validation images, once in a run. Of a foreign
    checkpoint timm's configuration is a guess, so the better one of both is taken; else what is known.

    Args:
        keys: The network's entry in the recipe.
        made: The network.
        data: The data.
        who: The network's name in the notes.
        folder: The run's folder, None for no measurement.
        writes: Whether this process writes what it has measured.

    Returns:
        None for the data's normalisation.
    """
    known, own = known_looks(keys, made, data.shape[0]), Looks(tuple(data.mean), tuple(data.std), "the data")
    if known is None or known[:2] == own[:2]:
        return None, []
    head_is_new = (
        made.new_head or not getattr(keys, "head", True) or _has_other_classes(keys, made.network, data)
    )
    if folder is None or head_is_new or not (data.validation.labels >= 0).any():
        numbers = [", ".join(f"{value:.4g}" for value in values) for values in known[:2]]
        return known, [f"{who}: mean {numbers[0]} and std {numbers[1]} are {known.source}'s, not the data's"]
    right = _measured(keys, made, data, [known, own], folder, writes)
    is_guess = known.source == "timm" and keys.checkpoint is not None
    taken = own if is_guess and right[1] > right[0] else known
    note = (
        f"{who}: {right[0]:.2f} % of the validation images right with {known.source}'s mean and std, "
        f"{right[1]:.2f} % with the data's: {taken.source}'s are taken (mean and std in the recipe decide)"
    )
    return (None if taken is own else known), [note]


def _has_other_classes(keys: ModelKeys, network: nn.Module, data: Data) -> bool:
    """Returns whether a network with timm's pretrained weights has a new head."""
    config = getattr(network, "pretrained_cfg", None) or {}
    return bool(getattr(keys, "pretrained", False)) and config.get("num_classes") != len(data.classes)


def _measured(
    keys: ModelKeys, made: Made, data: Data, candidates: list[Looks], folder: Path, writes: bool
) -> list[float]:
    """Returns the accuracy in percent on validation images with each normalisation; kept in the run's folder."""
    network, size = made.network, getattr(keys, "resize", None)
    filter = known_filter(keys, made) if size else None
    labels = data.validation.labels.tolist()
    depends_on = (
        digest(network.state_dict()),
        data.fingerprint,
        labels,
        size,
        filter,
        [c[:2] for c in candidates],
    )
    key = hashlib.sha256(repr(depends_on).encode()).hexdigest()
    path = folder / MEASURED
    kept: dict[str, list[float]] = {}
    if path.is_file():
        with contextlib.suppress(Mistake):  # damaged: measured again
            kept = records.read(path, dict[str, list[float]])
    found = kept.get(key)
    if found is not None and len(found) == len(candidates):
        return found
    right = [_percent_right(network, size, filter, data, looks) for looks in candidates]
    if writes:
        records.write(path, kept | {key: right}, indent=1)
    return right


@torch.no_grad()
def _percent_right(
    network: nn.Module, size: int | None, filter: str | None, data: Data, looks: Looks
) -> float:
    """Returns the network's accuracy in percent on at most `NUM_IMAGES` validation images, evenly spread."""
    modes = [(module, module.training) for module in network.modules()]
    learns = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    entry = TeacherKeys(model="python:x:y", resize=size, mean=looks.mean, std=looks.std)
    teacher = Teacher([network], [entry], data.mean, data.std, specs=[{}])
    part = data.at_size(size, filter).validation
    indices = torch.arange(0, len(part), max(1, len(part) // NUM_IMAGES))
    device = next(network.parameters()).device
    answers = [
        teacher.see(images.to(device).float() / 255).logits.argmax(-1)
        for images, _, _ in batches(part, list(indices.split(min(100, part.at_once))), part.workers, device)
    ]
    for module, mode in modes:
        module.training = mode
    for parameter, learned in learns:
        parameter.requires_grad_(learned)
    return percent_right(torch.cat(answers), part.labels[indices.to(part.ids.device)])
