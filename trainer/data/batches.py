"""The images of a run: the validation split, the order of an epoch, and batches on the device."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainer.data.images import Data, Images, InMemory, Part, Source
from trainer.data.views import KeptViews
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys


def make_data(keys: DataKeys, device: torch.device) -> Data:
    """Opens the dataset, splits off the validation part and puts what is in memory on the device."""
    source = _source(keys)
    own_validation = source.validation is not None
    total = len(source.train)
    order = torch.from_numpy(np.random.default_rng([keys.seed, 0x5EED]).permutation(total))
    held_out = 0
    if not own_validation:
        assert not isinstance(keys.validation, Path)  # that is the source's own
        fraction = isinstance(keys.validation, float)
        held_out = round(keys.validation * total) if fraction else int(keys.validation)
    size = total - held_out if keys.subset is None else keys.subset
    if (held_out < 1 and not own_validation) or size < 1 or held_out + size > total:
        raise Mistake(
            f"data: {keys.dataset} has {total} training images; validation {held_out} and subset {size} do not fit in it"
        )
    kept = None
    if keys.keep_views:
        assert keys.views is not None  # or the recipe is refused
        kept = KeptViews(keys.views, total, order[held_out : held_out + size], source.shape, device)
    mean, std = tuple(keys.mean or source.mean), tuple(keys.std or source.std)
    if {len(mean), len(std)} != {source.shape[0]}:
        raise Mistake(
            f"data: mean and std have {len(mean)} and {len(std)} values; the images have {source.shape[0]} channels"
        )
    digest = hashlib.sha256(repr((keys.dataset, total, source.shape, source.classes)).encode())
    # All images where they are at hand, some where they must be read first.
    some = (
        source.train.images
        if isinstance(source.train, InMemory)
        else source.train.__getitems__(order[:256].tolist())[0]
    )
    digest.update(some.contiguous().numpy().data)
    train = _placed(source.train, device)
    if isinstance(train, InMemory):
        order = order.to(train.images.device)
    return Data(
        name=keys.dataset,
        train=Part(train, order[held_out : held_out + size].sort().values, keys.workers),
        validation=Part(train, order[:held_out].sort().values, keys.workers)
        if source.validation is None
        else _whole(_placed(source.validation, device), keys.workers),
        test=_whole(_placed(source.test, device), keys.workers),
        classes=source.classes,
        mean=mean,
        std=std,
        shape=tuple(source.shape),  # type: ignore[arg-type]  # of three
        num_samples=total,
        augment=keys.augment,
        reading=source.reading,
        views=keys.views,
        kept=kept,
        seed=keys.seed,
        mixup=keys.mixup,
        cutmix=keys.cutmix,
        fingerprint=digest.hexdigest(),
        notes=source.notes,
    )


def _placed(images: Images, device: torch.device) -> Images:
    """Returns images in memory on the device, and others as they are."""
    if isinstance(images, InMemory) and device.type != "cpu":
        return InMemory(images.images.to(device), images.labels.to(device))
    return images


def _whole(images: Images, workers: int) -> Part:
    device = images.images.device if isinstance(images, InMemory) else None
    return Part(images, torch.arange(len(images), device=device), workers)


def _source(keys: DataKeys) -> Source:
    """What the dataset's file gives; validation images of their own where the recipe says nothing else."""
    function, settings = shelves.find("dataset", keys.dataset), shelves.own_settings(keys, DataKeys)
    if isinstance(keys.validation, Path):
        if "validation_folder" not in shelves.fields(function):
            raise Mistake(
                f"data: validation: got {str(keys.validation)!r}; dataset {keys.dataset!r} takes a fraction or a number"
            )
        settings["validation_folder"] = keys.validation
    source: Source = function(**settings)
    if (
        source.validation is not None
        and "validation" in keys.model_fields_set
        and not isinstance(keys.validation, Path)
    ):
        source.notes.append(
            f"the validation images that are there are left out: validation: {keys.validation} says otherwise"
        )
        source.validation = None
    return source


def seed_of(*numbers: int | str) -> int:
    """A seed that is a function of the numbers alone: what is drawn after it is the same in a resumed run."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest())


def epoch_order(
    num_images: int, batch_size: int, seed: int, epoch: int, rank: int, num_processes: int
) -> list[Tensor]:
    """Positions of this process's fraction of every batch of an epoch: a function of (seed, epoch) alone.

    batch_size counts the images of all processes together; the last batch may be smaller. With several processes
    each batch is filled up from the start of the order, so that all have equally many.
    """
    order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num_images))
    batches = list(order.split(batch_size))
    if num_processes == 1:
        return batches
    missing = -len(batches[-1]) % num_processes
    batches[-1] = torch.cat([batches[-1], order[torch.arange(missing) % num_images]])
    return [batch[rank::num_processes] for batch in batches]


def batches(
    part: Part, order: list[Tensor], workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """images uint8 [N, C, H, W], labels [N] and index [N], on the device, for each batch of positions."""
    if isinstance(part.images, InMemory):
        for positions in order:
            yield part.__getitems__(positions.to(part.ids.device))
        return
    told: Any = _Telling(part)
    loader: DataLoader[Any] = DataLoader(
        told,
        batch_sampler=[positions.tolist() for positions in order],
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, Mistake):
            raise batch
        images, labels, index = batch
        yield images.to(device, non_blocking=True), labels.to(device), index.to(device)


class _Telling:
    """A part that gives a mistake of the user's back: raised in a loader's process it would come with that one's traceback."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor, Tensor] | Mistake:
        try:
            return self.part.__getitems__(positions)
        except Mistake as error:
            return error


def _as_it_is(batch):
    return batch


def mix(
    images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a batch with itself reversed; labels become [N, K].

    With both given one of them is chosen for each batch, evenly. Draws from torch's global generator.
    """
    # An unlabelled image (-1) has no class: its row is all zeros.
    one_hot = (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(images.dtype)
    use_cutmix = cutmix > 0 and (mixup == 0 or torch.rand(()).item() < 0.5)
    alpha = cutmix if use_cutmix else mixup
    fraction = torch.distributions.Beta(alpha, alpha).sample().item()
    if use_cutmix:
        height, width = images.shape[2:]
        cut_h, cut_w = round(height * (1 - fraction) ** 0.5), round(width * (1 - fraction) ** 0.5)
        centre = torch.rand(2)
        top = min(max(int(centre[0] * height) - cut_h // 2, 0), height - cut_h)
        left = min(max(int(centre[1] * width) - cut_w // 2, 0), width - cut_w)
        mixed = images.clone()
        mixed[:, :, top : top + cut_h, left : left + cut_w] = images.flip(0)[
            :, :, top : top + cut_h, left : left + cut_w
        ]
        fraction = 1 - cut_h * cut_w / (height * width)
    else:
        mixed = images * fraction + images.flip(0) * (1 - fraction)
    return mixed, one_hot * fraction + one_hot.flip(0) * (1 - fraction)
