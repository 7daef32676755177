"""Image folder: images of any size in a folder of yours, one subfolder for each class."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor

from trainer.data.image_file import open_image
from trainer.data.images import Source
from trainer.mistakes import Mistake

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def image_folder(
    *,
    folder: Path,
    test_folder: Path | None = None,
    size: PositiveInt = 224,
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0,
) -> Source:
    """Images read from disk when needed, as RGB of 3 x size x size; the subfolder's name is the class, however deep they lie.

    folder: has the subfolder `train` and one of `test`, `val` and `validation`, the first that is there; or
    is itself the folder of the training images, and test_folder gives the others. Training images that lie in
    no subfolder are unlabelled (-1): a teacher can distil with them. Test images are labelled, and their
    classes are the training's. Classes are in natural order (2 before 10), as timm has them.
    size, crop: the middle square of `crop` times the shorter side, resized to `size` (bicubic, antialiased).
    Normalised with ImageNet's mean and deviation, unless the data section gives its own.
    What begins with a dot is passed over. Raises Mistake for a folder or class that is not there, a single
    class and, on reading, for a damaged image file.
    """
    if not folder.is_dir():
        raise Mistake(f"image_folder: there is no folder {folder}")
    train_folder = folder / "train" if (folder / "train").is_dir() else folder
    if test_folder is None:
        if train_folder == folder:
            raise Mistake(f"image_folder: {folder} has no subfolder 'train': give test_folder too")
        found = [folder / name for name in ("test", "val", "validation") if (folder / name).is_dir()]
        if not found:
            raise Mistake(f"image_folder: {folder} has no subfolder 'test', 'val' or 'validation'")
        test_folder = found[0]
    places = train_folder.resolve(), test_folder.resolve()
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        raise Mistake(
            f"image_folder: of {train_folder} and {test_folder} (test images) one lies in the other"
        )

    files, names = _find(train_folder)
    test_files, test_names = _find(test_folder)
    if "" in test_names:
        raise Mistake(
            f"image_folder: {test_files[test_names.index('')]} lies in no subfolder; "
            "test images need a class each"
        )
    labelled = [name for name in names if name]
    if labelled and len(labelled) < len(names):
        raise Mistake(
            f"image_folder: {files[names.index('')]} lies beside the classes' subfolders; "
            "either all training images lie in one, or none does"
        )
    classes = _in_order(labelled or test_names)
    if len(classes) < 2:
        raise Mistake(
            f"image_folder: all images of {train_folder} are of one class, {classes[0]!r}; two or more are needed"
        )
    number = {name: position for position, name in enumerate(classes)} | {"": -1}
    for name, file in zip(test_names, test_files, strict=True):
        if name not in number:
            raise Mistake(f"image_folder: {file}: there are no training images of class {name!r}")
    return Source(
        train=_OnDisk(files, [number[name] for name in names], size, crop),
        test=_OnDisk(test_files, [number[name] for name in test_names], size, crop),
        classes=classes,
        mean=(0.485, 0.456, 0.406),  # ImageNet's
        std=(0.229, 0.224, 0.225),
        shape=(3, size, size),
    )


def _find(folder: Path) -> tuple[list[str], list[str]]:
    """The image files under a folder and the class name of each, '' where it lies in no subfolder."""
    from timm.data.readers import create_reader  # only here: the import takes seconds

    if not folder.is_dir():
        raise Mistake(f"image_folder: there is no folder {folder}")
    try:
        reader = create_reader("", root=str(folder), input_key=";".join(_ENDINGS))
    except RuntimeError as fault:
        raise Mistake(f"image_folder: no file under {folder} ends with {', '.join(_ENDINGS)}") from fault
    files, names = [], []
    for file, _ in reader.samples:
        *folders, name = Path(file).relative_to(folder).parts
        if not any(part.startswith(".") for part in (*folders, name)):
            files.append(file)
            names.append(folders[0] if folders else "")
    if not files:
        raise Mistake(f"image_folder: there are no images under {folder}")
    return files, names


def _in_order(names: list[str]) -> list[str]:
    from timm.utils.misc import natural_key

    return sorted(set(names), key=natural_key)


class _OnDisk:
    """Image files, decoded and brought to one size when they are asked for."""

    def __init__(self, files: list[str], labels: list[int], size: int, crop: float) -> None:
        self.files = files
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.size = size
        self.crop = crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        images = torch.stack([self._read(self.files[position]) for position in positions])
        return images, self.labels[torch.as_tensor(positions)]

    def _read(self, file: str) -> Tensor:
        image = open_image(file, "RGB")
        side = min(image.size) * self.crop
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize(
            (self.size, self.size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
