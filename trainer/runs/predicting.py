"""Classifies image files by a packed or exported student: many files, in batches, of which a bad one stops none."""

import csv
import glob
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np

from trainer.data.image_file import BATCH, read_pixels
from trainer.data.listing import list_images
from trainer.data.reading import Reading
from trainer.mistakes import Mistake, printable


class Classifier(Protocol):
    """A student as torch runs it (`runs.answering`), or as the runtime without torch does (`runtime.student`)."""

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def reading(self) -> Reading: ...

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Returns logits [N, K] for images uint8 [N, C, H, W]."""


class Answer(NamedTuple):
    """What is said of one file: the likeliest (class, probability) pairs, or why it could not be read."""

    file: str
    classes: list[tuple[str, float]]
    error: str | None = None


def files_of(given: Iterable[str]) -> Iterator[str]:
    """Yields the files that arguments mean: a file, the images below a folder, a pattern, or '-' for paths on stdin.

    What does not exist and a folder without an image are yielded as they are: reading them says so.
    """
    for name in given:
        if name == "-":
            yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        elif Path(name).is_dir():
            yield from list_images(Path(name)).files or [name]
        elif not Path(name).exists() and glob.has_magic(name):
            yield from sorted(glob.glob(name, recursive=True)) or [name]
        else:
            yield name


def answers(student: Classifier, files: Iterable[str], top: int, workers: int) -> Iterator[Answer]:
    """Yields the answer to each file, in order; at most two batches of images are in memory.

    workers: threads that read images. Decoding and resizing run outside Python's lock, so that threads do.
    """

    def read(file: str) -> np.ndarray | str:
        try:
            return read_pixels(file, student.reading)
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
            good = [image for image in found if isinstance(image, np.ndarray)]
            likeliest: Iterator[Any] = iter(())
            if good:
                shares = _softmax(student.logits(np.stack(good)))
                best = np.argsort(-shares, axis=1, kind="stable")[:, :top]
                likeliest = zip(best.tolist(), np.take_along_axis(shares, best, 1).tolist(), strict=True)
            for file, image in zip(group, found, strict=True):
                if isinstance(image, str):
                    yield Answer(file, [], image)
                    continue
                pairs = zip(*next(likeliest), strict=True)
                yield Answer(file, [(student.classes[k], share) for k, share in pairs])


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


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
            text = json.dumps(line | ({"error": one.error} if one.error else {}), ensure_ascii=False)
            print(_encodable(text), file=out)
        elif one.error is None and rows:
            rows.writerows([_encodable(one.file), name, f"{share:.6f}"] for name, share in one.classes)
        elif one.error is None:
            words = [f"{printable(name, keep='')} {share * 100:.1f} %" for name, share in one.classes]
            print(f"{printable(one.file, keep='')}: {'  '.join(words)}", file=out)
    return bad


def _encodable(text: str) -> str:
    """Returns a text with a byte of a file's name that is no UTF-8 as an escape, such as \\udcff: JSON reads it back."""
    return text.encode("utf-8", "backslashreplace").decode()
