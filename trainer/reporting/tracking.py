"""Tracks a run in Weights & Biases by a process of its own, so that nothing of it can touch the run."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)
FINISH_SECONDS = 10.0  # how long the end of a run waits for the service


@contextlib.contextmanager
def tracked(folder: Path, wanted: bool) -> Iterator[None]:
    """Sends the log of a run while the `with` block runs; `trainer sync` sends later what could not be sent.

    The sender reads the log's file, from its first line. It learns of the run's end by the end of its standard input, so also
    if this process is killed. The run waits for it only at its end, and at most `FINISH_SECONDS`.

    Args:
        folder: The run's folder.
        wanted: Whether this process tracks the run: the main process of a recipe with `track`.
    """
    sender = _start(folder) if wanted else None
    try:
        yield
    finally:
        if sender is not None:
            _stop(sender, folder)


def _start(folder: Path) -> subprocess.Popen | None:
    package = str(Path(__file__).parents[2])
    paths = [path for path in (os.environ.get("PYTHONPATH"), package) if path]
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", "sync", str(folder), "--follow"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is the run's alone; and all that wandb starts can be ended together
        )
    except OSError as error:
        logger.warning("wandb is not used: no process can be started for it: %s", error)
        return None


def _stop(sender: subprocess.Popen, folder: Path) -> None:
    with contextlib.suppress(OSError):  # it has ended already, and has said why
        assert sender.stdin is not None
        sender.stdin.close()
    try:
        sender.wait(FINISH_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning(
            "wandb took longer than %.0f s and is switched off; `trainer sync %s` sends the rest of the log",
            FINISH_SECONDS,
            folder,
        )
    finally:
        _end(sender)


def _end(sender: subprocess.Popen) -> None:
    """Ends the sender and all that it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(sender.pid, signal.SIGKILL)
    else:
        sender.kill()
    sender.wait()
