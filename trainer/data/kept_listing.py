"""Keeps the listing of a large folder in the cache folder, until one of its folders changes."""

import contextlib
import hashlib
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from typing_extensions import TypedDict

from trainer.data.fetch import cache_folder
from trainer.data.listing import Listing, list_images
from trainer.mistakes import Mistake
from trainer.storage import records

MANY = 10_000  # pictures; a smaller folder is listed anew each time
SETTLED_SECONDS = 2  # a folder that has just changed may change again without a newer time


class _Listing(TypedDict):
    files: list[str]
    inside: list[str]
    classes: list[str]
    folders: list[str]
    passed_over: dict[str, int]
    num_links: int
    num_special: int
    entered: dict[str, int]


class _Record(TypedDict):
    listing: _Listing


def kept_listing(folder: Path) -> Listing:
    """Returns `list_images(folder)`, as it was kept if no folder below has changed since."""
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:24]
    record = cache_folder() / "listings" / f"{name}.json"
    kept = _read(record)
    if kept is not None:
        if kept.files[0] != str(folder / kept.inside[0]):  # it was named otherwise, or from another place
            kept.files = [str(folder / name) for name in kept.inside]
        return kept
    started = time.time()
    found = list_images(folder)
    if len(found.files) >= MANY and max(found.entered.values()) < (started - SETTLED_SECONDS) * 1e9:
        listing = asdict(found)
        with contextlib.suppress(OSError):  # without a writable cache, the next start lists it again
            records.write(record, {"listing": listing})
    return found


def _read(record: Path) -> Listing | None:
    """Returns the kept listing; None if it is missing, not valid, or of folders that have changed."""
    try:
        kept = records.read(record, _Record)
        changed = any(os.stat(name).st_mtime_ns != at for name, at in kept["listing"]["entered"].items())
    except (Mistake, OSError):
        return None
    if changed:
        return None
    return Listing(**{**kept["listing"], "passed_over": Counter(kept["listing"]["passed_over"])})
