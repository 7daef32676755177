"""A store of decoded pictures: one file in the cache folder, which any number of processes and runs read and fill.

A picture is put into it when it is first read. The file has a place for each; it is sparse, so that places take room on
disk only when they are filled. A record is valid if its checksum is right: half-written and damaged ones are not, and
are made anew.
"""

import hashlib
import json
import logging
import mmap
import os
import shutil
import weakref
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from torch.utils.data import get_worker_info

from trainer.data.fetch import cache_folder
from trainer.mistakes import Mistake
from trainer.storage import files
from trainer.storage.lock import is_mapped, share

FORMAT = 1
FOLDER = "store"  # in the cache folder
SHARE_OF_DISK = 4  # without limit_gib, stores take at most one part in so many of the free disk
_HEAD = np.dtype([("sum", "<u4"), ("height", "<u4"), ("width", "<u4"), ("channels", "<u4")])
_PAGE = 4096
logger = logging.getLogger(__name__)


class Store:
    """Records of uint8 [H, W, C], each up to a size. The file is opened when it is first used, in each process.

    When the file cannot be made, the disk is full, or the limit is reached and no older store can be removed, no more is
    put into it: one line says so, and the rest is decoded each time.

    Args:
        facts: Everything that the records depend on, in JSON's types.
        num_records: The number of records.
        most_bytes: The largest record. Larger ones are never kept.
        limit_gib: How much all stores in the cache folder may take together, None for a quarter of the free disk.
    """

    def __init__(
        self, facts: dict[str, Any], num_records: int, most_bytes: int, limit_gib: float | None = None
    ) -> None:
        self.facts = json.loads(json.dumps({"format": FORMAT, **facts}))
        name = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:24]
        self.folder = cache_folder() / FOLDER / name
        self.num_records, self.limit_gib = num_records, limit_gib
        self._place = most_bytes + -most_bytes % _PAGE
        self._start = num_records * _HEAD.itemsize + -num_records * _HEAD.itemsize % _PAGE
        self._close()

    def _close(self) -> None:
        self._file: int | None = None
        self._failed = self._is_full = self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        own = dict(self.__dict__)
        for name in ("_map", "_heads", "_checked"):
            own.pop(name, None)
        return own | {"_file": None}

    def open(self) -> None:
        """Opens the file; makes it if there is none. Raises Mistake if the folder cannot be written."""
        if self._file is not None:
            return
        if not hasattr(os, "pwrite"):
            raise Mistake(
                "data: store: this system (Windows) has no file that several processes fill; give store: off"
            )
        size = self._start + self.num_records * self._place
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self._file = os.open(self.folder / "records", os.O_RDWR | os.O_CREAT, 0o666)
                weakref.finalize(self, os.close, self._file)
                if os.fstat(self._file).st_size != size:  # new, or damaged
                    os.ftruncate(self._file, 0)
                    os.ftruncate(self._file, size)
                with os.fdopen(os.dup(self._file), "rb") as same:
                    share(same)  # so that `trainer cache --remove` and other stores leave it alone
                files.write_bytes(self.folder / "facts.json", json.dumps(self.facts, indent=1).encode())
            self._map = mmap.mmap(self._file, size)  # writable, or torch would warn of each record
        except OSError as error:
            self._file = None
            raise Mistake(
                f"data: store: {self.folder} cannot be used: {error.strerror or error}; the environment variable "
                "TRAINER_DATA names another folder, and store: off keeps nothing"
            ) from None
        self._heads = np.frombuffer(self._map, _HEAD, self.num_records)
        self._checked = np.zeros(self.num_records, dtype=bool)  # by this process
        self._allowed = self._most_bytes()

    def _ready(self) -> bool:
        """Opens the file; returns whether that worked."""
        if self._file is None and not self._failed:
            try:
                self.open()
            except Mistake as error:
                self._failed = True
                self._say_once(f"{str(error).partition(';')[0]}: pictures are decoded each time")
        return not self._failed

    def get(self, number: int) -> np.ndarray | None:
        """Returns a record, uint8 [H, W, C], in the file's memory, which must not be written; None if there is none."""
        if not self._ready():
            return None
        total, height, width, channels = (int(value) for value in self._heads[number])
        count = height * width * channels
        if not total or count > self._place:
            return None
        start = self._start + number * self._place
        found = np.frombuffer(self._map, np.uint8, count, start)
        if not self._checked[number]:
            if _sum(found, number) != total:
                self._say_once(f"{self.folder}: record {number} is damaged; such pictures are decoded again")
                return None
            self._checked[number] = True
        return found.reshape(height, width, channels)

    def expect(self, numbers: Iterable[int]) -> None:
        """Asks the system to bring records into memory together; reading each would otherwise wait for the disk by itself.

        It returns at once. A store larger than memory is read from the disk again in every epoch.
        """
        if not hasattr(mmap, "MADV_WILLNEED") or not self._ready():
            return
        for number in numbers:
            total, height, width, channels = (int(value) for value in self._heads[number])
            count = height * width * channels
            if total and 0 < count <= self._place:
                self._map.madvise(mmap.MADV_WILLNEED, self._start + number * self._place, count)

    def put(self, number: int, pixels: np.ndarray) -> None:
        """Keeps a record uint8 [H, W, C], if it fits and there is room."""
        if (
            not self._ready()
            or self._is_full
            or pixels.nbytes > self._place
            or not self._has_room(pixels.nbytes)
        ):
            return
        pixels = np.ascontiguousarray(pixels)
        head = np.array([(_sum(pixels, number), *pixels.shape)], _HEAD)
        assert self._file is not None
        try:
            # Written through the file, not the map: a full disk is then an error, and no signal that kills.
            os.pwrite(self._file, pixels.data, self._start + number * self._place)
            os.pwrite(self._file, head.tobytes(), number * _HEAD.itemsize)  # last: it makes the record valid
        except OSError as error:
            self._is_full = True
            self._say_once(f"{self.folder}: {error.strerror}: the other pictures are decoded each time")

    def num_bytes(self) -> int:
        """Returns the bytes that the store takes on disk."""
        return on_disk(self.folder / "records")

    def _has_room(self, num_bytes: int) -> bool:
        while self.num_bytes() + num_bytes > self._allowed:
            if not _remove_oldest(self.folder):
                self._is_full = True
                self._say_once(
                    f"{self.folder.parent}: the {_limit(self.folder, self.limit_gib) / 2**30:,.2f} GiB that stores may take "
                    "are full: the other pictures are decoded each time (data: store: {limit_gib: N} allows more)"
                )
                return False
            self._allowed = self._most_bytes()
        return True

    def _most_bytes(self) -> int:
        """Returns how many bytes this store may take beside the others."""
        others = sum(on_disk(other / "records") for other in _others(self.folder))
        return _limit(self.folder, self.limit_gib) - others

    def _say_once(self, line: str) -> None:
        worker = get_worker_info()
        if not self._warned and (worker is None or worker.id == 0):
            logger.warning("%s", line)
        self._warned = True


def _sum(pixels: np.ndarray, number: int) -> int:
    """Returns a checksum, never 0, of a record and its number."""
    return zlib.crc32(pixels.data, number + 1) or 1


def on_disk(path: Path) -> int:
    """Returns the bytes that a file takes on disk, which for a sparse one are fewer than its length."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_blocks * 512 if hasattr(found, "st_blocks") else found.st_size


def _limit(folder: Path, limit_gib: float | None) -> int:
    """Returns how many bytes all stores together may take: what is given, or a part of the disk that they leave free."""
    if limit_gib is not None:
        return int(limit_gib * 2**30)
    taken = sum(on_disk(path / "records") for path in (folder, *_others(folder)))
    return (shutil.disk_usage(folder).free + taken) // SHARE_OF_DISK


def _others(folder: Path) -> Iterator[Path]:
    """Yields the folders of the other stores."""
    for path in folder.parent.iterdir():
        if path != folder and (path / "records").is_file():
            yield path


def _remove_oldest(folder: Path) -> bool:
    """Removes the store that was opened longest ago, beside this one, and that nobody uses; returns whether there was one."""

    def opened(path: Path) -> float:
        facts = path / "facts.json"
        return facts.stat().st_mtime if facts.exists() else 0.0

    for other in sorted(_others(folder), key=opened):
        try:
            with FileLock(other / ".lock", timeout=0):
                if is_mapped(other / "records"):
                    continue
                for name in ("records", "facts.json"):
                    (other / name).unlink(missing_ok=True)
                logger.warning("%s: removed, the store that was used longest ago, to make room", other)
                return True
        except (Timeout, OSError):
            continue
    return False
