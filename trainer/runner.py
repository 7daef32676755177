"""From a checked recipe to a report: builds what a run carries, runs the stages in order, skips what is done."""

import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from trainer import bind, checkpoint, compress, files, packed, report, teacher
from trainer.context import Run
from trainer.data import make_data
from trainer.evaluate import percent_right, predict, record_teacher, student_view, teacher_answers
from trainer.measure import dense_bytes
from trainer.objective import Objective
from trainer.recipe import Recipe, RecipeError, StageKeys, read
from trainer.teacher import Teacher
from trainer.tracking import Log

WORKING_LAUNCHES = (
    "torchrun --nproc_per_node N -m trainer run RECIPE, or "
    "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N -m trainer run RECIPE"
)


def run(path: str | Path, changes: dict[str, Any] | None = None, folder: str | Path = "runs") -> dict[str, Any]:
    """Runs a recipe and returns its report; goes on where an earlier, interrupted run of the same recipe stopped.

    changes: {'stages.1.training.epochs': 2, ...}. folder: where the run's own folder NAME is made. Raises RecipeError for
    a faulty recipe, ValueError for what only the data and networks show, FloatingPointError for a loss that is not
    finite.
    """
    started = time.time()
    recipe, plain = read(path, changes)
    accelerator = make_accelerator(recipe)
    here = Path(folder) / recipe.name
    if accelerator.is_main_process:
        _same_recipe(here, plain)
        here.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    # Only the main process holds the lock: the others belong to it.
    with checkpoint.lock(here) if accelerator.is_main_process else _nothing():
        if (here / "report.json").is_file() and (here / "done").is_file():
            return _already_done(here, accelerator)
        if accelerator.is_main_process:
            _write_recipe(here, Path(path), plain, bool(changes))
        with Log(here / "log.jsonl", accelerator, recipe.track, name=recipe.name, config=plain) as log:
            return _run(recipe, plain, Path(path), here, accelerator, log, started)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of a run. Raises RecipeError when the launch asked for more processes than it got."""
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        log_with=recipe.track,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    asked = _processes_asked()
    if asked > accelerator.num_processes:
        raise RecipeError(
            f"the launch asked for {asked} processes and got {accelerator.num_processes}; these work: {WORKING_LAUNCHES}"
        )
    return accelerator


def _processes_asked() -> int:
    """How many processes the launch command asked for: accelerate's launcher quietly starts one where it cannot do more."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        words = []
    if any(word.endswith(("accelerate", "accelerate-launch")) or word == "accelerate.commands.launch" for word in words):
        counts = {"--num_processes": 1, "--num_machines": 1}
        for number, word in enumerate(words):
            for name in counts:
                value = words[number + 1] if word in (name, name.replace("_", "-")) and number + 1 < len(words) else None
                if word.startswith((name + "=", name.replace("_", "-") + "=")):
                    value = word.partition("=")[2]
                if value is not None and value.isdigit():
                    counts[name] = int(value)
        asked = max(asked, *counts.values())
    return asked


class _nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _same_recipe(here: Path, plain: dict[str, Any]) -> None:
    kept = here / "recipe.yaml"
    if not kept.is_file():
        return
    if yaml.safe_load(kept.read_text(encoding="utf-8")) != plain:
        raise RecipeError(
            f"{here}: holds a run of a different recipe (see {kept}); give this one another name (--name), "
            "another folder (--folder), or remove that run"
        )


def _write_recipe(here: Path, path: Path, plain: dict[str, Any], changed: bool) -> None:
    """The recipe as run: the file itself, or, where it was changed on the command line, what came of it."""
    text = path.read_text(encoding="utf-8")
    if changed:
        text = f"# {path.name} with changes from the command line\n" + yaml.safe_dump(plain, sort_keys=False)
    files.write_bytes(here / "recipe.yaml", text.encode())


def _already_done(here: Path, accelerator: Accelerator) -> dict[str, Any]:
    found = report.read(here)
    if accelerator.is_main_process:
        print(f"{here}: this recipe has run already; its report:\n\n{report.table(found['rows'])}", flush=True)
    return found


def _run(
    recipe: Recipe, plain: dict[str, Any], path: Path, here: Path, accelerator: Accelerator, log: Log, started: float
) -> dict[str, Any]:
    data = make_data(recipe.data, accelerator.device)
    run = Run(
        name=recipe.name, folder=here, seed=recipe.seed, accelerator=accelerator, data=data,
        student=None, student_spec=teacher.spec(recipe.student), teacher=_make_teacher(recipe, data), log=log,
        recipe_path=here / "recipe.yaml",
    )
    torch.manual_seed(recipe.seed * 2 + 1)
    run.student = teacher.create(recipe.student, data.shape, len(data.classes))
    if recipe.student.from_teacher:
        teacher.copy_layers(run.student, run.teacher.network)
    run.student.to(accelerator.device)
    if run.teacher is not None:
        run.teacher.to(accelerator.device)
    stages = recipe.stages
    _check_layers(recipe, run)
    first = _resume(run, stages)
    if run.teacher is not None and not _taught_here(stages) and first == 0:
        _guard_teacher(run)
    proof = run.teacher.fingerprint() if run.teacher is not None else ""
    for number in range(first, len(stages)):
        stage = stages[number]
        run.stage, run.stage_name, run.num_fits = number, stage.stage, 0
        function = bind.find("stage", stage.stage)
        if accelerator.is_main_process:
            print(f"\n[{number + 1}/{len(stages)}] {stage.stage}", flush=True)
        if stage.stage != "train" and run.teacher is not None and not proof:
            proof = run.teacher.fingerprint()
        function(run, **bind.own_settings(stage, StageKeys))
        if stage.stage == "train" and stage.who == "teacher":
            proof = run.teacher.fingerprint()
        _finish_stage(run)
    if run.teacher is not None and run.teacher.fingerprint() != proof:
        raise RuntimeError("the teacher's weights or statistics changed while it taught: this run proves nothing")
    result = _report(run, recipe, plain, time.time() - started)
    if accelerator.is_main_process:
        report.write(here, result, run.histograms)
        files.write_bytes(here / "done", b"")
        print(f"\n{report.table(run.rows)}\n\n{report.layer_table(result['layers'])}\n\n"
              f"{here / 'report.md'}  ({result['seconds']:.0f} s)", flush=True)
    log.table(run.rows)
    log.summary({k: v for k, v in run.rows[-1].items() if isinstance(v, (int, float))})
    return result


def _taught_here(stages: list) -> bool:
    return any(s.stage == "train" and s.who == "teacher" for s in stages)


def _make_teacher(recipe: Recipe, data) -> Teacher | None:
    if not recipe.teacher_entries:
        return None
    networks = []
    for number, keys in enumerate(recipe.teacher_entries):
        torch.manual_seed(recipe.seed * 2 + 1000 * number)
        network = teacher.create(keys, data.shape, len(data.classes))
        config = getattr(network, "pretrained_cfg", None) or {}
        if getattr(keys, "pretrained", False):
            known = config.get("num_classes")
            if known != len(data.classes) and not _taught_here(recipe.stages):
                raise ValueError(
                    f"teacher {keys.model!r} was trained on {known} classes and the data has {len(data.classes)}: its new "
                    "head is freshly initialised. Teach it with a stage train (who: teacher), or load a checkpoint"
                )
            if keys.mean is None and len(config.get("mean", ())) == data.shape[0]:
                keys.mean, keys.std = tuple(config["mean"]), tuple(config["std"])
        networks.append(network)
    return Teacher(networks, recipe.teacher_entries, data.mean, data.std, recipe.combine or "logits")


def _guard_teacher(run: Run) -> None:
    """A teacher that was not taught here is examined before it teaches. Raises ValueError when it only guesses."""
    answers = teacher_answers(run, "validation")
    labels = run.data.validation.labels
    known = labels >= 0
    if not known.any():
        return
    share = (answers[known] == labels[known]).double().mean().item()
    chance = 1 / len(run.data.classes)
    if share < chance + 3 * math.sqrt(chance * (1 - chance) / int(known.sum())) or share < 1.2 * chance:
        raise ValueError(
            f"the teacher has {share * 100:.2f} % of the validation images right, and guessing {chance * 100:.2f} %: its head "
            "is untrained, its classes are others, or its images are normalised otherwise"
        )
    record_teacher(run, "teacher")


def _check_layers(recipe: Recipe, run: Run) -> None:
    """Names of layers and pairs that only the networks know, checked before the first step of training."""
    faults = []
    places = compress.weights(run.student)
    for number, stage in enumerate(recipe.stages):
        for key in ("keep", "sensitivity", "sparsity", "bits", "values"):
            names = getattr(stage, key, None)
            for name in names if isinstance(names, (list, dict)) else []:
                try:
                    if name not in ("first", "last"):
                        compress.matching(places, name)
                except ValueError as error:
                    faults.append(f"stages[{number}].{key}: {error}")
        for n, term in enumerate(getattr(stage, "losses", None) or []):
            try:
                Objective(run.student, [term], run.data, run.teacher, device=run.accelerator.device)
            except ValueError as error:
                faults.append(f"stages[{number}].losses[{n}]: {error}")
    if faults:
        raise RecipeError("\n".join(faults))


def _stage_folder(run: Run, number: int, name: str) -> Path:
    return run.folder / "checkpoints" / f"{number:02d}-{name}"


def _finish_stage(run: Run) -> None:
    """Keeps what the stage left: networks, rows, histograms; the training's own checkpoints are no longer needed."""
    folder = _stage_folder(run, run.stage, run.stage_name)
    if run.accelerator.is_main_process:
        tensors = {"student": run.student.state_dict(), "learned": run.learned}
        if run.teacher is not None and run.teacher.version:
            tensors |= {f"teacher-{i}": n.state_dict() for i, n in enumerate(run.teacher.networks)}
        for moment, layers in run.histograms.items():
            tensors[f"weights-{moment}"] = {name: torch.from_numpy(array) for name, array in layers.items()}
        facts = {"step": 0, "rows": run.rows, "layers": run.layers,
                 "teacher_version": run.teacher.version if run.teacher is not None else 0}
        checkpoint.save(folder, tensors, facts, keep=1)
        for training in folder.glob("fit-*"):
            shutil.rmtree(training)
    run.accelerator.wait_for_everyone()


def _resume(run: Run, stages: list) -> int:
    """Takes up what the newest finished stage left; returns the number of the first stage that is still to be run."""
    for number in reversed(range(len(stages))):
        found = checkpoint.load(_stage_folder(run, number, stages[number].stage))
        if found is None:
            continue
        tensors, facts = found
        compress.restore(run.student, tensors["student"])
        run.student.to(run.accelerator.device)
        run.learned = {key: t.to(run.accelerator.device) for key, t in tensors["learned"].items()}
        for i, network in enumerate(run.teacher.networks if run.teacher is not None else []):
            if f"teacher-{i}" in tensors:
                network.load_state_dict(tensors[f"teacher-{i}"])
        if run.teacher is not None:
            run.teacher.version = facts["teacher_version"]
        run.rows, run.layers = facts["rows"], facts["layers"]
        run.histograms = {key.removeprefix("weights-"): {n: t.numpy() for n, t in layers.items()}
                          for key, layers in tensors.items() if key.startswith("weights-")}
        if run.accelerator.is_main_process:
            print(f"{run.folder}: going on after stage {number + 1} of {len(stages)} ({stages[number].stage})", flush=True)
        return number + 1
    return 0


def _report(run: Run, recipe: Recipe, plain: dict[str, Any], seconds: float) -> dict[str, Any]:
    layers = []
    for name, place in compress.weights(run.student).items():
        weight = place.value.detach().float().cpu().numpy()
        told = run.layers.get(name, {})
        num_weights, num_nonzero = weight.size, int((weight != 0).sum())
        k = told.get("clusters")
        layers.append({
            "layer": name, "shape": list(weight.shape), "num_weights": num_weights, "num_nonzero": num_nonzero,
            "sparsity": 1 - num_nonzero / num_weights, "thresholds": told.get("thresholds"), "clusters": k,
            "bits": told.get("bits"),
            "ratio_sharing": None if k is None or not num_nonzero else report.sharing_ratio(num_nonzero, 32, k * told.get("groups", 1)),
            "file_bytes": told.get("file_bytes"), "csr_bytes": report.csr_bytes(weight), "csc_bytes": report.csc_bytes(weight),
        })
    return {
        "name": recipe.name, "recipe": plain, "seed": recipe.seed, "versions": report.versions(), "hardware": report.hardware(),
        "seconds": seconds, "command": " ".join(sys.argv),
        "student_bytes": dense_bytes(run.student),
        "teacher_bytes": run.teacher.num_bytes if run.teacher is not None else None,
        "rows": run.rows, "layers": layers,
    }


def evaluate_file(file: Path, path: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Decodes a packed file and measures it on the test split of a recipe's data: top1 (percent), images, digest, bytes."""
    recipe, _ = read(path, changes)
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    model, header = packed.decode(content, str(file))
    # As in a run: the file was measured by the same arithmetic there.
    accelerator = Accelerator(mixed_precision=recipe.precision)
    data = make_data(recipe.data, accelerator.device)
    if packed.facts(data) != {key: header[key] for key in packed.facts(data)}:
        raise ValueError(f"{file}: was made for other images than the data of {path}: {header}")
    model.to(accelerator.device)
    run = Run(name=recipe.name, folder=Path(), seed=0, accelerator=accelerator, data=data, student=model, student_spec={},
              teacher=None, log=None, recipe_path=path)
    top1 = percent_right(predict(run, student_view(run, model), data.test), data.test.labels)
    return {"top1": top1, "images": len(data.test), "digest": packed.digest(model.state_dict()), "file_bytes": len(content)}
