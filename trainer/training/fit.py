"""The training loop: everything that learns goes through `fit`. It knows nothing of teachers, masks or codebooks."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.data.batches import batches, epoch_order, mix
from trainer.distillation.objective import Objective
from trainer.distributed import agreed, summed
from trainer.mistakes import Mistake
from trainer.networks.features import evaluating
from trainer.recipe.training import Training
from trainer.reporting.tables import percent
from trainer.training.denormals import flushed
from trainer.training.evaluate import balanced_accuracy, percent_right, predict, truth
from trainer.training.label_shares import label_shares
from trainer.training.run import Run
from trainer.training.schedule import learning_rate
from trainer.training.state import State, close_training, open_training, sync_buffers
from trainer.training.stopping import Stopped
from trainer.training.weighing import weigh_if_due

LOG_STEPS = 50  # steps between two logs of the losses, because each log waits for the device
CHECKPOINT_SECONDS = 60.0  # time between two checkpoints during a training; more if one takes longer than
SAVE_SECONDS = 1.2  # this: 2 % of the time

BeforeStep = Callable[[int, int], bool]


def fit(
    run: Run, objective: Objective, training: Training, before_step: BeforeStep | None = None
) -> dict[str, Any]:
    """Trains the objective in place.

    After an interruption at any moment, the same call continues from the newest checkpoint, and ends with the same
    weights, bit for bit on the same machine.

    Args:
        run: The run: its data, accelerator, log and folder.
        objective: The networks and losses to train.
        training: The settings.
        before_step: before_step(step, num_steps) is called before every optimizer step; gradual pruning tightens its
            masks there. Its changes must be in the objective's parameters and buffers or in run.layers, so that a
            resumed training finds them. It returns whether it will change the network again: a validation before its
            last change does not count for `keep: best` and `patience`, because the final network differs.

    Returns:
        epochs, steps, train_seconds, images_per_second; with `keep: best` also best_validation (percent;
            the balanced accuracy where the training balances the classes), best_epoch; with
        a teacher also ratios, what each term weighs: {term: {"weight", "first", "last"}} (`distillation.ratios`).

    Raises:
        FloatingPointError: At the first loss that is not finite, with stage, epoch, step and term.
        Mistake: For settings that do not work with these networks, images or this machine.
    """
    state = open_training(run, objective, training)
    tally = state.tally
    done = tally["finished"]
    with flushed(), run.stop.kept_until_the_step_ends():
        run.stop.raise_if_requested()
        while state.epoch < training.epochs and not done:
            images, seconds = tally["images"], tally["seconds"]
            changing = _epoch(state, before_step)
            _look(state)
            state.count_seconds()
            done = _end_epoch(state, changing, (tally["images"] - images) / (tally["seconds"] - seconds))
        close_training(state)
    best = {"best_validation": tally["best"], "best_epoch": tally["best_epoch"]}
    return {
        "epochs": state.epoch,
        "steps": state.step,
        "train_seconds": tally["seconds"],
        "images_per_second": tally["images"] / tally["seconds"],
        **(best if training.keep == "best" else {}),
        **({"ratios": tally["ratios"]} if "ratios" in tally else {}),
    }


def _epoch(state: State, before_step: BeforeStep | None) -> bool:
    """Trains to the end of an epoch; returns the last result of before_step, False without one."""
    run, training, accelerator = state.run, state.training, state.run.accelerator
    device, rank, num_processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    train, epoch, num_batches = run.data.train, state.epoch, state.num_batches
    view = state.views.number(epoch, run.stage)
    order = _order(state, rank)
    sizes = [len(positions) for positions in order]
    skipped = state.step % state.steps_per_epoch * training.accumulate
    changing = False
    shares = _shares(state, order)
    state.freeze()
    read = batches(train, order[skipped:], train.workers, device, state.views.cuts(view))
    for position, batch in enumerate(read, skipped):
        first = position - position % training.accumulate
        last = min(first + training.accumulate, num_batches) - 1
        if position == first:
            state.seed_generators(state.step, rank)
            if before_step is not None:
                changing = before_step(state.step, state.num_steps)
        images, labels, index = _augmented(state, *batch, view)
        if position == first:
            weigh_if_due(state, images, labels, index, None if run.data.mixed else view)
        if shares is not None:
            assert state.objective.label_shares is not None
            state.objective.label_shares.copy_(shares[position])
        # DDP exchanges gradients at the last batch of a step only.
        syncs = position == last and not state.syncs_by_hand
        with contextlib.nullcontext() if syncs else accelerator.no_sync(state.wrapped):
            try:
                terms = state.wrapped(
                    images,
                    labels,
                    index,
                    None if run.data.mixed else view,
                    state.step / state.steps_per_epoch,
                )
            except ValueError as error:
                raise of_a_batch(error, len(images)) from error
            loss = terms["loss"]
            if last > first:
                loss = loss * (len(images) / sum(sizes[first : last + 1]))
            state.backward(loss)
        state.window.add(terms, epoch, state.step)
        state.tally["images"] += len(images) * num_processes
        if position == last:
            _take_step(state)
            # At the end of an epoch `fit` and `_end_epoch` do this, after the validation.
            if last + 1 < num_batches:
                if state.step % LOG_STEPS == 0:
                    _look(state)
                    if _save_is_due(state):
                        state.count_seconds()
                        state.save()
                stopped_by = run.stop.due()
                if stopped_by is not None:
                    if state.step % LOG_STEPS:
                        _look(state)
                    state.count_seconds()
                    state.save()
                    raise Stopped(stopped_by)
    return changing


def _shares(state: State, order: list[Tensor]) -> Tensor | None:
    """Returns the `label_shares` of this epoch's batches, [batches, 2], on the device; None where all factors are 1."""
    data, training, objective = state.run.data, state.training, state.objective
    accelerator = state.run.accelerator
    alike = not data.partly_labelled and objective.class_weights is None
    if alike or training.accumulate == accelerator.num_processes == 1:
        return None
    objective.label_shares = torch.ones(2, device=accelerator.device)
    orders = [
        order if rank == accelerator.process_index else _order(state, rank)
        for rank in range(accelerator.num_processes)
    ]
    shares = label_shares(
        data.train.labels,
        orders,
        training.accumulate,
        accelerator.process_index,
        objective.class_weights,
        data.mixed,
    )
    return torch.tensor(shares, device=accelerator.device)  # all at once: a copy in each step would wait


def _order(state: State, rank: int) -> list[Tensor]:
    """Returns the positions of the images of each batch of this epoch, of a process."""
    train, training = state.run.data.train, state.training
    labels = train.labels.cpu() if training.sampler == "balanced" else None
    processes = state.run.accelerator.num_processes
    return epoch_order(len(train), training.batch_size, state.seed, state.epoch, rank, processes, labels)


def _augmented(
    state: State, images: Tensor, labels: Tensor, index: Tensor, view: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a batch for the objective: images [N, C, H, W] in [0, 1], augmented as in the view, and mixed."""
    data = state.run.data
    images = state.views.augmented(images, index, view)
    if data.mixed:
        mixing = (labels, len(data.classes), data.mixup, data.cutmix)
        pictures, drawn = state.objective.pictures, torch.get_rng_state()
        if pictures is not None:
            state.objective.mixed_pictures = lambda: _mixed_alike(pictures.of(index, view), mixing, drawn)
        images, labels = mix(images, *mixing)
    if state.training.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, labels, index


def _mixed_alike(images: Tensor, mixing: tuple, drawn: Tensor) -> Tensor:
    """Returns images mixed by the numbers that follow a state of the random generator; leaves the generator as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(drawn)
        return mix(images, *mixing)[0]


def of_a_batch(error: ValueError, num_images: int, who: str = "batch_size leaves") -> ValueError:
    """Returns the error of a forward pass, or a Mistake if BatchNorm cannot normalise a batch of one image.

    who: made the batch, in the message.
    """
    if num_images == 1 and "more than 1 value per channel" in str(error):
        return Mistake(f"{who} a batch of one image, which the network cannot learn from: {error}")
    return error


def _take_step(state: State) -> None:
    training = state.training
    rate = learning_rate(training, state.step, state.steps_per_epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    if state.syncs_by_hand:
        _average_gradients(state)
    if training.clip:
        state.run.accelerator.clip_grad_norm_(state.wrapped.parameters(), training.clip)
    state.take_step()
    # The optimizer's own zero_grad takes 30 µs, most of them for torch's profiler.
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    state.step += 1
    if state.averaged is not None:
        state.averaged.update(state.step)


def _average_gradients(state: State) -> None:
    """Replaces each gradient by its mean over the processes, as DDP does."""
    for parameter in state.wrapped.parameters():
        if parameter.grad is not None:
            summed(parameter.grad).div_(state.run.accelerator.num_processes)


def _look(state: State) -> None:
    """Logs the losses since the last call. Raises FloatingPointError at one that is not finite."""
    state.window.flush(state.step, learning_rate(state.training, state.step - 1, state.steps_per_epoch))
    state.show()


def _save_is_due(state: State) -> bool:
    interval = CHECKPOINT_SECONDS * max(1.0, state.save_seconds / SAVE_SECONDS)
    return agreed(time.monotonic() - state.last_saved > interval, state.run.accelerator.device)


def _end_epoch(state: State, changing: bool, speed: float) -> bool:
    """Validates, logs and saves after an epoch; returns whether patience has run out.

    changing: whether before_step will change the network again. speed: images per second.
    """
    run, training, tally, epoch = state.run, state.training, state.tally, state.epoch
    found: dict[str, float] = {}
    done = False
    if epoch % training.validate_every == 0 or epoch == training.epochs:
        found = _validate(state)
        judged = found.get("balanced", found["validation"])
        if not changing and (tally["best"] is None or judged > tally["best"]):
            tally["best"], tally["best_epoch"] = judged, epoch
            if training.keep == "best":
                state.progress.remember_best()
        if training.patience and tally["best_epoch"] is not None:
            done = epoch - tally["best_epoch"] >= training.patience
    state.show(ends_epoch=True)
    counted = state.objective.counted()
    run.log_numbers(state.step, epoch=epoch, images_per_second=speed, **found, **counted)
    if run.accelerator.is_main_process and run.bar.hidden:
        validation = f"  validation {percent(found['validation'])}" if found else ""
        validation += f" (balanced {percent(found['balanced'])})" if "balanced" in found else ""
        print(
            f"{run.stage_name}: epoch {epoch}/{training.epochs}  loss {state.window.loss:.4f}{validation}  "
            f"{speed:,.0f} images/s",
            flush=True,
        )
    if not done and epoch < training.epochs:
        stopped_by = run.stop.due()
        if stopped_by is not None or _save_is_due(state):
            state.save()
        if stopped_by is not None:
            raise Stopped(stopped_by)
    state.clock = time.monotonic()  # validation and checkpoint are not training
    return done


def _validate(state: State) -> dict[str, float]:
    """Returns the `validation` accuracy in percent, of the averaged weights if there are any.

    Where the training balances the classes, also the `balanced` accuracy, by which it is then judged.

    If the images have no labels, the teacher's classes are the labels.
    """
    run, objective, averaged = state.run, state.objective, state.averaged
    validation = run.data.validation
    if averaged is not None:
        averaged.swap()
    sync_buffers(objective)
    with evaluating(objective), run.accelerator.autocast():
        student = objective.finished()
        answers = predict(lambda images: student(objective.prepare(images)), validation, run.accelerator)
    if averaged is not None:
        averaged.swap()
    labels = truth(run, validation)
    found = {"validation": percent_right(answers, labels)}
    return found | ({"balanced": balanced_accuracy(answers, labels)} if state.training.balances else {})
