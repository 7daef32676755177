"""Images in memory or on disk, and the parts of a run's data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.data.reading import Reading
from trainer.mistakes import Mistake


class Images(Protocol):
    """A set of labelled images: in memory (`InMemory`) or read from disk."""

    labels: Tensor  # [len] int64, -1 where a label is not known

    def __len__(self) -> int: ...

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """images uint8 [N, C, H, W] and labels int64 [N] of the positions."""


class InMemory:
    """Images held as one uint8 tensor [num_images, C, H, W], fetched a batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}; they are uint8 [N, C, H, W]")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels: got {tuple(labels.shape)} for {len(images)} images")
        self.images = images
        self.labels = labels.long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, positions: Tensor | list[int]) -> tuple[Tensor, Tensor]:
        where = torch.as_tensor(positions, device=self.images.device)
        # Rows of bytes in one piece: nine times as quick as images[where].
        return self.images.index_select(0, where), self.labels.index_select(0, where)


@dataclass
class Source:
    """What a dataset file gives: training and test images and how they look.

    mean, std: per channel, of the training images scaled to [0, 1]. shape: (C, H, W). validation: images of their own;
    None where they are split off the training set. reading: how an image file becomes such an image; the default of the
    shape for data that is in no image files. notes: what the user should know of the data, a line each.
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


@dataclass
class Part:
    """Some of a source's images. ids: [len] int64, each sample's position in the source, the same in every run.

    workers: processes that read the images, where they lie on disk.
    """

    images: Images
    ids: Tensor
    workers: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, positions: Tensor | list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """images uint8 [N, C, H, W], labels int64 [N], index int64 [N] of positions within this part."""
        index = self.ids[positions]
        if isinstance(self.images, InMemory):
            return *self.images.__getitems__(index), index
        return *self.images.__getitems__(index.tolist()), index

    @property
    def labels(self) -> Tensor:
        return self.images.labels[self.ids]


@dataclass
class Data:
    """The images of a run. The train and validation parts come from the source's training set, test from its own.

    num_samples: size of the source's training set, so that every `index` is below it. views: how many different
    augmented views there are before they repeat, None for endless ones. kept: the `data.KeptViews`, if any.
    fingerprint: tells one set of training images from another. reading: how an image file becomes such an image
    (None: by the default for the shape). notes: what the user should know of the data.
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

    @property
    def mixed(self) -> bool:
        """Whether training images are mixed with others: what is seen then has no number and no single label."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def labelled(self) -> bool:
        return bool((self.train.labels >= 0).all())


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std per channel; images [N, C, H, W] in [0, 1]."""
    if len(mean) != images.shape[1] or len(std) != images.shape[1]:
        raise Mistake(
            f"mean and std have {len(mean)} and {len(std)} values for images of {images.shape[1]} channels"
        )
    if len(mean) == 1:
        return (images - mean[0]) * (1 / std[0])
    like: dict[str, Any] = {"device": images.device, "dtype": images.dtype}
    return (images - torch.tensor(mean, **like)[:, None, None]) * (
        1 / torch.tensor(std, **like)[:, None, None]
    )
