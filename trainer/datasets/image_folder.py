"""Image folder: images of any size in the user's folder, one subfolder for each class."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from trainer.data.crops import Cuts, read_part
from trainer.data.examined import Examined, examine
from trainer.data.image_file import read_image
from trainer.data.images import Source
from trainer.data.listing import Listing, in_order, list_images, notes_on_names
from trainer.data.reading import Reading
from trainer.mistakes import Mistake

TEST = ("test", "val", "valid", "validation")
VALIDATION = ("val", "valid", "validation")
Fraction = Annotated[float, Field(gt=0, lt=1)]
Number = Annotated[int, Field(gt=0, strict=True)]
Byte = Annotated[int, Field(ge=0, le=255)]


def image_folder(
    *,
    folder: Path,
    test: Fraction | Number | Path | None = None,
    test_folder: Path | None = None,
    test_seed: NonNegativeInt = 0,
    validation_folder: Path | None = None,
    size: PositiveInt = 224,
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0,
    background: tuple[Byte, Byte, Byte] = (255, 255, 255),
    bad_images: Literal["stop", "skip"] = "stop",
) -> Source:
    """Reads images from disk when needed, as RGB of 3 x size x size. The topmost subfolder is the class.

    Training images in no subfolder are unlabelled (-1) and can be used for distillation. Test images need
    labels, and their classes must be training classes. Classes are in natural order (2 before 10), which
    depends on their names only. Images are rotated by their EXIF orientation and normalised with ImageNet's
    mean and standard deviation, unless the data section sets its own. Files with a suffix that Pillow does
    not read, dot files, and links to files that are listed already are skipped and counted.

    Args:
        folder: A folder with the subfolder `train` and one of `test`, `val`, `valid` and `validation`, or the
            folder of the training images itself. A `val` folder next to `train` and `test` has the validation
            images.
        test: Another folder of test images; or, if `folder` has the class folders itself, the fraction or
            number of its images that are split off as the test set, class by class.
        test_folder: The old name of test.
        test_seed: Seed of that split.
        validation_folder: Another folder of validation images.
        size: Side of the input in pixels. The middle square is resized to it (bicubic, antialiased).
        crop: Side of the middle square as a fraction of the image's shorter side.
        background: (R, G, B), 0 to 255, under transparent pixels.
        bad_images: What happens if files are damaged, which is checked at the start: `stop` raises, `skip`
            leaves out up to 1 % of the files.

    Raises:
        Mistake: For a missing folder or class, a class without images, a single class, and damaged files.
    """
    if not folder.is_dir():
        raise Mistake(f"image_folder: there is no folder {folder}")
    try:
        return _opened(
            folder,
            test if test is not None else test_folder,
            test_seed,
            validation_folder,
            size,
            crop,
            background,
            bad_images,
        )
    except Mistake as error:
        message = str(error)
        raise Mistake(
            message if message.startswith("image_folder: ") else f"image_folder: {message}"
        ) from None


def _opened(
    folder: Path,
    test: float | Path | None,
    test_seed: int,
    validation_folder: Path | None,
    size: int,
    crop: float,
    background: tuple[int, int, int],
    bad_images: str,
) -> Source:
    """Opens the folders as `image_folder`; its messages do not name the dataset."""
    train_folder = folder / "train" if (folder / "train").is_dir() else folder
    fraction = test if isinstance(test, (int, float)) else None
    if fraction is not None and train_folder != folder:
        raise Mistake(
            f"test: {test} splits a plain folder of classes; {folder} has a subfolder 'train': name the test folder"
        )
    test_folder = None if isinstance(test, (int, float)) else _test_folder(folder, train_folder, test)
    if validation_folder is None and train_folder != folder:
        beside = [
            folder / name for name in VALIDATION if (folder / name).is_dir() and folder / name != test_folder
        ]
        validation_folder = beside[0] if beside else None
    parts = {"training": train_folder, "test": test_folder, "validation": validation_folder}
    _refuse_nested({name: path for name, path in parts.items() if path is not None})

    listings = {name: list_images(path) for name, path in parts.items() if path is not None}
    examined = examine([file for found in listings.values() for file in found.files], str(folder.resolve()))
    notes = _without_damaged(listings, examined, bad_images)
    train = listings["training"]
    classes = _classes(train, listings, train_folder)
    notes += notes_on_names(set(classes), set(_raw_names(train_folder)))
    number = {name: position for position, name in enumerate(classes)} | {"": -1}
    reading = Reading((3, size, size), crop=crop, background=background, depth=examined.depth)
    images = {name: _OnDisk(found, number, reading) for name, found in listings.items()}
    if fraction is not None:
        images["training"], images["test"] = _split(images["training"], fraction, test_seed)
    if examined.num_deep:
        notes.append(
            f"{examined.num_deep:,} pictures have 16 bits; their samples have {examined.depth}, and are scaled by that"
        )
    return Source(
        train=images["training"],
        test=images["test"],
        validation=images.get("validation"),
        classes=classes,
        mean=(0.485, 0.456, 0.406),  # ImageNet's
        std=(0.229, 0.224, 0.225),
        shape=reading.shape,
        reading=reading,
        notes=[_found(folder, classes, images, listings), *notes],
    )


def _test_folder(folder: Path, train_folder: Path, test: Path | None) -> Path:
    """Returns the folder of the test images: `test` if given, else the first subfolder named in `TEST`."""
    if test is not None:
        return Path(test)
    if train_folder == folder:
        raise Mistake(
            f"{folder} has no subfolder 'train': give test too, a folder, or the fraction of its images that are split off"
        )
    found = [folder / name for name in TEST if (folder / name).is_dir()]
    if not found:
        raise Mistake(f"{folder} has no subfolder 'test', 'val', 'valid' or 'validation'")
    return found[0]


def _refuse_nested(parts: dict[str, Path]) -> None:
    """Raises Mistake if one part's folder is inside another's, because they would have images in common."""
    for name, path in parts.items():
        for other, outer in parts.items():
            if name != other and path.resolve().is_relative_to(outer.resolve()):
                raise Mistake(f"of {outer} ({other} images) and {path} ({name} images) one lies in the other")


def _without_damaged(listings: dict[str, Listing], examined: Examined, bad_images: str) -> list[str]:
    """Removes damaged files from the listings; returns notes. Raises Mistake if they may not be skipped."""
    damaged = examined.damaged
    if not damaged:
        return []
    shown = [f"{path}: {fault}" for path, fault in list(damaged.items())[:10]]
    shown += [f"and {len(damaged) - 10} more"] * (len(damaged) > 10)
    lines = "\n".join(shown)
    total = sum(len(found.files) for found in listings.values())
    if bad_images == "stop":
        raise Mistake(
            f"{len(damaged)} of {total:,} pictures cannot be read (bad_images: skip leaves them out, up to 1 %):\n{lines}"
        )
    if len(damaged) > max(1, total // 100):
        raise Mistake(
            f"{len(damaged)} of {total:,} pictures cannot be read; at most 1 % are skipped:\n{lines}"
        )
    for found in listings.values():
        kept = [i for i, file in enumerate(found.files) if file not in damaged]
        found.files, found.classes = [found.files[i] for i in kept], [found.classes[i] for i in kept]
    return [f"{len(damaged)} of {total:,} pictures cannot be read and are skipped: {'; '.join(shown)}"]


def _classes(train: Listing, listings: dict[str, Listing], train_folder: Path) -> list[str]:
    """Returns the classes' names, in order. Raises Mistake if the images and classes do not fit together."""
    for name, found in listings.items():
        if not found.files:
            raise Mistake(f"there are no {name} images{found.described()}")
    labelled = [name for name in train.classes if name]
    if labelled and len(labelled) < len(train.classes):
        beside = train.files[train.classes.index("")]
        raise Mistake(
            f"{beside} lies beside the classes' subfolders; either all training images lie in one, or none does"
        )
    empty = [name for name in train.folders if name not in set(labelled)]
    if labelled and empty:
        raise Mistake(
            f"{train_folder} has class folders without a picture that can be read: {', '.join(empty)}{train.described()}"
        )
    for name in {"test", "validation"} & listings.keys():
        found = listings[name]
        if "" in found.classes:
            raise Mistake(
                f"{found.files[found.classes.index('')]} lies in no subfolder; {name} images need a class each"
            )
    classes = in_order(set(labelled) or set(listings["test"].classes if "test" in listings else ()))
    if len(classes) < 2:
        fault = f"of one class, {classes[0]!r}" if classes else "in no class folder"
        raise Mistake(f"all images of {train_folder} are {fault}; two or more classes are needed")
    for name in ("test", "validation"):
        for file, class_name in zip(*_both(listings.get(name)), strict=True):
            if class_name not in classes:
                raise Mistake(f"{file}: there are no training images of class {class_name!r}")
    return classes


def _both(found: Listing | None) -> tuple[list[str], list[str]]:
    """Returns the files of a listing and their classes; none without a listing."""
    return ([], []) if found is None else (found.files, found.classes)


def _raw_names(folder: Path) -> list[str]:
    """Returns the names of the class folders as they are on disk."""
    return [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _found(
    folder: Path, classes: list[str], images: dict[str, "_OnDisk"], listings: dict[str, Listing]
) -> str:
    """Returns one line: the classes, images of each part, fewest and most of a class, and skipped files."""
    counts = torch.bincount(images["training"].labels[images["training"].labels >= 0], minlength=len(classes))
    per_class = (
        f" ({int(counts.min()):,} to {int(counts.max()):,} a class)" if counts.any() else " without labels"
    )
    parts = [f"{len(images['training']):,} training images{per_class}"]
    parts += [f"{len(images[name]):,} {name} images" for name in ("validation", "test") if name in images]
    skipped = Listing()
    for found in listings.values():
        skipped.passed_over.update(found.passed_over)
        skipped.num_links += found.num_links
        skipped.num_special += found.num_special
    return f"{folder}: {len(classes)} classes, {', '.join(parts)}{skipped.described()}"


def _split(images: "_OnDisk", test: float, seed: int) -> tuple["_OnDisk", "_OnDisk"]:
    """Splits images into training and test images: of each class the same fraction, at least one image."""
    if (images.labels < 0).any():
        raise Mistake("images without labels cannot be split class by class: give test, a folder")
    fraction = test if isinstance(test, float) else test / len(images)
    if not 0 < fraction < 1:
        raise Mistake(f"test: {test} of {len(images)} images leaves none to train on")
    order = torch.from_numpy(np.random.default_rng([seed, 0x7E57]).permutation(len(images)))
    held_out = torch.zeros(len(images), dtype=torch.bool)
    for label in images.labels.unique():
        of_class = order[images.labels[order] == label]
        count = max(1, round(fraction * len(of_class)))
        if count >= len(of_class):
            raise Mistake(f"test: {test} leaves no training image of one class, which has {len(of_class)}")
        held_out[of_class[:count]] = True
    return images.some(~held_out), images.some(held_out)


class _OnDisk:
    """Image files, decoded and resized when they are used (an `Images`)."""

    def __init__(self, found: Listing, number: dict[str, int], reading: Reading) -> None:
        self.files = found.files
        self.labels = torch.tensor([number[name] for name in found.classes], dtype=torch.int64)
        self.reading = reading

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        images = torch.stack([read_image(self.files[position], self.reading) for position in positions])
        return images, self.labels[torch.as_tensor(positions)]

    def cut(self, positions: list[int], cuts: Cuts) -> tuple[Tensor, Tensor]:
        """Returns the part of each picture that `cuts` names, at the reading's size, and labels."""
        parts = [
            read_part(self.files[position], self.reading, numbers, cuts.settings)
            for position, numbers in zip(positions, cuts.numbers.tolist(), strict=True)
        ]
        return torch.stack(parts), self.labels[torch.as_tensor(positions)]

    def at(self, reading: Reading) -> "_OnDisk":
        """Returns the same images, read in another way."""
        part = _OnDisk(Listing(), {}, reading)
        part.files, part.labels = self.files, self.labels
        return part

    def some(self, chosen: Tensor) -> "_OnDisk":
        """Returns the images where `chosen`, bool [len], is True."""
        part = _OnDisk(Listing(), {}, self.reading)
        part.files = [file for file, is_chosen in zip(self.files, chosen.tolist(), strict=True) if is_chosen]
        part.labels = self.labels[chosen]
        return part
