"""The file that the teacher's answers are kept in."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from trainer.mistakes import Mistake
from trainer.storage import files

FORMAT = 1
GIB = 2**30
_SMALLER = (
    "type float16, top, fewer views, no maps or where: disk make it smaller or move it; limit_gib allows more"
)


def size_text(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:,.1f} MiB"


def refuse_above(num_bytes: int, limit_gib: float) -> None:
    if num_bytes > limit_gib * GIB:
        raise Mistake(
            f"the teacher's answers take {size_text(num_bytes)}, and {limit_gib:g} GiB are allowed; {_SMALLER}"
        )


def make_file(path: Path, size: int) -> None:
    """A file of zeros whose space is really taken. Raises Mistake naming sizes when there is no room."""
    partial = path.with_suffix(".partial")  # the caller holds the lock: one left here is a killed process's
    partial.unlink(missing_ok=True)
    if size > shutil.disk_usage(path.parent).free:
        raise _full(path.parent, size)
    try:
        with open(partial, "wb") as file:
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
        f"the teacher's answers take {size_text(size)}, and {folder} has {size_text(shutil.disk_usage(folder).free)} free; {_SMALLER}, and "
        "the environment variable TRAINER_DATA names another folder"
    )


def _take_space(file, size: int) -> None:
    # Writing through a map to space that was promised but is not there kills the process, without an error to catch.
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


def _read_facts(folder: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def same_facts(folder: Path, facts: dict[str, Any]) -> None:
    kept = _read_facts(folder)
    if kept is None:
        # Only a description: the folder's name already says that the facts are these.
        files.write_bytes(folder / "facts.json", json.dumps(facts, indent=1).encode())
    elif kept != facts:
        wrong = sorted(key for key in facts.keys() | kept.keys() if facts.get(key) != kept.get(key))
        raise Mistake(f"{folder}: its answers were kept for another {', '.join(wrong)}; remove that folder")


def other_facts(parent: Path, folder: Path, facts: dict[str, Any]) -> str:
    """Why the kept answers that are most like these were not taken; nothing where there are none of this dataset."""
    nearest: tuple[int, str] | None = None
    for other in sorted(parent.iterdir()):
        kept = _read_facts(other) if other != folder else None
        if kept is None or kept.get("dataset") != facts["dataset"]:
            continue
        differing = [key for key in facts if facts[key] != kept.get(key)]
        if nearest is None or len(differing) < nearest[0]:
            nearest = (len(differing), f"; those in {other.name} are of another {', '.join(differing)}")
    return nearest[1] if nearest else ""
