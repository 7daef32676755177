"""The images of a run: the validation split, the order of an epoch, and batches on the device."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.data.balance import balanced_order
from trainer.data.crops import Cuts
from trainer.data.images import Data, Images, InMemory, Part, Source
from trainer.data.splitting import most_held_out, split_off
from trainer.data.views import KeptViews
from trainer.data.workers import num_workers, read_batches
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys, StoreKeys

MOST_VALIDATION = 10_000  # images that are held out of a large training set, unless the recipe says how many


def make_data(keys: DataKeys, device: torch.device) -> Data:
    """Opens the dataset, splits off the validation part, and moves images that are in memory to the device.

    Raises:
        Mistake: When the validation part and the subset do not fit in the training images, or mean and std do
            not fit the number of channels.
    """
    source = _source(keys)
    own_validation = source.validation is not None
    order, held_out, most = _order(source, keys)
    total = len(source.train)
    size = most if keys.subset is None else keys.subset
    if held_out < 1 and not own_validation:
        raise Mistake(
            f"data: {keys.dataset} has {total} training images; validation {keys.validation} holds out none of them: "
            "it is too small a part, or no class has images, or groups of them, on both sides"
        )
    if not 1 <= size <= most:
        raise Mistake(
            f"data: {keys.dataset} has {total} training images; validation {held_out} and subset {size} do not fit in it"
        )
    chosen = order[held_out : held_out + size].sort().values
    _check_augment(keys, source)
    if keys.labelled is not None:
        _hide_labels(source.train, chosen, keys)
    _open_store(keys, source)
    kept = None
    if keys.keep_views:
        assert keys.views is not None  # the recipe refuses keep_views without views
        kept = KeptViews(keys.views, total, chosen, source.shape, device)
    mean, std = _looks(keys, source)
    digest = hashlib.sha256(repr((keys.dataset, total, source.shape, source.classes)).encode())
    # All images if they are in memory; if they must be read from disk a sample of them, and the sizes of all files.
    sample = (
        source.train.images
        if isinstance(source.train, InMemory)
        else source.train.__getitems__(order[:256].tolist())[0]
    )
    digest.update(sample.contiguous().numpy().data)
    digest.update(_file_sizes(source))
    if keys.labelled is not None:
        digest.update(repr(("labelled", keys.labelled)).encode())
    if keys.augment.random_resized_crop is not None:
        digest.update(_cut_facts(keys, source))
    train = _on_device(source.train, device)
    if isinstance(train, InMemory):
        order, chosen = order.to(train.images.device), chosen.to(train.images.device)
    reading = num_workers(keys.workers), math.prod(source.shape)
    return Data(
        name=keys.dataset,
        train=Part(train, chosen, *reading),
        validation=Part(train, order[:held_out].sort().values, *reading)
        if source.validation is None
        else _whole(_on_device(source.validation, device), *reading),
        test=_whole(_on_device(source.test, device), *reading),
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


def _looks(keys: DataKeys, source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and std of the normalisation. Raises Mistake for those that no image can be normalised with."""
    given = (keys.mean or source.mean, keys.std or source.std)
    mean, std = (tuple(np.atleast_1d(np.asarray(one, np.float64)).tolist()) for one in given)
    if {len(mean), len(std)} != {source.shape[0]}:
        raise Mistake(
            f"data: mean and std have {len(mean)} and {len(std)} values; the images have {source.shape[0]} channels"
        )
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise Mistake(
            f"data: got mean {list(mean)} and std {list(std)}; numbers, and above 0 for std, are allowed: the data section can give them"
        )
    return mean, std


def _order(source: Source, keys: DataKeys) -> tuple[Tensor, int, int]:
    """Returns the training images' order, how many at its front are held out for validation, and how many follow to train on.

    Of images in groups whole groups are held out, and what of them has no label is of neither. Raises Mistake if the number
    that the recipe asks for would leave a class without an image.
    """
    total = len(source.train)
    order = torch.from_numpy(np.random.default_rng([keys.seed, 0x5EED]).permutation(total))
    if source.validation is not None:
        return order, 0, total
    assert not isinstance(keys.validation, Path)  # then the source has its own validation images
    amount: float | int = keys.validation
    if "validation" not in keys.model_fields_set:
        amount = min(amount, MOST_VALIDATION / total)
    if source.groups is None:
        held_out = round(amount * total) if isinstance(amount, float) else int(amount)
        return order, held_out, total - held_out
    labels = source.train.labels
    most = most_held_out(labels, source.groups)
    if isinstance(amount, int) and amount > most:
        raise Mistake(
            f"data: {keys.dataset} has {total} training images; validation {amount} does not fit in it: {most} can be held out, "
            "because an image of each class, or a group of them, is trained on"
        )
    apart = split_off(labels, amount, [keys.seed, 0x5EED], source.groups)
    validates = apart & (labels >= 0) if (labels >= 0).any() else apart
    parts = [order[chosen[order]] for chosen in (validates, ~apart, apart & ~validates)]
    return torch.cat(parts), len(parts[0]), len(parts[1])


def _hide_labels(images: Images, chosen: Tensor, keys: DataKeys) -> None:
    """Makes chosen images unlabelled, but for as many of each class as `labelled` says. Raises Mistake if none has a label."""
    assert keys.labelled is not None
    labels = images.labels.clone()
    own = labels[chosen]
    if not (own >= 0).any():
        raise Mistake(f"data: labelled {keys.labelled}: the training images of {keys.dataset} have no labels")
    if isinstance(keys.labelled, int) and keys.labelled > int((own >= 0).sum()):
        raise Mistake(
            f"data: labelled {keys.labelled}: {int((own >= 0).sum())} of the training images of {keys.dataset} have a label"
        )
    own[~split_off(own, keys.labelled, [keys.seed, 0x1ABE1], leave_one=False)] = -1
    labels[chosen] = own
    images.labels = labels


def _check_augment(keys: DataKeys, source: Source) -> None:
    """Raises Mistake for augmentation that these images cannot have."""
    channels, where = source.shape[0], f"data: augment: dataset {keys.dataset!r} has"
    colours = [name for name in ("saturation", "hue", "grayscale") if getattr(keys.augment, name)]
    if colours and channels != 3:
        raise Mistake(f"{where} images of {channels} channels; {', '.join(colours)}: 3 are needed")
    policies = [name for name in ("rand_augment", "trivial_augment") if getattr(keys.augment, name)]
    if policies and channels not in (1, 3):
        raise Mistake(f"{where} images of {channels} channels; {policies[0]}: 1 or 3 are needed")
    if keys.augment.random_resized_crop is not None and not hasattr(source.train, "cut"):
        raise Mistake(
            f"{where} images that cannot be cut out of their pictures: leave out random_resized_crop"
        )


def _open_store(keys: DataKeys, source: Source) -> None:
    """Gives the store to images that are read from pictures. Raises Mistake if a store that was asked for has no folder."""
    if keys.store == "off":
        return
    from trainer.data.pictures import Pictures  # which needs Pillow: reading a recipe does not

    for images in (source.train, source.validation, source.test):
        if isinstance(images, Pictures):
            given = keys.store if isinstance(keys.store, StoreKeys) else None
            images.keep(given or StoreKeys(), required=given is not None)


def _file_sizes(source: Source) -> bytes:
    """Returns what tells the training files apart from others; nothing for images that are not read from files."""
    from trainer.data.pictures import Pictures

    return source.train.states().sizes.encode() if isinstance(source.train, Pictures) else b""


def _cut_facts(keys: DataKeys, source: Source) -> bytes:
    """Returns what parts of pictures depend on, beside the images as they are; nothing for what was once the only way."""
    from trainer.data.pictures import Pictures, stored_side

    if not isinstance(source.train, Pictures):
        return b""
    given = keys.store if isinstance(keys.store, StoreKeys) else StoreKeys()
    facts = source.train.reading.fit, None if keys.store == "off" else stored_side(given, source.shape)
    return b"" if facts == ("crop", 256) else repr(facts).encode()


def _on_device(images: Images, device: torch.device) -> Images:
    """Moves images in memory to the device; returns images that are read from disk unchanged."""
    if isinstance(images, InMemory) and device.type != "cpu":
        return InMemory(images.images.to(device), images.labels.to(device))
    return images


def _whole(images: Images, workers: int, image_bytes: int) -> Part:
    """Returns all images of a set as one part."""
    device = images.images.device if isinstance(images, InMemory) else None
    return Part(images, torch.arange(len(images), device=device), workers, image_bytes)


def _source(keys: DataKeys) -> Source:
    """Returns the dataset's images, without its own validation images if the recipe splits off others."""
    function, settings = shelves.find("dataset", keys.dataset), shelves.own_settings(keys, DataKeys)
    if isinstance(keys.validation, Path):
        if "validation_folder" not in shelves.fields(function):
            raise Mistake(
                f"data: validation: got {str(keys.validation)!r}; dataset {keys.dataset!r} takes a fraction or a number"
            )
        settings["validation_folder"] = keys.validation
    source: Source = function(**settings)
    _refuse_unfit(source, keys.dataset)
    if (
        source.validation is not None
        and "validation" in keys.model_fields_set
        and not isinstance(keys.validation, Path)
    ):
        source.notes.append(
            f"the dataset's own validation images are not used, because validation is {keys.validation}"
        )
        source.validation = None
    return source


def _refuse_unfit(source: Source, dataset: str) -> None:
    """Raises Mistake for what a dataset function must not return: it would fail in the middle of a run, or count wrong."""
    where = f"data: {dataset}"
    if not isinstance(source, Source):
        raise Mistake(f"{where}: returned {type(source).__name__}; a Source is allowed")
    known: set[str] = set()
    for name in source.classes:
        if not isinstance(name, str) or name in known:
            raise Mistake(f"{where}: classes: got {name!r}; a text for each class, each once, is allowed")
        known.add(name)
    if not len(source.test):
        raise Mistake(f"{where}: there are no test images; one or more are needed")
    for part in ("train", "validation", "test"):
        images: Images | None = getattr(source, part)
        if images is None:
            continue
        odd = images.labels[(images.labels < -1) | (images.labels >= len(known))]
        if len(odd):
            raise Mistake(
                f"{where}: {part}: got the label {int(odd[0])}; 0 to {len(known) - 1}, or -1 for none, is allowed"
            )
        shape = tuple(images.images.shape[1:]) if isinstance(images, InMemory) else tuple(source.shape)
        if shape != tuple(source.shape):
            raise Mistake(f"{where}: {part}: got images of {shape}; its shape says {tuple(source.shape)}")
    if source.groups is not None and source.groups.shape != source.train.labels.shape:
        raise Mistake(
            f"{where}: groups: got {list(source.groups.shape)}; a number for each of the {len(source.train)} training images is allowed"
        )


def seed_of(*numbers: int | str) -> int:
    """Returns a seed that depends on the numbers only, so that a resumed run draws the same numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest())


def epoch_order(
    num_images: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int,
    num_processes: int,
    balanced: Tensor | None = None,
) -> list[Tensor]:
    """Returns the positions of this process's images in each batch, a function of (seed, epoch) alone.

    The last batch may be smaller. If it would give each process one image, which BatchNorm cannot normalise,
    it is merged into the batch before it. With several processes the last batch is padded with images from
    the start of the order, so that all processes have the same number.

    Args:
        num_images: The number of training images.
        batch_size: Images of a batch, of all processes together.
        seed: The seed of the order.
        epoch: The number of the epoch.
        rank: The number of this process.
        num_processes: The number of processes.
        balanced: The images' labels, int64 [num_images], if as many images of each class are drawn.

    Returns:
        For each batch int64 [images of this process].
    """
    draw = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(
        draw.permutation(num_images) if balanced is None else balanced_order(balanced, draw)
    )
    batches = list(order.split(batch_size))
    if len(batches) > num_batches(num_images, batch_size, num_processes):
        batches[-2:] = [torch.cat(batches[-2:])]
    if num_processes == 1:
        return batches
    missing = -len(batches[-1]) % num_processes
    batches[-1] = torch.cat([batches[-1], order[torch.arange(missing) % num_images]])
    return [batch[rank::num_processes] for batch in batches]


def num_batches(num_images: int, batch_size: int, num_processes: int) -> int:
    """Returns the number of batches in an epoch (`epoch_order`)."""
    full, rest = divmod(num_images, batch_size)
    return full + (rest > num_processes or (rest > 0 and full == 0))


def batches(
    part: Part, order: list[Tensor], workers: int, device: torch.device, cuts: Cuts | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields images uint8 [N, C, H, W], labels int64 [N] and index int64 [N] of each batch, on the device.

    Args:
        part: The images.
        order: The positions in the part, one tensor for each batch (`epoch_order`).
        workers: The number of processes that read images from disk, if memory has room for so many.
        device: The device that batches are moved to.
        cuts: Which part of its picture each image shows (`Views.cuts`); None for the images as they are.

    Raises:
        Mistake: For an image that cannot be read, and for a process that has died while it read.
    """
    if isinstance(part.images, InMemory):
        # All at once: a copy for each batch would wait for the device.
        moved = torch.cat(order or [part.ids[:0]]).to(part.ids.device)
        for positions in moved.split([len(positions) for positions in order]):
            yield part.read(positions, cuts)
        return
    for images, labels, index in read_batches(part, order, workers, device.type == "cuda", cuts):
        yield (
            images.to(device, non_blocking=True),
            labels.to(device, non_blocking=True),
            index.to(device, non_blocking=True),
        )


def mix(
    images: Tensor, labels: Tensor, num_classes: int, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Mixes a batch with its own reverse by mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019).

    If both are on, one of them is drawn for each batch with equal probability. Draws from torch's global
    generator.

    Args:
        images: float [N, C, H, W].
        labels: int64 [N], -1 for unlabelled images.
        num_classes: K, the number of classes.
        mixup: Alpha of mixup's beta distribution, 0 for off.
        cutmix: Alpha of CutMix's beta distribution, 0 for off.

    Returns:
        The mixed images [N, C, H, W] and the mixed one-hot labels [N, K].
    """
    # The row of an unlabelled image (-1) is all zeros.
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
