"""Compares finished runs by their reports."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from trainer.mistakes import Mistake
from trainer.recipe.keys import DataKeys
from trainer.reporting import comparison
from trainer.reporting.report import Row
from trainer.runs.bench_subjects import short_names
from trainer.storage import files, records


class _Report(TypedDict):
    """What a comparison needs of a report."""

    name: str
    recipe: dict[str, Any]
    versions: dict[str, Any]
    hardware: dict[str, Any]
    seconds: float
    rows: list[Row]


def compare(folders: Sequence[Path], output: Path, force: bool = False) -> str:
    """Writes the comparison of some runs as one page; returns their table, and what must be known before comparing.

    Args:
        folders: The runs' folders, two or more.
        output: The file.
        force: Whether a file of that name is replaced.

    Raises:
        Mistake: With all runs that have no report, or one that this version cannot read; nothing is written then.
    """
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)):
        raise Mistake("compare: two runs or more are needed, each given once")
    if output.exists() and not force:
        raise Mistake(f"{output}: is there already; --force replaces it")
    found, faults = [], []
    for folder in folders:
        try:
            found.append(_read(folder))
        except Mistake as error:
            faults.append(str(error))
    if faults:
        raise Mistake("\n".join(faults))
    reports = dict(zip(short_names(folders), found, strict=True))
    notes = notes_of(reports)
    files.write_bytes(output, comparison.page(reports, notes).encode())
    return "\n\n".join([*notes, comparison.table(comparison.rows_of(reports))])


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    if not path.is_file():
        if (folder / "begun.json").is_file():
            raise Mistake(f"{folder}: this run has not finished: it has no report yet")
        raise Mistake(f"{folder}: is no run's folder: it has no report.json")
    advice = "if another version of the program wrote it, remove it, and the same trainer run writes it anew"
    return records.read(path, _Report, advice)


def notes_of(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns sentences on what makes the figures of some runs, {name: report}, hard to compare: other data, another version."""
    notes = []
    # The validation split, views and augmentation are how a run learns; the rest says which images it is tested on.
    learning = DataKeys.model_fields.keys() - {"dataset"}
    settings = [
        {key: value for key, value in report["recipe"].get("data", {}).items() if key not in learning}
        for report in reports.values()
    ]
    other = [key for key, _ in comparison.differences(settings)]
    tested = [report.get("test_images") for report in reports.values()]
    if other:
        notes.append(
            f"These runs are on different data ({', '.join(other)} differ): their accuracies cannot be compared."
        )
    elif any(one != tested[0] for one in tested if None not in (one, tested[0])):
        notes.append(
            "These runs were tested on different images, although their recipes name the same data: their accuracies cannot be compared."
        )
    versions = {str(report["versions"].get("trainer")) for report in reports.values()}
    if len(versions) > 1:
        notes.append(
            f"These runs were made by different versions of the program: {', '.join(sorted(versions))}."
        )
    return notes
