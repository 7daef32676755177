"""Measures files of networks side by side: accuracy, latency, images a second, time to open, memory, bytes."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.data.batches import make_data
from trainer.data.images import Data, in_size, normalize
from trainer.exporting.fresh import measured
from trainer.exporting.subject import NotInstalled
from trainer.mistakes import Mistake
from trainer.recipe.recipe import read
from trainer.reporting.facts import hardware, versions
from trainer.runs.bench_subjects import LAYOUTS, Subject, subjects
from trainer.runs.opening import accelerator_of
from trainer.runs.threads import available_threads
from trainer.training.evaluate import percent_right, predict

BATCHES = (1, 64)
SECONDS = 1.0  # that each latency is measured, about
CLOSE = 0.05  # times that differ by less are equal


def bench(
    files: Sequence[Path],
    recipe: Path | None = None,
    own: str | None = None,
    allow_python: bool = False,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Measures files of networks, each in processes of its own; a .tiny file by torch, by sparse products and as C.

    Args:
        files: .tiny, .onnx, .pt2 and .safetensors files, and student.c of an export.
        recipe: A recipe, or the bare name of a shipped one, on whose test images accuracy is measured.
        own: What builds a network that its file may not name itself, as the key `model` of a recipe.
        allow_python: Whether `own` and the recipe may name `python:module:name`, and .pt2 files are opened.
        seconds: That each latency is measured, about.

    Returns:
        "rows" (of `_row`), "sparsity" ({file: fraction of zeros in the layers that were made sparse}), "missing" (sentences on what could
        not be measured here), "hardware", "versions".

    Raises:
        Mistake: With all files that cannot be opened, before anything is measured, and where nothing can be.
    """
    data = None
    if recipe is not None:
        keys = read(recipe, None, allow_python)[0].data.model_copy(update={"keep_views": False})
        data = make_data(keys, torch.device("cpu"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        opened, missing, sparsity = subjects(files, own, allow_python, folder)
        if data is not None:
            _check_images(opened, data, recipe)
        if not opened:
            raise NotInstalled("\n".join(missing))
        most = available_threads(1)
        orders = [
            (subject, threads)
            for subject in opened
            for threads in sorted({1, min(most, subject.most_threads or most)})
        ]
        accuracies: dict[int, float | None] = {}
        rows = []
        for subject, threads in tqdm(orders, unit=" measurements", disable=None):
            if id(subject) not in accuracies:
                accuracies[id(subject)] = None if data is None else _top1(subject, data)
            rows.append(_row(subject, threads, seconds) | {"top1": accuracies[id(subject)]})
    return {
        "rows": rows,
        "sparsity": sparsity,
        "missing": missing,
        "num_images": None if data is None else len(data.test),
        "hardware": hardware(),
        "versions": versions(),
    }


def _check_images(subjects: Sequence[Subject], data: Data, recipe: Path | None) -> None:
    """Raises Mistake, with all of them, for files that were made for other images than the recipe's."""

    def wrong() -> Iterator[str]:
        for subject in subjects:
            shape, classes = subject.student.reading.shape, list(subject.student.classes)
            if classes and classes != list(data.classes):
                yield f"{subject.file}: has other classes than the data of {recipe}"
            elif shape[0] != data.shape[0]:
                yield f"{subject.file}: takes images of {shape[0]} channels; those of {recipe} have {data.shape[0]}"
            elif (
                not classes and subject.answer is not None
            ):  # without names their number is all that can be compared
                number = subject.answer(torch.zeros(1, *shape)).shape[1]
                if number != len(data.classes):
                    yield f"{subject.file}: answers with {number} classes; the data of {recipe} has {len(data.classes)}"

    if faults := list(dict.fromkeys(wrong())):
        raise Mistake("\n".join(faults))


def _top1(subject: Subject, data: Data) -> float | None:
    """Returns the accuracy on all test images in percent; None for a row whose network is another row's, and without labels."""
    answer, student = subject.answer, subject.student
    if answer is None:
        return None
    shape = student.reading.shape
    seen = data.at_size(shape[1], student.reading.filter)  # as it was taught: see `Teacher.images_of`

    def logits(images: Tensor) -> Tensor:
        return answer(normalize(in_size(images, shape[1:]), student.mean, student.std))

    with torch.inference_mode():
        right = percent_right(predict(logits, seen.test, accelerator_of(cpu=True)), data.test.labels)
    return None if math.isnan(right) else right


def _row(subject: Subject, threads: int, seconds: float) -> dict[str, Any]:
    """Returns one row: "file", "name" (short), "runtime", "threads", "file_bytes" (of C: code and constants as built here), "load_seconds", "peak_bytes" and
    "own_bytes" (see `fresh.measured`), "latency_seconds" and "latency_p95_seconds" (one image), "batch_seconds" and
    "batch_p95_seconds" (`BATCHES[1]` images), "images_per_second" (at that batch)."""
    found = measured(
        subject.prepare, subject.arguments, subject.student.reading.shape, threads, BATCHES, seconds
    )
    (one, one_late), (many, many_late) = (found["seconds"][batch] for batch in BATCHES)
    return {
        "file": subject.file,
        "name": subject.name,
        "runtime": subject.runtime,
        "threads": threads,
        "file_bytes": subject.num_bytes,
        "load_seconds": found["load_seconds"],
        "peak_bytes": found.get("peak_bytes"),
        "own_bytes": found.get("own_bytes"),
        "latency_seconds": one,
        "latency_p95_seconds": one_late,
        "batch_seconds": many,
        "batch_p95_seconds": many_late,
        "images_per_second": BATCHES[1] / many,
    }


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """Returns a plain sentence for each packed file on whether sparse execution pays at its sparsity, with one thread."""
    said = []
    kinds = {"latency_seconds": "one image", "batch_seconds": f"{BATCHES[1]} images"}
    for file, share in result["sparsity"].items():
        rows = {row["runtime"]: row for row in result["rows"] if row["file"] == file and row["threads"] == 1}
        if math.isnan(share):
            said.append(f"{file}: no linear layer or convolution has a zero: there is nothing to leave out")
            continue
        walking = [name for name in (*LAYOUTS, "C") if name in rows]
        parts, pays = [], []
        for key, what in kinds.items():
            dense = rows["torch"][key]
            shown = ", ".join(f"{name} {_against(rows[name][key], dense)}" for name in walking)
            parts.append(f"for {what} (dense in torch: {1000 * dense:.3g} ms) {shown}")
            pays += [f"{name} for {what}" for name in walking if rows[name][key] < (1 - CLOSE) * dense]
        end = f"it pays in {' and in '.join(pays)}" if pays else "it does not pay here"
        said.append(
            f"{file}: {100 * share:.1f} % of the weights are zero. Sparse execution with one thread: {'; '.join(parts)}: {end}"
        )
    return said


def _against(seconds: float, dense: float) -> str:
    times = seconds / dense
    if abs(times - 1) <= CLOSE:
        return "takes as long"
    many = max(times, 1 / times)
    said = f"{many:.2g}" if many < 10 else f"{many:,.0f}"
    return f"takes {said} times as long" if times > 1 else f"is {said} times as fast"
