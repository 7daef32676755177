"""Several students answer together, by the mean of their probabilities."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from trainer.exporting.timing import latency
from trainer.mistakes import Mistake
from trainer.recipe.recipe import read
from trainer.recipe.stages import seals
from trainer.reporting.plots import is_teacher
from trainer.reporting.tables import NOTHING, decimals, missing
from trainer.runs.answering import Student
from trainer.runs.evaluate_file import images_of, opened
from trainer.runs.opening import accelerator_of, set_kernels
from trainer.runs.several import run_all
from trainer.runs.trials import about, jobs_of, name_of, tell
from trainer.training.evaluate import normalized, percent_right, predict


def together(students: Mapping[str, Student]) -> Student:
    """Returns a student that answers with the log of the mean of several students' probabilities.

    students: by the names of their files. Raises Mistake for students that do not take the same images, or do not know the same
    classes in the same order.
    """
    (first_name, first), *others = students.items()
    for name, other in others:
        for what in ("classes", "reading"):
            if _plain(getattr(other, what)) != _plain(getattr(first, what)):
                differ = "knows other classes" if what == "classes" else "takes other images"
                raise Mistake(f"{name}: {differ} than {first_name}: they cannot answer together")

    def answer(images: Tensor) -> Tensor:
        """images: in [0, 1], which each student normalises in its own way."""
        parts = [
            student.answer((images - _channels(student.mean)) / _channels(student.std))
            for student in students.values()
        ]
        return mean_of(parts)

    nothing = [0.0] * len(first.mean), [1.0] * len(first.std)
    notes = [student.note for student in students.values() if student.note]
    return first._replace(
        mean=nothing[0], std=nothing[1], answer=answer, note="\n".join(notes) or None, network=None
    )


def mean_of(logits: Sequence[Tensor]) -> Tensor:
    """Returns the log of the mean of the softmax outputs of several logits [N, K]."""
    return torch.stack([each.float().softmax(-1) for each in logits]).mean(0).log()


def ensemble(
    path: str | Path,
    num_seeds: int,
    changes: Mapping[str, Any] | None = None,
    folder: str | Path = "runs",
    name: str | None = None,
    allow_python: bool = False,
    processes: int | None = None,
) -> dict[str, Any]:
    """Runs a recipe with the seeds 0, 1, 2 ... and measures the packed students one by one and together.

    Writes and prints NAME-ensemble.md and NAME-ensemble.json. The runs are those of `trials`.

    Args:
        path, num_seeds, changes, folder, name: As for `trials.trials`.
        allow_python, processes: As for `several.run_all`, with what it raises.

    Returns:
        {"rows"}: one for each student, for the first two, three ... of them together, for the student as it was before it was
        made smaller (the mean over the seeds) and for the teacher. "name", "students" (how many), "top1" (test, percent),
        "top1_validation" (both NaN or None where no image has a label), "file_bytes" (in sum), "latency_seconds" (of one image on one thread; None where not measured).

    Raises:
        Mistake: For a recipe that packs no student.
    """
    recipe, _ = read(path, dict(changes or {}), allow_python)
    if not any(map(seals, recipe.stages)):
        raise Mistake(
            f"{path}: packs no student: an ensemble is of packed files ({{stage: pack}} as the last stage)"
        )
    jobs = jobs_of(path, num_seeds, changes, folder, name, allow_python)
    reports = run_all(jobs, allow_python, processes)
    packed = [job.here / _packed(found) for job, found in zip(jobs, reports, strict=True)]
    found = {"rows": [*_students(path, recipe, packed), *_others(reports)]}
    name = name_of(jobs)
    text = f"{name}: {about(reports)}\n\n{table(found['rows'])}\n"
    tell(Path(folder) / f"{name}-ensemble", text, found)
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns an ensemble's rows as a table."""
    lines = [
        {
            "": row["name"],
            "top-1 %": decimals(row["top1"], 2),
            "validation %": decimals(row["top1_validation"], 2),
            "bytes": f"{row['file_bytes']:,.0f}",
            "ms": NOTHING if row["latency_seconds"] is None else f"{1000 * row['latency_seconds']:.3f}",
        }
        for row in rows
    ]
    return (
        tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
        + "\n\nTogether students answer with the mean of their probabilities; their bytes and times add up. ms: the median time of one "
        "image in torch on one thread."
    )


def _packed(report: Mapping[str, Any]) -> str:
    """Returns the name of the packed file that a run has written."""
    return str(next(row["file"] for row in reversed(report["rows"]) if row.get("file")))


def _students(path: str | Path, recipe: Any, packed: Sequence[Path]) -> list[dict[str, Any]]:
    """Returns the rows of the students, and of the first two, three ... of them together."""
    accelerator = accelerator_of(mixed_precision=recipe.precision)
    set_kernels(recipe)
    networks: list[Callable[[Tensor], Tensor]] = []
    for file in packed:
        content, model, header = opened(file, recipe)
        if not networks:
            data = images_of(file, header, recipe, Path(path), accelerator.device)
        networks.append(normalized(model.to(accelerator.device).eval(), data))
    sizes = [file.stat().st_size for file in packed]
    image = torch.zeros(1, *data.shape, device=accelerator.device)

    def row(name: str, first: int, last: int) -> dict[str, Any]:
        chosen = networks[first:last]

        def answer(images: Tensor) -> Tensor:
            parts = [network(images) for network in chosen]
            return parts[0] if len(parts) == 1 else mean_of(parts)

        right = {
            key: percent_right(predict(answer, part, accelerator), part.labels)
            for key, part in (("top1", data.test), ("top1_validation", data.validation))
        }
        return {
            "name": name,
            "students": len(chosen),
            **right,
            "file_bytes": sum(sizes[first:last]),
            "latency_seconds": _seconds(answer, image),
        }

    num = len(networks)
    alone = [row(f"seed {seed}", seed, seed + 1) for seed in range(num)]
    return alone + [row(f"{count} together", 0, count) for count in range(2, num + 1)]


def _seconds(answer: Callable[[Tensor], Tensor], image: Tensor) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            given = image.cpu().numpy()
            return latency(lambda _: answer(image).cpu(), given, 0.5)[0]
    finally:
        torch.set_num_threads(threads)


def _others(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the student before anything was taken from it, and of the teacher; both as the runs measured them."""
    rows = []
    for name, who, key in (
        ("student before it was made smaller", False, "student_bytes"),
        ("teacher", True, "teacher_bytes"),
    ):
        first = [next((row for row in found["rows"] if is_teacher(row) == who), None) for found in reports]
        if reports[0].get(key) and all(first):
            mean = {k: _mean([row[k] for row in first if row]) for k in ("top1", "top1_validation")}
            rows.append(
                {"name": name, "students": 1, **mean, "file_bytes": reports[0][key], "latency_seconds": None}
            )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean of values; None if one is missing."""
    known = [value for value in values if value is not None and not missing(value)]
    return statistics.fmean(known) if len(known) == len(values) else None


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) and not hasattr(value, "_fields") else value
