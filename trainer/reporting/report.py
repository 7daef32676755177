"""Writes the report of a run: report.json for programs, report.md with plots and report.html for people.

A row holds the results after a stage: "stage", "index", "top1", "top1_validation" and "agreement" (percent),
"num_weights", "num_nonzero", "sparsity" (fraction of zeros), "file_bytes", "ratio_student", "ratio_teacher",
"seconds", the stage's own numbers, and "warning" if the network has learnt nothing. A layer holds "layer",
"shape", "num_weights", "num_nonzero", "sparsity",
"thresholds" (a number or several, on |weight| unless the method says otherwise), "clusters", "bits",
"ratio_sharing", "file_bytes", "csr_bytes", "csc_bytes". Unknown entries are None or left out.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from trainer.reporting import drawing
from trainer.reporting.page import page, read_log
from trainer.reporting.plots import accuracy_against_bytes, histograms, position_of
from trainer.reporting.tables import (
    FOLDED,
    NOTHING,
    RATIOS_SAY,
    by_block,
    class_table,
    confusion_table,
    duration,
    export_table,
    layer_table,
    table,
    weight_table,
)
from trainer.storage import files, records

MOST_CLASSES = 30  # that a table shows
TRACKED = "report_without_images.html"
_Count = Annotated[int, Field(ge=0, le=2**62)]


class Row(TypedDict):
    """The entries of a row that `table` shows."""

    stage: str
    top1: NotRequired[float | None]
    agreement: NotRequired[float | None]
    num_nonzero: NotRequired[_Count | None]
    sparsity: NotRequired[float | None]
    file_bytes: NotRequired[_Count | None]
    ratio_student: NotRequired[float | None]
    ratio_teacher: NotRequired[float | None]


class _Report(TypedDict):
    rows: list[Row]


def write(
    folder: Path,
    report: Mapping[str, Any],
    weights: Mapping[str, Mapping[str, np.ndarray]],
    evidence: Mapping[str, Any],
    tracked: Mapping[str, Any] | None = None,
) -> None:
    """Writes report.json, report.md, the plots and report.html, each file whole or not at all.

    Args:
        folder: The run's folder.
        report: "name", "recipe", "versions", "hardware", "seconds", "rows", "layers" and any others; report.md also
            shows "warnings" (texts), "command" and "seed". In report.json a number that is not finite is null.
        weights: {moment: {layer: weights of any shape}}; moments are "dense", "pruned", "recovered", "clustered",
            "shared".
        evidence: What the test images show, for report.html; see `runs.evidence.gather`.
        tracked: The same for a second page, `TRACKED`, which a tracked run sends instead; None for no such page.
    """
    folder = Path(folder)
    plots = {}
    if any(position_of(row) for row in report["rows"]):
        plots["accuracy_bytes.png"] = accuracy_against_bytes(report)
    for name, figure in histograms(report["name"], weights):
        plots[name] = figure
    for name, figure in plots.items():
        files.write_bytes(folder / name, drawing.png(figure))
    files.write_bytes(folder / "report.md", _markdown(report, list(plots), evidence).encode())
    data = files.plain(report, not_finite=lambda _: None)
    records.write(folder / "report.json", data, indent=1, ensure_ascii=False, allow_nan=False)
    log = folder / "log.jsonl"
    lines = read_log(log) if log.is_file() else []
    (folder / TRACKED).unlink(missing_ok=True)
    for name, shown in (("report.html", evidence), (TRACKED, tracked)):
        if shown is not None:
            files.write_bytes(folder / name, page(data, lines, weights, shown).encode())


def read(folder: Path) -> dict[str, Any]:
    """Reads report.json of a run's folder. Raises Mistake, with the file's name, if it is missing or damaged."""
    path = Path(folder) / "report.json"
    return records.read(path, _Report, f"remove {path}, and the same command writes it anew")


def _markdown(report: Mapping[str, Any], plots: Iterable[str], evidence: Mapping[str, Any]) -> str:
    recipe = report.get("recipe")
    seed = report.get("seed", recipe.get("seed") if isinstance(recipe, Mapping) else None)
    parts = [f"# {report['name']}"]
    facts = [f"took {duration(report['seconds'])}"]
    if seed is not None:
        facts.append(f"seed {seed}")
    command = report.get("command")
    parts.append((f"`{command}`  \n" if command else "") + ", ".join(facts))
    parts += [f"> **Warning**: {warning}" for warning in report.get("warnings") or ()]
    parts += ["## Stages", table(report["rows"])]
    parts.append(
        "Top-1 and agreement with the teacher are on the test split. Bytes are those of the packed file at "
        "that stage; the ratios compare them with the dense student and the dense teacher."
    )
    if any(row.get("ratios") for row in report["rows"]):
        parts += ["## What the losses weigh", weight_table(report["rows"]), RATIOS_SAY]
    exports = [row for row in report["rows"] if row.get("target")]
    if exports:
        parts += ["## Exports", export_table(exports)]
        parts.append(
            "Each was run on the images by its real runtime. Ties are images whose class differs from the student's and whose "
            "two highest logits lie within 1e-4 of the largest. Times are of one image."
        )
        parts += [f"- {row['stage']}: {note}" for row in exports for note in row.get("notes", [])]
    if evidence.get("per_class"):
        parts += ["## Classes", class_table(evidence["per_class"][:MOST_CLASSES])]
        if len(evidence["per_class"]) > MOST_CLASSES:
            parts.append(
                f"The first {MOST_CLASSES} of {len(evidence['per_class'])} classes, as the last student answers them."
            )
        else:
            parts.append(confusion_table(evidence["confusion"], evidence["classes"]))
            parts.append(
                "Both are of the last student on the test split; a row is a true class, a column its answer."
            )
    if report.get("data"):
        parts += ["## Data", "\n".join(f"- {note}" for note in report["data"])]
    if report["layers"]:
        parts += ["## Layers", _layers(report["layers"])]
        parts.append(
            "Formula is the ratio by weight sharing alone, n·b / (n·log2 k + k·b), for the n weights left, "
            "of b = 32 bits, and k clusters; bytes are what the packed file really spends on the layer."
        )
    if plots := list(plots):
        parts += [
            "## Plots",
            *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in plots),
        ]
    parts += ["## Hardware", _listed(report["hardware"]), "## Versions", _listed(report["versions"])]
    return "\n\n".join(parts) + "\n"


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    if len(layers) <= FOLDED:
        return layer_table(layers)
    summary = f"<summary>all {len(layers)} layers</summary>"
    return f"{layer_table(by_block(layers))}\n\n<details>{summary}\n\n{layer_table(layers)}\n\n</details>"


def _listed(facts: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- {key.replace('_', ' ')}: {NOTHING if value is None else value}" for key, value in facts.items()
    )
