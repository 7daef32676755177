"""Locks a run's folder."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from trainer.mistakes import Mistake
from trainer.storage import files, records
from trainer.storage.checkpoint import logger
from trainer.storage.files import json_bytes

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]


class _Holder(TypedDict):
    pid: int
    host: str
    since: str


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds the folder for this process inside the `with` block, so that no second run writes into it.

    Raises Mistake, with the holder and the time, if another process holds it. The lock ends with the process, however
    that ends; forked children (a data loader's workers) do not hold it. The file .lock stays and has no meaning
    alone. If the file system has no locks (some network disks), a warning is logged and nothing is locked.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".holder"
    held = FileLock(folder / ".lock", timeout=0, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise Mistake(f"{folder}: another run is working in this folder ({_holder(holder)})") from None
    except OSError as error:
        logger.warning("%s: not locked against a second run: %s", folder, error)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        files.write_bytes(
            holder, json_bytes({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


def _holder(path: Path) -> str:
    try:
        who = records.read(path, _Holder)
    except Mistake:  # the holder has not written its name yet
        return "holder unknown"
    return f"process {who['pid']} on {who['host']}, since {who['since']}"


def share(file: IO[bytes]) -> None:
    """Marks an open file as used by this process, as long as it is open or mapped; see `is_mapped`.

    Systems without flock, and disks without locks, mark nothing.
    """
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_mapped(path: Path) -> bool:
    """Returns whether any process uses a file that it has marked by `share`."""
    if fcntl is None:
        return False
    with open(path, "rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False
