"""Files that are there whole or not at all."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PARTIAL = ".partial-"  # begins the name of what is being written


def write_through(path: Path, data: bytes) -> None:
    """Writes a file and forces it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to the disk (Windows has no such call and needs none)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, replacing one of that name; it survives a crash once this returns."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        write_through(partial, data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def plain(value: Any, not_finite: Callable[[float], Any] = float) -> Any:
    """The value in JSON's types: tensors and arrays as numbers or lists, paths and what is unknown as text.

    not_finite: what is written for a float that JSON has no number for.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, not_finite) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else not_finite(float(value))
    if hasattr(value, "tolist"):  # a tensor, an array, or a number of either
        return plain(value.tolist(), not_finite)
    return str(value)


def json_bytes(value: Any) -> bytes:
    """Non-finite floats as Python writes them (NaN, Infinity), which it reads back too."""
    return json.dumps(value, indent=1).encode()
