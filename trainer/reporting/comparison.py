"""Writes several runs beside each other: a table, and one page with the front, the stages, the exports, and what differs in the recipes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.reporting import charts
from trainer.reporting.front import on_front
from trainer.reporting.page import environment, last_row
from trainer.reporting.plots import position_of
from trainer.reporting.tables import comparison_table

GREY = 7  # the colour of teachers; the runs have those before it
NAMED_BY = ("stage", "loss", "to")  # the key that names an entry of a list in a recipe


def rows_of(reports: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each run, {name: report}: the last row of its student, with "run", "teacher_top1", "teacher_bytes",
    "run_seconds", "seed", "front" (whether no other run is smaller and at least as accurate, or more accurate and no larger)."""
    rows = []
    for name, report in reports.items():
        student, teacher = (last_row(report["rows"], who) or {} for who in ("student", "teacher"))
        rows.append(
            {
                **student,
                "run": name,
                "teacher_top1": teacher.get("top1"),
                "teacher_bytes": teacher.get("file_bytes"),
                "run_seconds": report["seconds"],
                "seed": report.get("seed"),
                "front": False,
            }
        )
    placed = [(row, at) for row in rows if "stage" in row and (at := position_of(row))]
    best = on_front([(size, 100 - right) for _, (size, right) in placed])
    for (row, _), front in zip(placed, best, strict=True):
        row["front"] = front
    return rows


def differences(recipes: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Returns (key, its value in each recipe, '–' where it has none) for each key that is not the same in all.

    Stages, losses and targets are told apart by their names, not by their places: stages.prune.sensitivity.
    """
    flat = [dict(_flat(recipe, "")) for recipe in recipes]
    keys = dict.fromkeys(key for found in flat for key in found)
    told = [(key, [str(found.get(key, "–")) for found in flat]) for key in keys]
    return [(key, values) for key, values in told if len(set(values)) > 1]


def _flat(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        names: list[str] = []
        for number, item in enumerate(value):
            entry = item if isinstance(item, Mapping) else {"to": item}
            key = next((key for key in NAMED_BY if key in entry), None)
            name = str(number) if key is None else str(entry[key])
            names.append(name)
            again = f"{name} {names.count(name)}" if names.count(name) > 1 else name
            yield from _flat({k: v for k, v in entry.items() if k != key}, f"{path}.{again}")
        yield path, ", ".join(names)
    else:
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else value


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of `rows_of` as text, the smallest file first."""
    return comparison_table(sorted(rows, key=lambda row: row.get("file_bytes") or float("inf")))


def page(reports: Mapping[str, Mapping[str, Any]], notes: Sequence[str]) -> str:
    """Returns the comparison of some runs, {name: report}, as one HTML page without any reference to another file.

    notes: what a reader must know before comparing, such as runs on different data.
    """
    from markupsafe import Markup

    rows = rows_of(reports)
    stages = dict.fromkeys(
        str(row["stage"]) for r in reports.values() for row in r["rows"] if not row.get("target")
    )
    by_stage = [(stage, [_found(report["rows"], stage) for report in reports.values()]) for stage in stages]
    exports = [(name, row) for name, report in reports.items() for row in report["rows"] if row.get("target")]
    environments = [report["versions"] | report["hardware"] for report in reports.values()]
    return (
        environment()
        .get_template("comparison.html")
        .render(
            names=list(reports),
            rows=rows,
            notes=notes,
            front=Markup(_front(reports, rows)),
            by_stage=by_stage,
            exports=exports,
            recipes=differences([report["recipe"] for report in reports.values()]),
            environments=differences(environments),
        )
    )


def _found(rows: Sequence[Mapping[str, Any]], stage: str) -> Mapping[str, Any]:
    return next((row for row in reversed(rows) if row["stage"] == stage and not row.get("target")), {})


def _front(reports: Mapping[str, Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    points = [
        (*at, str(row["run"]), number % GREY)
        for number, row in enumerate(rows)
        if "stage" in row and (at := position_of(row))
    ]
    teachers: dict[tuple[float, float], str] = {}
    for name, report in reports.items():
        row = last_row(report["rows"], "teacher")
        if row is not None and (at := position_of(row)):
            teachers[at] = "teacher" if at in teachers or not teachers else f"teacher of {name}"
    if not points:
        return ""
    way = sorted((row["file_bytes"], row["top1"]) for row in rows if row["front"])
    marks = points + [(*at, name, GREY) for at, name in teachers.items()]
    return charts.scatter(marks, (460, 300), ("size of the file", "top-1 accuracy (%), test split"), way)
