"""Runs a recipe: opens the run, runs the stages in order, skips the finished ones, writes the report."""

import contextlib
import hashlib
import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from trainer.compression.weights import weights_of
from trainer.data.batches import seed_of
from trainer.distillation.teacher import copy_layers
from trainer.distributed import is_main, told
from trainer.mistakes import say
from trainer.recipe.keys import Recipe, StageKeys
from trainer.recipe.shelves import find, own_settings
from trainer.recipe.stages import any_teaches, learns_labels, name_of, taught_alike, teaches, training_of
from trainer.reporting import report
from trainer.reporting.facts import command, hardware, versions
from trainer.reporting.log import Log
from trainer.reporting.tables import (
    FOLDED,
    by_block,
    csc_bytes,
    csr_bytes,
    layer_table,
    sharing_ratio,
    table,
    terminal_width,
)
from trainer.reporting.tracking import tracked
from trainer.runs.answers import images_at_once, keep_answers
from trainer.runs.earlier import first_broken
from trainer.runs.evidence import gather, without_pictures
from trainer.runs.guards import Untrained, check_at_least, examine, guard_teacher, stop_untrained, warnings_of
from trainer.runs.inputs import only_teaches
from trainer.runs.opening import folder_of, make_run
from trainer.runs.resuming import (
    Plan,
    begin,
    finish_stage,
    is_changed,
    is_finished,
    resume,
    stage_number,
    taught_already,
    tell_of_damage,
    write_recipe,
)
from trainer.runs.threads import threads_of_a_run
from trainer.storage import files
from trainer.training.bar import Bar, Due
from trainer.training.run import Run


def run(
    path: str | Path,
    changes: dict[str, Any] | None = None,
    folder: str | Path = "runs",
    threads: int | None = None,
    allow_python: bool = False,
    from_stage: str | None = None,
    fresh: bool = False,
    more: Sequence[Path] = (),
) -> dict[str, Any]:
    """Runs a recipe and returns its report; resumes an earlier, interrupted run in the same folder.

    If that was of another recipe, the run goes on after the last stage whose settings and inputs are equal, and what
    followed is moved to the run's folder earlier/. Equal stages of finished runs beside it are taken over.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        changes: {'stages.1.training.epochs': 2, ...}.
        folder: The folder in which the run's own folder NAME is made.
        threads: Threads of each process, instead of the recipe's; a resumed run keeps the number it began with.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.
        from_stage: The name or the number (from 0) of a stage; it and all after it are run anew.
        fresh: Whether all stages are run anew.
        more: Folders of further runs whose equal stages are taken over, finished or not.

    Raises:
        RecipeError: For a faulty recipe.
        Mistake: For mistakes that only the data and the networks show.
        Untrained: For a network that has learnt nothing, or less than at_least; the finished stages are reported.
        FloatingPointError: For a loss that is not finite.
        Stopped: After SIGTERM or SIGHUP; the same call goes on from there.
    """
    started = time.time()
    reads_finished = from_stage is None and not fresh
    with folder_of(path, changes, folder, allow_python, reads_finished) as opened:
        recipe, plain, here, accelerator, stop = opened
        changed = told(is_main() and is_changed(here, recipe.written.file, plain))
        anew = 0 if fresh else None if from_stage is None else stage_number(recipe, from_stage)
        if told(is_finished(here)) and not changed and anew is None:
            return _already_done(here, recipe, accelerator)
        plan = Plan(plain, bool(changes), changed, anew, more)
        with (
            threads_of_a_run(here, threads or recipe.threads, accelerator, changed),
            Log(here / "log.jsonl", accelerator) as log,
        ):
            this = make_run(recipe, here, accelerator, log)
            this.stop = stop
            if accelerator.is_main_process and not (here / "recipe.yaml").exists():
                write_recipe(here, recipe, plan)  # what mirrors the log reads it
            this.bar = bar_of(this, recipe.stages)
            tracks = recipe.track is not None and accelerator.is_main_process
            with tracked(here, tracks), this.bar.shown():  # after the data was opened
                try:
                    for stage in stages_due(this, recipe, plan, len(recipe.stages), started):
                        find("stage", stage.stage)(this, **own_settings(stage, StageKeys))
                except Untrained:
                    _write_report(this, recipe, plain, started)
                    raise
                return _concluded(this, recipe, plain, started)


@contextlib.contextmanager
def begun(
    path: str | Path,
    num_stages: int,
    changes: dict[str, Any] | None = None,
    folder: str | Path = "runs",
    allow_python: bool = False,
) -> Iterator[Run]:
    """Yields a run after its first stages, from their checkpoint or by running them; `run` can resume after them.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        num_stages: How many stages are run.
        changes: {'stages.1.training.epochs': 2, ...}.
        folder: The folder in which the run's own folder NAME is made.
        allow_python: Whether the recipe may name `python:module:name`, whose code then runs.

    Raises:
        Everything that `run` raises.
    """
    started = time.time()
    with folder_of(path, changes, folder, allow_python) as (recipe, plain, here, accelerator, stop):
        changed = told(is_main() and is_changed(here, recipe.written.file, plain))
        plan = Plan(plain, bool(changes), changed)
        with (
            threads_of_a_run(here, recipe.threads, accelerator, changed),
            Log(here / "log.jsonl", accelerator) as log,
        ):
            this = make_run(recipe, here, accelerator, log)
            this.stop = stop
            this.bar = bar_of(this, recipe.stages[:num_stages])
            with this.bar.shown():
                for stage in stages_due(this, recipe, plan, num_stages, started):
                    find("stage", stage.stage)(this, **own_settings(stage, StageKeys))
            yield this


def bar_of(run: Run, stages: Sequence[StageKeys]) -> Bar:
    """Returns the bar of a run of these stages."""
    due = []
    labelled = len(run.data.labelled_alone().train)
    teachers = 0 if run.teacher is None else len(run.teacher.networks)
    for stage in stages:
        training = training_of(stage)
        images = 0 if training is None else training.epochs
        images *= labelled if learns_labels(stage) else len(run.data.train)
        images *= teachers if teaches(stage) else 1
        due.append(Due(name_of(stage), "teacher" if teaches(stage) else "student", images))
    return Bar(due, run.accelerator.is_main_process)


def stages_due(run: Run, recipe: Recipe, plan: Plan, num_stages: int, started: float) -> Iterator[StageKeys]:
    """Prepares the run for each unfinished stage and yields the stage; saves its checkpoint afterwards.

    Args:
        run: The run.
        recipe: Its recipe.
        plan: How it begins.
        num_stages: How many of the recipe's stages are run.
        started: Time at which this process began the run.

    Raises:
        Mistake: For a teacher that only guesses, and for other images or another teacher than the run began with.
        RuntimeError: When a stage changed the teacher without being one that trains it.
    """
    accelerator = run.accelerator
    stages = recipe.stages[:num_stages]
    inputs, anew = begin(run, recipe, plan)
    first, run.seconds_before = resume(run, stages)
    run.bar.went_on(run.seconds_before)
    if first:
        stop_untrained(run, recipe, first - 1)
    if run.teacher is not None and not any_teaches(recipe.stages) and first == 0:
        guard_teacher(run)
    proof = _fingerprint(run)
    # A student that begins as a copy of the teacher copies one that has been taught.
    copying = next(itertools.filterfalse(lambda n: only_teaches(stages[n]), range(num_stages)), None)
    if recipe.student.from_teacher is None:
        copying = None
    for number, stage in enumerate(stages[first:], first):
        run.stage, run.stage_name, run.num_fits, run.student_answers = number, name_of(stage), 0, None
        if accelerator.is_main_process:
            print(f"\n[{number + 1}/{len(stages)}] {run.stage_name}", flush=True)
        run.bar.stage(number)
        # Until the teacher is taught again, its answers stay the same.
        if number == first or teaches(stages[number - 1]):
            run.cache = None
            if run.teacher is not None:
                run.teacher.at_once = images_at_once(
                    recipe, accelerator.num_processes, accelerator.device.type
                )
                run.cache = keep_answers(run, recipe, next(taught_alike(recipe.stages, number)))
        if teaches(stage):
            run.cache = None
        if number == copying:
            assert run.teacher is not None
            copy_layers(run.student, run.teacher.network)
        torch.manual_seed(seed_of(recipe.seed, number))  # so that a resumed stage draws the same numbers
        if not (number < anew and taught_already(run, number, stage, inputs, plan.more)):
            yield stage
        before, proof = proof, _fingerprint(run)
        if proof != before and not teaches(stage):
            raise RuntimeError(
                f"stage {run.stage_name!r} changed the teacher's weights or statistics: this run proves nothing"
            )
        examine(run, stage)
        finish_stage(run, inputs, proof, run.seconds_before + time.time() - started)
        stop_untrained(run, recipe, number)
        run.stop.raise_if_requested()


def _fingerprint(run: Run) -> str | None:
    return None if run.teacher is None else run.teacher.fingerprint()


def _concluded(run: Run, recipe: Recipe, plain: dict[str, Any], started: float) -> dict[str, Any]:
    """Writes and prints the report of a run whose stages are all done; returns it."""
    run.bar.stage(len(recipe.stages))
    result = _write_report(run, recipe, plain, started)
    here = run.folder
    if run.accelerator.is_main_process:
        answers = here / "views"  # the cache of the teacher's answers, needed during the run only
        if answers.is_symlink():  # the cache of another run
            answers.unlink()
        elif answers.is_dir():
            shutil.rmtree(answers)
        files.write_bytes(here / "done", b"")
        layers = result["layers"]
        shown = layers if len(layers) <= FOLDED else by_block(layers)
        width = terminal_width()
        print(
            f"\n{table(run.rows, width)}\n\n{layer_table(shown, width)}\n\n{_warned(result)}"
            f"{here / 'report.html'}  ({result['seconds']:.0f} s)",
            flush=True,
        )
    run.log.summary({k: v for k, v in run.rows[-1].items() if isinstance(v, (int, float))})
    return result


def _already_done(here: Path, recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    found = report.read(here)
    if accelerator.is_main_process:
        print(
            f"{here}: this recipe has run already (--fresh runs it anew, where its images or labels have changed); its report:\n\n"
            f"{_warned(found)}{table(found['rows'], terminal_width())}",
            flush=True,
        )
        tell_of_damage(here, recipe.stages)
        if broken := first_broken(here, found):
            say(f"{broken[1]}: is gone or damaged, and --from {broken[0]} makes it anew")
    for number in range(len(recipe.stages)):
        check_at_least(recipe, found["rows"], number)
    return found


def _warned(result: dict[str, Any]) -> str:
    return "".join(f"warning: {warning}\n\n" for warning in result.get("warnings") or ())


def _write_report(run: Run, recipe: Recipe, plain: dict[str, Any], started: float) -> dict[str, Any]:
    """Writes the report of the stages so far; returns it."""
    evidence = gather(run, pictures=recipe.report_images)
    result = _report(run, recipe, plain, run.seconds_before + time.time() - started)
    if run.accelerator.is_main_process:
        hides = recipe.track is not None and recipe.report_images and not recipe.track_images
        tracked_evidence = without_pictures(evidence) if hides else None
        report.write(run.folder, result, run.histograms, evidence, tracked_evidence)
    return result


def _report(run: Run, recipe: Recipe, plain: dict[str, Any], seconds: float) -> dict[str, Any]:
    layers = []
    for name, weight in weights_of(run.student).items():
        array = weight.value.detach().float().cpu().numpy()
        facts = run.layers.get(name, {})
        num_weights, num_nonzero = array.size, int((array != 0).sum())
        k = facts.get("clusters")
        layers.append(
            {
                "layer": name,
                "shape": list(array.shape),
                "num_weights": num_weights,
                "num_nonzero": num_nonzero,
                "sparsity": 1 - num_nonzero / num_weights,
                "thresholds": facts.get("thresholds"),
                "clusters": k,
                "bits": facts.get("bits"),
                "ratio_sharing": None
                if k is None or not num_nonzero
                else sharing_ratio(num_nonzero, 32, k * facts.get("groups", 1)),
                "file_bytes": facts.get("file_bytes"),
                "csr_bytes": csr_bytes(array),
                "csc_bytes": csc_bytes(array),
            }
        )
    return {
        "name": recipe.name,
        "warnings": warnings_of(recipe, run.rows),
        "recipe": plain,
        "seed": recipe.seed,
        "versions": versions(),
        "hardware": hardware(),
        "seconds": seconds,
        "command": command(),
        "student_bytes": run.student_bytes,
        "teacher_bytes": run.teacher.num_bytes if run.teacher is not None else None,
        "data": run.data.notes,
        "test_images": {
            "num": len(run.data.test),
            "labels": hashlib.sha256(run.data.test.labels.cpu().numpy().tobytes()).hexdigest()[:16],
        },
        "rows": run.rows,
        "layers": layers,
        "cache": run.cache.facts() if run.cache is not None else None,
    }
