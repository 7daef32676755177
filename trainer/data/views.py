"""Augmented views of a run's images, computed when needed or kept in memory."""

import math

import psutil
import torch
from torch import Tensor

from trainer.data.augment import apply, cuts_of, draw
from trainer.data.crops import Cuts
from trainer.data.images import Data, read
from trainer.mistakes import Mistake
from trainer.recipe.keys import Augment


class KeptViews:
    """Keeps the augmented images of a run's views in memory, from the first time that they are computed.

    They take views x N images of float32 in each process.

    Args:
        views: The number of views.
        num_samples: The size of the source's training set; every index is below it.
        ids: int64 [N], the indices that are used.
        shape: (C, H, W) of the images.
        device: The device that holds them.

    Raises:
        Mistake: With the sizes, if there is not enough free memory.
    """

    def __init__(
        self, views: int, num_samples: int, ids: Tensor, shape: tuple[int, int, int], device: torch.device
    ) -> None:
        needed = views * len(ids) * math.prod(shape) * 4
        free = (
            torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        )
        if needed > free:
            raise Mistake(
                f"data: keep_views: {views} views of {len(ids):,} images take {needed / 2**30:,.2f} GiB of memory and "
                f"{free / 2**30:,.2f} GiB are free; fewer views take less, and keep_views: false none"
            )
        self._row = torch.full(
            (num_samples,), len(ids), device=device
        )  # a row out of range, for images that are not used
        self._row[ids.to(device)] = torch.arange(len(ids), device=device)
        self._images = torch.empty(views, len(ids), *shape, device=device)
        self._known = torch.zeros(views, len(ids), dtype=torch.bool, device=device)
        self._whole: set[int] = set()

    def new(self, view: int, index: Tensor) -> Tensor:
        """Returns the positions in `index` [N] of the images that are not kept yet."""
        return (
            index[:0] if view in self._whole else (~self._known[view][self._row[index]]).nonzero().flatten()
        )

    def has_all(self, view: int) -> bool:
        """Returns whether every image of a view is kept."""
        return view in self._whole

    def write(self, view: int, index: Tensor, images: Tensor) -> None:
        """Keeps the augmented images [N, C, H, W] of `index` [N] in a view."""
        row = self._row[index]
        self._images[view][row] = images
        self._known[view, row] = True
        if self._known[view].all():
            self._whole.add(view)

    def read(self, view: int, index: Tensor) -> Tensor:
        """Returns the kept images [N, C, H, W] of `index` [N] in a view."""
        return self._images[view].index_select(0, self._row[index])


class Views:
    """Augments batches of a run's data. Keeps the random numbers of a view until the next view."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self._view: int | None = None
        self._tables: dict[torch.device, Tensor] = {}

    def number(self, epoch: int, stage: int) -> int:
        """Returns the number of the view of an epoch.

        Unlimited views differ between stages too. Without augmentation there is only view 0.
        """
        if self.data.augment == Augment():
            return 0
        return epoch % self.data.views if self.data.views else stage * 100_000 + epoch

    def augmented(self, images: Tensor, index: Tensor, view: int) -> Tensor:
        """Augments images uint8 [N, C, H, W] as in `view`; returns float32 [N, C, H, W] in [0, 1].

        The images are read with the view's `cuts`.
        """
        kept = self.data.kept
        if kept is None:
            return self._augment(images, index, view)
        new = kept.new(view, index)
        if len(new):
            kept.write(view, index[new], self._augment(images[new], index[new], view))
        return kept.read(view, index)

    def cuts(self, view: int) -> Cuts | None:
        """Returns which part of its picture each training image shows in `view`; None for images that are not cut."""
        kept = self.data.kept
        if self.data.augment.random_resized_crop is None or (kept is not None and kept.has_all(view)):
            return None
        return cuts_of(self.data.augment, self._numbers(view, torch.device("cpu")))

    def _augment(self, images: Tensor, index: Tensor, view: int) -> Tensor:
        numbers = self._numbers(view, images.device)
        return apply(self.data.augment, images, numbers[index], self.data.zoom)

    def _numbers(self, view: int, device: torch.device) -> Tensor:
        """Returns the random numbers [num_samples, P] of a view, on a device."""
        if self._view != view:
            self._tables = {}
            self._view = view
        if device not in self._tables:
            if not self._tables:
                drawn = draw(self.data.augment, self.data.seed, view, self.data.num_samples)
                self._tables[torch.device("cpu")] = drawn
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def of(self, index: Tensor, view: int) -> Tensor:
        """Reads the training images of `index` [N] and augments them as in `view`; returns float32 [N, C, H, W] in [0, 1]."""
        cuts = self.cuts(view)
        stored, _ = read(self.data.train.images, index, None if cuts is None else cuts.of(index))
        return self.augmented(stored.to(index.device), index, view)
