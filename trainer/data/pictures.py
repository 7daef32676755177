"""Labelled image files (an `Images`): decoded and resized when they are used, or once if there is a store."""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from trainer.data.crops import Cuts, cut, resized
from trainer.data.image_file import mode_of, open_image, read_image
from trainer.data.reading import Reading
from trainer.data.store import Store
from trainer.recipe.augment import RandomResizedCrop
from trainer.recipe.keys import StoreKeys

USUAL_SIDE, LARGER = 256, 1.5  # of whole pictures in a store: pixels at most, and times the input
_LONGEST = 4  # times as long as high: longer pictures have no place in a store


class Names(Sequence):
    """Names of files, in one array: a worker that reads one copies nothing, as it would from a list of texts."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number):  # an int, of numpy's too
        number = range(len(self))[number]
        start = self._ends[number - 1] if number else 0
        return os.fsdecode(self._text[start : self._ends[number]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))


class States(NamedTuple):
    """Hashes of the states of some files, in their order.

    Attributes:
        sizes: Of names without folders, and sizes: alike for the copies of several machines.
        changes: Of these and the times of change in seconds, which archives and most copies keep.
        places: Of whole paths, sizes and times to the last digit: for what is kept on this machine alone.
    """

    sizes: str
    changes: str
    places: str


class Pictures:
    """Image files with labels.

    Args:
        files: Their paths.
        labels: int64 [len], -1 for unlabelled ones.
        reading: How a file is read as an input.

    Attributes:
        store: What the recipe says of the store; None for none.
    """

    def __init__(self, files: Sequence[str], labels: Tensor, reading: Reading) -> None:
        self.files = files if isinstance(files, Names) else Names(files)
        self.labels, self.reading = labels, reading
        self.store: StoreKeys | None = None
        self._states: States | None = None
        self._inputs: Store | None = None  # the files as inputs of `reading`
        self._wholes: Store | None = None  # the whole pictures, smaller

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        if self._inputs is not None:
            self._inputs.expect(positions)
        images = torch.stack([self._input(position) for position in positions])
        return images, self.labels[torch.as_tensor(positions)]

    def cut(self, positions: list[int], cuts: Cuts) -> tuple[Tensor, Tensor]:
        """Returns the part of each picture that `cuts` names, at the reading's size, and labels."""
        reading, (_, height, width) = self.reading, self.reading.shape
        if self._wholes is not None:
            self._wholes.expect(positions)
        parts = torch.empty(len(positions), *self.reading.shape, dtype=torch.uint8)
        for part, position, numbers in zip(parts, positions, cuts.numbers.tolist(), strict=True):
            whole = self._whole(position, cuts.settings)
            how = reading.filter, reading.fit, reading.background
            part.copy_(cut(whole, numbers, cuts.settings, height, width, *how))
        return parts, self.labels[torch.as_tensor(positions)]

    def at(self, reading: Reading) -> "Pictures":
        """Returns the same pictures, read in another way."""
        other = type(self)(self.files, self.labels, reading)
        other._states = self._states
        other._keep(self.store)
        return other

    def some(self, chosen: Tensor) -> "Pictures":
        """Returns the pictures where `chosen`, bool [len], is True. They have no store."""
        files = [file for file, is_chosen in zip(self.files, chosen.tolist(), strict=True) if is_chosen]
        return type(self)(files, self.labels[chosen], self.reading)

    def opened(self, position: int) -> str | Image.Image:
        """Returns what a picture is read from: the path of its file, or an open image."""
        return self.files[position]

    def paths(self) -> Iterable[str]:
        """Returns the files whose change would change the pictures."""
        return self.files

    def states(self) -> "States":
        """Returns hashes of the files' states, as they were when this was first called."""
        if self._states is None:
            self._states = _states(self.paths())
        return self._states

    def keep(self, store: StoreKeys, required: bool) -> None:
        """Sets the store. required: whether Mistake is raised if it cannot be made."""
        self._keep(store)
        if required and self._inputs is not None:
            self._inputs.open()

    def _keep(self, store: StoreKeys | None) -> None:
        self.store = store
        self._inputs = self._wholes = None
        if store is None:
            return
        channels, height, width = self.reading.shape
        reading = asdict(self.reading)
        side = stored_side(store, self.reading.shape)
        whole = {key: reading[key] for key in ("background", "depth", "filter")}
        facts = {
            "files": self.states().places,
            "num_files": len(self),
            "first": self.files[0] if len(self) else "",
            "Pillow": PIL.__version__,
        }
        self._inputs = Store(
            {"kind": "inputs", **reading, **facts}, len(self), channels * height * width, store.limit_gib
        )
        self._wholes = Store(
            {"kind": "pictures", "short_side": side, "channels": channels, **whole, **facts},
            len(self),
            channels * side * side * _LONGEST,
            store.limit_gib,
        )

    def _input(self, position: int) -> Tensor:
        """Returns a picture as an input, uint8 [C, H, W]."""
        kept = None if self._inputs is None else self._inputs.get(position)
        if kept is not None:
            return torch.from_numpy(kept.transpose(2, 0, 1).copy())
        image = read_image(self.opened(position), self.reading)
        if self._inputs is not None:
            self._inputs.put(position, image.permute(1, 2, 0).numpy())
        return image

    def _whole(self, position: int, settings: RandomResizedCrop) -> np.ndarray:
        """Returns a whole picture uint8 [H, W, C], brought to the store's size whether that has room or not.

        Without a store it is as large as the smallest part needs it, or larger.
        """
        kept = None if self._wholes is None else self._wholes.get(position)
        if kept is not None:
            return kept
        reading, path = self.reading, self.opened(position)
        least = settings.scale[0] * min(settings.ratio[0], 1 / settings.ratio[1])
        side = (
            stored_side(self.store, reading.shape)
            if self.store
            else math.ceil(max(reading.shape[1:]) / math.sqrt(least))
        )
        mode = mode_of(reading.shape[0], path)
        image = open_image(path, mode, reading.background, reading.depth, at_least=side)
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        if self.store is not None and min(image.size) > side:
            scale = side / min(image.size)
            height, width = (max(side, round(length * scale)) for length in pixels.shape[:2])
            pixels = resized(pixels, height, width, reading.filter)
        if self._wholes is not None:
            self._wholes.put(position, pixels)
        return pixels


def stored_side(store: StoreKeys, shape: Sequence[int]) -> int:
    """Returns the shorter side in pixels of the whole pictures in a store, for inputs of `shape` (C, H, W).

    It is never smaller than the input. By default parts of 45 % of the area and more are not enlarged, up to inputs of
    170 pixels; above, the room on disk counts.
    """
    longer = max(shape[1:])
    return max(longer, store.short_side or min(USUAL_SIDE, math.ceil(LARGER * longer)))


def _states(names: Iterable[str]) -> States:
    """Returns the hashes of some files' states. Files that are gone count for nothing: reading them says so."""
    sizes, changes, places = (hashlib.sha256() for _ in range(3))
    for name in names:
        path = os.path.abspath(name)
        try:
            status = os.stat(path)
        except OSError:
            continue
        size, changed = f"{os.path.basename(path)}\0{status.st_size}\0", status.st_mtime_ns
        sizes.update(_encoded(size))
        changes.update(_encoded(f"{size}{changed // 10**9}\0"))
        places.update(_encoded(f"{path}\0{status.st_size}\0{changed}\0"))
    return States(sizes.hexdigest(), changes.hexdigest(), places.hexdigest())


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
