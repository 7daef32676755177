"""Classifies image files by a packed or exported student: many files, in batches, of which a bad one stops none."""

import csv
import glob
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from trainer.data.image_file import read_image
from trainer.data.listing import list_images
from trainer.mistakes import Mistake, printable
from trainer.packing.loading import BATCH, preprocess
from trainer.runs.answering import Student


class Answer(NamedTuple):
    """What is said of one file: the likeliest (class, probability) pairs, or why it could not be read."""

    file: str
    classes: list[tuple[str, float]]
    error: str | None = None


def files_of(given: Iterable[str]) -> Iterator[str]:
    """Yields the files that arguments mean: a file, the images below a folder, a pattern, or '-' for paths on stdin.

    What does not exist is yielded as it is: reading it says so.
    """
    for name in given:
        if name == "-":
            yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        elif Path(name).is_dir():
            yield from (str(Path(name, file)) for file in list_images(Path(name)).files)
        elif not Path(name).exists() and glob.has_magic(name):
            yield from sorted(glob.glob(name, recursive=True)) or [name]
        else:
            yield name


@torch.inference_mode()
def answers(student: Student, files: Iterable[str], top: int, workers: int) -> Iterator[Answer]:
    """Yields the answer to each file, in order; at most two batches of images are in memory.

    workers: threads that read images. Decoding and resizing run outside Python's lock, so that threads do.
    """

    def read(file: str) -> Tensor | str:
        try:
            return read_image(file, student.reading)
        except (Mistake, OSError) as error:
            return str(error)

    files = iter(files)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[list[str], list[Future]]] = deque()

        def read_ahead() -> None:
            if group := list(islice(files, BATCH)):
                waiting.append((group, [pool.submit(read, file) for file in group]))

        read_ahead()
        while waiting:
            read_ahead()
            group, reading = waiting.popleft()
            found = [future.result() for future in reading]
            good = [image for image in found if isinstance(image, Tensor)]
            likeliest: Iterator[Any] = iter(())
            if good:
                inputs = preprocess(torch.stack(good), student.reading, student.mean, student.std)
                best = student.answer(inputs).softmax(-1).topk(min(top, len(student.classes)))
                likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for file, image in zip(group, found, strict=True):
                if isinstance(image, str):
                    yield Answer(file, [], image)
                    continue
                classes, shares = next(likeliest)
                yield Answer(file, [(student.classes[k], p) for k, p in zip(classes, shares, strict=True)])


def write_answers(found: Iterable[Answer], form: str, out: TextIO, err: TextIO) -> int:
    """Writes answers as 'text', 'json' (one object a line) or 'csv'; returns how many files could not be read.

    Their errors go to err; with json they are lines too.
    """
    bad = 0
    rows = csv.writer(out) if form == "csv" else None
    if rows:
        rows.writerow(["file", "class", "probability"])
    for one in found:
        if one.error is not None:
            bad += 1
            print(f"trainer: {printable(one.error, keep='')}", file=err, flush=True)
        if form == "json":
            classes = [{"class": name, "probability": round(share, 6)} for name, share in one.classes]
            line: dict[str, Any] = {"file": one.file, "classes": classes}
            print(
                json.dumps(line | ({"error": one.error} if one.error else {}), ensure_ascii=False), file=out
            )
        elif one.error is None and rows:
            rows.writerows([one.file, name, f"{share:.6f}"] for name, share in one.classes)
        elif one.error is None:
            words = [f"{printable(name, keep='')} {share * 100:.1f} %" for name, share in one.classes]
            print(f"{printable(one.file, keep='')}: {'  '.join(words)}", file=out)
    return bad
