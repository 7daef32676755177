"""Opens a run: the accelerator, the folder, the data and the networks."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import nn

from trainer.data.batches import make_data
from trainer.data.images import Data
from trainer.data.workers import dismiss_all
from trainer.distillation.examine import look
from trainer.distillation.onednn import HALVES, kinds_in_float32
from trainer.distillation.teacher import Teacher, copy_layers
from trainer.distributed import on_cpus, told
from trainer.mistakes import Mistake
from trainer.recipe.keys import Recipe, TeacherKeys
from trainer.recipe.recipe import read
from trainer.recipe.stages import any_teaches, largest_batch, teaches, training_of
from trainer.recipe.text import RecipeError
from trainer.reporting.log import Log
from trainer.runs.checks import check_networks, without_effect
from trainer.runs.known import known_filter, known_size, looks_of
from trainer.runs.resuming import is_changed, is_finished
from trainer.runs.together import check_same, check_shared, together
from trainer.storage.lock import lock
from trainer.training.class_order import in_order
from trainer.training.run import Run
from trainer.training.stopping import Stop
from trainer.training.weights import Made, create, input_shape, recorded, zero_head

WORKING_LAUNCHES = (
    "torchrun --nproc_per_node N -m trainer run RECIPE, or "
    "accelerate launch --multi_gpu --num_processes N -m trainer run RECIPE"
)


@contextlib.contextmanager
def folder_of(
    path: str | Path,
    changes: dict[str, Any] | None,
    folder: str | Path,
    allow_python: bool = False,
    reads_finished: bool = False,
) -> Iterator[tuple[Recipe, dict[str, Any], Path, Accelerator, Stop]]:
    """Yields the recipe, its plain values, the run's folder (locked inside the context), the accelerator and the Stop.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'stages.1.training.epochs': 2, ...}.
        folder: The folder in which the run's own folder NAME is made.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.
        reads_finished: Whether the folder of a finished run of this recipe is only read. It is not locked then, as it may be another
            user's.

    Raises:
        RecipeError: For a faulty recipe, or a launch that got too few processes.
        Mistake: For processes that have not the same recipe, or do not share the folder.
        Everything that `together` raises.
    """
    with together() as stop, contextlib.ExitStack() as at_end:
        at_end.callback(dismiss_all)
        recipe, plain = read(path, changes, allow_python)
        accelerator = make_accelerator(recipe)
        if accelerator.is_main_process and recipe.written.notes:
            print("\n".join(recipe.written.notes), file=sys.stderr, flush=True)
        here = Path(folder) / recipe.name
        check_same(plain, "a recipe")
        finished = is_finished(here) and not is_changed(here, recipe.written.file, plain)
        if reads_finished and told(finished):
            yield recipe, plain, here, accelerator, stop
            return
        # Only the main process holds the lock: the others belong to it.
        with lock(here) if accelerator.is_main_process else contextlib.nullcontext():
            check_shared(here)
            yield recipe, plain, here, accelerator, stop


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Returns the Accelerator of a run. Raises RecipeError when the launch requested more processes than it got."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != recipe.precision:
        AcceleratorState._reset_state()  # Accelerate keeps the state of an earlier run in this process
    accelerator = accelerator_of(
        cpu=on_cpus(),  # else it counts one process for all that were started on CPUs
        mixed_precision=recipe.precision,
        # Else Accelerate takes the number from the launch, and divides every loss by it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.is_main_process:
        for line in _without_effect(recipe):
            print(line, flush=True)
    set_kernels(recipe)
    if _more_requested(accelerator.num_processes):
        raise RecipeError(
            f"the launch requested more processes than the {accelerator.num_processes} it got; these commands work: "
            f"{WORKING_LAUNCHES}. For one process: --num_processes 1 --num_machines 1, and WORLD_SIZE and MASTER_ADDR unset"
        )
    return accelerator


def set_kernels(recipe: Recipe) -> None:
    """Sets which kernels CUDA takes, as the recipe says; without `cudnn_benchmark` those that give the same bits each time."""
    if recipe.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.tf32
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    torch.backends.cudnn.deterministic = not recipe.cudnn_benchmark


def _without_effect(recipe: Recipe) -> Iterator[str]:
    """Yields a line for each option of the launch that has no effect, because the recipe sets it, and for such keys.

    `accelerate launch` passes the precision "no" when none was requested.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", recipe.precision):
        yield (
            f"--mixed_precision {precision} has no effect: the recipe's precision is {recipe.precision!r} "
            f"(precision: {precision} in the recipe)"
        )
    if not torch.cuda.is_available():
        for key in ("tf32", "cudnn_benchmark"):
            if getattr(recipe, key):
                yield f"{key}: true has no effect here: there is no NVIDIA GPU"
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        yield (
            f"--gradient_accumulation_steps {steps} has no effect: accumulate: {steps} in the recipe's training does that"
        )


def accelerator_of(**settings: Any) -> Accelerator:
    """Returns an Accelerator with these settings. Raises Mistake for a precision this machine lacks."""
    try:
        return Accelerator(**settings)
    except ValueError as error:
        raise Mistake(str(error)) from error


def _more_requested(num_processes: int) -> bool:
    """Returns whether the launch requested more processes than were started.

    Accelerate's launcher starts one process without a warning when it cannot start more. It sets MASTER_ADDR when
    several are requested, by flags or by its configuration file, and WORLD_SIZE only when several are started.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) > num_processes
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return by_accelerate and "MASTER_ADDR" in os.environ and num_processes == 1


def make_run(recipe: Recipe, here: Path, accelerator: Accelerator, log: Log) -> Run:
    """Builds the data, the networks and the run, and checks them against the recipe.

    Args:
        recipe: The recipe.
        here: The run's folder.
        accelerator: The run's accelerator.
        log: The run's log.

    Raises:
        RecipeError: For what does not fit these networks or this data.
        Mistake: For data or weights that cannot be loaded.
    """
    with accelerator.local_main_process_first():  # missing files are downloaded once
        data = make_data(recipe.data, accelerator.device)
        trained = largest_batch(recipe.stages)
        if trained is not None:
            data.measure_at_once(trained // accelerator.num_processes or 1)
        # The student first, because its normalisation is the data's.
        made = make_student(recipe, data, here, accelerator.is_main_process)
        teacher, notes = make_teacher(recipe, data, here, accelerator.is_main_process)
    data.notes += [*notes, *made.notes]
    student = made.network
    if recipe.student.from_teacher:
        assert teacher is not None
        if not copy_layers(student, teacher.network):
            message = "has no effect: no layer of the student is of a kind that the teacher has"
            raise RecipeError(recipe.fault(("student", "from_teacher"), message))
    if accelerator.is_main_process:
        for line in (*data.notes, *without_effect(recipe, data, accelerator.num_processes)):
            print(line, flush=True)
    student.to(accelerator.device)
    if teacher is not None:
        teacher.to(accelerator.device)
    for line in check_networks(recipe, made, data, teacher, accelerator.device):
        accelerator.print(line, flush=True)
    networks = [student, *(teacher.networks if teacher is not None else [])]
    _report_float32(networks, recipe.precision, accelerator)
    return Run(
        name=recipe.name,
        folder=here,
        seed=recipe.seed,
        accelerator=accelerator,
        data=data,
        student=student,
        student_spec=made.spec,
        teacher=teacher,
        log=log,
        allow_python=recipe.allows_python,
    )


def _report_float32(networks: list[nn.Module], precision: str, accelerator: Accelerator) -> None:
    """Prints which layers this machine computes in float32 despite the recipe's precision."""
    if precision == "no" or accelerator.device.type != "cpu" or not accelerator.is_main_process:
        return
    if not accelerator.native_amp:
        print(
            f"precision {precision}: Accelerate has it on GPUs only: all is computed in float32 here",
            flush=True,
        )
        return
    kinds = kinds_in_float32(networks, HALVES[precision])
    if kinds:
        print(
            f"precision {precision}: this processor does not have {', '.join(kinds)} in it: "
            "these layers compute in float32",
            flush=True,
        )


def make_student(recipe: Recipe, data: Data, folder: Path | None = None, writes: bool = True) -> Made:
    """Returns the recipe's student, initialised from its seed or loaded. Raises Mistake when that fails.

    The normalisation that a loaded student is known to have becomes the data's, unless the recipe gives the data one.
    folder: of the run, None for no measurement. writes: whether this process writes what it measures.
    """
    torch.manual_seed(recipe.seed * 2 + 1)
    is_taught = any(training_of(stage) is not None and not teaches(stage) for stage in recipe.stages)
    made = create(recipe.student, data.shape, len(data.classes), is_taught, "student")
    _expect_logits(recipe, ("student",), made, data.shape, len(data.classes))
    made = in_order(made, None, data.classes, data.shape, "student")
    size = tuple(made.facts.get("shape") or data.shape)
    if size != tuple(data.shape):
        shapes = ["x".join(map(str, shape)) for shape in (size, data.shape)]
        note = f"student: its checkpoint was trained on images of {shapes[0]}, and the data's are {shapes[1]}"
        made = made._replace(notes=[*made.notes, note])
    if recipe.data.mean is None and recipe.data.std is None:
        looks, notes = looks_of(recipe.student, made, data, "student", folder, writes)
        if looks is not None:
            data.mean, data.std = looks.mean, looks.std
        made = made._replace(notes=[*made.notes, *notes])
    return made


def _expect_logits(
    recipe: Recipe, path: tuple, made: Made, shape: tuple[int, int, int], num_classes: int | None
) -> None:
    """Raises RecipeError unless a network returns logits for images of `shape`, before what it knows is measured.

    path: of its entry in the recipe. num_classes: None for a teacher whose answers are not looked at.
    """
    who = "the " + path[0] if len(path) == 1 else f"{path[0]}[{path[1]}]"
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng(devices=[]):
            look(made.network, images, False, num_classes, who)
    except Mistake as error:
        raise RecipeError(recipe.fault(path, str(error))) from error


def make_teacher(
    recipe: Recipe, data: Data, folder: Path | None = None, writes: bool = True
) -> tuple[Teacher | None, list[str]]:
    """Returns the recipe's teacher, None when it has none, and notes for the user on how it was loaded.

    Raises Mistake for an untrained head that no stage trains. folder, writes: as in `make_student`.
    """
    if not recipe.teacher_entries:
        return None, []
    networks, entries, specs, notes, filters = [], [], [], [], []
    for number, keys in enumerate(recipe.teacher_entries):
        torch.manual_seed(recipe.seed * 2 + 1000 * number)
        is_taught = any_teaches(recipe.stages)
        where = f"teacher {keys.model}"
        if keys.resize is None and keys.checkpoint is not None:
            keys, found = _resized(keys, known_size(recorded(keys.checkpoint), "shape", data.shape), where)
            notes += found
        made = create(keys, data.shape, len(data.classes), is_taught or not keys.head, where)
        path = ("teachers", number) if recipe.teachers else ("teacher",)
        num_classes = len(data.classes) if keys.head else None
        _expect_logits(recipe, path, made, input_shape(keys, data.shape), num_classes)
        if keys.head:
            made = in_order(made, keys.classes, data.classes, input_shape(keys, data.shape), where)
        network = made.network
        if getattr(keys, "pretrained", False):
            if keys.head:
                _expect_taught(keys, network, data, is_taught)
            if keys.resize is None and not is_taught:
                config = getattr(network, "pretrained_cfg", None) or {}
                keys, found = _resized(keys, known_size(config, "input_size", data.shape), where)
                notes += found
        notes += made.notes
        if keys.mean is None:
            looks, found = looks_of(keys, made, data, where, folder, writes)
            if looks is not None:
                keys = keys.model_copy(update={"mean": looks.mean, "std": looks.std})
            notes += found
        networks.append(network)
        entries.append(keys)
        specs.append(made.spec)
        if keys.resize:
            filters.append(known_filter(keys, made))
            _, height, width = data.shape
            if height != width:
                notes.append(
                    f"{where}: sees the pictures stretched to {keys.resize} x {keys.resize}, because the student's are {height} "
                    f"high and {width} wide"
                )
    teacher = Teacher(
        networks, entries, data.mean, data.std, recipe.combine or "logits", specs, data.shape, *filters[:1]
    )
    return teacher, notes


def _resized(keys: TeacherKeys, size: int | None, where: str) -> tuple[TeacherKeys, list[str]]:
    """Returns a teacher's entry with the size that its images are known to have, and a note."""
    if size is None:
        return keys, []
    note = (
        f"{where}: sees images of {size} x {size} pixels, as it was trained on (resize in the recipe decides)"
    )
    return keys.model_copy(update={"resize": size}), [note]  # a copy: the recipe itself is not changed


def _expect_taught(keys: TeacherKeys, network: nn.Module, data: Data, is_taught: bool) -> None:
    """Sets a classifier to zero when the data's classes are not those of the pretrained weights.

    Raises Mistake when no stage trains it.
    """
    known = (getattr(network, "pretrained_cfg", None) or {}).get("num_classes")
    if known == len(data.classes):
        return
    if not is_taught:
        raise Mistake(
            f"teacher {keys.model!r} was trained on {known} classes and the data has {len(data.classes)}: its new "
            "head is freshly initialised. Teach it with a stage train (who: teacher), or load a checkpoint"
        )
    zero_head(network)
