"""Writes the student as one small file, and checks in a fresh process that it decodes to the same network."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from trainer.compression import units
from trainer.compression.states import dense_state
from trainer.compression.weights import weights_of
from trainer.distributed import environment_alone
from trainer.storage import files
from trainer.storage.weights_file import digest
from trainer.training.evaluate import apart, logits
from trainer.training.rows import record
from trainer.training.run import Run


def order(_settings, before) -> Iterator[str]:
    if any(stage.stage == "pack" for stage in before):
        yield "has no effect: the student is packed already"


def changes_student(settings) -> bool:
    return settings.tidy


def seals(_settings) -> bool:
    return True


def needs_trained(_settings) -> bool:
    return True


def check_student(settings, student: nn.Module) -> None:
    if settings.tidy:
        units.can_tidy(student)


def pack(
    run: Run, *, file: Annotated[str, Field(pattern=r"^[\w.-]+\.tiny$")] = "student.tiny", tidy: bool = False
) -> None:
    """Writes runs/NAME/`file`; a fresh process decodes it and measures its accuracy.

    file: name of the file. tidy: whether dead hidden units are dropped first, and the others sorted, whose order is free,
    so that the file is smaller. The student's outputs then stay the same up to the order of summation; the report's row
    has their largest difference over the validation images (`max_difference`) and the number of changed predictions
    (`num_changed`).
    Raises RuntimeError, and removes the file, if the decoded weights are not bit-equal or the accuracy differs.
    """
    from trainer.packing import network as packed  # here: a recipe is read without the coder

    path = run.folder / file
    tidied = _tidy(run) if tidy else {}
    decoded: dict = {}
    if run.accelerator.is_main_process:
        data = packed.encode(run.student, run.student_spec, packed.facts_of(run.data))
        files.write_bytes(path, data)
        decoded = _in_fresh_process(run, path)
        _account(run, data, str(path))
    row = record(
        run, "decoded", decoded.get("seconds", 0.0), digest=decoded.get("digest"), file=file, **tidied
    )
    if run.accelerator.is_main_process:
        expected = digest(dense_state(run.student))
        same = decoded["top1"] == row["top1"] or row["top1"] != row["top1"]  # NaN where there are no labels
        if decoded["digest"] != expected or not same:
            path.unlink()
            raise RuntimeError(
                f"{path}: decoded to another network: digest {decoded['digest'][:12]} for {expected[:12]}, "
                f"top-1 {decoded['top1']} % for {row['top1']} %; the file is removed"
            )


def _tidy(run: Run) -> dict[str, float]:
    """Tidies the student, in place. Raises RuntimeError if its outputs then differ by more than rounding."""
    before = logits(run)
    dropped = units.tidy(run.student)
    changes = apart(before, logits(run))
    if not changes["max_difference"] <= 1e-3 * max(1.0, before.abs().max().item()):
        raise RuntimeError(
            f"tidy changed what the student says: its outputs are {changes['max_difference']:.3g} apart"
        )
    return {"num_dropped": sum(dropped.values()), **changes}


def _account(run: Run, data: bytes, name: str) -> None:
    """Adds to the report how many bytes of the file each layer takes."""
    from trainer.packing import network as packed

    known = weights_of(run.student)
    for name_ in known:
        run.layers.setdefault(name_, {})["file_bytes"] = 0
    for part in packed.account(data, name)[0]:
        layer = part["tensor"] if part["tensor"] in known else part["tensor"].removesuffix(".weight")
        if layer in known:
            run.layers[layer]["file_bytes"] += part["bytes"]


def _in_fresh_process(run: Run, path) -> dict:
    environment = environment_alone()
    if run.accelerator.device.type == "cpu":
        environment["ACCELERATE_USE_CPU"] = "1"  # the same arithmetic as here
    command = [sys.executable, "-P", "-m", "trainer", "evaluate", str(path), str(run.recipe_path), "--json"]
    command += ["--threads", str(torch.get_num_threads())]  # the same order of summation
    command += ["--allow-python"] * run.allow_python
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{path}: the fresh process could not evaluate it:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
