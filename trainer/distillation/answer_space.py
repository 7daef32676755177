"""Allocates the file of the teacher's answers, and refuses one that is too large."""

import errno
import os
import shutil
from pathlib import Path

from trainer.mistakes import Mistake
from trainer.storage.files import naming

GIB = 2**30
_SMALLER = (
    "type float16, top, fewer views, no maps or where: disk make it smaller or move it; limit_gib allows more"
)


def size_text(num_bytes: int) -> str:
    """Formats a number of bytes in MiB, or in GiB from 0.1 GiB on."""
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.1f} MiB"


def refuse_above(num_bytes: int, limit_gib: float) -> None:
    """Raises Mistake, with both sizes, if the answers take more than the limit."""
    if num_bytes > limit_gib * GIB:
        raise Mistake(
            f"the teacher's answers take {size_text(num_bytes)}, and {limit_gib:g} GiB are allowed; {_SMALLER}"
        )


def make_file(path: Path, size: int) -> None:
    """Makes a file of zeros whose space is really allocated. Raises Mistake, with the sizes, if there is no room."""
    partial = path.with_suffix(".partial")  # the caller holds the lock, so an old one is a killed process's
    partial.unlink(missing_ok=True)
    if size > shutil.disk_usage(path.parent).free:
        raise _full(path.parent, size)
    try:
        with naming(path), open(partial, "wb") as file:
            _take_space(file, size)
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _full(path.parent, size) from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def _full(folder: Path, size: int) -> Mistake:
    return Mistake(
        f"the teacher's answers take {size_text(size)}, and {folder} has {size_text(shutil.disk_usage(folder).free)} free; "
        "type float16, top, fewer views or no maps make it smaller; the environment variable TRAINER_DATA moves it"
    )


def _take_space(file, size: int) -> None:
    # Without this a full disk would kill the process when it writes through the map, with no error to catch.
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    zeros = bytes(2**20)
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()
