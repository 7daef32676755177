"""Writes report.html: one file with the tables, charts and pictures of a run, readable anywhere without a network."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from trainer.mistakes import Mistake
from trainer.reporting import charts
from trainer.reporting.drawing import short_bytes
from trainer.reporting.plots import is_teacher, position_of
from trainer.reporting.tables import (
    FOLDED,
    FURTHER,
    NOTHING,
    RATIOS_SAY,
    by_block,
    duration,
    missing,
    percent,
    weighed,
)
from trainer.storage import records

if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

PARTS = ("mask", "values", "codebook", "other")
BINS = 40
MATRIX_CLASSES = 30  # a confusion matrix of more classes cannot be read


_Count = Annotated[int, Field(ge=0, le=2**53)]


class _Line(TypedDict):
    """What every line of a log has, and a line of numbers needs."""

    kind: str
    step: NotRequired[_Count]
    index: NotRequired[_Count]
    fit: NotRequired[_Count]


#: A line of numbers: those that are not finite are texts.
_NUMBERS = dict[str, float | str | bool | None]


def page(
    report: Mapping[str, Any],
    log: Iterable[Mapping[str, Any]],
    weights: Mapping[str, Mapping[str, np.ndarray]],
    evidence: Mapping[str, Any],
) -> str:
    """Returns a report as one HTML page, without any reference to another file.

    Args:
        report: As in report.json.
        log: The lines of log.jsonl.
        weights: {moment: {layer: weights}}, see `report.write`.
        evidence: What the test images show, see `runs.evidence.gather`; {} leaves those parts out.
    """
    from markupsafe import Markup

    templates = environment()
    layers = report["layers"]
    return templates.get_template("report.html").render(
        report=report,
        rows=report["rows"],
        further={
            key: name
            for key, name in FURTHER.items()
            if any(row.get(key) is not None for row in report["rows"])
        },
        exports=[row for row in report["rows"] if row.get("target")],
        student=last_row(report["rows"], "student"),
        teacher=last_row(report["rows"], "teacher"),
        accuracy=Markup(_accuracy(report["rows"])),
        byte_bars=Markup(_byte_bars(evidence.get("account", ()), len(layers))),
        parts=PARTS,
        trainings=[(name, *map(Markup, drawn), keys) for name, *drawn, keys in _trainings(log)],
        losses=weighed(report["rows"]),
        ratios_say=RATIOS_SAY,
        layers=layers,
        blocks=by_block(layers) if len(layers) > FOLDED else None,
        histograms=[
            (name, [(m, Markup(c), said) for m, c, said in found]) for name, found in _strips(weights)
        ],
        evidence=evidence,
        player=Markup(evidence.get("player") or ""),
        matrix=Markup(_matrix(evidence)),
    )


def environment() -> "Environment":
    """Returns jinja2's environment of the pages' templates, with their filters for numbers."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("trainer.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "share": lambda value: NOTHING if missing(value) else f"{100 * value:.2f} %",
        "count": lambda value: NOTHING if missing(value) else f"{value:,.0f}",
        "times": lambda value: NOTHING if missing(value) else f"{value:,.1f}×",
        "short_bytes": lambda value: NOTHING if missing(value) else short_bytes(value),
        "significant": lambda value: NOTHING if missing(value) else f"{value:.3g}",
        "milliseconds": lambda value: NOTHING if missing(value) else f"{1000 * value:.3g} ms",
        "plain_json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "duration": duration,
    }
    return made


def read_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log; a last line that a kill cut off is left out, and so are damaged ones, with a warning."""
    whole = path.read_bytes().rpartition(b"\n")[0]
    found, damaged = [], []
    for number, line in enumerate(whole.split(b"\n"), start=1):
        try:
            if line:
                read = records.parsed(line, f"{path}:{number}", _Line)
                if read["kind"] == "numbers":
                    records.parsed(line, f"{path}:{number}", _NUMBERS)
                found.append(read)
        except Mistake as error:
            damaged.append(str(error))
    if damaged:
        logger.warning("%d lines of the log are left out of the page: %s", len(damaged), damaged[0])
    return found


def _number(value: Any) -> float:
    """Returns a number of a log, which may be the text "nan" or "inf"; NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def last_row(rows: Sequence[Mapping[str, Any]], who: str) -> Mapping[str, Any] | None:
    """Returns the last row of the "student" or the "teacher" that is no export's; None without one."""
    found = [row for row in rows if is_teacher(row) == (who == "teacher") and not row.get("target")]
    return found[-1] if found else None


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    points = [(*at, str(row["stage"]), int(is_teacher(row))) for row in rows if (at := position_of(row))]
    return (
        charts.scatter(points, (460, 300), ("size of the file", "top-1 accuracy (%), test split"))
        if points
        else ""
    )


def _byte_bars(account: Iterable[Mapping[str, Any]], num_layers: int) -> str:
    rows: dict[str, dict[str, float]] = {}
    for part in account:
        name = part["tensor"] or f"({part['part']})"
        if num_layers > FOLDED:
            layer = part["tensor"].rpartition(".")[0] or part["tensor"]
            name = by_block([{"layer": layer}])[0]["layer"] if layer else "(the file's frame)"
        kind = part["part"] if part["part"] in PARTS else "other"
        rows.setdefault(name, dict.fromkeys(PARTS, 0.0))[kind] += part["bytes"]
    return charts.stacked(list(rows.items()), PARTS, 460) if rows else ""


def _trainings(log: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str, list[str]]]:
    """Returns (title, chart of its loss terms, chart of its validation accuracy, names of the terms) of each training.

    A resumed run wrote some steps twice; the later line counts. What was logged of stages that began anew is left out.
    """
    known = {
        "time",
        "kind",
        "stage",
        "index",
        "fit",
        "step",
        "epoch",
        "lr",
        "images_per_second",
        "teacher_images",
        "validation",
    }
    found: dict[_Training, tuple[dict[str, dict], dict[str, dict]]] = {}
    for line in log:
        if line.get("kind") == "begun":
            found = {key: drawn for key, drawn in found.items() if (key.number or 0) < line.get("index", 0)}
        if line.get("kind") != "numbers" or "step" not in line or "stage" not in line:
            continue
        terms, accuracies = found.setdefault(_training_of(line), ({}, {}))
        if "loss" in line:
            for name in line.keys() - known:
                terms.setdefault(name, {})[line["step"]] = _number(line[name])
        if "validation" in line:
            for name in ("validation", "balanced") if "balanced" in line else ("validation",):
                accuracies.setdefault(name, {})[line["step"]] = _number(line[name])
    shown = []
    fits = Counter((key.stage, key.number) for key in found)
    for key, (terms, accuracies) in found.items():
        if not terms:
            continue
        names = ["loss", *sorted(terms.keys() - {"loss"})]
        size = (460, 260)
        losses = charts.curves(
            {name: _windows(terms[name]) for name in names},
            size,
            ("step", "loss terms, weighted"),
            log=True,
        )
        right = charts.curves(
            {name: sorted(points.items()) for name, points in accuracies.items()},
            size,
            ("step", "top-1 accuracy (%), validation"),
        ) if accuracies else ""  # fmt: skip
        shown.append((_title(key, fits[key.stage, key.number]), losses, right, names))
    return shown


class _Training(NamedTuple):
    """Which training a line of the log is of: the stage's name and number, and the training's number within the stage.

    The numbers are None in the logs of older versions.
    """

    stage: str
    number: int | None
    fit: int | None


def _training_of(line: Mapping[str, Any]) -> _Training:
    return _Training(str(line["stage"]), line.get("index"), line.get("fit"))


def _title(training: _Training, num_fits: int) -> str:
    """Returns the title of a training's charts: "3. prune, training 2" where the stage has several trainings."""
    stage, number, fit = training
    if number is None or fit is None:
        return stage
    return f"{number + 1}. {stage}" + (f", training {fit + 1}" if num_fits > 1 else "")


def _windows(means: Mapping[int, float]) -> list[tuple[float, float]]:
    """Returns a term's means over the steps between two lines of the log, {last step: mean}, as points of a curve.

    A mean over fewer than half as many steps as the longest, as at the end of an epoch, is noise: it joins the next one, at the
    end the one before. What is not finite stands alone.
    """
    steps = sorted(means)
    lengths = {step: max(1, step - before) for before, step in zip([0, *steps], steps, strict=False)}
    groups: list[list[int]] = [[]]
    for step in steps:
        if math.isfinite(means[step]):
            groups[-1].append(step)
            if 2 * sum(lengths[one] for one in groups[-1]) >= max(lengths.values()):
                groups.append([])
    last = groups.pop()
    groups = [*groups[:-1], groups[-1] + last] if groups else [last]
    points = [(step, means[step]) for step in steps if not math.isfinite(means[step])]
    for group in filter(None, groups):
        weight = sum(lengths[step] for step in group)
        points.append((group[-1], sum(lengths[step] * means[step] for step in group) / weight))
    return sorted(points)


def _strips(
    weights: Mapping[str, Mapping[str, np.ndarray]],
) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Returns for each layer (moment, histogram of its non-zero weights, what is said of it) of each moment."""
    layers = list(dict.fromkeys(layer for found in weights.values() for layer in found))
    shown = []
    for layer in layers:
        arrays = {moment: found[layer] for moment, found in weights.items() if layer in found}
        far = max(float(np.abs(array).max(initial=0)) for array in arrays.values()) or 1.0
        edges = np.linspace(-far, far, BINS + 1)
        strips = []
        for number, (moment, array) in enumerate(arrays.items()):
            alive = array[array != 0]
            heights, _ = np.histogram(alive, edges)
            titles = [
                f"{low:.3g} to {high:.3g}: {height:,}"
                for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True)
            ]
            num_values = len(np.unique(alive))
            said = f"{100 * (1 - alive.size / array.size):.1f} % zeros"
            said += f", {num_values} values" if num_values < min(alive.size, 257) else ""
            strips.append((moment, charts.bars(heights.tolist(), titles, (170, 60), number), said))
        shown.append((layer, strips))
    return shown


def _matrix(evidence: Mapping[str, Any]) -> str:
    counts = evidence.get("confusion")
    if not counts or len(counts) > MATRIX_CLASSES:
        return ""
    return charts.heatmap(counts, evidence["classes"], 460)
