"""The one loop: everything that learns goes through `fit`. It knows nothing of teachers, masks or codebooks."""

import contextlib
import ctypes
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from trainer import onednn
from trainer.compression.codebooks import centroid_parameters
from trainer.data.batches import batches, epoch_order, mix, seed_of
from trainer.data.views import Views
from trainer.distributed import agreed, broadcast
from trainer.evaluate import percent_right, predict, truth
from trainer.mistakes import Mistake
from trainer.networks.features import evaluating
from trainer.objective import Objective
from trainer.recipe.keys import Training
from trainer.storage import checkpoint
from trainer.training.run import Run

LOG_STEPS = 50  # steps between two looks at the losses: each look waits for the device
CHECKPOINT_SECONDS = 60.0  # least time between two checkpoints in the middle of a training


def learning_rate(training: Training, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0: a pure function, so that resuming needs no scheduler's state."""
    total = training.epochs * steps_per_epoch
    rise = training.warmup * steps_per_epoch
    if step < rise:
        return training.lr * (step + 1) / (rise + 1)
    if training.schedule == "constant":
        return training.lr
    if training.schedule == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in training.milestones)
        return training.lr * (0.1 if training.gamma is None else training.gamma) ** passed
    if training.schedule == "cosine":
        return training.lr * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2
    top = 0.3 * total
    if step < top:
        low, high, fraction = training.lr / 25, training.lr, step / top
    else:
        low, high, fraction = training.lr, training.lr / 1e4, (step - top) / max(1.0, total - 1 - top)
    return low + (high - low) * (1 - math.cos(math.pi * fraction)) / 2


def make_optimizer(module: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; centroids are in a group of their own without weight decay."""
    free = {id(parameter) for parameter in centroid_parameters(module)}
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trainable if id(p) not in free], "weight_decay": training.weight_decay}]
    if free:
        groups.append({"params": [p for p in trainable if id(p) in free], "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise Mistake("there is nothing to train: all parameters are frozen")
    if training.optimizer == "sgd":
        momentum = 0.0 if training.momentum is None else training.momentum
        return torch.optim.SGD(
            groups, lr=training.lr, momentum=momentum, nesterov=training.nesterov, fused=True
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=training.lr, fused=True)


def cpp_compiler() -> str:
    """The compiler that torch.compile calls for a CPU."""
    return os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))


class Averaged:
    """The exponential moving average of a module's trainable parameters and floating buffers."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.live = [p for p in module.parameters() if p.requires_grad]
        self.live += [b for b in module.buffers() if b.is_floating_point()]
        self.average = [t.detach().clone() for t in self.live]
        self._mix = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        self._mix(self.average, [t.detach() for t in self.live], None)

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the average into the module and keeps what was there; a second call undoes the first."""
        for live, average in zip(self.live, self.average, strict=True):
            kept = live.detach().clone()
            live.copy_(average)
            average.copy_(kept)


def freeze_unused(objective: Objective, batch: Sequence[Tensor]) -> list[nn.Parameter]:
    """Freezes the parameters that the losses do not reach (a head, under losses on maps alone), and returns them.

    DDP waits for a gradient of every trainable parameter, so these must be told beforehand.
    """
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    with evaluating(objective):
        objective(*batch)["loss"].backward()
    unused = [p for p in objective.parameters() if p.requires_grad and p.grad is None]
    objective.zero_grad(set_to_none=True)
    for name, buffer in objective.named_buffers():
        buffer.copy_(buffers[name])
    for parameter in unused:
        parameter.requires_grad_(False)
    return unused


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
    onednn.attach(objective, learning=True)

    accumulate = training.accumulate
    num_batches = math.ceil(len(data.train) / training.batch_size)
    steps_per_epoch = math.ceil(num_batches / accumulate)
    num_steps = training.epochs * steps_per_epoch
    progress = _Progress(run, folder, objective, optimizer, averaged)
    step, tally = progress.load()
    done = tally["finished"]
    window = _Window(run)
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
            batches(data.train, order[skipped:], data.workers, device), skipped
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
    onednn.detach(objective)
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


class _Window:
    """Losses since the last look at them, kept on the device."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.loss = math.nan
        self._kept: list[Tensor] = []
        self._where: list[tuple[int, int]] = []
        self._names: list[str] = []

    def add(self, terms: dict[str, Tensor], epoch: int, step: int) -> None:
        self._names = list(terms)
        self._kept.append(torch.stack([value.detach().float() for value in terms.values()]))
        self._where.append((epoch, step))

    def flush(self, step: int, rate: float) -> None:
        """Logs the means. Raises FloatingPointError, on all processes, at the first loss that is not finite on any."""
        values = self.run.accelerator.reduce(torch.stack(self._kept), "mean").cpu()
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            row = bad[0, 0].item()
            broken = [
                n
                for n, v in zip(self._names, values[row], strict=True)
                if n != "loss" and not math.isfinite(v)
            ]
            epoch, at = self._where[row]
            raise FloatingPointError(
                f"stage {self.run.stage_name!r}, epoch {epoch + 1}, step {at + 1}: "
                f"{', '.join(broken) or 'the weighted sum'} is not finite (the run stops; its last checkpoint stands)"
            )
        means = dict(zip(self._names, values.mean(0).tolist(), strict=True))
        self.loss = means["loss"]
        self.run.log.numbers(self.run.stage_name, step, lr=rate, **means)
        self._kept, self._where = [], []


class _Progress:
    """What a training needs to go on after a kill: parameters, buffers, optimizer, average, best weights, position."""

    def __init__(
        self,
        run: Run,
        folder: Path,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        averaged: Averaged | None,
    ) -> None:
        self.run, self.folder, self.objective = run, folder, objective
        self.optimizer, self.averaged = optimizer, averaged
        self.best: dict[str, Tensor] | None = None

    def remember_best(self) -> None:
        if self.averaged is not None:
            self.averaged.swap()
        self.best = {name: tensor.detach().clone() for name, tensor in self.objective.state_dict().items()}
        if self.averaged is not None:
            self.averaged.swap()

    def recall_best(self) -> None:
        if self.best is not None:
            self.objective.load_state_dict(self.best)

    def save(self, step: int, tally: dict) -> None:
        accelerator = self.run.accelerator
        if accelerator.is_main_process:
            facts = {"step": step, "tally": tally, "layers": self.run.layers}
            groups, states = {"objective": self.objective.state_dict()}, {}
            if not tally["finished"]:
                states["optimizer"] = self.optimizer.state_dict()
                facts["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
                if self.averaged is not None:
                    groups["average"] = {str(i): t for i, t in enumerate(self.averaged.average)}
                if self.best is not None:
                    groups["best"] = self.best
            checkpoint.save(self.folder, groups, facts, states=states)
        accelerator.wait_for_everyone()

    def load(self) -> tuple[int, dict]:
        """Takes up the newest valid checkpoint; returns the steps done and the tally, those of a fresh start without one."""
        found = checkpoint.load(self.folder)
        if found is None:
            return 0, {"images": 0, "seconds": 0.0, "best": None, "best_epoch": None, "finished": False}
        groups, facts = found
        if "optimizer" in facts:
            raise Mistake(
                f"{self.folder}: an older version of the program was interrupted in this training, and this one cannot go on from "
                "there: remove that folder, and the training begins anew; the stages before it stand"
            )
        self.run.log.numbers(self.run.stage_name, facts["step"], resumed=1)
        self.run.layers = facts["layers"]
        self.objective.load_state_dict(groups["objective"])
        if not facts["tally"]["finished"]:
            self.optimizer.load_state_dict(groups["optimizer"])
            if self.run.accelerator.scaler is not None:
                self.run.accelerator.scaler.load_state_dict(facts["scaler"])
            if self.averaged is not None:
                for i, tensor in enumerate(self.averaged.average):
                    tensor.copy_(groups["average"][str(i)])
            self.best = groups.get("best")
        return facts["step"], facts["tally"]


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
        predictions = predict(run, lambda images: student(objective.prepare(images)), run.data.validation)
    if averaged is not None:
        averaged.swap()
    return percent_right(predictions, truth(run, run.data.validation))


def _sync_buffers(module: nn.Module) -> None:
    """Statistics that each process gathered by itself (BatchNorm's) become the main process's on all."""
    for buffer in module.buffers():
        broadcast(buffer)
