"""Every picture opened once before a training, so that damaged ones are found at the start; what was found is remembered."""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from trainer.data.fetch import cache_folder
from trainer.data.image_file import brightest
from trainer.data.reading import DEPTHS
from trainer.mistakes import Mistake
from trainer.storage import files


@dataclass
class Examined:
    """damaged: {file: why it cannot be read}. depth: bits of the samples in files of 16 bits, as the brightest one says."""

    damaged: dict[str, str]
    depth: int = 16
    num_deep: int = 0


def examine(paths: Sequence[str], name: str) -> Examined:
    """Opens every picture that has not been opened at its present size and time, in threads.

    What was found lies in the folder of `cache_folder`, so that the next start is quick. name: tells one set from another.
    """
    record = cache_folder() / "examined" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    known = _read(record)
    stamps = {path: _stamp(path) for path in paths}
    new = [path for path in paths if known.get(path, [None])[0] != stamps[path]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        shown = tqdm(
            pool.map(_look, new),
            total=len(new),
            desc="opening pictures",
            leave=False,
            disable=None if new else True,
        )
        for path, (fault, level) in zip(new, shown, strict=True):
            known[path] = [stamps[path], fault, level]
    if new:
        with contextlib.suppress(OSError):  # a folder that cannot be written costs the next start its time
            files.write_bytes(record, json.dumps({path: known[path] for path in paths}).encode())
    found = {path: known[path] for path in paths}
    levels = [level for _, _, level in found.values() if level is not None]
    return Examined(
        damaged={path: fault for path, (_, fault, _) in found.items() if fault is not None},
        depth=_depth(max(levels)) if levels else 16,
        num_deep=len(levels),
    )


def _read(record: Path) -> dict[str, list]:
    """What is remembered; nothing where the record is missing or is none."""
    try:
        known = json.loads(record.read_bytes())
    except (OSError, ValueError):
        return {}
    right = isinstance(known, dict) and all(
        isinstance(entry, list) and len(entry) == 3 for entry in known.values()
    )
    return known if right else {}


def _stamp(path: str) -> list[int]:
    try:
        status = os.stat(path)
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def _look(path: str) -> tuple[str | None, int | None]:
    try:
        return None, brightest(path)
    except Mistake as error:
        return str(error).removeprefix(f"{path}: "), None


def _depth(level: int) -> int:
    """Bits that samples up to this one have: 12 for 4095. Cameras and scanners write 10, 12 or 14 bits into 16."""
    return next(depth for depth in DEPTHS if level < 2**depth)
