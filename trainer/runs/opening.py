"""Opening a run: the accelerator, the folder, the data, the networks."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from trainer.data.batches import make_data
from trainer.data.images import Data
from trainer.distillation.onednn import kinds_in_float32
from trainer.distillation.teacher import Teacher, copy_layers
from trainer.mistakes import Mistake
from trainer.networks.build import create, spec
from trainer.recipe.keys import Recipe, TeacherKeys
from trainer.recipe.recipe import read
from trainer.recipe.stages import any_teaches
from trainer.recipe.text import RecipeError
from trainer.reporting.log import Log
from trainer.runs.checks import check_layers
from trainer.runs.resuming import same_recipe
from trainer.storage.lock import lock
from trainer.training.run import Run

WORKING_LAUNCHES = (
    "torchrun --nproc_per_node N -m trainer run RECIPE, or "
    "accelerate launch --multi_gpu --num_processes N -m trainer run RECIPE"
)


@contextlib.contextmanager
def folder_of(
    path: str | Path, changes: dict[str, Any] | None, folder: str | Path, allow_python: bool = False
) -> Iterator[tuple[Recipe, dict[str, Any], Path, Accelerator]]:
    """The recipe, as an object and plain, its folder, which is held while this lasts, and the accelerator."""
    recipe, plain = read(path, changes, allow_python)
    accelerator = make_accelerator(recipe)
    if accelerator.is_main_process and recipe.written.notes:
        print("\n".join(recipe.written.notes), file=sys.stderr, flush=True)
    here = Path(folder) / recipe.name
    same_recipe(here, recipe.written.file, plain)
    accelerator.wait_for_everyone()  # nothing is written before all have looked
    # Only the main process holds the lock: the others belong to it.
    with lock(here) if accelerator.is_main_process else contextlib.nullcontext():
        yield recipe, plain, here, accelerator


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of a run. Raises RecipeError when the launch asked for more processes than it got."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != recipe.precision:
        AcceleratorState._reset_state()  # that of an earlier run in this process, which Accelerate holds on to
    accelerator = accelerator_of(
        cpu=not torch.accelerator.is_available(),  # else it takes one process for all that were started on CPUs
        mixed_precision=recipe.precision,
        log_with=recipe.track,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if _asked_for_more(accelerator.num_processes):
        raise RecipeError(
            f"the launch asked for more processes than the {accelerator.num_processes} it got; these commands work: "
            f"{WORKING_LAUNCHES}. For one process: --num_processes 1 --num_machines 1, and WORLD_SIZE and MASTER_ADDR unset"
        )
    return accelerator


def accelerator_of(**settings: Any) -> Accelerator:
    """Raises Mistake for a precision that this machine has not got."""
    try:
        return Accelerator(**settings)
    except ValueError as error:
        raise Mistake(str(error)) from error


def _asked_for_more(num_processes: int) -> bool:
    """Whether the launch asked for more processes: accelerate's launcher quietly starts one where it cannot do more.

    By flags or by its configuration file, a launch of several sets MASTER_ADDR, and one that is really of several
    tells each its number too.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) > num_processes
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return by_accelerate and "MASTER_ADDR" in os.environ and num_processes == 1


def make_run(recipe: Recipe, here: Path, accelerator: Accelerator, log: Log) -> Run:
    with accelerator.local_main_process_first():  # what is missing is fetched once
        data = make_data(recipe.data, accelerator.device)
        teacher = make_teacher(recipe, data)
    if accelerator.is_main_process and data.notes:
        print("\n".join(data.notes), flush=True)
    torch.manual_seed(recipe.seed * 2 + 1)
    student = create(recipe.student, data.shape, len(data.classes))
    if recipe.student.from_teacher:
        assert teacher is not None
        if not copy_layers(student, teacher.network):
            message = "has no effect: no layer of the student is of a kind that the teacher has"
            raise RecipeError(recipe.fault(("student", "from_teacher"), message))
    student.to(accelerator.device)
    if teacher is not None:
        teacher.to(accelerator.device)
    check_layers(recipe, student, data, teacher, accelerator.device)
    networks = [student, *(teacher.networks if teacher is not None else [])]
    _report_float32(networks, recipe.precision, accelerator)
    return Run(
        name=recipe.name,
        folder=here,
        seed=recipe.seed,
        accelerator=accelerator,
        data=data,
        student=student,
        student_spec=spec(recipe.student),
        teacher=teacher,
        log=log,
        allow_python=recipe.allows_python,
    )


def _report_float32(networks: list[nn.Module], precision: str, accelerator: Accelerator) -> None:
    """Says what the recipe's precision does not reach, because this machine has it in float32 only."""
    if precision == "no" or accelerator.device.type != "cpu" or not accelerator.is_main_process:
        return
    if not accelerator.native_amp:
        print(
            f"precision {precision}: Accelerate has it on GPUs only: all is computed in float32 here",
            flush=True,
        )
        return
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    kinds = kinds_in_float32(networks, dtype)
    if kinds:
        print(
            f"precision {precision}: this processor does not have {', '.join(kinds)} in it: "
            "these layers compute in float32",
            flush=True,
        )


def make_teacher(recipe: Recipe, data: Data) -> Teacher | None:
    """The recipe's teacher, None where it has none. Raises Mistake for a head that nobody has trained."""
    if not recipe.teacher_entries:
        return None
    networks, entries = [], []
    for number, keys in enumerate(recipe.teacher_entries):
        torch.manual_seed(recipe.seed * 2 + 1000 * number)
        network = create(keys, data.shape, len(data.classes))
        if getattr(keys, "pretrained", False):
            keys = _as_pretrained(keys, network, data, any_teaches(recipe.stages))
        networks.append(network)
        entries.append(keys)
    return Teacher(networks, entries, data.mean, data.std, recipe.combine or "logits")


def _as_pretrained(keys: TeacherKeys, network: nn.Module, data: Data, is_taught: bool) -> TeacherKeys:
    """The entry of a network of pretrained weights, with the normalisation that they were trained with.

    Raises Mistake for a head that nobody has trained.
    """
    config = getattr(network, "pretrained_cfg", None) or {}
    known = config.get("num_classes")
    if known != len(data.classes) and not is_taught:
        raise Mistake(
            f"teacher {keys.model!r} was trained on {known} classes and the data has {len(data.classes)}: its new "
            "head is freshly initialised. Teach it with a stage train (who: teacher), or load a checkpoint"
        )
    if keys.mean is not None or len(config.get("mean", ())) != data.shape[0]:
        return keys
    # A copy: the checked recipe stays what its author wrote.
    return keys.model_copy(update={"mean": tuple(config["mean"]), "std": tuple(config["std"])})
