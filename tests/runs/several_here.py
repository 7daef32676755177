"""Runs of `several` in this process instead of processes of their own, which take seconds each to start."""

import contextlib
import os
from pathlib import Path

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


NO_LABELS = """
import torch
from trainer.data.images import InMemory, Source
def some():
    images = torch.randint(0, 256, (120, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train = InMemory(images, (images.float().mean((1, 2, 3)) > 127).long())
    test = InMemory(images[:40], torch.full((40,), -1))
    return Source(train=train, test=test, classes=["a", "b"], mean=(.5,), std=(.3,), shape=(1, 8, 8))
"""
TAUGHT = """
name: unlabelled
allow_untrained: true
data: {dataset: "python:no_labels:some", validation: 0.2}
teacher: {model: lenet300, hidden: [8]}
student: {model: lenet300, hidden: [4]}
stages:
  - {stage: train, who: teacher, training: {epochs: 1, batch_size: 40}}
  - {stage: distill, training: {epochs: 1, batch_size: 40}, losses: [{loss: cross_entropy}, {loss: kl}]}
  - {stage: prune, method: magnitude, sparsity: 0.5}
  - {stage: pack}
"""


def without_test_labels(folder, patch) -> Path:
    """A recipe on data of one's own whose test images have no labels, which needs --allow-python; it is the working folder's."""
    (folder / "no_labels.py").write_text(NO_LABELS)
    (folder / "unlabelled.yaml").write_text(TAUGHT)
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path(__file__).parents[2])]))
    return folder / "unlabelled.yaml"
