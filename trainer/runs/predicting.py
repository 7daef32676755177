"""Classifies image files by a packed or exported student: many files, in batches, of which a bad one stops none."""

import csv
import glob
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from trainer.data.image_file import read_image
from trainer.data.listing import list_images
from trainer.data.reading import Reading, reading_of
from trainer.exporting.subject import needed
from trainer.mistakes import Mistake, printable
from trainer.packing import network as packed
from trainer.packing.loading import BATCH, load, preprocess
from trainer.storage.files import read_bytes


class Student(NamedTuple):
    """A network that classifies: names of its classes, how an image is read and normalised, and its answers.

    answer: normalised float32 images [N, C, H, W] to logits [N, K].
    """

    classes: Sequence[str]
    reading: Reading
    mean: Sequence[float]
    std: Sequence[float]
    answer: Callable[[Tensor], Tensor]
    note: str | None = None


class Answer(NamedTuple):
    """What is said of one file: the likeliest (class, probability) pairs, or why it could not be read."""

    file: str
    classes: list[tuple[str, float]]
    error: str | None = None


def open_student(file: Path) -> Student:
    """Opens a .tiny or .onnx file. Raises Mistake for one that does not say what its images are like."""
    if file.suffix.lower() == ".onnx":
        return _open_onnx(file)
    data = read_bytes(file)
    network: Any = load(file)
    reading, header = packed.reading(data, str(file)), packed.header(data, str(file))
    note = None
    if data[2] == 1:
        note = f"{file}: of format version 1: images are resized bilinearly and then cut, as that version did"
    return Student(network.classes, reading, header["mean"], header["std"], network, note)


def _open_onnx(file: Path) -> Student:
    onnxruntime = needed("onnxruntime", "onnx")
    try:
        session = onnxruntime.InferenceSession(read_bytes(file), providers=["CPUExecutionProvider"])
        facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        classes, shape, mean, std = (facts[key] for key in ("classes", "shape", "mean", "std"))
    except KeyError as error:
        raise Mistake(f"{file}: its metadata have no {error}: files of `trainer export` have it") from None
    except Exception as error:  # onnxruntime's own types, one for each fault
        raise Mistake(f"{file}: is no ONNX file that can be run: {str(error).splitlines()[0]}") from None
    name = session.get_inputs()[0].name

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return Student(classes, reading_of(shape, facts.get("reading", {})), mean, std, answer)


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
