"""Times a few steps of every stage of a recipe, and says what the whole of it will take: hours, memory and disk."""

import contextlib
import io
import math
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from trainer.data.images import Data, Part
from trainer.data.pictures import stored_side
from trainer.distillation.answer_space import size_text
from trainer.distillation.answers import LIMIT_GIB
from trainer.recipe.keys import Augment, CacheKeys, Recipe, StageKeys
from trainer.recipe.shelves import find, own_settings
from trainer.recipe.stages import largest_batch, learns_labels, name_of, seals, teaches, training_of
from trainer.recipe.training import Training
from trainer.reporting.log import Log
from trainer.reporting.page import read_log
from trainer.reporting.tables import NOTHING, duration
from trainer.runs.earlier import stage_folder
from trainer.runs.opening import folder_of, make_run
from trainer.runs.resuming import Plan
from trainer.runs.runner import stages_due
from trainer.runs.threads import threads_of_a_run
from trainer.training.evaluate import answered, normalized
from trainer.training.run import Run

STEPS = 3  # of an epoch, of the largest batch
EPOCHS = 3  # of two views and of the first again, whose answers the cache of the teacher's then has
MEASURED = 256  # images of the validation and the test part


class Timed(NamedTuple):
    """What a few steps of a stage took.

    Attributes:
        num_fits: How many trainings the stage made.
        fresh: Images learnt in a second.
        kept: Likewise where the teacher's answers are kept.
        rest_seconds: What the stage took besides, with few images.
        num_rows: How many rows it added to the report, each after measuring all validation and test images.
        measured: Images measured in a second.
        peak_bytes: The most memory that the process has taken so far.
        disk_bytes: Of what is kept of the stage.
    """

    num_fits: int
    fresh: float
    kept: float
    rest_seconds: float
    num_rows: int
    measured: float
    peak_bytes: int
    disk_bytes: int = 0


def dry_run(
    path: str | Path,
    changes: dict[str, Any] | None = None,
    threads: int | None = None,
    allow_python: bool = False,
) -> str:
    """Runs each stage of a recipe for a few steps, in a folder that is then removed; returns the plan of the whole as text.

    Stages from `pack` on are not run: their time is that of measuring the test images.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'stages.1.training.epochs': 2, ...}.
        threads: Threads of each process, instead of the recipe's.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.

    Raises:
        Everything that `runs.runner.run` raises, but for networks that have learnt nothing.
    """
    started = time.monotonic()
    timed: list[Timed] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),  # the results of a few steps mean nothing
        folder_of(path, changes, folder, allow_python) as (recipe, plain, here, accelerator, stop),
        threads_of_a_run(here, threads or recipe.threads, accelerator),
        Log(here / "log.jsonl", accelerator) as log,
    ):
        few = _shortened(recipe)
        run = make_run(few, here, accelerator, log)
        run.stop, whole = stop, run.data
        run.data = _some(whole, STEPS * (largest_batch(recipe.stages) or 1))
        opened = time.monotonic() - started
        num_run = next((n for n, stage in enumerate(recipe.stages) if seals(stage)), len(recipe.stages))
        for stage in stages_due(run, few, Plan(plain, bool(changes), False), num_run, time.time()):
            print(
                f"timing stage {len(timed) + 1}/{len(recipe.stages)}: {name_of(stage)}",
                file=sys.stderr,
                flush=True,
            )
            timed.append(_timed(run, stage))
        for number, stage in enumerate(recipe.stages[:num_run]):
            kept = [
                file.stat().st_size
                for file in stage_folder(here, number, name_of(stage)).rglob("*")
                if file.is_file()
            ]
            timed[number] = timed[number]._replace(disk_bytes=sum(kept))
        views = recipe.data.views or 1 if recipe.data.augment != Augment() else 1
        answer_bytes = 0 if run.cache is None else run.cache.file.num_bytes * views // (few.data.views or 1)
        # A teacher of larger images reads the pictures at its own size, into a store of its own.
        own = whole if run.teacher is None else run.teacher.images_of(whole)
        stored = store_bytes(whole) + (0 if own is whole else store_bytes(own))
    return _plan(recipe, whole, opened, timed, answer_bytes, stored)


def _shortened(recipe: Recipe) -> Recipe:
    """Returns the recipe with `EPOCHS` epochs in every stage, at most two views, and nothing kept beyond the run."""
    stages = [
        stage.model_copy(
            update={
                "at_least": None,
                **{
                    key: value.model_copy(update={"epochs": EPOCHS, "freeze_epochs": 0, "patience": None})
                    for key, value in ((key, getattr(stage, key)) for key in type(stage).model_fields)
                    if isinstance(value, Training)
                },
            }
        )
        for stage in recipe.stages
    ]
    cache = recipe.cache
    if cache not in (None, "off"):
        cache = (cache if isinstance(cache, CacheKeys) else CacheKeys()).model_copy(
            update={"where": "memory", "limit_gib": 1e6}
        )
    views = None if recipe.data.views is None else min(2, recipe.data.views)
    data = recipe.data.model_copy(update={"views": views, "keep_views": False})
    few = recipe.model_copy(update={"stages": stages, "cache": cache, "data": data, "allow_untrained": True})
    few._text, few._allows_python = recipe._text, recipe._allows_python
    return few


def _some(data: Data, num_train: int) -> Data:
    """Returns the data with a few images of each part."""

    def few(part: Part, chosen: Tensor) -> Part:
        return replace(part, ids=part.ids[chosen.to(part.ids.device)])

    return replace(
        data,
        train=few(data.train, chosen_images(data.train.labels, num_train)),
        validation=few(data.validation, _evenly(len(data.validation), MEASURED)),
        test=few(data.test, _evenly(len(data.test), MEASURED)),
    )


def chosen_images(labels: Tensor, most: int) -> Tensor:
    """Returns the positions of at most so many training images, evenly spaced; of labelled ones a batch, if there are any.

    labels: int64 [N], -1 for unlabelled images. `most`: of `STEPS` batches.
    """
    labels = labels.cpu()
    labelled, others = (labels >= 0).nonzero()[:, 0], (labels < 0).nonzero()[:, 0]
    if not len(labelled) or not len(others):
        return _evenly(len(labels), most)
    # Few have labels: evenly spaced images may have none, and then there is nothing for `train` to learn from.
    share = round(most * len(labelled) / len(labels))
    taught = labelled[_evenly(len(labelled), min(max(2, most // STEPS, share), most - 1))]
    return torch.cat([taught, others[_evenly(len(others), most - len(taught))]]).sort().values


def _evenly(num_images: int, most: int) -> Tensor:
    return torch.linspace(0, num_images - 1, min(most, num_images)).long()


def _timed(run: Run, stage: StageKeys) -> Timed:
    """Runs a stage on few images, and returns what it took."""
    log, num_rows = run.folder / "log.jsonl", len(run.rows)
    num_lines = len(read_log(log))
    started = time.monotonic()
    find("stage", stage.stage)(run, **own_settings(stage, StageKeys))
    seconds = time.monotonic() - started
    epochs = [line for line in read_log(log)[num_lines:] if "images_per_second" in line and "epoch" in line]
    speeds = [float(line["images_per_second"]) for line in epochs]
    views = 1 if run.data.augment == Augment() else run.data.views
    fresh = kept = math.nan
    if len(speeds) >= EPOCHS:
        kept = speeds[EPOCHS - 1]
        fresh = kept if run.cache is None else speeds[0] if views == 1 else speeds[1]
    started = time.monotonic()
    teacher = run.teacher if teaches(stage) else None
    network = normalized(run.student.eval(), run.data) if teacher is None else lambda x: teacher.see(x).logits
    answered(network, run.data.test, run.accelerator)[0].cpu()  # which waits for a GPU
    measured = len(run.data.test) / (time.monotonic() - started)
    learnt = sum(len(_learnt_from(stage, run.data)) / speed for speed in speeds)
    return Timed(
        run.num_fits,
        fresh,
        kept,
        max(0.0, seconds - learnt),
        len(run.rows) - num_rows,
        measured,
        _peak_bytes(run.accelerator.device),
    )


def _learnt_from(stage: StageKeys, data: Data) -> Part:
    """Returns the training images that a stage takes."""
    return (data.labelled_alone() if learns_labels(stage) else data).train


def _peak_bytes(device: torch.device) -> int:
    """Returns the most memory that this process has taken so far: of its GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def learning_seconds(num_images: int, num_epochs: int, fresh: float, kept: float, new_views: int) -> float:
    """Returns how long so many epochs take, of which the first `new_views` ask the teacher.

    fresh, kept: images in a second, without and with the teacher's kept answers.
    """
    new = min(num_epochs, new_views)
    return num_images * (new / fresh + (num_epochs - new) / kept)


def store_bytes(data: Data) -> int:
    """Returns about what the store takes once all pictures are in it: of training images that are cut the whole pictures,
    a third longer than high, of others the inputs."""
    total = 0
    channels, height, width = data.shape
    for part in (data.train, data.validation, data.test):
        store = getattr(part.images, "store", None)
        if store is not None:
            side = stored_side(store, data.shape)
            cut = part is data.train and data.augment.random_resized_crop is not None
            total += len(part) * channels * (side * side * 4 // 3 if cut else height * width)
    return total


def _plan(
    recipe: Recipe, data: Data, opened: float, timed: Sequence[Timed], answer_bytes: int, stored: int
) -> str:
    """Returns the plan as text: a row for each stage and the sum, then what is kept."""
    in_memory = not (
        recipe.cache == "disk" or (isinstance(recipe.cache, CacheKeys) and recipe.cache.where == "disk")
    )
    refused = recipe.cache is None and answer_bytes > LIMIT_GIB * 2**30
    keeps = bool(answer_bytes) and not refused
    new_views = (recipe.data.views or 1) if recipe.data.augment != Augment() else 1
    rows, total, disk = (
        [["opening", NOTHING, NOTHING, NOTHING, duration(opened), NOTHING, NOTHING]],
        opened,
        0,
    )
    num_measured = len(data.validation) + len(data.test)
    for number, stage in enumerate(recipe.stages):
        training, found = training_of(stage), timed[number] if number < len(timed) else None
        epochs, learning = NOTHING, NOTHING
        if found is None:  # from `pack` on
            last = timed[-1] if timed else None
            seconds = 0.0 if last is None else (num_measured + len(data.test)) / last.measured
            rows.append(
                [name_of(stage), NOTHING, NOTHING, NOTHING, f"{duration(seconds)} or more", NOTHING, NOTHING]
            )
            total += seconds
            continue
        seconds = found.rest_seconds + found.num_rows * num_measured / found.measured
        if training is not None and found.num_fits:
            num_epochs = found.num_fits * training.epochs
            asks = keeps and not teaches(stage) and found.kept > found.fresh
            seconds += learning_seconds(
                len(_learnt_from(stage, data)),
                num_epochs,
                found.fresh,
                found.kept if asks else found.fresh,
                new_views if asks else num_epochs,
            )
            seconds += (
                found.num_fits
                * math.ceil(training.epochs / training.validate_every)
                * len(data.validation)
                / found.measured
            )
            new_views = max(0, new_views - num_epochs) if asks else new_views
            epochs = f"{num_epochs:,}"
            learning = f"{found.fresh:,.0f}" + (f", then {found.kept:,.0f}" if asks else "")
        total += seconds
        disk += found.disk_bytes
        rows.append(
            [
                name_of(stage),
                epochs,
                learning,
                f"{found.measured:,.0f}",
                duration(seconds),
                size_text(found.peak_bytes),
                size_text(found.disk_bytes),
            ]
        )
    peak = max((one.peak_bytes for one in timed), default=0)
    rows.append(["all", "", "", "", duration(total), size_text(peak), size_text(disk)])
    head = ["stage", "epochs", "learnt images/s", "measured images/s", "time", "memory so far", "disk"]
    lines = [tabulate(rows, head, disable_numparse=True, colalign=("left", *["right"] * 6)), ""]
    lines.append(
        f"{len(data.train):,} training, {len(data.validation):,} validation and {len(data.test):,} test images; measured "
        f"with {STEPS} steps of an epoch, while the machine did whatever else it does"
    )
    if keeps:
        lines.append(
            f"the teacher's answers take {size_text(answer_bytes)} {'in memory' if in_memory else 'on disk'}"
        )
    elif refused:
        lines.append(
            f"the teacher's answers would take {size_text(answer_bytes)}, more than {LIMIT_GIB:g} GiB: they are not kept"
        )
    if stored:
        lines.append(f"the store of decoded pictures takes about {size_text(stored)} on disk")
    if recipe.data.keep_views:
        kept = (recipe.data.views or 1) * len(data.train) * math.prod(data.shape) * 4
        lines.append(f"the kept views take {size_text(kept)} in memory")
    return "\n".join(lines)
