"""Emoji: two drawings of 1,906 emoji, in colour and with transparency, by category."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, NonNegativeInt
from torch import Tensor

from trainer.data.fetch import NOTICES, fetch
from trainer.data.image_file import read_image
from trainer.data.images import InMemory, Source, mean_and_std
from trainer.data.reading import Reading
from trainer.data.splitting import split_off
from trainer.mistakes import Mistake

DRAWINGS = ("google", "twitter")
_CELL = 66  # pixels of a cell of a sheet: 64 and a transparent border


def emoji(
    *,
    size: Annotated[int, Field(ge=8, le=256)] = 64,
    classes: Literal["category", "subcategory"] = "category",
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    test_seed: NonNegativeInt = 0,
    variants: bool = False,
) -> Source:
    """Reads 1,906 emoji of Unicode 16 as Google and Twitter draw them, 3 x size x size on white, by category.

    Both drawings of an emoji are on the same side of the split into training, validation and test images. Their 9
    categories have 85 to 386 emoji each ("Food & Drink", "Flags" ...), their 98 subcategories 1 to 258; a
    subcategory of one emoji has no test image. The five components (skin tones) are left out. Two npm packages with
    the pictures are downloaded into the cache folder if missing. Their licences ask for the authors' names
    (Apache-2.0 and CC BY 4.0).

    Args:
        size: Side in pixels; the originals have 64. Resized bicubically, antialiased.
        classes: What is told apart.
        test: The fraction of the test emoji, of each class.
        test_seed: Seed of that split.
        variants: Whether the drawings of the training emoji in other skin colours, 1,875 of all emoji, are training images
            without a label, for a teacher to answer. Those of test emoji are left out.

    Raises:
        FetchError: When no source answers.
    """
    folder = fetch("emoji")
    entries = [one for one in _table(folder / "emoji.json") if one["category"] != "Component"]
    names = sorted({one[classes] for one in entries})
    kinds = torch.tensor([names.index(one[classes]) for one in entries])
    is_test = split_off(kinds, test, [test_seed, 0x7E57])
    training, tested = (torch.nonzero(chosen).flatten().tolist() for chosen in (~is_test, is_test))
    # (number of the emoji, its cell) of every training image; then those that have no label.
    cells = [(number, entries[number]) for number in training]
    others = (
        [(n, cell) for n, one in cells for cell in one.get("skin_variations", {}).values()]
        if variants
        else []
    )
    reading = Reading((3, size, size))
    images = {name: _Sheet(folder / f"{name}.png", reading) for name in DRAWINGS}

    def drawn(chosen: list[Any]) -> Tensor:
        return torch.stack([images[drawing].read(cell) for cell in chosen for drawing in DRAWINGS])

    train = drawn([cell for _, cell in cells + others])
    numbers = torch.tensor([number for number, _ in cells + others]).repeat_interleave(len(DRAWINGS))
    labels = kinds[numbers]
    labels[len(DRAWINGS) * len(cells) :] = -1
    mean, std = mean_and_std(train)
    of_test = kinds[torch.tensor(tested)].repeat_interleave(len(DRAWINGS))
    without_label = (
        f", and {len(DRAWINGS) * len(others):,} in other skin colours without a label" if others else ""
    )
    return Source(
        train=InMemory(train, labels),
        test=InMemory(drawn([entries[number] for number in tested]), of_test),
        classes=names,
        mean=mean,
        std=std,
        shape=reading.shape,
        reading=reading,
        groups=numbers,
        notes=[
            f"emoji: {len(training):,} training and {len(tested):,} test emoji of {len(names)} classes, in two drawings "
            f"each{without_label}",
            NOTICES["emoji"],
        ],
    )


def _table(path: Path) -> list[dict[str, Any]]:
    """Returns the entries of the packages' table. Raises Mistake if it is no list of emoji."""
    found = json.loads(path.read_bytes())
    if not isinstance(found, list) or not all(
        {"category", "subcategory", "sheet_x"} <= set(one) for one in found
    ):
        raise Mistake(f"{path}: is no table of emoji")
    return found


class _Sheet:
    """One drawing of all emoji, cell by cell in one picture."""

    def __init__(self, path: Path, reading: Reading) -> None:
        with Image.open(path) as image:
            self.pixels = np.array(image.convert("RGBA"))
        self.reading = reading

    def read(self, cell: dict[str, Any]) -> Tensor:
        """Returns the emoji of a table's entry as uint8 [3, H, W]."""
        left, top = (_CELL * cell[key] + 1 for key in ("sheet_x", "sheet_y"))
        return read_image(self.pixels[top : top + _CELL - 2, left : left + _CELL - 2], self.reading)
