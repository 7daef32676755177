"""Runs a recipe with several seeds: mean, spread and worst of every row of its report."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from trainer.mistakes import Mistake
from trainer.recipe.recipe import read
from trainer.reporting.tables import NOTHING
from trainer.runs.several import Job, run_all
from trainer.storage import files


def trials(
    path: str | Path,
    num_seeds: int,
    changes: Mapping[str, Any] | None = None,
    folder: str | Path = "runs",
    name: str | None = None,
    allow_python: bool = False,
    processes: int | None = None,
) -> list[dict[str, Any]]:
    """Runs a recipe with the seeds 0, 1, 2 ...; prints and writes NAME-trials.md and NAME-trials.json; returns the reports.

    Each seed has a run of its own, NAME-seedN. The seed of the data section, which splits off the validation images, stays
    the recipe's. Test accuracies are only reported; nothing is chosen by them.

    Args:
        path: The recipe's file, or the bare name of a shipped one.
        num_seeds: How many seeds.
        changes: {'stages.1.training.epochs': 2, ...}.
        folder: The folder of runs.
        name: Another name than the recipe's.
        allow_python, processes: As for `several.run_all`, with what it raises.
    """
    jobs = jobs_of(path, num_seeds, changes, folder, name, allow_python)
    reports = run_all(jobs, allow_python, processes)
    summary = [{key: found[key] for key in ("seed", "seconds", "rows")} for found in reports]
    name = name_of(jobs)
    text = f"{name}: {about(reports)}\n\n{table([found['rows'] for found in reports])}\n"
    tell(Path(folder) / f"{name}-trials", text, summary)
    return reports


def tell(place: Path, text: str, found: Any) -> None:
    """Prints what several runs have shown, and writes it beside them: the text as PLACE.md, its numbers as PLACE.json, with null for NaN."""
    numbers = json.dumps(files.plain(found, not_finite=lambda _: None), indent=1, allow_nan=False)
    for ending, content in (("md", text), ("json", numbers)):
        files.write_bytes(place.with_name(f"{place.name}.{ending}"), content.encode())
    print(f"\n{text}", flush=True)


def jobs_of(
    path: str | Path,
    num_seeds: int,
    changes: Mapping[str, Any] | None,
    folder: str | Path,
    name: str | None,
    allow_python: bool,
) -> list[Job]:
    """Returns one job for each seed, called NAME-seedN. Raises Mistake for changes with a seed."""
    given = dict(changes or {})
    if "seed" in given:
        raise Mistake("seed has no effect: the runs have the seeds 0, 1, 2 ...")
    name = name or read(path, given, allow_python)[0].name
    return [
        Job(path, {**given, "seed": seed, "name": f"{name}-seed{seed}"}, Path(folder))
        for seed in range(num_seeds)
    ]


def name_of(jobs: Sequence[Job]) -> str:
    """Returns the name that the jobs of `jobs_of` have in common."""
    return str(jobs[0].changes["name"]).removesuffix("-seed0")


def about(reports: Sequence[Mapping[str, Any]]) -> str:
    """Returns how many seeds ran, how long and on what."""
    machine = reports[0]["hardware"]
    on = machine["gpu"] or f"{machine['cpu']}, {machine['torch_threads']} of {machine['cores']} cores"
    seconds = statistics.fmean(found["seconds"] for found in reports)
    seeds = "seed 0" if len(reports) == 1 else f"{len(reports)} seeds (0 to {len(reports) - 1})"
    return f"{seeds}, {seconds:.0f} s a run, {on}"


def spread(values: Sequence[float]) -> str:
    """Returns 'mean ± sample standard deviation', without the latter for one value, a dash for none."""
    if not values:
        return NOTHING
    mean = statistics.fmean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def table(runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Returns one line for each row of the runs' reports: accuracies with their spread and the worst, zeros and bytes."""
    lines = []
    for rows in zip(*runs, strict=True):
        known = {
            key: [row[key] for row in rows if row.get(key) is not None]
            for key in ("top1", "top1_validation", "agreement", "sparsity", "file_bytes", "ratio_student")
        }
        top1, sizes = known["top1"], known["file_bytes"]
        lines.append(
            {
                "stage": rows[0]["stage"],
                "test top-1 %": spread(top1),
                "worst": f"{min(top1):.2f}" if top1 else NOTHING,
                "validation %": spread(known["top1_validation"]),
                "agreement %": spread(known["agreement"]),
                "zeros %": f"{statistics.fmean(known['sparsity']) * 100:.2f}"
                if known["sparsity"]
                else NOTHING,
                "bytes": f"{statistics.fmean(sizes):,.0f}" if sizes else NOTHING,
                "largest": f"{max(sizes):,}" if sizes else NOTHING,
                "to student": f"{statistics.fmean(known['ratio_student']):.1f}×"
                if known["ratio_student"]
                else NOTHING,
            }
        )
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
