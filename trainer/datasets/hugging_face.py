"""Hugging Face: a data set of the hub or of a local folder, by the library `datasets`."""

import functools
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import PositiveInt

from trainer.data.images import LOOKS, Source
from trainer.data.pictures import Pictures
from trainer.data.reading import Reading
from trainer.mistakes import Mistake, nearest

TEST = ("test", "validation", "val")


def hugging_face(
    *,
    name: str,
    config: str | None = None,
    train: str = "train",
    test: str | None = None,
    image: str | None = None,
    label: str | None = None,
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224,
    channels: Literal[1, 3] = 3,
    resize_mode: Literal["crop", "pad", "squash"] = "crop",
) -> Source:
    """Reads a data set of Hugging Face, 3 x size x size, row by row from its memory-mapped tables; nothing is streamed.

    It needs the package `datasets` (the extra hugging_face). A data set of the hub is downloaded into that library's
    own cache.

    Args:
        name: The hub's name, such as beans; or a local folder: one that `save_to_disk` has written, or one that
            `load_dataset` reads (parquet, imagefolder).
        config: The data set's configuration, where it has several.
        train: The split of the training images.
        test: The split of the test images; the first of test, validation and val by default.
        image: The column of the pictures; the first of that type by default.
        label: The column of the classes; the first of that type by default.
        size: Side of the input in pixels, or [height, width].
        channels: 1 for grey images.
        resize_mode: As of `image_folder`.

    Raises:
        Mistake: Without the package, and for a name, split or column that is not there.
    """
    height, width = (size, size) if isinstance(size, int) else size
    reading = Reading((channels, height, width), fit=resize_mode)
    found = _opened(name, config)
    splits = {"train": train, "test": test or next((one for one in TEST if one in found), "test")}
    for split in splits.values():
        if split not in found:
            raise Mistake(f"hugging_face: {name} has no split {split!r}{nearest(split, list(found))}")
    columns = found[train].features
    pictures = image or _first(columns, "Image", name)
    labels = label or _first(columns, "ClassLabel", name)
    for column in (pictures, labels):
        if column not in columns:
            raise Mistake(f"hugging_face: {name} has no column {column!r}{nearest(column, list(columns))}")
    classes = list(getattr(columns[labels], "names", ()))
    if len(classes) < 2:
        raise Mistake(f"hugging_face: {name}: column {labels!r} has no names of two or more classes")
    parts = {
        part: Rows(
            [f"{name}\t{config or ''}\t{split}\t{pictures}\t{row}" for row in range(len(found[split]))],
            torch.tensor([-1 if one is None else one for one in found[split][labels]], dtype=torch.int64),
            reading,
        )
        for part, split in splits.items()
    }
    mean, std = LOOKS[channels]
    return Source(
        train=parts["train"],
        test=parts["test"],
        classes=classes,
        mean=mean,
        std=std,
        shape=reading.shape,
        reading=reading,
        groups=torch.arange(len(parts["train"])),
        notes=[
            f"hugging_face: {name}: {len(classes)} classes, {len(parts['train']):,} training and {len(parts['test']):,} test images"
        ],
    )


class Rows(Pictures):
    """Pictures in rows of a table. Their names are data set, configuration, split, column and row, with tabs between."""

    def opened(self, position: int) -> Image.Image:
        name, config, split, column, row = self.files[position].split("\t")
        found = _opened(name, config or None)[split][int(row)][column]
        if found is None:
            raise Mistake(f"hugging_face: {name}: row {row} of {split} has no picture")
        return found

    def paths(self) -> list[str]:
        """Returns the files of the tables."""
        tables = dict.fromkeys(tuple(name.split("\t")[:3]) for name in self.files)
        return [
            one["filename"]
            for name, config, split in tables
            for one in _opened(name, config or None)[split].cache_files
        ]


@functools.cache
def _opened(name: str, config: str | None) -> Any:
    """Opens a data set in this process; returns {split: table}."""
    try:
        import datasets
    except ImportError:
        raise Mistake(
            'hugging_face: needs the package datasets: pip install "tiny-student[hugging_face]"'
        ) from None
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, config)
    except (
        Exception
    ) as error:  # a hub that is out of reach, a folder without data, a code that is not allowed ...
        raise Mistake(f"hugging_face: {name}: cannot be opened: {type(error).__name__}: {error}") from None


def _first(columns: Any, kind: str, name: str) -> str:
    """Returns the first column of a type."""
    for column, feature in columns.items():
        if type(feature).__name__ == kind:
            return str(column)
    raise Mistake(f"hugging_face: {name} has no column of type {kind}; there are: {', '.join(columns)}")
