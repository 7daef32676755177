"""The number of threads of a run, which a resumed run keeps."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from trainer.distributed import usable_cores
from trainer.runs.resuming import facts_of_beginning
from trainer.training.denormals import flushed


@contextlib.contextmanager
def threads_of_a_run(
    here: Path, asked: int | None, accelerator: Accelerator, changed: bool = False
) -> Iterator[None]:
    """Sets torch's number of threads inside the context, and restores the earlier number on exit.

    They count denormal numbers as zero. A resumed run keeps the number it began with, because the order of sums depends
    on it, and so do the last bits of the weights.

    Args:
        here: The run's folder.
        asked: The number requested; None for one thread per core, or what torch uses if that is less.
        accelerator: The run's accelerator.
        changed: Whether the folder holds a run of another recipe. A number that is requested is then used.
    """
    before = torch.get_num_threads()
    most = available_threads(accelerator.num_processes)
    # A lower number may come from OMP_NUM_THREADS, set by the user or by a launcher, or from a caller in Python;
    # these cannot be message apart, so it is respected.
    now = asked or min(most, before)
    begun = None if changed and asked else facts_of_beginning(here).get("threads")
    number = begun or now
    message = None
    if number != now:
        message = (
            f"{here}: goes on with {_counted(number)}, as it began ({_counted(now)} would be used now): "
            "rounding depends on the number"
        )
    elif now < most and not asked and _launched() and accelerator.device.type == "cpu":
        message = (
            f"computing with {_counted(now)}, as set by OMP_NUM_THREADS (launchers set it to 1 by default); there are "
            f"cores for {most}: accelerate launch --num_cpu_threads_per_process {most}, or --threads {most}, "
            f"or threads: {most} in the recipe"
        )
    if message and accelerator.is_main_process:
        print(message, flush=True)
    with flushed():
        torch.set_num_threads(number)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def available_threads(num_processes: int) -> int:
    """Returns the number of physical cores for each process of this machine, at least 1."""
    logical = usable_cores()
    cores = min(psutil.cpu_count(logical=False) or logical, logical)
    return max(1, cores // min(num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))))


def _counted(threads: int) -> str:
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def _launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
