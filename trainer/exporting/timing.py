"""Times calls and tells the memory of a process. Imports nothing heavy: it runs in processes that are measured."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP, MOST_CALLS, MOST_SECONDS = 10, 500, 3.0
STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def latency(
    run: Callable[[np.ndarray], Any], images: np.ndarray, most_seconds: float = MOST_SECONDS
) -> tuple[float, float]:
    """Returns median and 95th percentile of the seconds of a call with these images, after a few calls to warm up."""
    _called(run, images, WARM_UP, most_seconds / 3)
    seconds = _called(run, images, MOST_CALLS, most_seconds)
    return float(np.median(seconds)), float(np.quantile(seconds, 0.95))


def _called(run: Callable[[np.ndarray], Any], images: np.ndarray, calls: int, most: float) -> list[float]:
    """Returns the seconds of each of so many calls, or of those that fit into `most` seconds; at least one."""
    seconds: list[float] = []
    while not seconds or (len(seconds) < calls and sum(seconds) < most):
        started = time.perf_counter()
        run(images)
        seconds.append(time.perf_counter() - started)
    return seconds


def memory() -> tuple[int, int] | None:
    """Returns the bytes that this process has in memory, and the most that it had since `forget_peak`; None where Linux is not.

    Not getrusage's maximum, which counts the parent's too.
    """
    if not STATUS.exists():
        return None
    status = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    now, most = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, most


def forget_peak() -> None:
    """Lets the most memory so far be what is in memory now, where the system allows it."""
    try:
        PEAK.write_text("5")
    except OSError:
        return
