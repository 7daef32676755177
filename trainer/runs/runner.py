"""From a checked recipe to a report: builds what a run carries, runs the stages in order, skips what is done."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trainer.compression.weights import weights_of
from trainer.data.batches import seed_of
from trainer.recipe.keys import Recipe, StageKeys
from trainer.recipe.shelves import find, own_settings
from trainer.recipe.stages import any_teaches, name_of, teaches
from trainer.reporting import report
from trainer.reporting.facts import command, hardware, versions
from trainer.reporting.log import Log
from trainer.reporting.tables import csc_bytes, csr_bytes, layer_table, sharing_ratio, table
from trainer.runs.answers import keep_answers
from trainer.runs.checks import guard_teacher
from trainer.runs.opening import folder_of, make_run
from trainer.runs.resuming import finish_stage, resume, same_beginning, write_recipe
from trainer.runs.threads import threads_of_a_run
from trainer.storage import files
from trainer.training.run import Run
from trainer.training.stopping import stopping


def run(
    path: str | Path,
    changes: dict[str, Any] | None = None,
    folder: str | Path = "runs",
    threads: int | None = None,
    allow_python: bool = False,
) -> dict[str, Any]:
    """Runs a recipe and returns its report; goes on where an earlier, interrupted run of the same recipe stopped.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'stages.1.training.epochs': 2, ...}.
        folder: Where the run's own folder NAME is made.
        threads: Of each process, in place of the recipe's; a run that goes on keeps the number it began with.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.

    Raises:
        RecipeError: For a faulty recipe.
        Mistake: For what only the data and networks show.
        FloatingPointError: For a loss that is not finite.
        Stopped: After SIGTERM or SIGHUP; the same call goes on from there.
    """
    started = time.time()
    with folder_of(path, changes, folder, allow_python) as (recipe, plain, here, accelerator):
        if (here / "report.json").is_file() and (here / "done").is_file():
            return _already_done(here, accelerator)
        if accelerator.is_main_process:
            write_recipe(here, recipe, plain, bool(changes))
        with (
            threads_of_a_run(here, threads or recipe.threads, accelerator),
            Log(here / "log.jsonl", accelerator, recipe.track, name=recipe.name, config=plain) as log,
            stopping() as stop,
        ):
            this = make_run(recipe, here, accelerator, log)
            this.stop = stop
            for stage in _stages_due(this, recipe, recipe.stages, started):
                find("stage", stage.stage)(this, **own_settings(stage, StageKeys))
            return _concluded(this, recipe, plain, started)


@contextlib.contextmanager
def begun(
    path: str | Path,
    num_stages: int,
    changes: dict[str, Any] | None = None,
    folder: str | Path = "runs",
    allow_python: bool = False,
) -> Iterator[Run]:
    """A run as its first stages leave it: from its checkpoint where they are done, else they run now and `run` goes on there.

    Raises what `run` raises.
    """
    started = time.time()
    with folder_of(path, changes, folder, allow_python) as (recipe, plain, here, accelerator):
        if accelerator.is_main_process:
            write_recipe(here, recipe, plain, bool(changes))
        with threads_of_a_run(here, recipe.threads, accelerator), Log(here / "log.jsonl", accelerator) as log:
            this = make_run(recipe, here, accelerator, log)
            for stage in _stages_due(this, recipe, recipe.stages[:num_stages], started):
                find("stage", stage.stage)(this, **own_settings(stage, StageKeys))
            yield this


def _stages_due(run: Run, recipe: Recipe, stages: list[StageKeys], started: float) -> Iterator[StageKeys]:
    """Those of the stages that are not done yet, each with the run made ready for it, and kept when it is over."""
    accelerator = run.accelerator
    same_beginning(run, recipe)
    first, run.seconds_before = resume(run, stages)
    if run.teacher is not None and not any_teaches(recipe.stages) and first == 0:
        guard_teacher(run)
    proof = _fingerprint(run)
    # A teacher's answers are worth keeping once it learns nothing more.
    kept_from = 1 + max((n for n, stage in enumerate(recipe.stages) if teaches(stage)), default=-1)
    for number, stage in enumerate(stages[first:], first):
        run.stage, run.stage_name, run.num_fits = number, name_of(stage), 0
        if accelerator.is_main_process:
            print(f"\n[{number + 1}/{len(stages)}] {run.stage_name}", flush=True)
        if run.teacher is not None and number == max(first, kept_from):
            run.cache = keep_answers(run, recipe, recipe.stages[kept_from:])
        torch.manual_seed(
            seed_of(recipe.seed, number)
        )  # of what the stage makes new, the same in a resumed one
        yield stage
        before, proof = proof, _fingerprint(run)
        if proof != before and not teaches(stage):
            raise RuntimeError(
                f"stage {run.stage_name!r} changed the teacher's weights or statistics: this run proves nothing"
            )
        finish_stage(run, proof, run.seconds_before + time.time() - started)
        run.stop.raise_if_requested()


def _fingerprint(run: Run) -> str | None:
    return None if run.teacher is None else run.teacher.fingerprint()


def _concluded(run: Run, recipe: Recipe, plain: dict[str, Any], started: float) -> dict[str, Any]:
    """The report of a run whose stages are done, written and shown."""
    result = _report(run, recipe, plain, run.seconds_before + time.time() - started)
    here = run.folder
    if run.accelerator.is_main_process:
        views = here / "views"  # the teacher's answers, kept for this run
        if views.is_symlink():  # lent by another one
            views.unlink()
        elif views.is_dir():
            shutil.rmtree(views)
        report.write(here, result, run.histograms)
        files.write_bytes(here / "done", b"")
        print(
            f"\n{table(run.rows)}\n\n{layer_table(result['layers'])}\n\n"
            f"{here / 'report.md'}  ({result['seconds']:.0f} s)",
            flush=True,
        )
    run.log.table(run.rows)
    run.log.summary({k: v for k, v in run.rows[-1].items() if isinstance(v, (int, float))})
    return result


def _already_done(here: Path, accelerator: Accelerator) -> dict[str, Any]:
    found = report.read(here)
    if accelerator.is_main_process:
        print(f"{here}: this recipe has run already; its report:\n\n{table(found['rows'])}", flush=True)
    return found


def _report(run: Run, recipe: Recipe, plain: dict[str, Any], seconds: float) -> dict[str, Any]:
    layers = []
    for name, place in weights_of(run.student).items():
        weight = place.value.detach().float().cpu().numpy()
        told = run.layers.get(name, {})
        num_weights, num_nonzero = weight.size, int((weight != 0).sum())
        k = told.get("clusters")
        layers.append(
            {
                "layer": name,
                "shape": list(weight.shape),
                "num_weights": num_weights,
                "num_nonzero": num_nonzero,
                "sparsity": 1 - num_nonzero / num_weights,
                "thresholds": told.get("thresholds"),
                "clusters": k,
                "bits": told.get("bits"),
                "ratio_sharing": None
                if k is None or not num_nonzero
                else sharing_ratio(num_nonzero, 32, k * told.get("groups", 1)),
                "file_bytes": told.get("file_bytes"),
                "csr_bytes": csr_bytes(weight),
                "csc_bytes": csc_bytes(weight),
            }
        )
    return {
        "name": recipe.name,
        "recipe": plain,
        "seed": recipe.seed,
        "versions": versions(),
        "hardware": hardware(),
        "seconds": seconds,
        "command": command(),
        "student_bytes": run.student_bytes,
        "teacher_bytes": run.teacher.num_bytes if run.teacher is not None else None,
        "data": run.data.notes,
        "rows": run.rows,
        "layers": layers,
        "cache": run.cache.facts() if run.cache is not None else None,
    }
