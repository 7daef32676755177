"""Watches a process's operations on the disk for `chaos.py`: kills or fails one of them, and records what was synced."""

import builtins
import contextlib
import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.storage import files


class Disk:
    """Counts writes, syncs, renames and removals of this process, and strikes at one.

    Args:
        log: A line is appended for every operation; a sync's tells the file's size or the folder's entries.
        at: The number of the operation to strike at, None for none.
        moment: Within the operation, 0 to 1: below 0.4 before it, below 0.7 half way through a write, else after it.
        fails: An error number to raise instead of killing the process.
    """

    def __init__(self, log: Path, at: int | None, moment: float, fails: int | None) -> None:
        self.at, self.moment, self.fails, self.count = at, moment, fails, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.shadows = log.with_suffix(".shadows")

    def watch(self) -> None:
        """Puts itself between the program and the operating system."""
        real_write, real_sync = files.write_through, os.fsync

        def write(path: Path, data: bytes) -> None:
            if self.count == self.at and not self.fails and 0.4 <= self.moment < 0.7:
                with open(path, "wb") as file:
                    file.write(data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            self._around(real_write, path, data)

        def sync(handle: int) -> None:
            self._around(real_sync, handle)
            self._tell(handle)

        files.write_through = write  # type: ignore[assignment]
        os.fsync = sync  # type: ignore[assignment]
        for name in ("rename", "replace"):
            setattr(os, name, self._moving(getattr(os, name)))
        for name in ("unlink", "rmdir"):
            real = getattr(os, name)
            setattr(os, name, lambda *a, real=real, **k: self._around(real, *a, removes=True, **k))

    def _moving(self, real: Callable) -> Callable:
        def moved(source: Any, target: Any) -> None:
            # The old file is kept: without a sync of the folder a power failure may bring it back.
            if os.path.isfile(target):
                self.shadows.mkdir(exist_ok=True)
                shadow = self.shadows / str(os.stat(target).st_ino)
                with contextlib.suppress(FileExistsError):
                    try:
                        os.link(target, shadow)
                    except OSError as error:  # a disk of its own, which loses no power here
                        if error.errno != errno.EXDEV:
                            raise
            self._around(real, source, target)

        return moved

    def _around(self, real: Callable, *arguments: Any, removes: bool = False, **more: Any) -> Any:
        number, self.count = self.count, self.count + 1
        os.write(self.log, b"{}\n")
        here = number == self.at
        if here and self.fails and not removes:
            path = arguments[0] if not isinstance(arguments[0], int) else None
            raise OSError(self.fails, os.strerror(self.fails), None if path is None else str(path))
        if here and not self.fails and self.moment < 0.4:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return real(*arguments, **more)
        finally:
            if here and not self.fails:
                os.kill(os.getpid(), signal.SIGKILL)

    def _tell(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.exists():
            os.write(self.log, json.dumps(_told(path)).encode() + b"\n")


def lose_unsynced(folder: Path, log: Path, chance: random.Random) -> None:
    """Does to a folder what a power failure may do: what was not synced in the last start is partly lost.

    A file that was written but not synced is cut back towards its synced size; an entry that was made since its
    folder was synced disappears, and a file that was replaced comes back. Each with even chances.
    """
    synced: dict[int, dict[str, Any]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        told = json.loads(line) if line.endswith("}") else {}
        if told:
            synced[told["inode"]] = told
    shadows = log.with_suffix(".shadows")
    for path in sorted(folder.rglob("*"), reverse=True):
        status = path.lstat()
        if path.name == ".lock" or not path.exists():
            continue
        known = synced.get(status.st_ino)
        if path.is_file() and chance.random() < 0.5:
            size = known["size"] if known else 0
            if (known is None or known["time"] != status.st_mtime_ns) and size < status.st_size:
                with builtins.open(path, "r+b") as file:
                    file.truncate(chance.randint(size, status.st_size))
        above = synced.get(path.parent.stat().st_ino)
        if above is None or "entries" not in above:  # never synced; its inode may have been a file's before
            continue
        if above["entries"].get(path.name) == status.st_ino or chance.random() < 0.5:
            continue
        old = shadows / str(above["entries"].get(path.name))
        if path.is_dir():
            shutil.rmtree(path)
        elif old.exists():
            os.replace(old, path)
        else:
            path.unlink()
    shutil.rmtree(shadows, ignore_errors=True)
    with builtins.open(log, "a") as file:  # what is left is on the disk
        for path in (folder, *folder.rglob("*")):
            if path.exists():
                file.write(json.dumps(_told(path)) + "\n")


def _told(path: Path) -> dict[str, Any]:
    status = path.stat()
    told: dict[str, Any] = {"inode": status.st_ino, "size": status.st_size, "time": status.st_mtime_ns}
    if path.is_dir():
        told["entries"] = {entry.name: entry.inode() for entry in os.scandir(path)}
    return told
