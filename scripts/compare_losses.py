#!/usr/bin/env python
"""Compares every loss with labels alone: students of equal architecture, data and epochs.

    .venv/bin/python scripts/compare_losses.py                    # all, three seeds; resumes if interrupted
    .venv/bin/python scripts/compare_losses.py kl hint --seeds 1  # some

The teacher is that of the recipe's first stage (recipes/fashion_resnet18_to_lenet5.yaml: timm's resnet18); a
run of that recipe in the folder is used again. The students are LeNet-5 (61,706 parameters)
on a fixed part of the training images, without augmentation, all by the same settings: those of one seed
start from the same weights and see the same order of images. The teacher's logits, embeddings and maps are
cached on disk before the first student starts, so that the times include the loss but not the teacher. The
weights are those of the papers or of the benchmark codes that follow them, and were not tuned. The test split is
only reported, after the last epoch; choose a loss by the validation column.

Writes FOLDER/compare_losses/table.md, and a JSON file for each student.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from trainer.data.batches import batches, make_data, seed_of
from trainer.distillation.answers import Answers
from trainer.distillation.objective import Objective
from trainer.networks.build import spec
from trainer.recipe.keys import Augment, CacheKeys, Recipe
from trainer.recipe.recipe import read
from trainer.recipe.words import changes_of
from trainer.runs.runner import begun
from trainer.runs.trials import spread
from trainer.storage import files
from trainer.storage.lock import lock
from trainer.training.evaluate import normalized, percent_right, predict, teacher_answers
from trainer.training.fit import fit
from trainer.training.run import Run
from trainer.training.weights import create

RECIPE = Path("recipes/fashion_resnet18_to_lenet5.yaml")
STUDENT = {"model": "lenet5"}
DATA = {"data.subset": 4_000, "data.views": None, "data.augment": {}}
TRAINING = {"epochs": 10, "batch_size": 64, "lr": 2e-3, "schedule": "one_cycle", "validate_every": 10}
CACHED = 500  # batch size of the teacher while the cache is filled

LABELS = {"loss": "cross_entropy"}
BASE = "labels alone"


def beside(
    loss: str, weight: float | dict[str, Any] = 1.0, labels: float = 1.0, **settings: Any
) -> list[dict[str, Any]]:
    """Returns the terms of a loss together with cross-entropy on the labels."""
    return [LABELS | {"weight": labels}, {"loss": loss, "weight": weight, **settings}]


def rising(value: float) -> dict[str, Any]:
    """Returns a weight that rises over the first twelfth of the epochs: 20 of the 240 that the papers train for."""
    return {"value": value, "schedule": "warm_up", "epochs": TRAINING["epochs"] / 12}


# "authors": of the paper, in their code. RepDistiller: of Tian et al. 2020, who compare a dozen losses.
# Where authors take a sum and our loss takes a mean, the weight is scaled for the maps that are paired here: the
# teacher's 64x14x14, 128x4x4 and 512x1x1 (12,544, 2,048 and 512 numbers).
TERMS: dict[str, list[dict[str, Any]]] = {
    # No teacher.
    BASE: [LABELS],
    "labels, smoothed": [LABELS | {"label_smoothing": 0.1}],
    "binary_cross_entropy": [{"loss": "binary_cross_entropy", "sum_classes": True}],
    # On logits.
    "hard_label": beside("hard_label", 0.5, labels=0.5),  # DeiT
    "kl": beside("kl", 0.9, labels=0.1, temperature=4),  # RepDistiller (Tian et al.)
    "decoupled": beside("decoupled", rising(1), alpha=1, beta=8, temperature=4),  # authors
    "logit_standardized": beside("logit_standardized", 9, labels=0.1, temperature=2),  # authors
    "dist": beside("dist", 1, beta=1, gamma=1, temperature=1),  # authors' ImageNet setting
    "multi_level": beside("multi_level", 0.9, labels=0.1),  # as for kl
    "curriculum_temperature": beside("curriculum_temperature", 0.9, labels=0.1),  # as for kl
    # On maps.
    "hint": beside("hint", 100),  # RepDistiller
    "attention": beside("attention", 1000),  # authors
    "neuron_selectivity": beside("neuron_selectivity", 50),  # authors
    "similarity": beside("similarity", 3000),  # authors
    "fsp": beside("fsp", 50),  # RepDistiller
    # The authors' sum / 1000, halved from each layer to the one below: 12.5 / 4, 2 / 2 and 0.5 are 1.5 a layer.
    "margin_relu": beside("margin_relu", 1.5),
    # The authors' sum x 3 / 1000, halved likewise.
    "activation_boundary": beside("activation_boundary", 5),
    "factor": beside("factor", 500),  # authors
    "review": beside("review", rising(1)),  # authors
    # The authors' sum x 7e-5 is 1.8 means at their 512x7x7, and 0.9, 0.14 and 0.04 here.
    "masked_generative": beside("masked_generative", 1),
    "channel_wise": beside("channel_wise", 50, temperature=4),  # authors, on maps
    "variational": beside("variational", 1),  # authors
    "one_for_all": beside("one_for_all", 1),  # authors
    # On embeddings.
    "relational": beside("relational", 1, distance=25, angle=50),  # authors
    "probabilistic": beside("probabilistic", 30_000),  # RepDistiller
    "correlation": beside("correlation", 1),  # published weights (0.003, 0.02) belong to other sums
    "contrastive": beside("contrastive", 0.8),  # authors; of fewer than 16,384 other images all are negatives
    "reuse_classifier": [{"loss": "reuse_classifier"}],  # authors: no labels, the classifier is replaced
    "semantic": beside("semantic", 1),  # authors
    # On weights.
    "weight_distribution": beside("weight_distribution", 1),  # our own
    # Together, as in our first recipes.
    "kl and hint": [*beside("kl", 0.9, labels=0.1, temperature=4), {"loss": "hint", "weight": 1}],
}


def recipe_of(path: Path, changes: dict[str, Any], terms: list[dict[str, Any]]) -> Recipe:
    """Returns the recipe of a student: the teacher's stage and one for the student, with the changes."""
    plain = read(path)[1]
    labels_only = all(term["loss"] in ("cross_entropy", "binary_cross_entropy") for term in terms)
    stage = {"stage": "train" if labels_only else "distill", "training": TRAINING, "losses": terms}
    given = {"student": STUDENT, **DATA, "stages": [plain["stages"][0], stage], **changes}
    return read(path, given)[0]


def keep_answers(run: Run, recipes: list[Recipe], folder: Path) -> None:
    """Opens a cache of all answers that the losses need from the teacher, and fills it."""
    layers: dict[str, None] = {}
    for recipe in recipes:
        objective = Objective(
            student_of(run, recipe),
            recipe.stages[1].losses,
            run.data,
            run.teacher,
            device=run.accelerator.device,
        )
        layers |= dict.fromkeys(objective.teacher_layers)
    keys = CacheKeys(where="disk", embeddings=True, maps=bool(layers))
    cache = Answers(
        run.teacher, run.data, folder / "views", keys, layers=list(layers), device=run.accelerator.device
    )
    cache.check()
    for images, _, index in batches(
        run.data.train, list(torch.arange(len(run.data.train)).split(CACHED)), 0, run.accelerator.device
    ):
        cache.see(images.float() / 255, index, 0)
    run.cache = cache
    print(f"the teacher's answers are kept: {cache.describe()}", flush=True)


def student_of(run: Run, recipe: Recipe) -> torch.nn.Module:
    """Returns a student initialised from the run's seed, with the same weights for every loss."""
    torch.manual_seed(run.seed * 2 + 1)
    return create(recipe.student, run.data.shape, len(run.data.classes)).network.to(run.accelerator.device)


def trial(run: Run, recipe: Recipe, name: str, seed: int, file: Path) -> dict[str, Any]:
    """Trains one student and measures it, or reads the result of an earlier call from the file.

    Args:
        run: The run with the teacher, the data and the cache.
        recipe: The student's recipe.
        name: The row of the table.
        seed: The student's seed.
        file: The JSON file of the result.

    Raises:
        ValueError: When the file is of another teacher, data or settings.
    """
    facts = {
        "terms": [t.model_dump(mode="json", exclude_unset=True) for t in recipe.stages[1].losses],
        "training": recipe.stages[1].training.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "student": spec(recipe.student),
        "teacher": run.teacher.fingerprint(),
        "seed": seed,
    }
    if file.is_file():
        known = json.loads(file.read_text())
        if known["facts"] != facts:
            wrong = ", ".join(key for key in facts if known["facts"].get(key) != facts[key])
            raise ValueError(f"{file}: is of another {wrong}; remove it, or name another --folder")
        return known
    own = dataclasses.replace(
        run,
        folder=file.with_suffix(""),
        seed=seed,
        stage=1,
        stage_name=recipe.stages[1].stage,
        num_fits=0,
        rows=[],
        layers={},
        learned={},
    )
    own.student = student_of(own, recipe)
    torch.manual_seed(seed_of(seed, 1))
    training = recipe.stages[1].training
    objective = Objective(
        own.student,
        recipe.stages[1].losses,
        own.data,
        own.teacher,
        num_epochs=training.epochs,
        device=own.accelerator.device,
        cache=own.cache,
    )
    moments: list[float] = []

    def clock(step: int, num_steps: int) -> bool:
        moments.append(time.process_time())
        return False

    numbers = fit(own, objective, training, clock)
    objective.finish()
    own.student.eval()
    network = normalized(own.student, own.data)
    answers = predict(network, own.data.test, own.accelerator)
    answers_validation = predict(network, own.data.validation, own.accelerator)
    steps = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    found = {
        "name": name,
        "facts": facts,
        "top1": percent_right(answers, own.data.test.labels),
        "top1_validation": percent_right(answers_validation, own.data.validation.labels),
        "agreement": percent_right(answers, teacher_answers(run, "test")),
        "step_seconds": statistics.median(steps),
        "train_seconds": numbers["train_seconds"],
    }
    files.write_bytes(file, json.dumps(found, indent=1).encode())
    shutil.rmtree(own.folder)
    print(
        f"== {name}, seed {seed}: top-1 {found['top1']:.2f} %  agreement {found['agreement']:.2f} %  "
        f"{found['step_seconds'] * 1e3:.1f} ms a step",
        flush=True,
    )
    return found


def shown(terms: list[dict[str, Any]]) -> str:
    """Returns the terms with their weights as text, as in '0.1 cross_entropy + 0.9 kl'."""

    def weight(term: dict[str, Any]) -> str:
        given = term.get("weight", 1)
        value = given["value"] if isinstance(given, dict) else given
        return f"{value:g} {term['loss']}"

    return " + ".join(weight(term) for term in terms)


def table(trials: dict[str, list[dict[str, Any]]]) -> str:
    """Returns one line a loss, the best first: accuracy, gain over labels alone at the same seed, agreement, cost."""
    base = trials[BASE]
    base_step = statistics.median(t["step_seconds"] for t in base)
    lines = []
    for name, found in trials.items():
        top1 = [t["top1"] for t in found]
        gains = [t["top1"] - b["top1"] for t, b in zip(found, base, strict=False)]
        better = sum(gain > 0 for gain in gains)
        lines.append(
            (
                statistics.fmean(gains),
                {
                    "loss": name,
                    "terms": shown(found[0]["facts"]["terms"]),
                    "test top-1 %": spread(top1),
                    "gain": "–" if name == BASE else f"{statistics.fmean(gains):+.2f}",
                    "seeds that gained": "–" if name == BASE else f"{better} of {len(gains)}",
                    "validation %": spread([t["top1_validation"] for t in found]),
                    "agreement %": spread([t["agreement"] for t in found]),
                    "cost of a step": f"{statistics.median(t['step_seconds'] for t in found) / base_step:.2f}×",
                },
            )
        )
    rows = [line for _, line in sorted(lines, key=lambda pair: -pair[0])]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def main(arguments: list[str] | None = None) -> str:
    """Trains all students, and writes, prints and returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "losses", nargs="*", help=f"rows of the table; all when not given: {', '.join(TERMS)}"
    )
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="its first stage teaches the teacher")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="changes",
        help="of the students' recipe: data.subset=5000, stages.1.training.epochs=4",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.losses) - set(TERMS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no row of the table; allowed: {', '.join(TERMS)}")
    names = [name for name in TERMS if not options.losses or name in options.losses or name == BASE]
    recipes = {name: recipe_of(options.recipe, changes_of(options.changes), TERMS[name]) for name in names}
    folder = options.folder / "compare_losses"
    folder.mkdir(parents=True, exist_ok=True)
    trials: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    started = time.time()
    with begun(options.recipe, 1, None, options.folder) as teacher_run, lock(folder):
        data = make_data(recipes[BASE].data, teacher_run.accelerator.device)
        run = dataclasses.replace(teacher_run, data=data, answers={})
        keep_answers(run, list(recipes.values()), folder)
        for seed in range(options.seeds):
            for name in names:
                file = folder / f"{name.replace(' ', '_').replace(',', '')}-seed{seed}.json"
                trials[name].append(trial(run, recipes[name], name, seed, file))
        right = percent_right(teacher_answers(run, "test"), data.test.labels)
    training = recipes[BASE].stages[1].training
    base = recipes[BASE]
    augmentation = "without augmentation" if data.augment == Augment() else "with augmentation"
    text = (
        f"{base.data.dataset}: {base.student.model} on {len(data.train):,} images {augmentation}, "
        f"{training.epochs} epochs of batches of {training.batch_size}, {options.seeds} seeds; the teacher, "
        f"{base.teacher.model} as {options.recipe.name} teaches it, has {right:.2f} %, and its answers come from the "
        f"disk. ± is the standard deviation over the seeds; the cost is processor time.\n\n{table(trials)}\n"
    )
    files.write_bytes(folder / "table.md", text.encode())
    print(f"\n{text}\n{folder / 'table.md'}  ({time.time() - started:.0f} s)", flush=True)
    return text


if __name__ == "__main__":
    main()
