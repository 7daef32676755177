"""WebDataset: shards, which are .tar files with a picture and its label side by side."""

import glob
import io
import os
import tarfile
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from PIL import Image
from pydantic import Field, PositiveInt

from trainer.data.image_file import endings
from trainer.data.images import LOOKS, Source
from trainer.data.pictures import Pictures
from trainer.data.reading import Reading
from trainer.mistakes import Mistake
from trainer.storage.files import read_bytes

MOST_CLASSES = 2**16  # or as many as there are pictures
Shards = Path | Annotated[list[Path], Field(min_length=1)]


def web_dataset(
    *,
    train: Shards,
    test: Shards,
    validation_folder: Shards | None = None,
    class_names: Path | None = None,
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 224,
    channels: Literal[1, 3] = 3,
    resize_mode: Literal["crop", "pad", "squash"] = "crop",
) -> Source:
    """Reads pictures out of shards on disk, 3 x size x size, in any order: none is unpacked, and nothing is streamed.

    A shard is a .tar file, not compressed, in which files of one name up to its first dot belong together: a picture of any
    kind that Pillow reads (the first, if there are several), and NAME.cls with the number of its class. Pictures without .cls are unlabelled training images.
    Where each picture lies is found by reading the shards' tables once at the start. Batches are drawn from all shards, so
    the order is random, the same in every run, and divided among the processes. A damaged picture ends the run when it is
    read: all are not opened before.

    Args:
        train: Files or patterns such as shards/train-*.tar.
        test: Likewise.
        validation_folder: Likewise, of validation images; without it they are split off the training images.
        class_names: A file with the name of each class on a line, in the order of their numbers. By default the numbers.
        size: Side of the input in pixels, or [height, width].
        channels: 1 for grey images.
        resize_mode: As of `image_folder`.

    Raises:
        Mistake: For a pattern that names no file, a shard that is compressed, damaged or given twice, and labels that are no
            numbers.
    """
    height, width = (size, size) if isinstance(size, int) else size
    reading = Reading((channels, height, width), fit=resize_mode)
    part_of: dict[str, str] = {}
    parts = {"train": _members(train, "train", part_of), "test": _members(test, "test", part_of)}
    if validation_folder is not None:
        parts["validation"] = _members(validation_folder, "validation", part_of)
    for name, found in parts.items():
        if name != "train" and any(label < 0 for label in found.labels):
            picture = found.names[found.labels.index(-1)].rpartition("#")[0]
            raise Mistake(f"web_dataset: {name}: {picture} has no .cls beside it")
    most = 1 + max(label for found in parts.values() for label in found.labels)
    allowed = max(MOST_CLASSES, sum(len(found.names) for found in parts.values()))
    for found in parts.values():
        if most > allowed and most - 1 in found.labels:
            picture = found.names[found.labels.index(most - 1)].rpartition("#")[0]
            raise Mistake(
                f"web_dataset: the .cls beside {picture}: got {most - 1}; the number of a class, below {allowed:,}, is allowed"
            )
    names = [str(number) for number in range(most)]
    if class_names is not None:
        names = [
            line.strip()
            for line in read_bytes(class_names).decode("utf-8", "replace").splitlines()
            if line.strip()
        ]
    if most > len(names) or len(set(names)) < max(2, len(names)):
        raise Mistake(
            f"web_dataset: there are {most} classes, and {len(set(names))} names of classes; two classes or more are needed, "
            "and a name of its own for each"
        )
    images = {
        name: Members(found.names, torch.tensor(found.labels), reading) for name, found in parts.items()
    }
    mean, std = LOOKS[channels]
    counts = ", ".join(f"{len(found.names):,} {name} images" for name, found in parts.items())
    return Source(
        train=images["train"],
        test=images["test"],
        validation=images.get("validation"),
        classes=names,
        mean=mean,
        std=std,
        shape=reading.shape,
        reading=reading,
        groups=torch.arange(len(images["train"])),
        notes=[f"web_dataset: {len(names)} classes, {counts}"],
    )


class Members(Pictures):
    """Pictures inside .tar files. Their names are SHARD/NAME#START+LENGTH+LETTERS.

    START and LENGTH are the bytes' place in the shard, LETTERS the length of the shard's name.
    """

    def opened(self, position: int) -> Image.Image:
        name, _, place = self.files[position].rpartition("#")
        start, length, letters = map(int, place.split("+"))
        with open(name[:letters], "rb") as file:
            data = os.pread(file.fileno(), length, start)
        try:
            image = Image.open(io.BytesIO(data))
            image.filename = name  # for messages
            return image
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            raise Mistake(f"{name}: is no image that can be read: {error}") from None

    def paths(self) -> list[str]:
        return list(dict.fromkeys(_shard(name) for name in self.files))


def _shard(name: str) -> str:
    """Returns the shard of a member's name."""
    return name[: int(name.rpartition("+")[2])]


class _Members(NamedTuple):
    names: list[str]
    labels: list[int]


def _members(shards: Shards, part: str, part_of: dict[str, str]) -> _Members:
    """Lists the pictures of shards, in the order of the shards' names and of the files in each.

    part: what they are. part_of: {shard: what it is}, to which these are added; one that is there already is refused.
    """
    names: list[str] = []
    labels: list[int] = []
    known = endings()
    for pattern in shards if isinstance(shards, list) else [shards]:
        files = sorted(glob.glob(str(pattern)))
        if not files:
            raise Mistake(f"web_dataset: there is no file {pattern}")
        for file in files:
            if not file.endswith(".tar"):
                raise Mistake(
                    f"web_dataset: {file}: is no .tar; compressed shards cannot be read in any order: unpack them"
                )
            real = os.path.realpath(file)
            if real in part_of:
                raise Mistake(
                    f"web_dataset: {file}: is given twice ({part_of[real]} and {part} images): a shard may be in one of them, once"
                )
            part_of[real] = part
            pictures: dict[str, str] = {}
            classes: dict[str, int] = {}
            try:
                with tarfile.open(file, "r:") as shard:
                    for member in shard:
                        folder, _, base = member.name.rpartition("/")
                        key, _, ending = base.partition(".")
                        key = f"{folder}/{key}"
                        if not member.isfile():
                            continue
                        if ending.lower() == "cls":
                            classes[key] = _number(shard, member, file)
                        elif "." + ending.lower().rpartition(".")[2] in known:
                            place = f"{file}/{member.name}#{member.offset_data}+{member.size}+{len(file)}"
                            pictures.setdefault(key, place)
            except (tarfile.TarError, OSError) as error:
                raise Mistake(f"web_dataset: {file}: is no .tar file that can be read: {error}") from None
            names += pictures.values()
            labels += [classes.get(key, -1) for key in pictures]
    if not names:
        raise Mistake(f"web_dataset: {shards} has no pictures")
    return _Members(names, labels)


def _number(shard: tarfile.TarFile, member: tarfile.TarInfo, file: str) -> int:
    """Returns the class in a .cls file."""
    stream = shard.extractfile(member)
    text = b"" if stream is None else stream.read(32).strip()
    if not text.isdigit():
        raise Mistake(
            f"web_dataset: {file}/{member.name}: got {text[:20]!r}; the number of a class is allowed"
        )
    return int(text)
