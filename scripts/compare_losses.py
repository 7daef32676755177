#!/usr/bin/env python
"""Compares every loss with labels alone: students of equal architecture, data and epochs, each at its own learning rate.

    .venv/bin/python scripts/compare_losses.py                              # all rows, three seeds; goes on where it stopped
    .venv/bin/python scripts/compare_losses.py --rows "kl, T = 1" hint --seeds 1    # some
    .venv/bin/python scripts/compare_losses.py --rates table.md                     # each row at its rate in an earlier table
    .venv/bin/python scripts/compare_losses.py --trained                            # the tables of the students that there are

The recipe gives data, teacher and student (recipes/fashion_4000.yaml: 4,000 images; its teacher is loaded, see there).
Teacher and student share six views of each image. Students of one seed start from the same weights and see the same order of images.
Each row is tried with three learning rates on seed 0, labels alone too; the one with the best validation accuracy is taken for
all seeds. The five rows with the best mean validation accuracy, and labels alone, get five seeds. A row's loss stands beside
cross-entropy of weight 1 and has the weight `auto`, whose gradient is as large as that of the labels in the first steps;
the rows called "paper" have the weights of the papers or of the benchmark codes that follow them. A few rows are
trained for ten epochs without augmentation too. Teacher's answers come from the disk and are there before the first student
starts, so that the times include the loss but not the teacher. The test split is only reported, after the last epoch.
--processes N trains so many students at once, one thread each; the costs of a step are then those of a busy machine.

Writes FOLDER/compare_losses/table.md, and a JSON file for each student.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from trainer.data.batches import batches, seed_of
from trainer.data.views import Views
from trainer.distillation.answers import Answers
from trainer.distillation.objective import Objective
from trainer.networks.build import spec
from trainer.recipe.keys import CacheKeys, Recipe
from trainer.recipe.recipe import read
from trainer.recipe.terms import needs_teacher
from trainer.recipe.words import changes_of
from trainer.runs.runner import begun
from trainer.runs.trials import spread
from trainer.storage import files
from trainer.storage.lock import lock
from trainer.training.evaluate import normalized, percent_right, predict, teacher_answers
from trainer.training.fit import fit
from trainer.training.run import Run
from trainer.training.weights import create

RECIPE = Path("recipes/fashion_4000.yaml")
RATES = (5e-3, 1e-2, 2e-2)
BEST, BEST_SEEDS = 5, 5  # so many rows get so many seeds
CACHED = 500  # batch size of the teacher while the cache is filled

LABELS = {"loss": "cross_entropy"}
ONE = ["conv2"]  # of the student: its last convolution
BASE = "labels alone"
Terms = list[dict[str, Any]]


def balanced(loss: str, **settings: Any) -> Terms:
    """Returns labels and a loss whose gradient is as large."""
    return [LABELS, {"loss": loss, "weight": "auto", **settings}]


def beside(loss: str, weight: float | dict[str, Any] = 1.0, labels: float = 1.0, **settings: Any) -> Terms:
    """Returns the terms of a loss together with cross-entropy on the labels."""
    return [LABELS | {"weight": labels}, {"loss": loss, "weight": weight, **settings}]


# A weight that rises over the first twelfth of the epochs: 20 of the 240 that the papers train for.
RISING = {"value": 1, "schedule": "warm_up", "epochs": 2.5}

# "authors": of the paper, in their code. RepDistiller: of Tian et al. 2020, who compare a dozen losses. ONE where the paper
# compares one layer. Their weights were chosen for sums and means over other maps than ours.
PAPERS: dict[str, Terms] = {
    "hard_label": beside("hard_label", 0.5, labels=0.5),  # DeiT
    "kl": beside("kl", 0.9, labels=0.1, temperature=4),  # RepDistiller (Tian et al.)
    "decoupled": beside("decoupled", RISING, alpha=1, beta=8, temperature=4),  # authors
    "logit_standardized": beside("logit_standardized", 9, labels=0.1, temperature=2),  # authors
    "dist": beside("dist", 1, beta=1, gamma=1, temperature=1),  # authors' ImageNet setting
    "teacher_temperature": beside("teacher_temperature", 1, temperature=4, weighted=True),  # our own
    "normalized": beside("normalized", 1, gamma=1.5, temperature=1),  # authors
    "refined": beside("refined", RISING, alpha=1, beta=4, temperature=4),  # our own, of one temperature
    "multi_level": beside("multi_level", 0.9, labels=0.1),  # as for kl
    "curriculum_temperature": beside("curriculum_temperature", 0.9, labels=0.1),  # as for kl
    "hint": beside("hint", 100, at=ONE),  # RepDistiller
    "attention": beside("attention", 1000),  # authors
    "neuron_selectivity": beside("neuron_selectivity", 50),  # authors
    "similarity": beside("similarity", 3000, at=ONE),  # authors
    "fsp": beside("fsp", 50),  # RepDistiller
    "margin_relu": beside("margin_relu", 1.5),  # authors' sum / 1000, halved from each layer to the one below
    "activation_boundary": beside("activation_boundary", 5),  # authors' sum x 3 / 1000, halved likewise
    "factor": beside("factor", 500, at=ONE),  # authors
    "review": beside("review", RISING),  # authors
    "masked_generative": beside("masked_generative", 1, at=ONE),  # authors' sum x 7e-5
    "channel_wise": beside("channel_wise", 50, temperature=4),  # authors, on maps
    "variational": beside("variational", 1),  # authors
    "one_for_all": beside("one_for_all", 1),  # authors
    "vit_features": beside(
        "vit_features", 9, at=["conv1", "conv2"]
    ),  # authors' sums, at 196 tokens of width 768
    "relational": beside("relational", 1, distance=25, angle=50),  # authors
    "probabilistic": beside("probabilistic", 30_000),  # RepDistiller
    "correlation": beside("correlation", 1),  # published weights (0.003, 0.02) belong to other sums
    "contrastive": beside("contrastive", 0.8),  # authors; of fewer than 16,384 other images all are negatives
    "semantic": beside("semantic", 1),  # authors
    "weight_distribution": beside("weight_distribution", 1),  # our own
}
# Settings of the balanced rows that are not the paper's.
OTHERWISE: dict[str, dict[str, Any]] = {
    "decoupled": {"beta": 1.0, "temperature": 4},  # 8 is CIFAR-100's; ten classes ask for less
    "logit_standardized": {"temperature": 2},
    "refined": {"beta": 1.0, "temperature": 4},  # as for decoupled
}
KL = {"loss": "kl", "weight": "auto", "temperature": 1}


def rows_of() -> dict[str, Terms]:
    """Returns the terms of every row by its name."""
    rows: dict[str, Terms] = {
        BASE: [LABELS],
        "labels, smoothed": [LABELS | {"label_smoothing": 0.1}],
        "binary_cross_entropy": [{"loss": "binary_cross_entropy", "sum_classes": True}],
        **{f"kl, T = {t}": balanced("kl", temperature=t) for t in (1, 2, 4)},
        "kl, T = 1, no labels": [{"loss": "kl", "temperature": 1}],
        "reuse_classifier": [{"loss": "reuse_classifier"}],  # authors: no labels, the classifier is replaced
    }
    for loss, terms in PAPERS.items():
        if loss != "kl":
            at = {"at": terms[-1]["at"]} if "at" in terms[-1] else {}
            own = {k: v for k, v in terms[-1].items() if k not in ("loss", "weight", "at")}
            rows[loss] = balanced(loss, **(OTHERWISE.get(loss) or own), **at)
        rows[f"{loss}, paper"] = terms
    rows["kl, T = 1, and hint"] = [LABELS, KL, {"loss": "hint", "weight": "auto", "at": ONE}]
    rows["kl, T = 1, and similarity"] = [LABELS, KL, {"loss": "similarity", "weight": "auto", "at": ONE}]
    rows["kl, T = 1, and relational"] = [LABELS, KL, {"loss": "relational", "weight": "auto"}]
    return rows


class Protocol(NamedTuple):
    """How long the students of a table train and on what: changes of the recipe, and the names of its rows.

    key: the name of the folder of its students.
    """

    key: str
    title: str
    epochs: int
    changes: dict[str, Any]
    rows: tuple[str, ...]


ROWS = rows_of()
PROTOCOLS = (
    Protocol("views", "30 epochs, shared views", 30, {"data.views": 6}, tuple(ROWS)),
    Protocol(
        "plain",
        "10 epochs, no augmentation",
        10,
        {"data.views": None, "data.augment": {}},
        (BASE, "kl, T = 1", "kl, T = 4", "dist", "hint", "decoupled"),
    ),
)


class Row(NamedTuple):
    """A row of a table: its recipe for each learning rate, and what its students have, by rate and seed."""

    name: str
    recipes: dict[float, Recipe]
    found: dict[tuple[float, int], dict[str, Any]]

    def rate(self) -> float:
        """The learning rate with the best validation accuracy on seed 0."""
        return max(self.recipes, key=lambda rate: self.found[rate, 0]["top1_validation"])

    def trials(self) -> list[dict[str, Any]]:
        """What the students at that rate have, by seed."""
        return [found for (rate, _), found in sorted(self.found.items()) if rate == self.rate()]


def recipe_of(path: Path, changes: dict[str, Any], terms: Terms, epochs: int, rate: float) -> Recipe:
    """Returns the recipe of a student: one stage, with these terms."""
    training = {
        "batch_size": 64,
        "schedule": "one_cycle",
        "epochs": epochs,
        "lr": rate,
        "validate_every": epochs,
    }
    labels_only = all(term["loss"] in ("cross_entropy", "binary_cross_entropy") for term in terms)
    stage = {"stage": "train" if labels_only else "distill", "training": training, "losses": terms}
    return read(path, {"stages": [stage], "cache": None, **changes})[0]


def keep_answers(run: Run, recipes: Iterable[Recipe], folder: Path) -> Answers:
    """Opens a cache of all answers that the losses need from the teacher, and fills it."""
    layers: dict[str, None] = {}
    asks = False
    for recipe in recipes:
        terms = recipe.stages[0].losses
        asks = asks or any(needs_teacher(term) for term in terms)
        objective = Objective(
            student_of(run, recipe), terms, run.data, run.teacher, device=run.accelerator.device
        )
        layers |= dict.fromkeys(objective.teacher_layers)
    keys = CacheKeys(where="disk", type="float16", embeddings=True, maps=bool(layers))
    device, train, views = run.accelerator.device, run.data.train, Views(run.data)
    cache = Answers(run.teacher, run.data, folder / "views", keys, layers=list(layers), device=device)
    cache.check()
    parts = list(torch.arange(len(train)).split(CACHED))
    for view in range(run.data.views or 1) if asks else ():
        for images, _, index in batches(train, parts, 0, device, views.cuts(view)):
            cache.see(views.augmented(images, index, view), index, view, list(layers), True)
    print(f"the teacher's answers are kept: {cache.describe()}", flush=True)
    return cache


def student_of(run: Run, recipe: Recipe) -> torch.nn.Module:
    """Returns a student initialised from the run's seed, with the same weights for every loss."""
    torch.manual_seed(run.seed * 2 + 1)
    return create(recipe.student, run.data.shape, len(run.data.classes)).network.to(run.accelerator.device)


def trial(run: Run, recipe: Recipe, name: str, seed: int, file: Path) -> dict[str, Any]:
    """Trains one student and measures it, or reads the result of an earlier call from the file.

    Raises ValueError when the file is of another teacher, data or settings.
    """
    training, terms = recipe.stages[0].training, recipe.stages[0].losses
    facts = {
        "terms": [term.model_dump(mode="json", exclude_unset=True) for term in terms],
        "training": training.model_dump(mode="json"),
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
    of_training = {
        "folder": file.with_suffix(""),
        "seed": seed,
        "stage": 1,
        "stage_name": recipe.stages[0].stage,
    }
    own = dataclasses.replace(run, num_fits=0, rows=[], layers={}, learned={}, **of_training)
    own.student = student_of(own, recipe)
    torch.manual_seed(seed_of(seed, 1))
    device = own.accelerator.device
    objective = Objective(
        own.student, terms, own.data, own.teacher, num_epochs=training.epochs, device=device, cache=own.cache
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
        "agreement": percent_right(answers, teacher_answers(own, "test")),
        "ratios": numbers.get("ratios", {}),
        "step_seconds": statistics.median(steps),
        "train_seconds": numbers["train_seconds"],
    }
    files.write_bytes(file, json.dumps(found, indent=1).encode())
    shutil.rmtree(own.folder)
    print(
        f"== {name}, lr {training.lr:g}, seed {seed}: validation {found['top1_validation']:.2f} %  top-1 "
        f"{found['top1']:.2f} %  {found['step_seconds'] * 1e3:.1f} ms a step, {found['train_seconds']:.0f} s",
        flush=True,
    )
    return found


def table(rows: list[Row]) -> str:
    """Returns one line a row, the best first: accuracy, gain over labels alone at the same seed, agreement, ratios, cost."""
    base = next(row for row in rows if row.name == BASE).trials()
    labels = {one["facts"]["seed"]: one["top1"] for one in base}
    lines = []
    for row in rows:
        found = [one for one in row.trials() if one["facts"]["seed"] in labels]
        gains = [one["top1"] - labels[one["facts"]["seed"]] for one in found]
        error = f" ± {statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
        ratios = [
            f"{statistics.median(one['ratios'][term]['last'] for one in found):.2g}"
            for term in found[0]["ratios"]
            if not term.startswith("cross_entropy")
        ]
        cost = statistics.median(one["step_seconds"] for one in found)
        line = {
            "loss": row.name,
            "lr": f"{row.rate():g}",
            "test top-1 %": spread([one["top1"] for one in found]),
            "gain": "–" if row.name == BASE else f"{statistics.fmean(gains):+.2f}{error}",
            "seeds": str(len(gains)),
            "validation %": spread([one["top1_validation"] for one in found]),
            "agreement %": spread([one["agreement"] for one in found]),
            "ratio": ", ".join(ratios) or "–",
            "cost of a step": f"{cost / statistics.median(one['step_seconds'] for one in base):.2f}×",
        }
        lines.append((statistics.fmean(gains), line))
    ordered = [line for _, line in sorted(lines, key=lambda pair: -pair[0])]
    return tabulate(ordered, headers="keys", tablefmt="github", disable_numparse=True)


def rates_of(tables: str, title: str) -> dict[str, float]:
    """Returns the learning rate of every row of the table of this title, of those that an earlier call wrote, by its name."""
    others = "|".join(re.escape(protocol.title) for protocol in PROTOCOLS)
    own = re.search(rf"{re.escape(title)}: (.*?)(?=(?:{others}): |\Z)", tables, re.DOTALL)
    lines = own.group(1).splitlines() if own else []
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if line.startswith("|")]
    return {name: float(rate) for name, rate in cells if name in ROWS}


def file_of(folder: Path, row: Row, rate: float, seed: int) -> Path:
    """Returns the file of a student's numbers."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', row.name)}-lr{rate:g}-seed{seed}.json"


def trained(run: Run, rows: list[Row], folder: Path) -> list[Row]:
    """Returns the rows whose students have been trained at all rates on seed 0, with all of their seeds."""
    for row in rows:
        for rate, recipe in row.recipes.items():
            for seed in range(BEST_SEEDS):
                file = file_of(folder, row, rate, seed)
                if file.is_file():
                    row.found[rate, seed] = trial(run, recipe, row.name, seed, file)
    return [row for row in rows if {(rate, 0) for rate in row.recipes} <= set(row.found)]


def compare(run: Run, rows: list[Row], num_seeds: int, folder: Path, processes: int) -> None:
    """Trains the students of a table: all rates on seed 0, the best rate on the other seeds, more seeds of the best rows."""

    def train(row: Row, rate: float, seed: int) -> None:
        row.found[rate, seed] = trial(
            run, row.recipes[rate], row.name, seed, file_of(folder, row, rate, seed)
        )

    def train_all(wanted: list[tuple[Row, float, int]]) -> None:
        in_processes([functools.partial(train, *each) for each in wanted], processes)
        for each in wanted:  # reads what the processes wrote, and trains what they did not
            train(*each)

    train_all([(row, rate, 0) for row in rows for rate in row.recipes])
    train_all([(row, row.rate(), seed) for seed in range(1, num_seeds) for row in rows])
    by_validation = sorted(
        rows, key=lambda row: -statistics.fmean(t["top1_validation"] for t in row.trials())
    )
    chosen = [row for row in by_validation if row.name != BASE][:BEST] + [
        row for row in rows if row.name == BASE
    ]
    seeds = range(num_seeds, BEST_SEEDS if num_seeds > 1 else 0)
    train_all([(row, row.rate(), seed) for seed in seeds for row in chosen])


def in_processes(jobs: list[Callable[[], None]], processes: int) -> None:
    """Calls the jobs in forked processes of one thread, so many at once. What a job returns or raises stays in its process."""
    if processes < 2:
        return
    context = multiprocessing.get_context("fork")
    num_taken = context.Value("i", 0)

    def work() -> None:
        torch.set_num_threads(1)  # more would wait for the threads of the parent, which a fork does not have
        while True:
            with num_taken.get_lock():
                mine = num_taken.value
                num_taken.value += 1
            if mine >= len(jobs):
                return
            jobs[mine]()

    workers = [context.Process(target=work) for _ in range(min(processes, len(jobs)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main(arguments: list[str] | None = None) -> str:
    """Trains all students, and writes, prints and returns the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=[], help=f"all when not given: {'; '.join(ROWS)}")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="gives data, teacher and student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of all students, instead of 30 and 10")
    parser.add_argument(
        "--rates",
        type=Path,
        metavar="TABLE",
        help="table.md of an earlier call: the rows of its tables, each at the rate it has there, not at three",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--processes", type=int, default=1, help="so many students at once")
    parser.add_argument("--trained", action="store_true", help="trains none: the rows that there are")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        dest="changes",
        help="of the recipe: teacher.checkpoint=FILE, data.subset=5000",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.rows) - set(ROWS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no row of the table; allowed: {'; '.join(ROWS)}")
    earlier = options.rates and options.rates.read_text()
    if earlier and not any(BASE in rates_of(earlier, protocol.title) for protocol in PROTOCOLS):
        parser.error(f"{options.rates}: has no row {BASE!r}; the table.md of an earlier call is needed")
    if options.processes > 1 and torch.accelerator.is_available():
        parser.error(
            "--processes: not on a GPU, which a forked process cannot use; several calls, each with a --folder, can share it"
        )
    folder = options.folder / "compare_losses"
    folder.mkdir(parents=True, exist_ok=True)
    changes, started, texts = changes_of(options.changes), time.time(), []
    for protocol in PROTOCOLS:
        names = [name for name in protocol.rows if not options.rows or name in options.rows or name == BASE]
        rates = dict.fromkeys(names, RATES)
        if earlier:
            rates = {
                name: (rate,) for name, rate in rates_of(earlier, protocol.title).items() if name in names
            }
        if not rates:
            print(f"{protocol.title}: has no table in {options.rates}")
            continue
        given = protocol.changes | changes
        epochs = options.epochs or protocol.epochs
        rows = [
            Row(
                name,
                {rate: recipe_of(options.recipe, given, ROWS[name], epochs, rate) for rate in rates[name]},
                {},
            )
            for name in rates
        ]
        first = next(iter(rows[0].recipes.values()))
        own = {
            "stages": [first.written.plain["stages"][0]],
            "cache": None,
            **given,
            "name": protocol.key,
        }
        with begun(options.recipe, 0, own, folder) as run, lock(folder):
            students = folder / "students" / protocol.key
            if options.trained:
                rows = trained(run, rows, students)
                if not rows or rows[0].name != BASE:
                    print(f"{protocol.title}: {BASE} has not been trained at all rates yet")
                    continue
            else:
                run.cache = keep_answers(run, [next(iter(row.recipes.values())) for row in rows], folder)
                compare(run, rows, options.seeds, students, options.processes)
            right = percent_right(teacher_answers(run, "test"), run.data.test.labels)
            num_images, views = len(run.data.train), first.data.views
        texts.append(
            f"{protocol.title}: {first.student.model} on {num_images:,} images of {first.data.dataset}"
            f"{f' in {views} views' if views else ''}, {epochs} epochs of batches of 64, learning rates "
            f"{f'of {options.rates}' if earlier else ', '.join(f'{rate:g}' for rate in RATES)}; the teacher, {first.teacher.model}, has {right:.2f} %. "
            "Gain in points ± its standard error over the seeds, elsewhere ± is the standard deviation; ratio: of the gradients at "
            f"the last epoch; the cost is processor time.\n\n{table(rows)}\n"
        )
        files.write_bytes(folder / "table.md", "\n".join(texts).encode())
    text = "\n".join(texts)
    print(f"\n{text}\n{folder / 'table.md'}  ({time.time() - started:.0f} s)", flush=True)
    return text


if __name__ == "__main__":
    main()
