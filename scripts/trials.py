#!/usr/bin/env python
"""Runs a recipe with several seeds and prints mean, spread and time of every row of its report.

    .venv/bin/python scripts/trials.py recipes/lenet300_mnist.yaml --seeds 3

Seeds 0, 1, 2 ... each have a run (runs/NAME-seedN), which resumes if interrupted. The seed of the data section, which
splits off the validation images, stays the recipe's. Spread is the sample standard deviation. Test accuracies are only
reported; nothing is chosen by them.
"""

import argparse
import json
import statistics
from pathlib import Path

from tabulate import tabulate

from trainer.recipe.recipe import read
from trainer.recipe.words import changes_of
from trainer.runs.runner import run


def spread(values: list[float]) -> str:
    """Returns 'mean ± standard deviation', without the latter for one value."""
    mean = statistics.fmean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def table(reports: list[dict]) -> str:
    """Returns one line for each row of the reports: accuracies with their spread, the worst one, zeros and bytes."""
    lines = []
    for rows in zip(*(report["rows"] for report in reports), strict=True):
        top1 = [row["top1"] for row in rows]
        agreement = [row["agreement"] for row in rows if row["agreement"] is not None]
        lines.append(
            {
                "stage": rows[0]["stage"],
                "test top-1 %": spread(top1),
                "worst": f"{min(top1):.2f}",
                "validation %": spread([row["top1_validation"] for row in rows]),
                "agreement %": spread(agreement) if agreement else "–",
                "zeros %": f"{statistics.fmean(row['sparsity'] for row in rows) * 100:.2f}",
                "bytes": f"{statistics.fmean(row['file_bytes'] for row in rows):,.0f}",
                "largest": f"{max(row['file_bytes'] for row in rows):,}",
                "to student": f"{statistics.fmean(row['ratio_student'] or 0 for row in rows):.1f}×"
                if rows[0]["ratio_student"]
                else "–",
            }
        )
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def machine(hardware: dict) -> str:
    """Returns the hardware of a run as text."""
    return hardware["gpu"] or f"{hardware['cpu']}, {hardware['torch_threads']} of {hardware['cores']} cores"


def main() -> None:
    """Runs all seeds, and writes and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--name")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="changes")
    parser.add_argument("--allow-python", action="store_true")
    options = parser.parse_args()
    changes = changes_of(options.changes)
    name = options.name or read(options.recipe, changes, options.allow_python)[0].name
    reports = [
        run(
            options.recipe,
            {**changes, "seed": seed, "name": f"{name}-seed{seed}"},
            options.folder,
            allow_python=options.allow_python,
        )
        for seed in range(options.seeds)
    ]
    text = (
        f"{name}: {len(reports)} seeds (0 to {len(reports) - 1}), "
        f"{statistics.fmean(r['seconds'] for r in reports):.0f} s a run, {machine(reports[0]['hardware'])}\n\n{table(reports)}\n"
    )
    print("\n" + text)
    (options.folder / f"{name}-trials.md").write_text(text)
    summary = [{"seed": r["seed"], "seconds": r["seconds"], "rows": r["rows"]} for r in reports]
    (options.folder / f"{name}-trials.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
