"""Labelled images in memory or on disk, and the parts of a run's data."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.crops import Cuts, cut
from trainer.data.reading import Reading
from trainer.mistakes import Mistake

SAMPLE = 64  # images not in memory that are read for a digest of them
# ImageNet's mean and standard deviation, of colour and (about) of grey.
LOOKS = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.459,), (0.226,))}


class Images(Protocol):
    """A set of labelled images: in memory (`InMemory`) or read from disk.

    Images that are read from pictures may have `at(reading) -> Images`, the same read as another `Reading` says; and
    `cut(positions, cuts)`, which returns parts of the whole pictures instead, for `random_resized_crop`.
    """

    labels: Tensor  # int64 [len], -1 for unlabelled images

    def __len__(self) -> int: ...

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Returns images uint8 [N, C, H, W] and labels int64 [N] at the positions."""


class InMemory:
    """Images in one uint8 tensor [num_images, C, H, W], with labels [num_images]; read a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise Mistake(f"data: {name}: got {type(value).__name__}; a tensor is allowed")
        if images.dtype != torch.uint8 or images.dim() != 4:
            got = f"{images.dtype} {list(images.shape)}"
            raise Mistake(f"data: images: got {got}; uint8 [N, C, H, W] is allowed")
        if labels.shape != images.shape[:1]:
            raise Mistake(
                f"data: labels: got {list(labels.shape)}; one for each of the {len(images)} images is allowed"
            )
        self.images = images
        self.labels = labels.long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, positions: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(positions, device=self.images.device)
        # index_select copies whole rows of bytes: nine times as fast as images[index].
        return self.images.index_select(0, index), self.labels.index_select(0, index)

    def cut(self, positions: Tensor | list[int], cuts: Cuts) -> tuple[Tensor, Tensor]:
        """Returns the part of each image that `cuts` names, resized to the image's size, and labels."""
        images, labels = self.__getitems__(positions)
        height, width = images.shape[2:]
        parts = [
            cut(image, numbers, cuts.settings, height, width, "bilinear")
            for image, numbers in zip(images, cuts.numbers.tolist(), strict=True)
        ]
        return torch.stack(parts), labels


def read(images: Images, index: Tensor, cuts: Cuts | None = None) -> tuple[Tensor, Tensor]:
    """Returns images uint8 [N, C, H, W] and labels int64 [N] at positions `index` [N].

    cuts: of these images; None for the images as they are.
    """
    positions: Any = index.to(images.images.device) if isinstance(images, InMemory) else index.tolist()
    if cuts is None:
        return images.__getitems__(positions)
    return images.cut(positions, cuts)  # type: ignore[attr-defined]  # `make_data` refuses others


def digest_of(images: Images, ids: Tensor) -> str:
    """Returns a digest of pixels: of all images in memory; of others a sample of those at positions `ids`, which is evenly spread."""
    sample = ids[:: max(1, len(ids) // SAMPLE)].tolist()
    pixels = images.images if isinstance(images, InMemory) else images.__getitems__(sample)[0]
    return hashlib.sha256(pixels.cpu().contiguous().numpy().data).hexdigest()


@dataclass
class Source:
    """What a dataset function returns: training and test images, and facts about them.

    Attributes:
        train: The training images.
        test: The test images.
        classes: Names of the classes, in the order of the labels.
        mean: For each channel, of the training images scaled to [0, 1].
        std: For each channel, likewise.
        shape: (C, H, W) of the images.
        validation: Separate validation images; None if they are split off the training set.
        reading: How an image file is read as such an image; None for the default of the shape.
        notes: Lines about the data for the user.
        groups: int64 [len(train)]. Validation images that are split off are taken group by group, and class by class;
            None for images that are drawn one by one, whatever their class.
    """

    train: Images
    test: Images
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    validation: Images | None = None
    reading: Reading | None = None
    notes: list[str] = field(default_factory=list)
    groups: Tensor | None = None


@dataclass
class Part:
    """Some of a source's images, for example the training images without the validation images.

    Attributes:
        images: The source's images.
        ids: int64 [len], each sample's position in the source, the same in every run.
        workers: The number of processes that read images from disk.
        image_bytes: Bytes of one image.
        at_once: The most images of a batch that is measured, on one process.
    """

    images: Images
    ids: Tensor
    workers: int = 0
    image_bytes: int = 0
    at_once: int = 1000

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, positions: Tensor | list[int], cuts: Cuts | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns images uint8 [N, C, H, W], labels int64 [N] and index int64 [N] at positions in it.

        cuts: of all of the source's images; None for the images as they are.
        """
        index = self.ids[positions]
        return *read(self.images, index, None if cuts is None else cuts.of(index)), index

    __getitems__ = read

    @property
    def labels(self) -> Tensor:
        """The labels, int64 [len], -1 for unlabelled images."""
        return self.images.labels[self.ids]


@dataclass
class Data:
    """The images of a run, with the settings of their augmentation.

    Attributes:
        name: The dataset's name.
        train: The part that is trained on, from the source's training set.
        validation: The validation part, from the source's training set or its own validation images.
        test: The source's test images.
        classes: Names of the classes, in the order of the labels.
        mean: Of the normalisation, for each channel.
        std: Of the normalisation, for each channel.
        shape: (C, H, W) of the images.
        num_samples: Size of the source's training set; every `index` is below it.
        augment: The settings of the augmentation.
        views: The number of augmented views before they repeat, None for no limit.
        kept: The `views.KeptViews`, if any.
        seed: The seed of the data.
        mixup: Alpha of mixup, 0 for off.
        cutmix: Alpha of CutMix, 0 for off.
        fingerprint: A hash that differs between sets of training images.
        reading: How an image file is read as such an image; None for the default of the shape.
        notes: Lines about the data for the user.
        zoom: How many times as large as the recipe's the images are (`at_size`).
    """

    name: str
    train: Part
    validation: Part
    test: Part
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    num_samples: int
    augment: Any
    views: int | None = None
    kept: Any = None
    seed: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    fingerprint: str = ""
    reading: Reading | None = None
    notes: list[str] = field(default_factory=list)
    zoom: float = 1.0

    def at_size(self, size: int | None, filter: str | None = None) -> "Data":
        """Returns the same images as read from their pictures at another size, for a network that sees larger ones.

        size: of the longer side, the other in proportion. filter: of the resizing; the data's own for None. What of a
        picture is seen, `crop` and `resize_mode`, is the data's. Returns the data itself for its own size, for None, and
        for images that are not read from pictures.
        """
        channels, height, width = self.shape
        parts = (self.train, self.validation, self.test)
        if size is None or size == max(height, width) or not all(hasattr(p.images, "at") for p in parts):
            return self
        zoom = size / max(height, width)
        reading = self.reading or Reading(self.shape)
        shape = (channels, max(1, round(height * zoom)), max(1, round(width * zoom)))
        reading = replace(reading, shape=shape, filter=filter or reading.filter)
        train, validation, test = (
            replace(part, images=part.images.at(reading), image_bytes=math.prod(shape))  # type: ignore[attr-defined]
            for part in parts
        )
        return replace(
            self,
            train=train,
            validation=validation,
            test=test,
            shape=reading.shape,
            reading=reading,
            kept=None,
            zoom=self.zoom * zoom,
        )

    def measure_at_once(self, num_images: int) -> None:
        """Sets how many images are measured at a time, at most."""
        for part in (self.train, self.validation, self.test):
            part.at_once = num_images

    @property
    def mixed(self) -> bool:
        """Whether training images are mixed with others. A mixed image has no index and no single label."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def labelled(self) -> bool:
        """Whether any training image has a label."""
        return bool((self.train.labels >= 0).any())

    @property
    def partly_labelled(self) -> bool:
        """Whether some training images have a label and others have none."""
        return self.labelled and bool((self.train.labels < 0).any())

    def labelled_alone(self) -> "Data":
        """Returns the data without the training images that have no label; the data itself if none has one, or all."""
        if not self.partly_labelled:
            return self
        return replace(self, train=replace(self.train, ids=self.train.ids[self.train.labels >= 0]))


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation of each channel of images uint8 [N, C, H, W], scaled to [0, 1]."""
    channels = images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for some in images.split(
        256
    ):  # they are counted, because as floats they would take eight times the memory
        for channel in range(channels):
            counts[channel] += torch.bincount(some[:, channel].flatten(), minlength=256)
    weights, values = (
        counts / counts.sum(1, keepdim=True, dtype=torch.float64),
        torch.arange(256, dtype=torch.float64) / 255,
    )
    mean = (weights * values).sum(1)
    variance = (weights * (values - mean[:, None]) ** 2).sum(1)
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


def in_size(images: Tensor, size: Sequence[int] | None) -> Tensor:
    """Returns images [N, C, H, W] in [0, 1] in the size (H, W) that a network sees; as they are for None."""
    if size is None or tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=tuple(size), mode="bilinear", antialias=True)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns (images - mean) / std for each channel, of images [N, C, H, W] in [0, 1]."""
    if len(mean) != images.shape[1] or len(std) != images.shape[1]:
        raise Mistake(
            f"mean and std have {len(mean)} and {len(std)} values for images of {images.shape[1]} channels"
        )
    if len(mean) == 1:
        return (images - mean[0]).mul_(1 / std[0])
    subtracted, factor = _constants(tuple(mean), tuple(std), images.device, images.dtype)
    return (images - subtracted).mul_(factor)


_kept: dict[tuple, tuple[Tensor, Tensor]] = {}


def _constants(mean: tuple, std: tuple, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns mean and 1 / std on the device, [C, 1, 1] each. They stay there: a copy in each step would wait for the device."""
    key = (mean, std, device, dtype)
    if key not in _kept:
        with torch.inference_mode(False):  # else no later training could use them
            made = (torch.tensor(each, device=device, dtype=dtype)[:, None, None] for each in (mean, std))
            subtracted, deviation = made
            _kept[key] = (subtracted, 1 / deviation)
    return _kept[key]
