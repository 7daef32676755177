"""Runs of `several` in this process instead of processes of their own, which take seconds each to start."""

import contextlib

from trainer.cli import main
from trainer.runs import several


class Here:
    """What is used of a subprocess.Popen."""

    def __init__(self, status: int) -> None:
        self.returncode = status

    def poll(self) -> int:
        return self.returncode


def run_here(patch) -> list[list[str]]:
    """Runs are made in this process from now on; the list gets the words of each command."""
    commands: list[list[str]] = []

    def start(job, threads, allow_python):
        commands.append(several.words_of(job, threads, allow_python))
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.log, "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return Here(main(commands[-1]))

    patch.setattr(several, "_start", start)
    return commands
