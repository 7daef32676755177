"""A training while it lasts: opened before its first step, closed after its last."""

import ctypes
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from trainer.data.batches import batches, seed_of
from trainer.data.views import Views
from trainer.distillation.objective import Objective
from trainer.distillation.onednn import attach, detach
from trainer.distributed import broadcast
from trainer.mistakes import Mistake
from trainer.recipe.keys import Training
from trainer.training.optimizer import Averaged, cpp_compiler, freeze_unused, make_optimizer
from trainer.training.progress import Progress, Window
from trainer.training.run import Run


@dataclass
class State:
    """What a training works with, and where it stands.

    number: which of its stage's trainings it is. num_batches: of an epoch. wrapped: the objective as Accelerate and
    torch.compile call it. take_step: the optimizer's step. unused: parameters that no loss reaches, frozen meanwhile.
    step: steps done. tally: images and seconds so far, the best validation and its epoch, whether it is finished.
    clock: since when seconds are not counted yet. last_saved: when its last checkpoint was begun.
    """

    run: Run
    objective: Objective
    training: Training
    number: int
    num_batches: int
    steps_per_epoch: int
    views: Views
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    take_step: Callable[[], Any]
    averaged: Averaged | None
    unused: list[nn.Parameter]
    progress: Progress
    window: Window
    bar: tqdm
    step: int
    tally: dict[str, Any]
    clock: float
    last_saved: float

    @property
    def num_steps(self) -> int:
        return self.training.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def seed(self) -> int:
        """The training's own: another one in each stage, and in each training of a stage."""
        return seed_of(self.run.seed, self.run.stage, self.number)

    def seed_generators(self, *numbers: int) -> None:
        """Seeds the generators that a step draws from, by the training and the numbers.

        Not torch.manual_seed: for each kind of device that is not in use it keeps a list of such calls, with stack
        traces.
        """
        device = self.run.accelerator.device
        seed = seed_of(self.run.seed, self.run.stage, self.number, *numbers)
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)

    def count_seconds(self) -> None:
        """Adds the time since the clock was set to the training's seconds, and sets it anew."""
        now = time.monotonic()
        self.tally["seconds"] += now - self.clock
        self.clock = now

    def save(self) -> None:
        self.last_saved = time.monotonic()
        self.progress.save(self.step, self.tally)


def open_training(run: Run, objective: Objective, training: Training) -> State:
    """Makes ready what a training works with, at its newest checkpoint where there is one.

    Raises Mistake for a batch size that does not split over the processes, and where a compiler is missing.
    """
    _keep_freed_memory()
    accelerator = run.accelerator
    if training.batch_size % accelerator.num_processes:
        raise Mistake(
            f"batch_size {training.batch_size} does not split over {accelerator.num_processes} processes"
        )
    number = run.num_fits  # a stage may train several times
    run.num_fits += 1
    folder = run.folder / "checkpoints" / f"{run.stage:02d}-{run.stage_name}" / f"fit-{number}"
    if training.compile and accelerator.device.type == "cpu" and shutil.which(cpp_compiler()) is None:
        raise Mistake(
            f"training.compile needs a C++ compiler on a CPU: there is no {cpp_compiler()!r}; CXX can name another"
        )
    objective.recall(run.learned)
    objective.train()
    if training.channels_last:
        objective.to(memory_format=torch.channels_last)
    views = Views(run.data)
    unused = _freeze_unused(run, objective, views) if accelerator.num_processes > 1 else []
    optimizer = make_optimizer(objective, training)
    averaged = Averaged(objective, training.ema) if training.ema else None
    wrapped, scaled = accelerator.prepare(objective, optimizer)
    if training.compile:
        objective.leave_out_of_compile()
        wrapped = torch.compile(wrapped)
    attach(objective, learning=True)
    progress = Progress(run, folder, objective, optimizer, averaged)
    step, tally = progress.load()
    num_batches = math.ceil(len(run.data.train) / training.batch_size)
    steps_per_epoch = math.ceil(num_batches / training.accumulate)
    now = time.monotonic()
    return State(
        run=run,
        objective=objective,
        training=training,
        number=number,
        num_batches=num_batches,
        steps_per_epoch=steps_per_epoch,
        views=views,
        wrapped=wrapped,
        optimizer=optimizer,
        # Accelerate's wrapper asks the file system about optional packages at each step; it is of use with a scaler only.
        take_step=optimizer.step if accelerator.scaler is None else scaled.step,
        averaged=averaged,
        unused=unused,
        progress=progress,
        window=Window(run),
        bar=_bar(run, step, training.epochs * steps_per_epoch),
        step=step,
        tally=tally,
        clock=now,
        last_saved=now,
    )


def close_training(state: State) -> None:
    """Leaves in the objective what the training is to keep, and takes back all else that opening it did."""
    run, objective = state.run, state.objective
    state.bar.close()
    if not state.tally["finished"]:
        if state.averaged is not None:
            state.averaged.swap()
        state.progress.recall_best()
        sync_buffers(objective)
        # The finished state is kept until the whole stage is over: a stage may train several times.
        state.progress.save(state.step, state.tally | {"finished": True})
    for parameter in state.unused:
        parameter.requires_grad_(True)
    detach(objective)
    if state.training.channels_last:
        objective.to(memory_format=torch.contiguous_format)
    run.learned.update(objective.learned())
    run.accelerator.free_memory()
    objective.zero_grad(set_to_none=True)
    objective.eval()
    # Whatever the stage draws next is the same whether this training was run or found finished.
    state.seed_generators(state.num_steps)


def _keep_freed_memory() -> None:
    """Has glibc keep up to a GiB of memory that is freed, which it else gives back to be faulted in anew at each step.

    The maps of a small network's batch lie above its thresholds: up to a quarter of a step goes into such faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its maximum


def _freeze_unused(run: Run, objective: Objective, views: Views) -> list[nn.Parameter]:
    """Freezes what the losses do not reach, as two images of this process show."""
    train, device, rank = run.data.train, run.accelerator.device, run.accelerator.process_index
    # Own images: the teacher is asked once for each.
    own = torch.arange(2 * rank, 2 * rank + 2) % len(train)
    images, labels, index = next(batches(train, [own], 0, device))
    view = None if run.data.mixed else 0
    return freeze_unused(objective, (views.augmented(images, index, 0), labels, index, view))


def _bar(run: Run, step: int, num_steps: int) -> tqdm:
    return tqdm(
        total=num_steps,
        initial=step,
        desc=run.stage_name,
        unit="step",
        leave=False,
        dynamic_ncols=True,
        disable=None if run.accelerator.is_main_process else True,
    )


def sync_buffers(module: nn.Module) -> None:
    """Statistics that each process gathered by itself (BatchNorm's) become the main process's on all."""
    for buffer in module.buffers():
        broadcast(buffer)
