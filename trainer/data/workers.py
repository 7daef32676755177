"""Reads batches of images from disk in worker processes: no more of them than shared memory has room for.

The workers of a part stay from one epoch to the next.
"""

import atexit
import copy
import gc
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trainer.data.crops import Cuts
from trainer.data.images import Part, read
from trainer.distributed import is_main, usable_cores
from trainer.mistakes import Mistake

SHARED = "/dev/shm"  # where Linux keeps the memory that processes share; a container may have 64 MB of it
PREFETCH = 2  # batches that a worker reads ahead
MOST_WORKERS = 8  # of `auto`
SHARE_OF_SHARED = 4  # at most one part in so many of shared memory stays taken by a part's places
MOST_KEPT = 2  # parts whose workers stay: those that an epoch trains and validates on
# A batch may take so long until its worker counts as hung: large photos on a slow disk take half a second each.
SECONDS, SECONDS_PER_IMAGE = 120, 2


def num_workers(asked: int | Literal["auto"]) -> int:
    """Returns the number of workers of each process: what is asked for, or one for each core, at most `MOST_WORKERS`."""
    if asked != "auto":
        return asked
    return max(1, min(MOST_WORKERS, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def read_batches(
    part: Part, order: list[Tensor], workers: int, pinned: bool, cuts: Cuts | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields images uint8 [N, C, H, W], labels int64 [N] and index int64 [N] of each batch, on the CPU.

    Args:
        part: The images.
        order: The positions in the part, one tensor for each batch.
        workers: The number of processes that read; fewer if shared memory has no room for more, which is printed once.
        pinned: Whether the batches are in pinned memory.
        cuts: Which part of its picture each image shows; None for the images as they are.

    Raises:
        Mistake: For an image that cannot be read, and when a worker has died or hangs.
    """
    largest = max((len(positions) for positions in order), default=0)
    crew = _crew(part, _affordable(workers, largest * part.image_bytes), pinned, largest)
    crew.order.batches, crew.order.cuts = order, cuts
    crew.is_busy = True
    finished = False
    try:
        yield from _batches(_begin(crew.loader), crew.places)
        finished = True
    except GeneratorExit:
        finished = True  # nobody wants the rest, which the workers throw away
        raise
    finally:
        crew.is_busy = False
        if not finished:
            _dismiss(crew)


def _batches(iterator: Iterator[Any], places: Tensor | None) -> Iterator[Any]:
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):  # it comes from a worker
                raise
            raise Mistake(
                f"a worker that reads images has died or hangs ({str(error).partition(chr(10))[0][:100]}): it was killed, or "
                f"memory ran out{_shared_memory()}; data: {{workers: 0}} reads without workers"
            ) from error
        if isinstance(batch, Mistake):
            raise batch
        images, labels, index = batch
        if not isinstance(images, Tensor):
            assert places is not None
            place, shape = images
            images = places[place, : math.prod(shape)].view(shape).clone()  # the place will be written again
        yield images, torch.from_numpy(labels), torch.from_numpy(index)


@dataclass(eq=False)
class _Order:
    """A batch sampler, which is given other batches for every epoch."""

    ids: Tensor
    batches: list[Tensor] = field(default_factory=list)
    cuts: Cuts | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        """Yields what a worker is asked for: positions in the source, the settings and numbers of their cuts, the batch's number.

        As arrays: a tensor would go to the worker through a file of its own in shared memory.
        """
        for number, positions in enumerate(self.batches):
            index = self.ids[positions].cpu()
            cuts = None if self.cuts is None else self.cuts.of(index)
            yield index.numpy(), None if cuts is None else (cuts.settings, cuts.numbers.numpy()), number


@dataclass(eq=False)
class _Crew:
    """The workers of a part: a data loader with its batch sampler.

    places: where workers leave images (`_places`), None if they send them. made_for: the settings that it was made with. is_busy: whether an epoch is being read.
    """

    part: Part
    made_for: tuple[int, bool, int]
    order: _Order
    loader: DataLoader[Any]
    places: Tensor | None = None
    is_busy: bool = False


_crews: list[_Crew] = []  # those that stay, the one that was used last at the end


def _crew(part: Part, workers: int, pinned: bool, largest: int) -> _Crew:
    """Returns the workers of a part that stay from an earlier epoch, or new ones. largest: images of the largest batch."""
    made_for = (workers, pinned, largest)
    for crew in _crews:
        if crew.part is part and crew.made_for == made_for and not crew.is_busy:
            _crews.remove(crew)
            _crews.append(crew)
            return crew
    order = _Order(part.ids)
    places = None if pinned else _places(workers, largest * part.image_bytes)
    dataset: Any = _ReturnsMistakes(part, places)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        timeout=SECONDS + SECONDS_PER_IMAGE * largest if workers else 0,
        pin_memory=pinned,
        persistent_workers=workers > 0,
        multiprocessing_context=_of_readers() if workers else None,
        worker_init_fn=_outlive,
    )
    crew = _Crew(part, made_for, order, loader, places)
    if workers:
        idle = [other for other in _crews if not other.is_busy]
        for other in idle[: max(0, len(_crews) + 1 - MOST_KEPT)]:
            _dismiss(other)
        _crews.append(crew)
    return crew


class _Reader(multiprocessing.Process):
    """A worker process. Since it ignores SIGTERM (`_outlive`), its run ends it by SIGKILL."""

    @staticmethod
    def _Popen(process: Any) -> Any:  # multiprocessing asks for it by this name
        started: Any = multiprocessing.Process._Popen(process)
        started.terminate = started.kill
        return started


def _of_readers() -> Any:
    """Returns Python's own way of starting processes, with `_Reader` as its process."""
    context: Any = copy.copy(multiprocessing.get_context())
    context.Process = _Reader
    return context


# What `timeout`, a closed terminal and a scheduler send to all processes of a run; Windows has no SIGHUP.
_TO_ALL = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


def _outlive(_worker: int) -> None:
    """Makes a worker ignore what is sent to all processes of a run, which still needs batches to end its step.

    A worker whose run has died ends by itself. What it has of its run's garbage is never collected in it: that would end
    other workers' loaders, which are not its own, in the middle of whatever it does (an import breaks by it).
    """
    gc.freeze()
    gc.enable()
    for number in _TO_ALL:
        signal.signal(number, signal.SIG_IGN)


def _begin(loader: DataLoader[Any]) -> Iterator[Any]:
    """Returns the batches of an epoch. While workers start, which are not ready yet (`_outlive`), signals and garbage wait."""
    collects = gc.isenabled()
    gc.disable()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_ALL) if hasattr(signal, "pthread_sigmask") else None
    try:
        return iter(loader)
    finally:
        if before is not None:  # Windows has none
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if collects:
            gc.enable()


if hasattr(signal, "SIGCHLD"):
    # Python ends the workers that are left at its exit, and torch would print a traceback for each.
    atexit.register(signal.signal, signal.SIGCHLD, signal.SIG_DFL)


def _places(workers: int, batch_bytes: int) -> Tensor | None:
    """Returns places for batches in shared memory, uint8 [num_places, batch_bytes], which workers take in turn.

    A batch that is sent has a file in shared memory of its own, whose new pages cost about half as much time as cutting its
    images. Of the batches after the one in use, the loader asks for `PREFETCH` of each worker: so many places and one
    more are never written too early. Returns None without workers, and where shared memory is small.
    """
    total, free = (PREFETCH * workers + 1) * batch_bytes, free_shared_bytes()
    if not workers or not batch_bytes or (free is not None and total * SHARE_OF_SHARED > free):
        return None
    return torch.empty(PREFETCH * workers + 1, batch_bytes, dtype=torch.uint8).share_memory_()


def _dismiss(crew: _Crew) -> None:
    """Ends workers: they end with the last reference to their loader."""
    if crew in _crews:
        _crews.remove(crew)


def dismiss_all() -> None:
    """Ends the workers that have stayed from earlier epochs."""
    _crews.clear()


def _affordable(workers: int, batch_bytes: int) -> int:
    """Returns how many of the workers shared memory has room for, and prints once if that is fewer.

    Each batch that waits is in shared memory: `PREFETCH` of each worker, one in use and one on its way.
    """
    free = free_shared_bytes()
    if not workers or free is None:
        return workers
    free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    number = workers
    while number and (PREFETCH * number + 2) * batch_bytes > free:
        number -= 1
    if number < workers and is_main():
        _print_once(
            number,
            f"{SHARED} has {free / 2**20:,.0f} MiB free for each process, and {workers} workers need "
            f"{(PREFETCH * workers + 2) * batch_bytes / 2**20:,.0f}: images are read by {number or 'no'} workers, which may be "
            "slower (docker run --shm-size=2g gives more)",
        )
    return number


def free_shared_bytes() -> int | None:
    """Returns the free bytes of shared memory; None where the system does not limit it by a file system."""
    try:
        found = os.statvfs(SHARED)
    except (OSError, AttributeError):  # macOS; Windows
        return None
    return found.f_bavail * found.f_frsize


def _shared_memory() -> str:
    free = free_shared_bytes()
    return "" if free is None else f" ({SHARED} has {free / 2**20:,.0f} MiB free)"


_printed: set[int] = set()


def _print_once(number: int, line: str) -> None:
    """Prints the first line that is about this number of workers."""
    if number not in _printed:
        _printed.add(number)
        print(line, flush=True)


class _ReturnsMistakes:
    """A part that returns a Mistake instead of raising it.

    Raised in a worker process, its message would contain the traceback of that process.
    """

    def __init__(self, part: Part, places: Tensor | None) -> None:
        self.part, self.places = part, places

    def __len__(self) -> int:
        return len(self.part)

    def __getitems__(self, asked: tuple) -> tuple[Tensor | tuple, np.ndarray, np.ndarray] | Mistake:
        """Returns images (or their place and shape), labels and index; the latter as arrays, which cost less to send."""
        index, cut, number = asked
        cuts = None if cut is None else Cuts(cut[0], torch.from_numpy(cut[1]))
        try:
            images, labels = read(self.part.images, torch.from_numpy(index), cuts)
        except Mistake as error:
            return error
        if self.places is None or images.numel() > self.places.shape[1]:
            return images, labels.numpy(), index
        place = number % len(self.places)
        self.places[place, : images.numel()].view(images.shape).copy_(images)
        return (place, tuple(images.shape)), labels.numpy(), index


def _unchanged(batch):
    return batch
