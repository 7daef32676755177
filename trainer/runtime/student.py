"""Opens a packed file without torch, and classifies with it.

from trainer.runtime.student import open_tiny
open_tiny("student.tiny").predict(["a.png", "b.jpg"])
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.image_file import BATCH, read_pixels
from trainer.data.reading import Reading, reading_of
from trainer.exporting.installed import needed
from trainer.mistakes import Mistake
from trainer.packing import container, headers
from trainer.runtime.layers import Shapes, Values
from trainer.runtime.networks import find
from trainer.storage.files import read_bytes

TOLD = ("classes", "shape", "mean", "std")  # what the file of an export says of its images


class Student(NamedTuple):
    """A network that classifies: names of its classes, how an image is read and normalised, and its answers.

    answer: normalised float32 images [N, C, H, W] to logits [N, K].
    """

    classes: Sequence[str]
    reading: Reading
    mean: Sequence[float]
    std: Sequence[float]
    answer: Callable[[np.ndarray], np.ndarray]
    note: str | None = None

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Returns logits [N, K] for images uint8 [N, C, H, W] of the input's size."""
        parts = [pixels[at : at + BATCH] for at in range(0, len(pixels), BATCH)]
        return np.concatenate([self.answer(normalized(part, self.mean, self.std)) for part in parts])

    def predict(self, files: Iterable[str | Path]) -> list[str]:
        """Returns the name of each image file's class. Raises Mistake for a file that cannot be read."""
        pixels = [read_pixels(file, self.reading) for file in files]
        return [self.classes[k] for k in self.logits(np.stack(pixels)).argmax(1)] if pixels else []


def normalized(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Returns a network's input, float32, for images uint8 [N, C, H, W]: `data.images.normalize`, bit for bit."""
    if len(mean) != pixels.shape[1] or len(std) != pixels.shape[1]:
        raise Mistake(
            f"mean and std have {len(mean)} and {len(std)} values for images of {pixels.shape[1]} channels"
        )
    images = pixels.astype(np.float32) / np.float32(255)
    if len(mean) == 1:
        return (images - np.float32(mean[0])) * np.float32(1 / std[0])
    subtracted, deviation = (np.array(each, np.float32)[:, None, None] for each in (mean, std))
    return (images - subtracted) * (np.float32(1) / deviation)


def open_student(file: Path) -> Student:
    """Opens a .onnx or packed file. Raises Mistake as `open_onnx` and `open_tiny`, and for files that need torch."""
    ending = file.suffix.lower()
    if ending in (".pt2", ".safetensors"):
        raise Mistake(f"{file}: needs torch, which is not installed here; .tiny and .onnx files do not")
    return open_onnx(file) if ending == ".onnx" else open_tiny(file)


def open_onnx(file: str | Path) -> Student:
    """Opens a file of `trainer export` by onnxruntime. Raises Mistake for one that cannot be run or tells too little."""
    onnxruntime = needed("onnxruntime", "onnx")
    try:
        session = onnxruntime.InferenceSession(read_bytes(file), providers=["CPUExecutionProvider"])
        told = session.get_modelmeta().custom_metadata_map
        facts = {key: json.loads(told[key]) for key in (*TOLD, "reading") if key in told}
    except Mistake:
        raise
    except Exception as error:  # onnxruntime's own types, one for each fault
        raise Mistake(f"{file}: is no ONNX file that can be run: {str(error).splitlines()[0]}") from None
    name = session.get_inputs()[0].name

    def answer(images: np.ndarray) -> np.ndarray:
        logits = session.run(None, {name: images})[0]
        check_answers(file, logits.shape[-1], student.classes)
        return logits

    student = told_by(file, facts, answer)  # what it refuses is said before the first answer
    return student


def told_by(
    file: str | Path, facts: Mapping[str, Any], answer: Callable[[np.ndarray], np.ndarray]
) -> Student:
    """Returns the student of an export, with what is written in it. Raises Mistake for an export that tells too little."""
    try:
        _, shape, mean, std = (facts[key] for key in TOLD)
    except KeyError as error:
        raise Mistake(f"{file}: its metadata have no {error}: files of `trainer export` have it") from None
    try:
        headers.check(facts)
    except Mistake as error:
        raise Mistake(f"{file}: its metadata are not valid: {str(error).partition(': ')[2]}") from None
    full = headers.full(facts)
    return Student(full["classes"], reading_of(shape, full["reading"]), mean, std, answer)


def check_answers(file: str | Path, num_answers: int, classes: Sequence[str]) -> None:
    """Raises Mistake where a file's network has more or fewer answers for an image than the file names classes."""
    if num_answers != len(classes):
        raise Mistake(
            f"{file}: has {num_answers} answers for an image, and its metadata name {len(classes)} classes"
        )


def open_tiny(file: str | Path) -> Student:
    """Opens a packed file of a network of the models shelf.

    Raises:
        Mistake: For a damaged file, one of another network, and one that does not say what its images are like.
    """
    data, name = read_bytes(file), str(file)
    header = headers.header(data, name)
    if not headers.rebuilds(header):
        whose = repr(header["net"]["model"]) if "net" in header else "a network"
        raise Mistake(
            f"{name}: holds the weights of {whose} that is on no shelf: export it to onnx first (trainer export, where torch "
            "is installed)"
        )
    try:
        find(header["net"]["model"])
    except Mistake as error:
        raise Mistake(f"{name}: {error}") from None
    reading = headers.reading(data, name)
    _, weights = container.decode(data, name, layout)
    if {key: (array.shape, array.dtype.name) for key, array in weights.items()} != layout(header):
        raise Mistake(f"{name}: does not hold the tensors of {header['net']['model']!r}")
    answer = partial(_apply, Values(weights), header["net"], len(header["classes"]))
    return Student(
        header["classes"], reading, header["mean"], header["std"], answer, headers.note(data, name)
    )


def layout(header: Mapping[str, Any]) -> container.Normal:
    """Returns names, shapes and types of the tensors of the network that the header names, as `packing.network.layout`."""
    header = headers.full(header)
    headers.check_settings(header)
    net = header["net"]
    if net.get("folded"):
        raise Mistake(
            f"the BatchNorm of {net['model']!r} is folded away: it opens with torch, or as an .onnx file"
        )
    if net.get("maps"):
        raise Mistake(f"{net['model']!r} is quantized: it opens with torch, or as an .onnx file")
    resized = net.get("resized", {})
    if not isinstance(resized, Mapping):
        raise Mistake(f"sizes of layers: got {resized!r}; {{layer: [outputs, inputs]}} is allowed")
    shapes = Shapes(resized)
    try:
        _apply(shapes, net, len(header["classes"]), tuple(header["shape"]))
    except (TypeError, LookupError, ArithmeticError) as error:  # settings of a file that somebody else made
        raise Mistake(f"model {net['model']!r} cannot be built: {error}") from error
    return shapes.found


def _apply(net: Any, spec: Mapping[str, Any], num_classes: int, x: Any) -> Any:
    settings = {key: value for key, value in spec.items() if key not in ("model", "resized", "output")}
    return find(spec["model"])(net, x, num_classes, **settings)
