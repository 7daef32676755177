"""Shows what a recipe's teacher is worth: its student beside the same student on labels alone, seed by seed."""

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from tabulate import tabulate

from trainer.data.batches import make_data
from trainer.mistakes import Mistake
from trainer.recipe.keys import Recipe, Stage, StageKeys
from trainer.recipe.recipe import read
from trainer.recipe.stages import losses_of, name_of, seals, stretched, teaches, training_of
from trainer.recipe.terms import needs_teacher
from trainer.recipe.text import dump
from trainer.recipe.training import Training
from trainer.reporting.plots import is_teacher
from trainer.reporting.tables import NOTHING
from trainer.runs.answers import share_answers
from trainer.runs.earlier import stage_folder
from trainer.runs.inputs import only_teaches
from trainer.runs.several import Job, run_all
from trainer.runs.trials import about, spread, tell
from trainer.storage import checkpoint, files

ARMS = ("taught", "labels")
# What a teacher's entry says of the weights it began with. Those that were kept are whole, and in the order of the data's classes.
OF_A_FILE = {"checkpoint", "prefix", "use_ema", "classes"}


def gain(
    path: str | Path,
    num_seeds: int,
    changes: Mapping[str, Any] | None = None,
    folder: str | Path = "runs",
    rates: Sequence[float] = (),
    allow_python: bool = False,
    processes: int | None = None,
) -> dict[str, Any]:
    """Runs a recipe's student as the recipe says and on labels alone, for the same steps; prints and returns the gain.

    The teacher is taught once, with the recipe's own seed, and all students share it and its kept answers. Then each of
    the seeds 0, 1, 2 ... has two runs, which begin from the same weights and see the same images in the same order. What a
    stage needs of the teacher is left out of the second: its losses on the labels stay (one alone with weight 1), or
    cross-entropy takes their place. Where only some images have a label, its epochs hold these alone, and are as many
    more. Stages from the packed file on are left out of both.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        num_seeds: How many seeds.
        changes: {'stages.1.training.epochs': 2, ...}.
        folder: The folder of runs; all of this is in NAME-gain there.
        rates: Learning rates of the student's first training. Both arms are tried with each, on seed 0, and take the one
            with the best validation accuracy. Without any both take the recipe's.
        allow_python, processes: As for `several.run_all`, with what it raises.

    Returns:
        {"rates", "rows"}: the learning rate of each arm, and for each stage "stage", "gain" and "error" (the standard error
        of its mean, None for one seed) in points of test accuracy, and of each arm the list of "top1" and "agreement".

    Raises:
        Mistake: For a recipe without a teacher, or in which a stage teaches teacher and student at once, and for data
            without a label.
    """
    recipe, plain = read(path, dict(changes or {}), allow_python)
    if not recipe.teacher_entries:
        raise Mistake(f"{path}: there is no teacher, whose gain could be shown")
    share = _labelled_share(recipe, bool(rates))
    here = Path(folder) / f"{recipe.name}-gain"
    arms = _arms(recipe, plain, _taught(recipe, plain, here, folder, allow_python), share, allow_python)
    chosen = {arm: _rate(arms[arm]) for arm in ARMS}
    if rates:
        chosen = _best_rates(arms, rates, here, allow_python, processes)
    for arm in ARMS:
        _set_rate(arms[arm], chosen[arm])
    jobs = [
        _job(
            here,
            arm,
            arms[arm],
            f"{arm}-rate{chosen[arm]:g}-seed{seed}" if rates else f"{arm}-seed{seed}",
            seed,
        )
        for seed in range(num_seeds)
        for arm in ARMS
    ]
    reports = run_all(jobs, allow_python, processes)
    shutil.rmtree(here / "views", ignore_errors=True)  # the answers that the runs have shared
    taught, alone = reports[::2], reports[1::2]
    found = {"rates": chosen, "rows": _rows(taught, alone)}
    said = "each at the learning rate that was best on validation images, of " + ", ".join(
        f"{r:g}" for r in rates
    )
    text = (
        f"{recipe.name}: {about(taught)}; taught with learning rate {chosen['taught']:g}, on labels alone with "
        f"{chosen['labels']:g} ({said if rates else 'the recipe gives it; --rates tries others for both'})\n\n{table(found)}\n"
    )
    tell(here / "gain", text, found)
    print(here / "gain.md", flush=True)
    return found


def table(found: Mapping[str, Any]) -> str:
    """Returns a gain's rows as a table."""
    lines = []
    for row in found["rows"]:
        error = NOTHING if row["error"] is None else f"{row['error']:.2f}"
        line = {"stage": row["stage"], "gain": f"{row['gain']:+.2f} ± {error}"}
        for arm, title in zip(ARMS, ("taught", "labels alone"), strict=True):
            line[f"{title} %"] = spread(row[arm]["top1"])
            line[f"agreement {title} %"] = spread([one for one in row[arm]["agreement"] if one is not None])
        lines.append(line)
    return (
        tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
        + "\n\nGain in points of test accuracy ± its standard error over the seeds; elsewhere ± is the standard deviation."
    )


def _taught(
    recipe: Recipe, plain: dict[str, Any], here: Path, folder: str | Path, allow_python: bool
) -> list[Path] | None:
    """Runs the stages that teach; returns the files of the teachers' weights, None if no stage teaches."""
    numbers = [number for number, stage in enumerate(recipe.stages) if teaches(stage)]
    if not numbers:
        return None
    for number in numbers:
        if not only_teaches(recipe.stages[number]):
            raise Mistake(
                recipe.fault(("stages", number), "changes teacher and student at once: no gain can be told")
            )
    stages = [plain["stages"][number] for number in numbers]
    name = f"{recipe.name}-teacher"
    file = _write(
        here / "teacher.yaml", {**plain, "name": name, "stages": stages, "cache": None, "track": None}
    )
    run_all([Job(file, {"name": name}, Path(folder))], allow_python, 1)
    last = stage_folder(Path(folder) / name, len(stages) - 1, name_of(recipe.stages[numbers[-1]]))
    newest = checkpoint.newest(last)
    assert newest is not None
    return [newest / f"teacher-{number}.safetensors" for number in range(len(recipe.teacher_entries))]


def _arms(
    recipe: Recipe, plain: dict[str, Any], teachers: list[Path] | None, share: float, allow_python: bool
) -> dict[str, dict[str, Any]]:
    """Returns the recipes of both arms, as plain values: the student's stages up to the packed file.

    share: the part of the training images that have a label.
    """
    common = {**plain, "track": None, "allow_untrained": True}  # of a comparison that is a result too
    if teachers is not None:
        entries = [
            {key: value for key, value in entry.items() if key not in OF_A_FILE}
            | {"checkpoint": str(file)}
            | ({"pretrained": False} if "pretrained" in entry else {})
            for entry, file in zip(plain.get("teachers") or [plain["teacher"]], teachers, strict=True)
        ]
        common |= {"teachers": entries} if plain.get("teachers") else {"teacher": entries[0]}
    end = next((n for n, stage in enumerate(recipe.stages) if seals(stage)), len(recipe.stages))
    kept = [number for number in range(end) if not teaches(recipe.stages[number])]
    if not any(needs_teacher(term) for n in kept for _, _, term in losses_of(recipe.stages[n])):
        raise Mistake(f"{recipe.written.file}: no loss asks the teacher, so there is no gain to show")
    taught = [plain["stages"][number] for number in kept]
    labels = [_on_labels(recipe.stages[number], plain["stages"][number], allow_python) for number in kept]
    for stage, before in zip(labels, taught, strict=True):
        if share < 1 and stage["stage"] != before["stage"]:
            stage.update(_in_more_epochs(stage, share))
    return {
        "taught": {**common, "stages": taught},
        "labels": {**common, "stages": labels, "cache": None},
    }


def _in_more_epochs(stage: dict[str, Any], share: float) -> dict[str, Any]:
    """Returns a stage whose epochs hold a share of the images, with as many more: its course over the steps stays the same."""
    checked = TypeAdapter(Stage).validate_python(stage, context={"allow_python": True})
    training = training_of(checked)
    assert training is not None
    found = stretched(checked, stage, round(training.epochs / share) / training.epochs)
    try:
        Training.model_validate(found["training"])
    except ValidationError:  # by rounding it could stop after the last epoch at the earliest
        found["training"].pop("patience", None)
    return found


def _labelled_share(recipe: Recipe, validates: bool) -> float:
    """Returns the part of the training images that have a label.

    validates: whether a learning rate is chosen by validation images. Raises Mistake where none of the images has a label that
    are learnt from, chosen by or measured on.
    """
    data = make_data(recipe.data, torch.device("cpu"))
    labels = data.train.labels
    needed = {
        "training": (labels, "there is no gain over labels"),
        "test": (data.test.labels, "no gain can be measured"),
    }
    if validates:
        needed["validation"] = (data.validation.labels, "no rate of --rates can be chosen")
    for what, (own, so) in needed.items():
        if not (own >= 0).any():
            raise Mistake(f"{recipe.written.file}: no {what} image has a label, so {so}")
    return float((labels >= 0).float().mean())


def _on_labels(stage: StageKeys, plain: dict[str, Any], allow_python: bool) -> dict[str, Any]:
    """Returns a stage without what it needs of the teacher."""
    terms = list(losses_of(stage))
    if not any(needs_teacher(term) for _, _, term in terms):
        return plain
    key = terms[0][0]
    own = [
        plain[key][n] for at, n, term in terms if at == key and not needs_teacher(term) and term.weight != 0
    ]
    if len(own) == 1:
        own = [{name: value for name, value in own[0].items() if name != "weight"}]
    changed = {k: v for k, v in plain.items() if k != "at_least"} | {key: own or [{"loss": "cross_entropy"}]}
    try:
        TypeAdapter(Stage).validate_python(changed, context={"allow_python": allow_python})
    except ValidationError:  # a stage that cannot do without a teacher
        return {"stage": "train", "training": plain["training"], "losses": changed[key]}
    return changed


def _best_rates(
    arms: dict[str, dict[str, Any]],
    rates: Sequence[float],
    here: Path,
    allow_python: bool,
    processes: int | None,
) -> dict[str, float]:
    """Returns for each arm the learning rate of its first training with the best validation accuracy on seed 0."""
    jobs = []
    for arm in ARMS:
        first = _first_training(arms[arm])
        for rate in rates:
            short = json.loads(json.dumps({**arms[arm], "stages": arms[arm]["stages"][: first + 1]}))
            _set_rate(short, rate)
            jobs.append(_job(here, arm, short, f"{arm}-tried-{rate:g}", 0))
    reports = iter(run_all(jobs, allow_python, processes))
    found: dict[str, float] = {}
    for arm in ARMS:
        right = {rate: next(reports)["rows"][-1]["top1_validation"] for rate in rates}
        found[arm] = max(right, key=lambda rate: right[rate])
        print(
            f"{arm}: validation " + ", ".join(f"{v:.2f} % at {rate:g}" for rate, v in right.items()),
            flush=True,
        )
    return found


def _first_training(plain: Mapping[str, Any]) -> int:
    return next(number for number, stage in enumerate(plain["stages"]) if stage.get("training"))


def _rate(plain: Mapping[str, Any]) -> float:
    stage = plain["stages"][_first_training(plain)]
    training = training_of(TypeAdapter(Stage).validate_python(stage, context={"allow_python": True}))
    assert training is not None
    return training.lr


def _set_rate(plain: dict[str, Any], rate: float) -> None:
    number = _first_training(plain)
    stage = plain["stages"][number]
    plain["stages"][number] = {**stage, "training": {**stage["training"], "lr": rate}}


def _job(here: Path, arm: str, plain: dict[str, Any], name: str, seed: int) -> Job:
    file = _write(here / "recipes" / f"{name}.yaml", {**plain, "name": name, "seed": seed})
    if arm == "taught":
        (here / "views").mkdir(exist_ok=True)
        share_answers(here / "views", here / name)
    return Job(file, {"name": name}, here)


def _write(file: Path, plain: Mapping[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in plain.items() if value is not None}
    files.write_bytes(file, dump(kept).encode())
    return file


def _rows(taught: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each row of the student in the reports."""
    runs = {arm: [[row for row in found["rows"] if not is_teacher(row)] for found in reports]
            for arm, reports in zip(ARMS, (taught, alone), strict=True)}  # fmt: skip
    rows = []
    for number, row in enumerate(runs["taught"][0]):
        arms = {
            arm: {key: [run[number][key] for run in found] for key in ("top1", "agreement")}
            for arm, found in runs.items()
        }
        gains = [a - b for a, b in zip(arms["taught"]["top1"], arms["labels"]["top1"], strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        rows.append({"stage": row["stage"], "gain": statistics.fmean(gains), "error": error, **arms})
    return rows
