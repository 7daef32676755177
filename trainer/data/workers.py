"""Reads batches of images from disk in worker processes: no more of them than shared memory has room for."""

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from trainer.data.crops import Cuts
from trainer.data.images import Part
from trainer.distributed import is_main
from trainer.mistakes import Mistake

SHARED = "/dev/shm"  # where Linux keeps the memory that processes share; a container may have 64 MB of it
PREFETCH = 2  # batches that a worker reads ahead
# A batch may take so long until its worker counts as hung: large photos on a slow disk take half a second each.
SECONDS, SECONDS_PER_IMAGE = 120, 2


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
    workers = _affordable(workers, largest * part.image_bytes)
    dataset: Any = _ReturnsMistakes(part, cuts)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=[positions.tolist() for positions in order],
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        timeout=SECONDS + SECONDS_PER_IMAGE * largest if workers else 0,
        pin_memory=pinned,
    )
    iterator = iter(loader)
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
        yield batch


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

    def __init__(self, part: Part, cuts: Cuts | None) -> None:
        self.part, self.cuts = part, cuts

    def __len__(self) -> int:
        return len(self.part)

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor, Tensor] | Mistake:
        try:
            return self.part.read(positions, self.cuts)
        except Mistake as error:
            return error


def _unchanged(batch):
    return batch
