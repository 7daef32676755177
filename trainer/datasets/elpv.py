"""ELPV: electroluminescence pictures of solar cells, functional or defective."""

import zipfile
from io import BytesIO
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, NonNegativeInt
from torch import Tensor

from trainer.data.fetch import FILES, NOTICES, fetch
from trainer.data.image_file import read_image
from trainer.data.images import InMemory, Source, mean_and_std
from trainer.data.reading import Reading
from trainer.mistakes import Mistake

_INSIDE = "elpv_dataset/data/"
_CLASSES = ["functional", "defective"]


def elpv(
    *,
    size: Annotated[int, Field(ge=8, le=300)] = 160,
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    test_seed: NonNegativeInt = 0,
    doubtful: Literal["leave_out", "nearest"] = "leave_out",
) -> Source:
    """Reads 2,624 grey pictures of solar cells, 1 x size x size in 2 classes (Buerhop-Lutz et al. 2018).

    The table gives each cell a probability of a defect: 1,508 have 0 (functional), 715 have 1 (defective), 401 have 1/3
    or 2/3. Test images are split off by seed: of each class and kind of cell (mono- or polycrystalline) the same
    fraction, and never a doubtful one. The table does not say which cells are of one module, so cells of one module may
    be among both training and test images. The package with the pictures, 91 MB, is downloaded into the cache
    folder if missing. Its licence forbids commercial use (CC BY-NC-SA 4.0).

    Args:
        size: Side in pixels; the originals have 300. Resized bicubically, antialiased.
        test: The fraction of the test images.
        test_seed: Seed of that split.
        doubtful: What is done with the pictures of 1/3 and 2/3: `leave_out`, or `nearest`: they are training images of
            the nearer class.

    Raises:
        FetchError: When no source answers.
    """
    [file] = FILES["elpv"]
    path = fetch("elpv") / file
    reading = Reading((1, size, size))
    with zipfile.ZipFile(path) as archive:
        rows = [line.split() for line in archive.read(f"{_INSIDE}labels.csv").decode().splitlines()]
        rows = [row for row in rows if row]
        if any(len(row) != 3 for row in rows):
            raise Mistake(f"{path}: labels.csv has a line that is not: file, probability, kind of cell")
        probability = np.array([float(row[1]) for row in rows])
        chosen = np.arange(len(rows)) if doubtful == "nearest" else np.flatnonzero(probability % 1 == 0)
        pixels = torch.stack([_read(archive, rows[i][0], reading) for i in chosen])
    probability, kinds = probability[chosen], np.array([rows[i][2] for i in chosen])
    labels = torch.from_numpy((probability > 0.5).astype(np.int64))
    is_test = _test_images(probability, kinds, test, test_seed)
    train = InMemory(pixels[~is_test], labels[~is_test])
    mean, std = mean_and_std(train.images)
    counts = torch.bincount(labels, minlength=2).tolist()
    return Source(
        train=train,
        test=InMemory(pixels[is_test], labels[is_test]),
        classes=list(_CLASSES),
        mean=mean,
        std=std,
        shape=reading.shape,
        reading=reading,
        notes=[
            f"elpv: {counts[0]:,} functional and {counts[1]:,} defective cells; cells of one module may be among both "
            "training and test images",
            NOTICES["elpv"],
        ],
    )


def _read(archive: zipfile.ZipFile, name: str, reading: Reading) -> Tensor:
    with Image.open(BytesIO(archive.read(_INSIDE + name))) as image:
        return read_image(image, reading)


def _test_images(probability: np.ndarray, kinds: np.ndarray, fraction: float, seed: int) -> Tensor:
    """Returns which images are test images, bool [N]: of each class and kind the fraction, at least one."""
    order = np.random.default_rng([seed, 0x7E57]).permutation(len(kinds))
    chosen = torch.zeros(len(kinds), dtype=torch.bool)
    for defect in (0, 1):
        for kind in sorted(set(kinds)):
            members = order[(probability[order] == defect) & (kinds[order] == kind)]
            chosen[members[: max(1, round(fraction * len(members)))]] = True
    return chosen
