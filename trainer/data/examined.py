"""Checks every image file before a training, to find damaged ones at the start. The results are cached."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from typing_extensions import TypedDict

from trainer.data.fetch import cache_folder
from trainer.data.image_file import brightest
from trainer.data.reading import DEPTHS
from trainer.mistakes import Mistake
from trainer.storage import records


class _Record(TypedDict):
    """The file of the results: {path: [[size, time], fault, greatest sample]}."""

    files: dict[str, list]


@dataclass
class Examined:
    """The result of checking image files.

    damaged: {file: why it cannot be read}. depth: bits of the samples in 16-bit files, from the brightest of
    them. num_deep: the number of 16-bit grey files.
    """

    damaged: dict[str, str]
    depth: int = 16
    num_deep: int = 0


def examine(paths: Sequence[str], name: str) -> Examined:
    """Opens every image file, in threads. A file's result is cached for its size and modification time.

    Args:
        paths: The files.
        name: The name of the set of files; each set has its own cache file in `cache_folder`.
    """
    record = cache_folder() / "examined" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    known = _read(record)
    stamps = {path: _stamp(path) for path in paths}
    new = [path for path in paths if known.get(path, [None])[0] != stamps[path]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm(
            pool.map(_check, new),
            total=len(new),
            desc="opening pictures",
            leave=False,
            disable=None if new else True,
        )
        for path, (fault, level) in zip(new, results, strict=True):
            known[path] = [stamps[path], fault, level]
    if new:
        with contextlib.suppress(OSError):  # without a writable cache, the next start checks them again
            kept = {path: known[path] for path in paths}
            records.write(record, {"files": kept})
    found = {path: known[path] for path in paths}
    levels = [level for _, _, level in found.values() if level is not None]
    return Examined(
        damaged={path: fault for path, (_, fault, _) in found.items() if fault is not None},
        depth=_depth(max(levels)) if levels else 16,
        num_deep=len(levels),
    )


def _read(record: Path) -> dict[str, list]:
    """Returns the cached results; none if the cache file is missing or not valid."""
    try:
        return records.read(record, _Record)["files"]
    except Mistake:
        return {}


def _stamp(path: str) -> list[int]:
    """Returns a file's size in bytes and its modification time in nanoseconds."""
    try:
        status = os.stat(path)
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def _check(path: str) -> tuple[str | None, int | None]:
    """Returns why a file cannot be read (or None) and the greatest sample of a 16-bit grey file (or None)."""
    try:
        return None, brightest(path)
    except Mistake as error:
        return str(error).removeprefix(f"{path}: "), None


def _depth(level: int) -> int:
    """Returns the bit depth of samples up to `level`. Cameras store 10, 12 or 14 bits in 16-bit files."""
    return next(depth for depth in DEPTHS if level < 2**depth)
