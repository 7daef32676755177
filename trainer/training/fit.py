"""The one loop: everything that learns goes through `fit`. It knows nothing of teachers, masks or codebooks."""

import contextlib
import ctypes
import math
import shutil
import sys
import time
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from trainer.data.batches import batches, epoch_order, mix, seed_of
from trainer.data.views import Views
from trainer.distillation.objective import Objective
from trainer.distillation.onednn import attach, detach
from trainer.distributed import agreed, broadcast
from trainer.mistakes import Mistake
from trainer.networks.features import evaluating
from trainer.recipe.keys import Training
from trainer.training.evaluate import percent_right, predict, truth
from trainer.training.optimizer import Averaged, cpp_compiler, freeze_unused, make_optimizer
from trainer.training.progress import Progress, Window
from trainer.training.run import Run
from trainer.training.schedule import learning_rate

LOG_STEPS = 50  # steps between two looks at the losses: each look waits for the device
CHECKPOINT_SECONDS = 60.0  # least time between two checkpoints in the middle of a training


def fit(
    run: Run, objective: Objective, training: Training, before_step: Callable[[int, int], bool] | None = None
) -> dict[str, float]:
    """Trains the objective in place; returns epochs, steps, train_seconds, images_per_second and the best validation.

    before_step(step, num_steps) is called before every optimizer step: gradual pruning tightens its masks there. What
    it changes must be in the objective's parameters and buffers or in run.layers, so that a resumed training finds it. It
    returns whether it will change the network again: a validation before its last change is not up for `keep: best`
    or `patience`, since what was validated is not what was asked for.
    Interrupted at any moment, the same call continues from the newest checkpoint, to the same weights bit for bit on the
    same machine. Raises FloatingPointError at the first loss that is not finite, naming stage, epoch, step and term.
    """
    _keep_freed_memory()
    accelerator, data = run.accelerator, run.data
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    if training.batch_size % num_processes:
        raise Mistake(f"batch_size {training.batch_size} does not split over {num_processes} processes")
    number = run.num_fits  # a stage may train several times
    run.num_fits += 1
    folder = run.folder / "checkpoints" / f"{run.stage:02d}-{run.stage_name}" / f"fit-{number}"
    if training.compile and device.type == "cpu" and shutil.which(cpp_compiler()) is None:
        raise Mistake(
            f"training.compile needs a C++ compiler on a CPU: there is no {cpp_compiler()!r}; CXX can name another"
        )
    objective.recall(run.learned)
    objective.train()
    if training.channels_last:
        objective.to(memory_format=torch.channels_last)
    views = Views(data)
    mixed = data.mixup > 0 or data.cutmix > 0
    unused: list[nn.Parameter] = []
    if num_processes > 1:
        mine = torch.arange(2 * rank, 2 * rank + 2) % len(
            data.train
        )  # own ones: the teacher is asked once for each
        images, labels, index = next(batches(data.train, [mine], 0, device))
        unused = freeze_unused(
            objective, (views.augmented(images, index, 0), labels, index, None if mixed else 0)
        )
    optimizer = make_optimizer(objective, training)
    averaged = Averaged(objective, training.ema) if training.ema else None
    wrapped, scaled = accelerator.prepare(objective, optimizer)
    # Accelerate's wrapper asks the file system about optional packages at each step; it is of use with a scaler only.
    take_step = optimizer.step if accelerator.scaler is None else scaled.step
    if training.compile:
        objective.leave_out_of_compile()
        wrapped = torch.compile(wrapped)
    attach(objective, learning=True)

    accumulate = training.accumulate
    num_batches = math.ceil(len(data.train) / training.batch_size)
    steps_per_epoch = math.ceil(num_batches / accumulate)
    num_steps = training.epochs * steps_per_epoch
    progress = Progress(run, folder, objective, optimizer, averaged)
    step, tally = progress.load()
    done = tally["finished"]
    window = Window(run)
    bar = tqdm(
        total=num_steps,
        initial=step,
        desc=run.stage_name,
        unit="step",
        leave=False,
        dynamic_ncols=True,
        disable=None if accelerator.is_main_process else True,
    )
    clock = last_saved = time.monotonic()

    epoch = step // steps_per_epoch
    while epoch < training.epochs and not done:
        view = views.number(epoch, run.stage)
        order = epoch_order(
            len(data.train),
            training.batch_size,
            seed_of(run.seed, run.stage, number),
            epoch,
            rank,
            num_processes,
        )
        sizes = [len(positions) for positions in order]
        skipped = step % steps_per_epoch * accumulate
        images_before, seconds_before = tally["images"], tally["seconds"]
        changing = False
        for place, (images, labels, index) in enumerate(
            batches(data.train, order[skipped:], data.train.workers, device), skipped
        ):
            first = place - place % accumulate
            last = min(first + accumulate, num_batches) - 1
            if place == first:
                _seed(device, run.seed, run.stage, number, step, rank)
                if before_step is not None:
                    changing = before_step(step, num_steps)
            images = views.augmented(images, index, view)
            if mixed:
                images, labels = mix(images, labels, len(data.classes), data.mixup, data.cutmix)
            if training.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            # Processes exchange gradients at the last batch of a step only.
            with contextlib.nullcontext() if place == last else accelerator.no_sync(wrapped):
                try:
                    terms = wrapped(images, labels, index, None if mixed else view, step / steps_per_epoch)
                except ValueError as error:
                    raise _of_a_batch(error, len(images)) from error
                loss = terms["loss"]
                if last > first:
                    loss = loss * (len(images) / sum(sizes[first : last + 1]))
                accelerator.backward(loss)
            window.add(terms, epoch, step)
            tally["images"] += len(images) * num_processes
            if place < last:
                continue
            rate = learning_rate(training, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if training.clip:
                accelerator.clip_grad_norm_(wrapped.parameters(), training.clip)
            take_step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if averaged is not None:
                averaged.update()
            # The end of an epoch looks and saves by itself, after its validation.
            if step % LOG_STEPS == 0 and last + 1 < num_batches:
                window.flush(step, rate)
                bar.update(step - bar.n)
                bar.set_postfix(loss=f"{window.loss:.4f}", refresh=False)
                if agreed(time.monotonic() - last_saved > CHECKPOINT_SECONDS, device):
                    clock, last_saved = _count_seconds(tally, clock), time.monotonic()
                    progress.save(step, tally)
        epoch += 1
        window.flush(step, learning_rate(training, step - 1, steps_per_epoch))
        bar.update(step - bar.n)
        clock = _count_seconds(tally, clock)
        speed = (tally["images"] - images_before) / (tally["seconds"] - seconds_before)
        found = {}
        if epoch % training.validate_every == 0 or epoch == training.epochs:
            found["validation"] = _validate(run, objective, averaged)
            if not changing and (tally["best"] is None or found["validation"] > tally["best"]):
                tally["best"], tally["best_epoch"] = found["validation"], epoch
                if training.keep == "best":
                    progress.remember_best()
            if training.patience and tally["best_epoch"] is not None:
                done = epoch - tally["best_epoch"] >= training.patience
        run.log.numbers(
            run.stage_name, step, epoch=epoch, images_per_second=speed, **found, **objective.counted()
        )
        if accelerator.is_main_process and bar.disable:
            told = f"  validation {found['validation']:.2f} %" if found else ""
            print(
                f"{run.stage_name}: epoch {epoch}/{training.epochs}  loss {window.loss:.4f}{told}  {speed:,.0f} images/s",
                flush=True,
            )
        if (
            not done
            and epoch < training.epochs
            and agreed(time.monotonic() - last_saved > CHECKPOINT_SECONDS, device)
        ):
            last_saved = time.monotonic()
            progress.save(step, tally)
        clock = time.monotonic()  # validation and checkpoint are not training
    bar.close()
    if not tally["finished"]:
        if averaged is not None:
            averaged.swap()
        progress.recall_best()
        _sync_buffers(objective)
        # The finished state is kept until the whole stage is over: a stage may train several times.
        progress.save(step, tally | {"finished": True})
    for parameter in unused:
        parameter.requires_grad_(True)
    detach(objective)
    if training.channels_last:
        objective.to(memory_format=torch.contiguous_format)
    run.learned.update(objective.learned())
    accelerator.free_memory()
    objective.zero_grad(set_to_none=True)
    objective.eval()
    # Whatever the stage draws next is the same whether this training was run or found finished.
    _seed(device, run.seed, run.stage, number, num_steps)
    return {
        "epochs": epoch,
        "steps": step,
        "train_seconds": tally["seconds"],
        "images_per_second": tally["images"] / tally["seconds"],
        **(
            {"best_validation": tally["best"], "best_epoch": tally["best_epoch"]}
            if training.keep == "best"
            else {}
        ),
    }


def _of_a_batch(error: ValueError, num_images: int) -> ValueError:
    """The error of a forward pass; a mistake where a batch of one image is normalised over nothing."""
    if num_images == 1 and "more than 1 value per channel" in str(error):
        return Mistake(
            f"batch_size leaves a batch of one image, which the network cannot learn from: {error}"
        )
    return error


def _keep_freed_memory() -> None:
    """Has glibc keep up to a GiB of memory that is freed, which it else gives back to be faulted in anew at each step.

    The maps of a small network's batch lie above its thresholds: up to a quarter of a step goes into such faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its maximum


def _seed(device: torch.device, *numbers: int) -> None:
    """Seeds the generators that a step draws from.

    Not torch.manual_seed: for each kind of device that is not in use it keeps a list of such calls, with stack traces.
    """
    torch.default_generator.manual_seed(seed_of(*numbers))
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed_of(*numbers))


def _count_seconds(tally: dict, since: float) -> float:
    """Adds the time since then to the training's seconds; returns the time now."""
    now = time.monotonic()
    tally["seconds"] += now - since
    return now


def _validate(run: Run, objective: Objective, averaged: Averaged | None) -> float:
    """Percent of the validation part that is right, by the averaged weights where there are such.

    Right is what the label says, and where there are no labels what the teacher says.
    """
    if averaged is not None:
        averaged.swap()
    _sync_buffers(objective)
    with evaluating(objective):
        student = objective.finished()
        network = lambda images: student(objective.prepare(images))
        predictions = predict(network, run.data.validation, run.accelerator)
    if averaged is not None:
        averaged.swap()
    return percent_right(predictions, truth(run, run.data.validation))


def _sync_buffers(module: nn.Module) -> None:
    """Statistics that each process gathered by itself (BatchNorm's) become the main process's on all."""
    for buffer in module.buffers():
        broadcast(buffer)
