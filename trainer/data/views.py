"""Augmented views of a run's images, computed when needed or kept in memory."""

import math

import psutil
import torch
from torch import Tensor

from trainer.data.augment import apply, draw
from trainer.data.images import Data, InMemory
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
        self._table: Tensor | None = None

    def number(self, epoch: int, stage: int) -> int:
        """Returns the number of the view of an epoch.

        Unlimited views differ between stages too. Without augmentation there is only view 0.
        """
        if self.data.augment == Augment():
            return 0
        return epoch % self.data.views if self.data.views else stage * 100_000 + epoch

    def augmented(self, images: Tensor, index: Tensor, view: int) -> Tensor:
        """Augments images uint8 [N, C, H, W] as in `view`; returns float32 [N, C, H, W] in [0, 1]."""
        kept = self.data.kept
        if kept is None:
            return self._augment(images, index, view)
        new = kept.new(view, index)
        if len(new):
            kept.write(view, index[new], self._augment(images[new], index[new], view))
        return kept.read(view, index)

    def _augment(self, images: Tensor, index: Tensor, view: int) -> Tensor:
        if self._view != view:
            self._table = draw(self.data.augment, self.data.seed, view, self.data.num_samples).to(
                images.device
            )
            self._view = view
        assert self._table is not None
        return apply(self.data.augment, images, self._table[index], self.data.zoom)

    def of(self, index: Tensor, view: int) -> Tensor:
        """Reads the training images of `index` [N] and augments them as in `view`; returns float32 [N, C, H, W] in [0, 1]."""
        images = self.data.train.images
        if isinstance(images, InMemory):
            stored, _ = images.__getitems__(index.to(images.images.device))
        else:
            stored, _ = images.__getitems__(index.tolist())
        return self.augmented(stored.to(index.device), index, view)
