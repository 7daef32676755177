"""What of a finished run goes to Weights & Biases beside its log: plots, the page, student.tiny and the exports."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.reporting.report import TRACKED, read

MOST_LETTERS = 64  # of a tag


def tags(config: Mapping[str, Any]) -> list[str]:
    """Returns what a run is found by: its dataset, networks and stages. config: the recipe as plain values."""
    teachers = config.get("teachers") or [config.get("teacher")]
    entries = [("data", "dataset"), ("student", "model")]
    found = [config[part].get(key) for part, key in entries if isinstance(config.get(part), Mapping)]
    found += [keys.get("model") for keys in teachers if isinstance(keys, Mapping)]
    found += [stage.get("stage") for stage in config.get("stages") or [] if isinstance(stage, Mapping)]
    return [str(tag)[:MOST_LETTERS] for tag in dict.fromkeys(found) if tag]


def media(wandb: Any, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a finished run's plots and its page, as wandb shows them. No image of the data is in them unasked."""
    found: dict[str, Any] = {
        f"plots/{plot.stem}": wandb.Image(str(plot)) for plot in sorted(folder.glob("*.png"))
    }
    page = _page(folder, config)
    if page is not None:
        found["page"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
    return found


def _page(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """Returns the page that may be sent; None if that which is there shows images of the data, which were not to be tracked."""
    free = config.get("track_images") or config.get("report_images") is False
    page = folder / ("report.html" if free else TRACKED)
    return page if page.is_file() else None


def send_artifacts(wandb: Any, run: Any, folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Sends a finished run's packed student, exports and report; returns a sentence for each that may not be sent.

    The service keeps each version once, so that a second call sends nothing.
    """
    rows = read(folder)["rows"]
    name = str(config.get("name", folder.name))
    unsent = [] if _page(folder, config) else ["report.html"]
    student = wandb.Artifact(f"{name}-student", type="model")
    files = [row["file"] for row in rows if row.get("file")][-1:]
    for row in rows:
        if row.get("target"):
            here = f"{row['folder']}/{row['stage']}"
            if row.get("shows_images", True) and not config.get("track_images"):
                unsent.append(here)
            else:
                files += [f"{here}/{file}" for file in row["files"]]
    for file in files:
        if (folder / file).is_file():
            student.add_file(str(folder / file), name=file)
    run.log_artifact(student)
    report = wandb.Artifact(f"{name}-report", type="report")
    for path in _report_files(folder, config):
        report.add_file(str(path), name=path.name)
    run.log_artifact(report)
    advice = "it may show images of the data, and the recipe has no track_images: true"
    return [f"{folder / file} is not sent: {advice}" for file in unsent]


def _report_files(folder: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    yield from (
        folder / name for name in ("recipe.yaml", "report.json", "report.md") if (folder / name).is_file()
    )
    yield from sorted(folder.glob("*.png"))
    page = _page(folder, config)
    if page is not None:
        yield page
