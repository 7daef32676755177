"""How many threads a run computes with: those it began with."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from trainer.runs.resuming import facts_of_beginning


@contextlib.contextmanager
def threads_of_a_run(here: Path, asked: int | None, accelerator: Accelerator) -> Iterator[None]:
    """While this lasts torch computes with the threads that the run began with, or else those asked for, or all there are.

    The order of sums depends on the number, and so do the last bits of what is learned.
    """
    before = torch.get_num_threads()
    most = available_threads(accelerator.num_processes)
    # What OMP_NUM_THREADS said, or a caller in Python, is the user's will, or a launcher's: who can tell?
    now = asked or min(most, before)
    begun = facts_of_beginning(here).get("threads")
    number = begun or now
    told = None
    if number != now:
        told = (
            f"{here}: goes on with {_counted(number)}, as it began ({_counted(now)} would be used now): "
            "rounding depends on the number"
        )
    elif now < most and not asked and _launched() and accelerator.device.type == "cpu":
        told = (
            f"computing with {_counted(now)}, as OMP_NUM_THREADS says, which launchers set to 1 where nobody has; there are "
            f"cores for {most}: accelerate launch --num_cpu_threads_per_process {most}, or --threads {most}, "
            f"or threads: {most} in the recipe"
        )
    if told and accelerator.is_main_process:
        print(told, flush=True)
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_threads(num_processes: int) -> int:
    """One for each physical core that this process may use, divided among the processes of this machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    logical = len(affinity(0)) if affinity else os.cpu_count() or 1
    cores = min(psutil.cpu_count(logical=False) or logical, logical)
    return max(1, cores // min(num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))))


def _counted(threads: int) -> str:
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def _launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
