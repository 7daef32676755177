"""The things a run carries: the data, the networks, the folder, and where it stands."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


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

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        where = torch.as_tensor(positions, device=self.images.device)
        # Rows of bytes in one piece: nine times as quick as images[where].
        return self.images.index_select(0, where), self.labels.index_select(0, where)


@dataclass
class Source:
    """What a dataset file gives: two sets of images and how they look.

    mean, std: per channel, of the training images scaled to [0, 1]. shape: (C, H, W).
    """

    train: Images
    test: Images
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]


@dataclass
class Part:
    """Some of a source's images. ids: [len] int64, each sample's position in the source, the same in every run."""

    images: Images
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, positions: Tensor | list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """images uint8 [N, C, H, W], labels int64 [N], index int64 [N] of positions within this part."""
        index = self.ids[positions]
        where = index if isinstance(self.images, InMemory) else index.tolist()
        return *self.images.__getitems__(where), index

    @property
    def labels(self) -> Tensor:
        return self.images.labels[self.ids]


@dataclass
class Data:
    """The images of a run. The train and validation parts come from the source's training set, test from its own.

    num_samples: size of the source's training set, so that every `index` is below it. views: how many different
    augmented views there are before they repeat, None for endless ones. kept: the `data.KeptViews`, if any. workers:
    processes that read from disk. fingerprint: tells one set of training images from another.
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
    workers: int = 0
    fingerprint: str = ""

    @property
    def labelled(self) -> bool:
        return bool((self.train.labels >= 0).all())


@dataclass
class Run:
    """One run of a recipe, handed from stage to stage.

    folder: runs/NAME. teacher: None where the recipe has none. student_bytes: of the student as it was built, dense (0:
    as it is). stage: position of the stage now running. rows and layers are what the report says, histograms the
    weights of its plots. answers: the teacher's, kept.
    learned: projectors and other learned parts of losses, handed from stage to stage.
    """

    name: str
    folder: Path
    seed: int
    accelerator: Any
    data: Data
    student: nn.Module
    student_spec: dict
    teacher: Any
    log: Any
    recipe_path: Path
    student_bytes: int = 0
    stage: int = 0
    stage_name: str = ""
    num_fits: int = 0
    rows: list[dict] = field(default_factory=list)
    layers: dict[str, dict] = field(default_factory=dict)
    histograms: dict[str, dict] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)
    answers: dict[tuple, Tensor] = field(default_factory=dict)
