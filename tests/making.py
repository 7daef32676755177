"""Runs for tests of the loop and of single stages, in this process or in one of two."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from trainer.data.batches import make_data
from trainer.networks.build import build
from trainer.recipe import shelves
from trainer.recipe.keys import DataKeys
from trainer.reporting import report
from trainer.reporting.log import Log
from trainer.runs import evidence, guards
from trainer.stages import pack
from trainer.training.run import Run

_open: list[Log] = []
LEFT_OUT = {
    (report, "accuracy_against_bytes"): None,
    (report, "position_of"): lambda row: None,
    (report, "histograms"): lambda name, weights: [],
    (evidence, "_players"): lambda *_: (None, None, "this is a test"),
}
DRAWN = {(place, name): getattr(place, name) for place, name in LEFT_OUT}
FRESH_PROCESS = pack._in_fresh_process  # what conftest.py spares most tests
FOUND_UNTRAINED = guards._found_untrained  # likewise


def make_run(
    folder, spec: dict | None = None, student: type[nn.Module] | None = None, accelerator=None, stage_name="train", *,
    stage=0, teacher=None, **data,
) -> Run:  # fmt: skip
    """A run on a few digits, of a student that a spec or a class of the test's own builds; the test's end closes its log."""
    accelerator = accelerator or Accelerator(cpu=True)
    keys = shelves.checker(shelves.find("dataset", "digits"), DataKeys)
    data = make_data(keys.model_validate({"dataset": "digits"} | data), accelerator.device)
    torch.manual_seed(7)
    _open.append(Log(Path(folder) / "log.jsonl"))
    return Run(
        name="x",
        folder=Path(folder),
        seed=3,
        accelerator=accelerator,
        data=data,
        student=student() if student else build(spec, data.shape, len(data.classes)),
        student_spec=dict(spec or {}),
        teacher=teacher,
        log=_open[-1],
        stage=stage,
        stage_name=stage_name,
    )


def close() -> None:
    """Closes the logs of all runs so far."""
    while _open:
        _open.pop().close()


def leave_plots_out(patch) -> None:
    """Reports are written without their plots and without the student inside, which take a second each."""
    for (place, name), instead in LEFT_OUT.items():
        patch.setattr(place, name, instead)


def put_plots_in(patch) -> None:
    """Reports have all of that, as a user's have."""
    for (place, name), real in DRAWN.items():
        patch.setattr(place, name, real)
