"""Runs several recipes at once, each in a process of its own, and goes on where an earlier call stopped."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.distributed import environment_alone
from trainer.mistakes import Mistake
from trainer.recipe.recipe import read
from trainer.reporting import report
from trainer.reporting.tables import missing, percent
from trainer.runs.resuming import is_changed, is_finished
from trainer.runs.threads import available_threads
from trainer.training.stopping import launched, stopping

PATIENCE = 120.0  # seconds that a run has to keep its last step after it was told to end


class Job(NamedTuple):
    """A run that is wanted: the recipe's file, its changes with the run's `name`, and the folder of runs."""

    path: str | Path
    changes: Mapping[str, Any]
    folder: Path

    @property
    def here(self) -> Path:
        return Path(self.folder) / self.changes["name"]

    @property
    def log(self) -> Path:
        """Where the output of its process goes."""
        return Path(self.folder) / f"{self.changes['name']}.out"


def run_all(
    jobs: Sequence[Job], allow_python: bool = False, processes: int | None = None
) -> list[dict[str, Any]]:
    """Runs all jobs and returns their reports, in order. Those that have run already are not run again.

    All recipes are checked first. An interruption ends all runs after their present step; the same call goes on from there.

    Args:
        jobs: What is to be run.
        allow_python: Whether the recipes may name `python:module:name`, whose code then runs.
        processes: How many run at once: by default as many as there are cores, and one where there is a GPU. The cores are
            shared among them, unless the recipe gives its threads.

    Raises:
        Mistake: For a faulty recipe, inside a launch of several processes, and after all other runs when some have failed.
        Stopped: After SIGTERM or SIGHUP.
    """
    if launched():
        raise Mistake(
            "this starts processes of its own: start it as trainer or python -m trainer, not by a launcher"
        )
    recipes = [read(job.path, dict(job.changes), allow_python) for job in jobs]
    due = [
        job
        for job, (recipe, plain) in zip(jobs, recipes, strict=True)
        if not is_finished(job.here) or is_changed(job.here, recipe.written.file, plain)
    ]
    if processes is None:
        processes = 1 if torch.accelerator.is_available() else available_threads(1)
    processes = min(processes, len(jobs))
    # Of all jobs, not of those that are due: rounding depends on the number of threads.
    threads = None if recipes[0][0].threads else available_threads(processes)
    failed = _run(due, processes, threads, allow_python) if due else {}
    if failed:
        raise Mistake("\n".join(f"{job.here}: {why} ({job.log})" for job, why in failed))
    return [report.read(job.here) for job in jobs]


def _run(due: list[Job], processes: int, threads: int | None, allow_python: bool) -> list[tuple[Job, str]]:
    """Runs the jobs, so many at once; returns those that failed, each with the last line that it printed."""
    waiting, failed, num_done = list(due), [], 0
    working: list[tuple[Job, subprocess.Popen, float]] = []
    try:
        with stopping():
            while waiting or working:
                while waiting and len(working) < processes:
                    job = waiting.pop(0)
                    working.append((job, _start(job, threads, allow_python), time.monotonic()))
                time.sleep(0.1)
                for one in [one for one in working if one[1].poll() is not None]:
                    working.remove(one)
                    job, process, started = one
                    num_done += 1
                    why = _last_line(job.log) if process.returncode else None
                    if why is not None:
                        failed.append((job, why))
                    print(
                        f"[{num_done}/{len(due)}] {job.here}: {why or _shown(job)}  ({time.monotonic() - started:.0f} s)",
                        flush=True,
                    )
    finally:
        for _, process, _ in working:
            process.terminate()
        for _, process, _ in working:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
    return failed


def words_of(job: Job, threads: int | None, allow_python: bool) -> list[str]:
    """Returns the command line's words, after the program, that run the job."""
    words = ["run", str(job.path), "--folder", str(job.folder)]
    for key, value in job.changes.items():
        words += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    words += [] if threads is None else ["--threads", str(threads)]
    return words + ["--allow-python"] * allow_python


def _start(job: Job, threads: int | None, allow_python: bool) -> subprocess.Popen:
    command = [sys.executable, "-P", "-m", "trainer", *words_of(job, threads, allow_python)]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "wb") as log:
        return subprocess.Popen(
            command, env=environment_alone(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
    return lines[-1].removeprefix("trainer: ")


def _shown(job: Job) -> str:
    row = report.read(job.here)["rows"][-1]
    if missing(row.get("top1")):  # no test image has a label
        return f"{row['stage']} agreement {percent(row.get('agreement'))}"
    return f"{row['stage']} {percent(row['top1'])}"
