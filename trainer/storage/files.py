"""Writes files that exist whole or not at all."""

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.mistakes import Mistake

PARTIAL = ".partial-"  # prefix of the name of a file that is being written


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Names the path in an OSError that names none (a full disk) or only a partial file (a missing permission)."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename and PARTIAL not in str(error.filename)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_through(path: Path, data: bytes) -> None:
    """Writes a file and syncs it to the disk."""
    with naming(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries to the disk (Windows has no such call and needs none)."""
    if os.name == "nt":
        return
    with naming(folder):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and replaces one of that name. It survives a crash after this returns."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with naming(path):
            write_through(partial, data)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_regular(path: str | Path) -> None:
    """Raises Mistake for a path that is no file but a pipe, a socket or a device: reading it might never end."""
    mode = os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise Mistake(f"{path}: is {kind}; a file is needed")


def read_bytes(path: str | Path) -> bytes:
    """Reads a file that the user has named. Raises Mistake, with its name and the reason, if that fails."""
    check_regular(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Mistake(f"{path}: cannot be read: {error.strerror}") from None


def plain(value: Any, not_finite: Callable[[float], Any] = float) -> Any:
    """Converts a value to JSON's types: tensors and arrays to numbers or lists, paths and unknown types to text.

    not_finite: converts a float that is infinite or NaN, which JSON does not have.
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
    """Returns a value as JSON bytes. Non-finite floats are written as NaN and Infinity, which Python reads back."""
    return json.dumps(value, indent=1).encode()
