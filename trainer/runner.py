"""From a checked recipe to a report: builds what a run carries, runs the stages in order, skips what is done."""

import contextlib
import copy
import inspect
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from trainer.compression import folding
from trainer.compression.states import dense_bytes, restore
from trainer.compression.weights import Weight, choose, matching, weights_of
from trainer.data.batches import make_data, seed_of
from trainer.data.fetch import cache_folder
from trainer.data.images import Data
from trainer.distillation.answers import ViewCache
from trainer.distillation.objective import Objective
from trainer.distillation.onednn import kinds_in_float32
from trainer.distillation.teacher import Teacher, copy_layers
from trainer.mistakes import Mistake
from trainer.networks.build import build, create, spec
from trainer.packing import network as packed
from trainer.recipe import shelves
from trainer.recipe.keys import Augment, CacheKeys, Recipe, StageKeys
from trainer.recipe.recipe import read
from trainer.recipe.terms import asked_of_teacher
from trainer.recipe.text import RecipeError, dump, parse
from trainer.reporting import report
from trainer.reporting.facts import command, hardware, versions
from trainer.reporting.log import Log
from trainer.reporting.tables import csc_bytes, csr_bytes, layer_table, sharing_ratio, table
from trainer.storage import checkpoint, files
from trainer.storage.lock import lock
from trainer.storage.weights_file import digest
from trainer.training.evaluate import percent_right, predict, student_view, teacher_answers
from trainer.training.rows import record_teacher
from trainer.training.run import Run

WORKING_LAUNCHES = (
    "torchrun --nproc_per_node N -m trainer run RECIPE, or "
    "accelerate launch --multi_gpu --num_processes N -m trainer run RECIPE"
)


def run(
    path: str | Path,
    changes: dict[str, Any] | None = None,
    folder: str | Path = "runs",
    threads: int | None = None,
) -> dict[str, Any]:
    """Runs a recipe and returns its report; goes on where an earlier, interrupted run of the same recipe stopped.

    changes: {'stages.1.training.epochs': 2, ...}. folder: where the run's own folder NAME is made. threads: of each process,
    in place of the recipe's; a run that goes on keeps the number it began with. Raises RecipeError for a faulty recipe,
    Mistake for what only the data and networks show, FloatingPointError for a loss that is not finite.
    """
    started = time.time()
    with _folder_of(path, changes, folder) as (recipe, plain, here, accelerator):
        if (here / "report.json").is_file() and (here / "done").is_file():
            return _already_done(here, accelerator)
        if accelerator.is_main_process:
            _write_recipe(here, recipe, plain, bool(changes))
        with (
            _threads(here, threads or recipe.threads, accelerator),
            Log(here / "log.jsonl", accelerator, recipe.track, name=recipe.name, config=plain) as log,
        ):
            return _run(recipe, plain, here, accelerator, log, started)


@contextlib.contextmanager
def begun(
    path: str | Path, num_stages: int, changes: dict[str, Any] | None = None, folder: str | Path = "runs"
) -> Iterator[Run]:
    """A run as its first stages leave it: from its checkpoint where they are done, else they run now and `run` goes on there.

    Raises what `run` raises.
    """
    started = time.time()
    with _folder_of(path, changes, folder) as (recipe, plain, here, accelerator):
        if accelerator.is_main_process:
            _write_recipe(here, recipe, plain, bool(changes))
        with _threads(here, recipe.threads, accelerator), Log(here / "log.jsonl", accelerator) as log:
            run = _make_run(recipe, here, accelerator, log)
            _run_stages(run, recipe, recipe.stages[:num_stages], started)
            yield run


@contextlib.contextmanager
def _folder_of(
    path: str | Path, changes: dict[str, Any] | None, folder: str | Path
) -> Iterator[tuple[Recipe, dict[str, Any], Path, Accelerator]]:
    """The recipe, as an object and plain, its folder, which is held while this lasts, and the accelerator."""
    recipe, plain = read(path, changes)
    accelerator = make_accelerator(recipe)
    here = Path(folder) / recipe.name
    _same_recipe(here, recipe.written.path, plain)
    accelerator.wait_for_everyone()  # nothing is written before all have looked
    # Only the main process holds the lock: the others belong to it.
    with lock(here) if accelerator.is_main_process else contextlib.nullcontext():
        yield recipe, plain, here, accelerator


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of a run. Raises RecipeError when the launch asked for more processes than it got."""
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != recipe.precision:
        AcceleratorState._reset_state()  # that of an earlier run in this process, which Accelerate holds on to
    accelerator = _accelerator(
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


@contextlib.contextmanager
def _threads(here: Path, asked: int | None, accelerator: Accelerator) -> Iterator[None]:
    """While this lasts torch computes with the threads that the run began with, or else those asked for, or all there are.

    The order of sums depends on the number, and so do the last bits of what is learned.
    """
    before = torch.get_num_threads()
    most = available_threads(accelerator.num_processes)
    # What OMP_NUM_THREADS said, or a caller in Python, is the user's will, or a launcher's: who can tell?
    now = asked or min(most, before)
    begun = _facts_of_beginning(here).get("threads")
    number = begun or now
    told = None
    if number != now:
        told = (
            f"{here}: goes on with {_counted(number)}, as it began ({_counted(now)} would be used now): "
            "rounding depends on the number"
        )
    elif now < most and not asked and _launched() and accelerator.device.type == "cpu":
        told = (
            f"computing with {_counted(now)}, as OMP_NUM_THREADS says, which launchers set to 1 where nobody has; there are "
            f"cores for {most}: accelerate launch --num_cpu_threads_per_process {most}, or --threads {most}, "
            f"or threads: {most} in the recipe"
        )
    if told and accelerator.is_main_process:
        print(told, flush=True)
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_threads(num_processes: int) -> int:
    """One for each physical core that this process may use, divided among the processes of this machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    logical = len(affinity(0)) if affinity else os.cpu_count() or 1
    cores = min(psutil.cpu_count(logical=False) or logical, logical)
    return max(1, cores // min(num_processes, int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))))


def _counted(threads: int) -> str:
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def _launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def _accelerator(**settings: Any) -> Accelerator:
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


def _same_recipe(here: Path, path: Path, plain: dict[str, Any]) -> None:
    """Refuses a folder that another recipe has left something in; a start that came to nothing leaves but its recipe."""
    kept = here / "recipe.yaml"
    left = (here / "checkpoints").exists() or (here / "done").exists()
    if not kept.is_file() or not (left or kept.samefile(path)):
        return
    if parse(kept).plain != plain:
        raise RecipeError(
            f"{here}: holds a run of a different recipe (see {kept}); give this one another name (--name), "
            "another folder (--folder), or remove that run"
        )


def _write_recipe(here: Path, recipe: Recipe, plain: dict[str, Any], changed: bool) -> None:
    """The recipe as run: the text that was read, or, where it was changed on the command line, what came of it."""
    text = recipe.written.source
    if changed:
        text = f"# {recipe.written.path.name} with changes from the command line\n" + dump(plain)
    files.write_bytes(here / "recipe.yaml", text.encode())


def _already_done(here: Path, accelerator: Accelerator) -> dict[str, Any]:
    found = report.read(here)
    if accelerator.is_main_process:
        print(f"{here}: this recipe has run already; its report:\n\n{table(found['rows'])}", flush=True)
    return found


def _run(
    recipe: Recipe, plain: dict[str, Any], here: Path, accelerator: Accelerator, log: Log, started: float
) -> dict[str, Any]:
    run = _make_run(recipe, here, accelerator, log)
    started = _run_stages(run, recipe, recipe.stages, started)
    result = _report(run, recipe, plain, time.time() - started)
    if accelerator.is_main_process:
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
    log.table(run.rows)
    log.summary({k: v for k, v in run.rows[-1].items() if isinstance(v, (int, float))})
    return result


def _make_run(recipe: Recipe, here: Path, accelerator: Accelerator, log: Log) -> Run:
    with accelerator.local_main_process_first():  # what is missing is fetched once
        data = make_data(recipe.data, accelerator.device)
        guide = make_teacher(recipe, data)
    run = Run(
        name=recipe.name,
        folder=here,
        seed=recipe.seed,
        accelerator=accelerator,
        data=data,
        student=None,
        student_spec=spec(recipe.student),
        teacher=guide,
        log=log,
        recipe_path=here / "recipe.yaml",
    )
    torch.manual_seed(recipe.seed * 2 + 1)
    run.student = create(recipe.student, data.shape, len(data.classes))
    if recipe.student.from_teacher and not copy_layers(run.student, run.teacher.network):
        told = "has no effect: no layer of the student is of a kind that the teacher has"
        raise RecipeError(recipe.fault(("student", "from_teacher"), told))
    run.student.to(accelerator.device)
    run.student_bytes = dense_bytes(run.student)
    if run.teacher is not None:
        run.teacher.to(accelerator.device)
    check_layers(recipe, run.student, data, run.teacher, accelerator.device)
    _tell_float32(run, recipe)
    return run


def _tell_float32(run: Run, recipe: Recipe) -> None:
    """Says what the recipe's precision does not reach, because this machine has it in float32 only."""
    if (
        recipe.precision == "no"
        or run.accelerator.device.type != "cpu"
        or not run.accelerator.is_main_process
    ):
        return
    if not run.accelerator.native_amp:
        print(
            f"precision {recipe.precision}: Accelerate has it on GPUs only: all is computed in float32 here",
            flush=True,
        )
        return
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
    kinds = kinds_in_float32([run.student, *(run.teacher.networks if run.teacher is not None else [])], dtype)
    if kinds:
        print(
            f"precision {recipe.precision}: this processor does not have {', '.join(kinds)} in it: "
            "these layers compute in float32",
            flush=True,
        )


def _run_stages(run: Run, recipe: Recipe, stages: list[StageKeys], started: float) -> float:
    """Runs those of the stages that are not done yet; returns when all this began, earlier sessions taken into account."""
    accelerator = run.accelerator
    _same_beginning(run, recipe)
    first, seconds_before = _resume(run, stages)
    started -= seconds_before
    if run.teacher is not None and not _taught_here(recipe.stages) and first == 0:
        _guard_teacher(run)
    proof = run.teacher.fingerprint() if run.teacher is not None else None
    # A teacher's answers are worth keeping once it learns nothing more.
    kept_from = 1 + max((n for n, stage in enumerate(recipe.stages) if _taught_here([stage])), default=-1)
    asked_for_cache = False
    for number in range(first, len(stages)):
        stage = stages[number]
        run.stage, run.stage_name, run.num_fits = number, stage.stage, 0
        function = shelves.find("stage", stage.stage)
        if accelerator.is_main_process:
            print(f"\n[{number + 1}/{len(stages)}] {stage.stage}", flush=True)
        if run.teacher is not None and number >= kept_from and not asked_for_cache:
            run.teacher.cache, asked_for_cache = _keep_answers(run, recipe, recipe.stages[kept_from:]), True
        torch.manual_seed(
            seed_of(recipe.seed, number)
        )  # of what the stage makes new, so that a resumed one makes the same
        function(run, **shelves.own_settings(stage, StageKeys))
        before, proof = proof, run.teacher.fingerprint() if run.teacher is not None else None
        if proof != before and not _taught_here([stage]):
            raise RuntimeError(
                f"stage {stage.stage!r} changed the teacher's weights or statistics: this run proves nothing"
            )
        _finish_stage(run, proof, time.time() - started)
    return started


def _same_beginning(run: Run, recipe: Recipe) -> None:
    """Raises Mistake when a run that goes on finds other images or another teacher than it began with."""
    told = {"images": "the training images are not those", "teacher": "the teacher is not the one"}
    facts: dict[str, Any] = {"images": [run.data.fingerprint, len(run.data.train)]}
    if run.teacher is not None and not _taught_here(recipe.stages):
        facts["teacher"] = run.teacher.fingerprint()
    begun = _facts_of_beginning(run.folder)
    if begun:
        for what, fact in facts.items():
            if begun.get(what) != fact:
                raise Mistake(f"{run.folder}: {told[what]} that this run began with: give it another folder")
        return
    run.accelerator.wait_for_everyone()  # nothing is written before all have looked
    if run.accelerator.is_main_process:
        facts["threads"] = torch.get_num_threads()  # of the main process
        files.write_bytes(run.folder / "begun.json", json.dumps(facts, indent=1).encode())


def _facts_of_beginning(here: Path) -> dict[str, Any]:
    """What a run that goes on began with; nothing where there is nothing to go on from."""
    path = here / "begun.json"
    return (
        json.loads(path.read_text(encoding="utf-8"))
        if path.is_file() and (here / "checkpoints").exists()
        else {}
    )


def _taught_here(stages: list) -> bool:
    return any(s.stage == "train" and s.who == "teacher" for s in stages)


def make_teacher(recipe: Recipe, data: Data) -> Teacher | None:
    """The recipe's teacher, None where it has none. Raises Mistake for a head that nobody has trained."""
    if not recipe.teacher_entries:
        return None
    networks = []
    for number, keys in enumerate(recipe.teacher_entries):
        torch.manual_seed(recipe.seed * 2 + 1000 * number)
        network = create(keys, data.shape, len(data.classes))
        config = getattr(network, "pretrained_cfg", None) or {}
        if getattr(keys, "pretrained", False):
            known = config.get("num_classes")
            if known != len(data.classes) and not _taught_here(recipe.stages):
                raise Mistake(
                    f"teacher {keys.model!r} was trained on {known} classes and the data has {len(data.classes)}: its new "
                    "head is freshly initialised. Teach it with a stage train (who: teacher), or load a checkpoint"
                )
            if keys.mean is None and len(config.get("mean", ())) == data.shape[0]:
                keys.mean, keys.std = tuple(config["mean"]), tuple(config["std"])
        networks.append(network)
    return Teacher(networks, recipe.teacher_entries, data.mean, data.std, recipe.combine or "logits")


def _guard_teacher(run: Run) -> None:
    """A teacher that was not taught here is examined before it teaches, each of several by itself.

    Raises Mistake when one only guesses.
    """
    guide, part = run.teacher, run.data.validation
    several = len(guide.networks) > 1
    chance = 1 / len(run.data.classes)
    doubt = 3 * math.sqrt(chance * (1 - chance) / max(1, int((part.labels >= 0).sum())))
    for number, network in enumerate(guide.networks):
        if several:
            answers = predict(run, lambda images, n=number, net=network: net(guide.prepare(images, n)), part)
        else:
            answers = teacher_answers(run, "validation")
        share = percent_right(answers, part.labels) / 100
        if share < max(chance + doubt, 1.2 * chance):
            who = f"teachers[{number}]" if several else "the teacher"
            raise Mistake(
                f"{who} has {share * 100:.2f} % of the validation images right, and guessing {chance * 100:.2f} %: its head "
                "is untrained, its classes are others, or its images are normalised otherwise"
            )
    record_teacher(run, "teacher")


def check_layers(
    recipe: Recipe, student: nn.Module, data: Data, guide: Teacher | None, device: torch.device | str
) -> None:
    """What only the networks know, checked before the first step of training: layers, pairs, what losses can be fed.

    Raises RecipeError with all faults.
    """
    faults = []
    places = weights_of(student)
    seen = set()
    for number, stage in enumerate(recipe.stages):
        if stage.stage in ("prune", "share"):
            faults += [
                recipe.fault(("stages", number, *below), told) for below, told in _layer_faults(stage, places)
            ]
        check_student = getattr(inspect.getmodule(shelves.find("stage", stage.stage)), "check_student", None)
        if check_student is not None and not any(f"stages[{number}]" in fault for fault in faults):
            try:
                check_student(stage, student)
            except Mistake as error:
                faults.append(recipe.fault(("stages", number), str(error)))
            else:
                if stage.stage == "fold":  # what comes after it finds another network
                    student = folding.fold(copy.deepcopy(student), spec(recipe.student))[0]
        terms = getattr(stage, "losses", None) or []
        if not terms and getattr(stage, "training", None) and not data.labelled:
            told = "learns from labels where no losses are given, and the training images have none"
            faults.append(recipe.fault(("stages", number), told))
        for n, term in enumerate(terms):
            if repr(term) in seen:  # mostly the same terms in every stage
                continue
            seen.add(repr(term))
            try:
                Objective(student, [term], data, guide, device=device).rehearse(data)
            except Mistake as error:
                faults.append(recipe.fault(("stages", number, "losses", n), str(error)))
    if faults:
        raise RecipeError("\n".join(faults))


def _layer_faults(stage: StageKeys, places: dict[str, Weight]) -> Iterator[tuple[tuple, str]]:
    """Layers that a stage names and the student has not, or that it should name and does not."""
    settings = {
        key: getattr(stage, key)
        for key in ("keep", "sensitivity", "sparsity", "bits", "values")
        if hasattr(stage, key)
    }
    unknown = False
    for key, setting in settings.items():
        for number, name in enumerate(setting) if isinstance(setting, (list, dict)) else ():
            if key == "keep" and name in ("first", "last"):
                continue
            try:
                matching(places, name)
            except Mistake as error:
                unknown = True
                yield (key, number if key == "keep" else name), str(error)
    if unknown:
        return
    try:
        chosen = choose(places, stage.keep)
    except Mistake as error:
        yield ("keep",), str(error)
        return
    if not chosen:
        yield ("keep",), f"leaves no layer to {stage.stage}"
    for key, setting in settings.items():
        if isinstance(setting, dict):
            named = {name: matching(places, name) for name in setting}
            for name, layers in named.items():
                if not set(layers) & set(chosen):
                    yield (key, name), "has no effect: the layer is in keep"
            missing = [layer for layer in chosen if layer not in sum(named.values(), [])]
            if missing:
                yield (key,), f"nothing is given for {', '.join(missing)} (name them here or in keep)"
    groups = getattr(stage, "groups", None)
    for name, place in chosen.items() if groups else ():
        if len(place.value) % groups:
            yield (
                ("groups",),
                f"got {groups}; the {len(place.value)} rows of layer {name!r} do not split into so many",
            )


def _stage_folder(run: Run, number: int, name: str) -> Path:
    return run.folder / "checkpoints" / f"{number:02d}-{name}"


def _finish_stage(run: Run, teacher_fingerprint: str | None, seconds: float) -> None:
    """Keeps what the stage left: networks, rows, histograms; the training's own checkpoints are no longer needed."""
    folder = _stage_folder(run, run.stage, run.stage_name)
    if run.accelerator.is_main_process:
        tensors = {"student": run.student.state_dict(), "learned": run.learned}
        if run.teacher is not None and run.teacher.version:
            tensors |= {f"teacher-{i}": n.state_dict() for i, n in enumerate(run.teacher.networks)}
        for moment, layers in run.histograms.items():
            tensors[f"weights-{moment}"] = {name: torch.from_numpy(array) for name, array in layers.items()}
        facts = {
            "step": 0,
            "rows": run.rows,
            "layers": run.layers,
            "seconds": seconds,
            "teacher": teacher_fingerprint,
            "student_spec": run.student_spec,
            "teacher_version": run.teacher.version if run.teacher is not None else 0,
        }
        checkpoint.save(folder, tensors, facts, keep=1)
        for training in folder.glob("fit-*"):
            shutil.rmtree(training)
    run.accelerator.wait_for_everyone()


def _resume(run: Run, stages: list) -> tuple[int, float]:
    """Takes up what the newest finished stage left; returns the number of the first stage that is still to be run, and
    the seconds spent before. Raises Mistake when the teacher is another than it was.
    """
    for number in reversed(range(len(stages))):
        found = checkpoint.load(_stage_folder(run, number, stages[number].stage))
        if found is None:
            continue
        tensors, facts = found
        if facts["student_spec"] != json.loads(
            json.dumps(run.student_spec)
        ):  # a stage has made it another network: folded it, or removed channels
            run.student_spec = facts["student_spec"]
            run.student = build(run.student_spec, run.data.shape, len(run.data.classes))
        restore(run.student, tensors["student"])
        run.student.to(run.accelerator.device)
        run.learned = {key: t.to(run.accelerator.device) for key, t in tensors["learned"].items()}
        for i, network in enumerate(run.teacher.networks if run.teacher is not None else []):
            if f"teacher-{i}" in tensors:
                network.load_state_dict(tensors[f"teacher-{i}"])
        if run.teacher is not None:
            run.teacher.version = facts["teacher_version"]
            if run.teacher.fingerprint() != facts["teacher"]:
                raise Mistake(
                    f"{run.folder}: the teacher is not the one that this run began with: give it another folder"
                )
        run.rows, run.layers = facts["rows"], facts["layers"]
        run.histograms = {
            key.removeprefix("weights-"): {n: t.numpy() for n, t in layers.items()}
            for key, layers in tensors.items()
            if key.startswith("weights-")
        }
        if run.accelerator.is_main_process:
            print(
                f"{run.folder}: going on after stage {number + 1} of {len(stages)} ({stages[number].stage})",
                flush=True,
            )
        return number + 1, facts["seconds"]
    return 0, 0.0


def _keep_answers(run: Run, recipe: Recipe, stages: list[StageKeys]) -> ViewCache | None:
    """Opens the cache of the teacher's answers for the stages to come: as the recipe says, or, where it says nothing, in
    memory, with what the most stages need that fits. Raises RecipeError when what the recipe says cannot be done.
    """
    teaching = [
        stage
        for stage in stages
        if getattr(stage, "training", None) and asked_of_teacher(getattr(stage, "losses", None) or [])
    ]
    asked = [asked_of_teacher(stage.losses) for stage in teaching]
    data, accelerator = run.data, run.accelerator
    if recipe.cache == "off" or not asked:
        return None
    if recipe.cache is not None:
        wishes = [recipe.cache if isinstance(recipe.cache, CacheKeys) else CacheKeys(where=recipe.cache)]
    elif data.mixup or data.cutmix or (data.augment != Augment() and data.views is None):
        wishes = []
        refused = (
            "mixed images are never seen twice"
            if data.mixup or data.cutmix
            else "data.views does not limit the views"
        )
    else:
        embeddings, maps = (any(kind in kinds for kinds in asked) for kind in ("embedding", "maps"))
        combinations = dict.fromkeys([(embeddings, maps), (embeddings, False), (False, False)])
        wishes = [
            keys
            for e, m in combinations
            if any((keys := CacheKeys(embeddings=e, maps=m)).serve(k) for k in asked)
        ]
        refused = "every loss asks for more than logits"
    for keys in wishes:
        layers: dict[str, None] = {}
        for stage in teaching if keys.maps else []:
            objective = Objective(run.student, stage.losses, data, run.teacher, device=accelerator.device)
            layers |= dict.fromkeys(objective.teacher_layers)
        folder = (cache_folder() if keys.where == "disk" else run.folder) / "views"
        try:
            cache = ViewCache(
                run.teacher,
                data,
                folder,
                keys,
                layers=list(layers),
                device=accelerator.device,
                precision=recipe.precision,
            )
            with accelerator.autocast():
                cache.check()
                lost = cache.measure() if accelerator.is_main_process else {}
        except Mistake as error:
            if recipe.cache is not None:
                raise RecipeError(recipe.fault(("cache",), str(error))) from error
            refused = str(error)
            continue
        run.log.numbers("cache", 0, num_bytes=cache.num_bytes, **lost)
        if accelerator.is_main_process:
            told = "".join(f"; {key} {value:.3g}" for key, value in lost.items())
            print(f"the teacher's answers are kept: {cache.describe()}{told}", flush=True)
        return cache
    if accelerator.is_main_process:
        print(f"the teacher's answers are not kept: {refused}", flush=True)
    return None


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
        "rows": run.rows,
        "layers": layers,
        "cache": run.teacher.cache.facts()
        if run.teacher is not None and run.teacher.cache is not None
        else None,
    }


def evaluate_file(file: Path, path: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Decodes a packed file and measures it on the test split of a recipe's data: top1 (percent), images, digest, bytes."""
    recipe, _ = read(path, changes)
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise Mistake(f"{file}: cannot be read: {error.strerror}") from None
    header = packed.header(content, str(file))
    into = None
    if not packed.rebuilds(header) and header.get("net") == spec(recipe.student):
        # The recipe's author names the code, not the file.
        into = build(header["net"], tuple(header["shape"]), len(header["classes"]))
    model, header = packed.decode(content, str(file), into)
    # As in a run: the file was measured by the same arithmetic there.
    accelerator = _accelerator(mixed_precision=recipe.precision)
    recipe.data.keep_views = False  # of images that are not looked at here
    data = make_data(recipe.data, accelerator.device)
    if packed.facts_of(data) != {key: header[key] for key in packed.facts_of(data)}:
        raise Mistake(f"{file}: was made for other images than the data of {path}: {header}")
    model.to(accelerator.device)
    run = Run(
        name=recipe.name,
        folder=Path(),
        seed=0,
        accelerator=accelerator,
        data=data,
        student=model,
        student_spec={},
        teacher=None,
        log=None,
        recipe_path=path,
    )
    top1 = percent_right(predict(run, student_view(run, model), data.test), data.test.labels)
    return {
        "top1": top1,
        "images": len(data.test),
        "digest": digest(model.state_dict()),
        "file_bytes": len(content),
    }
