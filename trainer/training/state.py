"""Opens a training before its first step, holds its state, and closes it after its last step."""

import ctypes
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.balance import balanced_weights
from trainer.data.batches import batches, seed_of
from trainer.data.batches import num_batches as batches_of_an_epoch
from trainer.data.views import Views
from trainer.distillation.objective import Objective
from trainer.distillation.onednn import attach, detach
from trainer.distributed import broadcast
from trainer.mistakes import Mistake
from trainer.recipe.training import Training
from trainer.training.freezing import Frozen
from trainer.training.optimizer import Averaged, c_compiler, cpp_compiler, freeze_unused, make_optimizer
from trainer.training.progress import Progress, Window
from trainer.training.run import Run

FIRST_SCALE = 2.0**16  # of a loss in float16, before a training has found one that its gradients bear


@dataclass
class State:
    """The state of a training.

    Attributes:
        run, objective, training: As given to `fit`.
        number: Number of the training within its stage, from 0.
        num_batches: Batches of an epoch.
        steps_per_epoch: Optimizer steps of an epoch.
        views: Makes the augmented images.
        wrapped: The objective, wrapped by Accelerate and torch.compile.
        optimizer: The plain optimizer.
        backward: Computes the gradients of a loss, through the gradient scaler if there is one.
        take_step: The optimizer's step, likewise.
        averaged: The moving average of the weights, None without `ema`.
        unused: Parameters that no loss reaches, frozen during the training.
        frozen: All but the head of the network, None if all of it is trained from the first step.
        progress: Its checkpoints.
        window: The losses since the last log.
        step: Steps done.
        tally: Images and seconds so far, the best validation and its epoch, whether it is finished, and what each term
            weighs: {"weight", "first", "last"}, the last two its ratios (`distillation.ratios`).
        clock: The time up to which seconds are counted.
        last_saved: The time of its last checkpoint.
        save_seconds: How long that took.
        named: The terms that this process has named for what they weigh.
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
    backward: Callable[[Tensor], Any]
    take_step: Callable[[], Any]
    averaged: Averaged | None
    unused: list[nn.Parameter]
    frozen: Frozen | None
    progress: Progress
    window: Window
    step: int
    tally: dict[str, Any]
    clock: float
    last_saved: float
    save_seconds: float = 0.0
    named: set[str] = field(default_factory=set)

    @property
    def num_steps(self) -> int:
        return self.training.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def syncs_by_hand(self) -> bool:
        """Whether the processes' gradients are averaged here, not by DDP.

        DDP waits for a gradient of each parameter that was trainable when it was wrapped, and would never learn of
        parameters that are unfrozen later.
        """
        return self.frozen is not None and self.frozen.is_on and self.training.train_only is None

    def freeze(self) -> None:
        """Freezes all but the head in the epochs that say so, and ends that after them."""
        if self.frozen is not None:
            self.frozen.set(self.training.train_only is not None or self.epoch < self.training.freeze_epochs)

    @property
    def seed(self) -> int:
        """The training's seed, which differs between stages and between a stage's trainings."""
        return seed_of(self.run.seed, self.run.stage, self.number)

    def seed_generators(self, *numbers: int) -> None:
        """Seeds the random generators from the training's seed and the numbers (step, rank).

        torch.manual_seed would keep a list of its calls, with stack traces, for each kind of device not in use.
        """
        device = self.run.accelerator.device
        seed = seed_of(self.run.seed, self.run.stage, self.number, *numbers)
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)

    def count_seconds(self) -> None:
        """Adds the time since `clock` to the training's seconds, and sets `clock` to now."""
        now = time.monotonic()
        self.tally["seconds"] += now - self.clock
        self.clock = now

    @property
    def images(self) -> int:
        """How many images it has learnt, each epoch's counted again."""
        return self.step * len(self.run.data.train) // self.steps_per_epoch

    def show(self, ends_epoch: bool = False) -> None:
        """Shows the last loss, and how far it is."""
        self.run.bar.learnt(self.images, self.window.loss, ends_epoch)

    def save(self) -> None:
        self.last_saved = time.monotonic()
        self.progress.save(self.step, self.tally)
        self.save_seconds = time.monotonic() - self.last_saved


def open_training(run: Run, objective: Objective, training: Training) -> State:
    """Prepares a training, and loads its newest checkpoint if there is one.

    Raises Mistake for a batch size that does not split over the processes, and for `compile` without a compiler.
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
    if training.compile:
        _expect_compiler(accelerator.device)
    if training.class_weights:
        objective.weigh_classes(balanced_weights(run.data.train.labels, len(run.data.classes)))
    objective.recall(run.learned)
    objective.train()
    if training.channels_last:
        objective.to(memory_format=torch.channels_last)
    frozen = Frozen(objective.student) if training.train_only or training.freeze_epochs else None
    if frozen is not None and training.train_only:
        frozen.set(True)
    views = Views(run.data)
    unused = _freeze_unused(run, objective, views) if accelerator.num_processes > 1 else []
    later = frozen.parameters if frozen is not None else []
    optimizer = make_optimizer(objective, training, later)
    averaged = Averaged(objective, training.ema) if training.ema else None
    wrapped, scaled = accelerator.prepare(objective, optimizer)
    if accelerator.scaler is not None:
        # It is the run's: what it has learnt in earlier trainings is not known to one that goes on after them.
        own = accelerator.scaler.state_dict()
        accelerator.scaler.load_state_dict({**own, "scale": FIRST_SCALE, "_growth_tracker": 0})
    if accelerator.num_processes > 1:
        # DDP would send masks, codes and memory banks at each forward pass. It has sent them once now. (The attribute has
        # this name in every version of torch, unlike the argument.)
        wrapped.broadcast_buffers = False
    if training.compile:
        objective.leave_out_of_compile()
        wrapped = torch.compile(wrapped)
    attach(objective, learning=True)
    processes = run.accelerator.num_processes
    num_batches = batches_of_an_epoch(len(run.data.train), training.batch_size, processes)
    steps_per_epoch = math.ceil(num_batches / training.accumulate)
    progress = Progress(run, folder, objective, optimizer, averaged, steps_per_epoch)
    step, tally = progress.load()
    now = time.monotonic()
    state = State(
        run=run,
        objective=objective,
        training=training,
        number=number,
        num_batches=num_batches,
        steps_per_epoch=steps_per_epoch,
        views=views,
        wrapped=wrapped,
        optimizer=optimizer,
        # Accelerate's wrappers look for optional packages on disk at each step, and are needed with a scaler only.
        backward=Tensor.backward if accelerator.scaler is None else accelerator.backward,
        take_step=optimizer.step if accelerator.scaler is None else scaled.step,
        averaged=averaged,
        unused=unused,
        frozen=frozen,
        progress=progress,
        window=Window(run),
        step=step,
        tally=tally,
        clock=now,
        last_saved=now,
    )
    run.bar.learns(training.epochs * len(run.data.train), state.images)
    return state


def _expect_compiler(device: torch.device) -> None:
    """Raises Mistake if there is no compiler that torch.compile calls for a device."""
    if device.type == "cpu" and shutil.which(cpp_compiler()) is None:
        raise Mistake(
            f"training.compile needs a C++ compiler on a CPU: there is no {cpp_compiler()!r}; CXX can name another"
        )
    if device.type == "cuda" and sys.platform == "linux" and c_compiler() is None:
        raise Mistake(
            "training.compile needs a C compiler, for what starts a GPU's kernels: there is no gcc and no clang; CC can name another"
        )


def close_training(state: State) -> None:
    """Leaves the final weights (averaged or best, as set) in the objective, and undoes everything else of `open_training`."""
    run, objective = state.run, state.objective
    if not state.tally["finished"]:
        if state.averaged is not None:
            state.averaged.swap()
        state.progress.recall_best()
        sync_buffers(objective)
        # The finished state is kept until the whole stage is over: a stage may train several times.
        state.progress.save(state.step, state.tally | {"finished": True})
    for parameter in (*state.unused, *(state.frozen.parameters if state.frozen is not None else ())):
        parameter.requires_grad_(True)
    detach(objective)
    if state.training.channels_last:
        objective.to(memory_format=torch.contiguous_format)
    run.learned.update(objective.learned())
    run.accelerator.free_memory()
    objective.zero_grad(set_to_none=True)
    objective.eval()
    # The stage's next random numbers must not depend on whether this training ran or was found finished.
    state.seed_generators(state.num_steps)


def _keep_freed_memory() -> None:
    """Makes glibc keep up to a GiB of freed memory, instead of returning it to the system.

    The maps of a small network's batch are above glibc's thresholds; the page faults of memory that returns take up to a
    quarter of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its maximum


def _freeze_unused(run: Run, objective: Objective, views: Views) -> list[nn.Parameter]:
    """Freezes the parameters that the losses do not reach, found with two images that have labels, if any have."""
    train, device, rank = run.data.train, run.accelerator.device, run.accelerator.process_index
    labels = train.labels.cpu()
    chosen = (labels >= 0).nonzero()[:, 0] if (labels >= 0).any() else torch.arange(len(train))
    # Each process uses its own images, so that the teacher answers each once.
    own = chosen[torch.arange(2 * rank, 2 * rank + 2) % len(chosen)]
    images, labels, index = next(batches(train, [own], 0, device, views.cuts(0)))
    view = None if run.data.mixed else 0
    return freeze_unused(objective, (views.augmented(images, index, 0), labels, index, view))


def sync_buffers(module: nn.Module) -> None:
    """Copies the main process's buffers to all processes.

    A training keeps no others equal by that: masks and codes do not change, and memory banks take the batches of all
    processes. BatchNorm's running statistics are the main process's, and only an evaluation uses them.
    """
    for buffer in module.buffers():
        broadcast(buffer)
