"""Augmented views: made as they are asked for, or kept in memory."""

import math

import psutil
import torch
from torch import Tensor

from trainer.data.augment import apply, draw
from trainer.data.images import Data
from trainer.mistakes import Mistake
from trainer.recipe.keys import Augment


class KeptViews:
    """The augmented images of a run's views, kept in memory from the first time that they are made.

    views: their number. num_samples: every index is below it. ids: int64 [N], the indices that will be asked for, which
    alone take memory: views x N images in float32 (in each process). shape: (C, H, W). Raises Mistake, naming
    sizes, when there is not so much memory.
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
        self._row = torch.full((num_samples,), len(ids), device=device)  # no row, of what is in no view
        self._row[ids.to(device)] = torch.arange(len(ids), device=device)
        self._images = torch.empty(views, len(ids), *shape, device=device)
        self._known = torch.zeros(views, len(ids), dtype=torch.bool, device=device)
        self._whole: set[int] = set()

    def new(self, view: int, index: Tensor) -> Tensor:
        """Positions in `index` of the images that are not kept yet."""
        return (
            index[:0] if view in self._whole else (~self._known[view][self._row[index]]).nonzero().flatten()
        )

    def write(self, view: int, index: Tensor, images: Tensor) -> None:
        row = self._row[index]
        self._images[view][row] = images
        self._known[view, row] = True
        if self._known[view].all():
            self._whole.add(view)

    def read(self, view: int, index: Tensor) -> Tensor:
        return self._images[view].index_select(0, self._row[index])


class Views:
    """Augmented batches of a run's data: a view's random parameters are drawn once and kept while it lasts."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self._view: int | None = None
        self._table: Tensor | None = None

    def number(self, epoch: int, stage: int) -> int:
        """Which view an epoch looks at; endless views differ from stage to stage too, images as they are have one."""
        if self.data.augment == Augment():
            return 0
        return epoch % self.data.views if self.data.views else stage * 100_000 + epoch

    def augmented(self, images: Tensor, index: Tensor, view: int) -> Tensor:
        """Images uint8 [N, C, H, W] as float [0, 1], seen as in `view`."""
        kept = self.data.kept
        if kept is None:
            return self._made(images, index, view)
        new = kept.new(view, index)
        if len(new):
            kept.write(view, index[new], self._made(images[new], index[new], view))
        return kept.read(view, index)

    def _made(self, images: Tensor, index: Tensor, view: int) -> Tensor:
        if self._view != view:
            self._table = draw(self.data.augment, self.data.seed, view, self.data.num_samples).to(
                images.device
            )
            self._view = view
        assert self._table is not None
        return apply(self.data.augment, images, self._table[index])
