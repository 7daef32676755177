"""Image folder: images of any size in the user's folders, one subfolder for each class, or in a table."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from trainer.data.examined import Examined, examine
from trainer.data.images import LOOKS, Source
from trainer.data.kept_listing import kept_listing
from trainer.data.listing import Listing, in_order, notes_on_names
from trainer.data.pictures import Pictures
from trainer.data.reading import Reading
from trainer.data.splitting import groups_of, split_off
from trainer.data.tables import is_table, list_table, named_classes
from trainer.mistakes import Mistake

TEST = ("test", "val", "valid", "validation")
VALIDATION = ("val", "valid", "validation")
Fraction = Annotated[float, Field(gt=0, lt=1)]
Number = Annotated[int, Field(gt=0, strict=True)]
Byte = Annotated[int, Field(ge=0, le=255)]


def check(settings: Any) -> None:
    """Raises Mistake for settings that do not go together."""
    if settings.resize_mode != "crop" and settings.crop != 1:
        raise Mistake(
            f"crop has no effect with resize_mode {settings.resize_mode!r}, which shows all of an image"
        )
    own_validation = settings.validation_folder or isinstance(settings.validation, Path)
    if settings.group is not None and own_validation and not isinstance(settings.test, (int, float)):
        raise Mistake("group has no effect: neither test nor validation images are split off")


def image_folder(
    *,
    folder: Path | Annotated[list[Path], Field(min_length=1)],
    test: Fraction | Number | Path | None = None,
    test_folder: Path | None = None,
    test_seed: NonNegativeInt = 0,
    validation_folder: Path | None = None,
    unlabelled_folder: Path | None = None,
    group: str | None = None,
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224,
    channels: Literal[1, 3] = 3,
    resize_mode: Literal["crop", "pad", "squash"] = "crop",
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0,
    background: tuple[Byte, Byte, Byte] = (255, 255, 255),
    class_names: Path | None = None,
    bad_images: Literal["stop", "skip"] = "stop",
) -> Source:
    """Reads images from disk when needed, as RGB of 3 x size x size. The topmost subfolder is the class.

    Training images in no subfolder are unlabelled (-1) and can be used for distillation. Test images need
    labels, and their classes must be training classes. Classes are in natural order (2 before 10), which
    depends on their names only. Images are rotated by their EXIF orientation and normalised with ImageNet's
    mean and standard deviation, unless the data section sets its own. Files with a suffix that Pillow does
    not read, dot files, and links to files that are listed already are skipped and counted. Test and validation
    images that are split off are taken class by class. The listing of a large folder is kept.

    Args:
        folder: A folder with the subfolder `train` and one of `test`, `val`, `valid` and `validation`, or the
            folder of the training images itself. A `val` folder next to `train` and `test` has the validation
            images. Instead of a folder, here and below, a .csv file with the columns path and label, the paths
            relative to the file. Several folders: their images of one class are one class.
        test: Another folder of test images; or, if `folder` has the class folders itself, the fraction or
            number of its images that are split off as the test set, class by class.
        test_folder: The old name of test.
        test_seed: Seed of that split.
        validation_folder: Another folder of validation images.
        unlabelled_folder: A folder of further training images, whose subfolders mean nothing: the teacher labels them.
        group: Which images must not be on both sides of a split, because they show the same: `parent`, those of one
            subfolder; or a regular expression, those with the same match in their path below `folder` (of its first
            group, if it has one). An image without a match is alone.
        size: Side of the input in pixels, or [height, width]. The middle part of that aspect ratio is resized to it
            (bicubic, antialiased).
        channels: 1 for grey images.
        resize_mode: What becomes of images of another aspect ratio: `crop` keeps the middle part, `pad` keeps all, with
            the background on two sides, `squash` keeps all and stretches it.
        crop: Side of the middle part as a fraction of the largest that fits in the image.
        background: (R, G, B), 0 to 255, under transparent pixels and beside padded images.
        class_names: A file that names the classes: each line has a folder's name, a space and the class's name.
        bad_images: What happens if files are damaged, which is checked at the start: `stop` raises, `skip`
            leaves out up to 1 % of the files.

    Raises:
        Mistake: For a missing folder or class, a class without images, a single class, and damaged files.
    """
    height, width = (size, size) if isinstance(size, int) else size
    reading = Reading(
        (channels, height, width), crop=crop, background=background, fit=resize_mode, draft=True
    )
    test = test if test is not None else test_folder
    folders = folder if isinstance(folder, list) else [folder]
    with _named():
        parts = _parts(folders, test, validation_folder, unlabelled_folder)
        return _opened(folders, parts, test, test_seed, group, reading, class_names, bad_images)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Puts the dataset's name before the message of a Mistake."""
    try:
        yield
    except Mistake as error:
        raise Mistake(f"image_folder: {str(error).removeprefix('image_folder: ')}") from None


def _parts(
    folders: list[Path],
    test: float | Path | None,
    validation_folder: Path | None,
    unlabelled_folder: Path | None,
) -> dict[str, list[Path]]:
    """Returns the folders and tables of each part: "training", and where there are any "test", "validation", "unlabelled"."""
    for folder in folders:
        if not folder.is_dir() and not is_table(folder):
            raise Mistake(f"there is no folder {folder}")
    training = [folder / "train" if (folder / "train").is_dir() else folder for folder in folders]
    parts = {"training": training}
    inner = [folder for folder in folders if folder not in training]
    if isinstance(test, (int, float)):
        if inner:
            raise Mistake(
                f"test: {test} splits a plain folder of classes; {inner[0]} has a subfolder 'train': name the test folder"
            )
    else:
        parts["test"] = [Path(test)] if test is not None else [*map(_test_folder, folders)]
    beside = [
        folder / name for folder in inner for name in VALIDATION
        if (folder / name).is_dir() and folder / name not in parts.get("test", [])
    ]  # fmt: skip
    if validation_folder is not None or beside:
        parts["validation"] = (
            [validation_folder]
            if validation_folder is not None
            else beside[:1]
            if len(inner) == 1
            else beside
        )
    if unlabelled_folder is not None:
        parts["unlabelled"] = [unlabelled_folder]
    _refuse_nested([(name, path) for name, paths in parts.items() for path in paths])
    return parts


def _opened(
    folders: list[Path],
    parts: dict[str, list[Path]],
    test: float | Path | None,
    test_seed: int,
    group: str | None,
    reading: Reading,
    class_names: Path | None,
    bad_images: str,
) -> Source:
    """Opens the folders of `_parts`; its messages do not name the dataset."""
    listings = {name: _listed(paths) for name, paths in parts.items()}
    if any(
        is_table(path) for paths in parts.values() for path in paths
    ):  # folders with a file in common are refused
        _refuse_common(listings)
    name = ", ".join(str(folder.resolve()) for folder in folders)
    examined = examine([file for found in listings.values() for file in found.files], name)
    notes = _without_damaged(listings, examined, bad_images)
    unlabelled = listings.pop("unlabelled", Listing())
    train = listings["training"]
    classes = _classes(train, listings, parts["training"])
    notes += notes_on_names(set(classes), set(_raw_names(parts["training"])))
    number = {name: position for position, name in enumerate(classes)} | {"": -1}
    unlabelled.classes = [""] * len(unlabelled.files)
    train.add(unlabelled)
    groups = groups_of(train.files, train.inside, group)
    reading = replace(reading, depth=examined.depth)
    images = {name: _pictures(found, number, reading) for name, found in listings.items()}
    if isinstance(test, (int, float)):
        held_out = _test_images(images["training"], test, test_seed, groups, classes)
        # What has no label in a group that is held out is of neither.
        images["test"], images["training"] = (
            images["training"].some(held_out & (images["training"].labels >= 0)),
            images["training"].some(~held_out),
        )
        groups = groups[~held_out]
    if examined.num_deep:
        notes.append(
            f"{examined.num_deep:,} pictures have 16 bits; their samples have {examined.depth}, and are scaled by that"
        )
    mean, std = LOOKS[reading.shape[0]]
    return Source(
        train=images["training"],
        test=images["test"],
        validation=images.get("validation"),
        classes=named_classes(class_names, classes) if class_names else classes,
        mean=mean,
        std=std,
        shape=reading.shape,
        reading=reading,
        notes=[_found(images, folders, classes, listings), *notes],
        groups=groups,
    )


def _test_folder(folder: Path) -> Path:
    """Returns the folder of the test images beside the training images: the first subfolder named in `TEST`."""
    if not (folder / "train").is_dir():
        raise Mistake(
            f"{folder} has no subfolder 'train': give test too, a folder, or the fraction of its images that are split off"
        )
    found = [folder / name for name in TEST if (folder / name).is_dir()]
    if not found:
        raise Mistake(f"{folder} has no subfolder 'test', 'val', 'valid' or 'validation'")
    return found[0]


def _listed(paths: list[Path]) -> Listing:
    """Lists the pictures of folders and tables, those of the first first."""
    found = Listing()
    for path in paths:
        found.add(list_table(path) if is_table(path) else kept_listing(path))
    return found


def _refuse_nested(parts: list[tuple[str, Path]]) -> None:
    """Raises Mistake if one folder is inside another, because they would have images in common."""
    for at, (name, path) in enumerate(parts):
        for other_at, (other, outer) in enumerate(parts):
            if at != other_at and path.resolve().is_relative_to(outer.resolve()):
                raise Mistake(f"of {outer} ({other} images) and {path} ({name} images) one lies in the other")


def _refuse_common(listings: dict[str, Listing]) -> None:
    """Raises Mistake if a file is listed twice, in one part or in two: it would be learnt from and measured on."""
    part_of: dict[str, str] = {}
    twice: list[str] = []
    for name, found in listings.items():
        for file in found.files:
            path = os.path.abspath(file)
            if path in part_of:
                twice.append(f"{path} ({part_of[path]} and {name} images)")
            part_of[path] = name
    if twice:
        others = f" (and {len(twice) - 1:,} more)" if len(twice) > 1 else ""
        raise Mistake(f"{twice[0]} stands in the lists twice{others}: a picture may be in one of them, once")


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
        found.keep([i for i, file in enumerate(found.files) if file not in damaged])
    return [f"{len(damaged)} of {total:,} pictures cannot be read and are skipped: {'; '.join(shown)}"]


def _classes(train: Listing, listings: dict[str, Listing], folders: list[Path]) -> list[str]:
    """Returns the classes' names, in order. Raises Mistake if the images and classes do not fit together."""
    train_folder = " and ".join(map(str, folders))
    for name, found in listings.items():
        if not found.files:
            raise Mistake(f"there are no {name} images{found.described()}")
    labelled = [name for name in train.classes if name]
    tables = any(map(is_table, folders))  # whose pictures without a label are unlabelled
    if labelled and len(labelled) < len(train.classes) and not tables:
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
                f"{found.files[found.classes.index('')]} lies in no subfolder, or its line has no label; {name} images need a "
                "class each"
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


def _raw_names(folders: list[Path]) -> list[str]:
    """Returns the names of the class folders as they are on disk."""
    entries = [entry for folder in folders if folder.is_dir() for entry in folder.iterdir()]
    return list({entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")})


def _found(
    images: dict[str, Pictures], folders: list[Path], classes: list[str], listings: dict[str, Listing]
) -> str:
    """Returns one line: the classes, images of each part, fewest and most of a class, and skipped files."""
    labels = images["training"].labels
    counts = torch.bincount(labels[labels >= 0], minlength=len(classes))
    per_class = (
        f" ({int(counts.min()):,} to {int(counts.max()):,} a class)" if counts.any() else " without labels"
    )
    num_labelled = int(counts.sum()) or len(labels)
    parts = [f"{num_labelled:,} training images{per_class}"]
    if num_labelled < len(labels):
        parts.append(f"{len(labels) - num_labelled:,} without labels")
    parts += [f"{len(images[name]):,} {name} images" for name in ("validation", "test") if name in images]
    skipped = Listing()
    for found in listings.values():
        skipped.add(found)
    return f"{', '.join(map(str, folders))}: {len(classes)} classes, {', '.join(parts)}{skipped.described()}"


def _test_images(
    images: Pictures, test: float | int, seed: int, groups: Tensor, classes: list[str]
) -> Tensor:
    """Returns which images are split off as test images, bool [N]. Raises Mistake if a class has none left, or no label."""
    if not (images.labels >= 0).any():
        raise Mistake("images without labels cannot be split class by class: give test, a folder")
    if not isinstance(test, float) and test >= int((images.labels >= 0).sum()):
        raise Mistake(f"test: {test} of {len(images)} images leaves none to train on")
    # Of a number of images a class's part is known only after the split: none is left where that would take the last.
    held_out = split_off(images.labels, test, [seed, 0x7E57], groups, leave_one=isinstance(test, float))
    for label in images.labels.unique().tolist():
        of_class = images.labels == label
        count, num_groups = int(of_class.sum()), len(groups[of_class].unique())
        too_few = isinstance(test, float) and (num_groups == 1 or max(1, round(test * count)) >= count)
        if label >= 0 and (too_few or bool(held_out[of_class].all())):
            raise Mistake(
                f"test: {test} leaves no training image of class {classes[label]!r}, which has {count}"
                + (f" in {num_groups} groups" if num_groups < count else "")
            )
    return held_out


def _pictures(found: Listing, number: dict[str, int], reading: Reading) -> Pictures:
    labels = torch.tensor([number[name] for name in found.classes], dtype=torch.int64)
    return Pictures(found.files, labels, reading)
