"""Opens a file of any form that this program writes as a network that classifies."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data.reading import Reading, reading_of
from trainer.distillation.onednn import HALVES, attach
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing import headers
from trainer.packing import network as packed
from trainer.packing.loading import load, preprocess
from trainer.recipe.shelves import ALLOW_PYTHON, PYTHON
from trainer.runtime import student as runtime
from trainer.runtime.student import TOLD
from trainer.storage.files import read_bytes
from trainer.training.weights import load_weights, recorded

FORMS = (".tiny", ".onnx", ".pt2", ".safetensors")


class Student(NamedTuple):
    """A network that classifies: names of its classes, how an image is read and normalised, and its answers.

    answer: normalised float32 images [N, C, H, W] to logits [N, K]. network: as torch runs it, None where another runtime does.
    """

    classes: Sequence[str]
    reading: Reading
    mean: Sequence[float]
    std: Sequence[float]
    answer: Callable[[Tensor], Tensor]
    note: str | None = None
    network: nn.Module | None = None

    @torch.inference_mode()
    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Returns logits [N, K] for images uint8 [N, C, H, W] of the input's size."""
        images = preprocess(torch.from_numpy(pixels), self.reading, self.mean, self.std)
        return self.answer(images).float().numpy()


def in_precision(student: Student, precision: str) -> Student:
    """Returns a student that computes in mixed precision, "bf16" or "fp16", and with "no" the same student.

    Its answers then are not those that its report tells of. Raises Mistake for one that another runtime than torch runs.
    """
    if precision == "no":
        return student
    network = student.network
    if network is None:
        raise Mistake(
            f"--precision {precision} has no effect: the file holds its own graph, in its own types"
        )
    half = HALVES[precision]
    attach(network, learning=False)  # an LSTM computes in float32 where this processor has no other for it

    def answer(images: Tensor) -> Tensor:
        with torch.autocast("cpu", half):
            return network(images)

    return student._replace(answer=answer)


def open_student(file: Path, own: str | None = None, allow_python: bool = False) -> Student:
    """Opens a .tiny, .onnx, .pt2 or .safetensors file.

    Args:
        file: The file; of .safetensors those that this program wrote, which say what network they hold.
        own: What builds its network, as the key `model` of a recipe: for a network that the file may not name itself.
        allow_python: Whether `own` may be `python:module:name`, and whether a .pt2 file is opened: both can run code.

    Raises:
        Mistake: For a file that is damaged, or does not say what its images are like.
    """
    ending = file.suffix.lower()
    if own is not None:
        if ending not in (".tiny", ".safetensors"):
            raise Mistake(f"--model has no effect for {file}: it holds its own graph")
        if own.startswith(PYTHON) and not allow_python:
            raise Mistake(f"--model {own}: {ALLOW_PYTHON}")
    if ending == ".onnx":
        return _open_onnx(file)
    if ending == ".pt2":
        return _open_program(file, allow_python)
    return _open_weights(file, own) if ending == ".safetensors" else _open_packed(file, own)


def _open_packed(file: Path, own: str | None) -> Student:
    data = read_bytes(file)
    header = packed.header(data, str(file))
    into = _own_network(file, header, own, header["shape"], header["classes"])
    network: Any = load(file, into)
    reading = packed.reading(data, str(file))
    note = headers.note(data, str(file))
    return Student(network.classes, reading, header["mean"], header["std"], network, note, network)


def _open_weights(file: Path, own: str | None) -> Student:
    facts = recorded(file)
    missing = [key for key in TOLD if not facts.get(key)]
    if missing or not (facts.get("net") or own):
        raise Mistake(
            f"{file}: does not say {', '.join(missing) or 'net'}: a checkpoint of this program does, as does a .tiny file"
        )
    shape, classes = tuple(facts["shape"]), facts["classes"]
    network = _own_network(file, facts, own, shape, classes)
    if network is None:
        if not packed.rebuilds(facts):
            raise Mistake(f"{file}: holds a network of somebody else's code: name it with --model")
        network = build(facts["net"], shape, len(classes))
    made = load_weights(network, facts.get("net") or {"model": own}, shape, len(classes), file)
    network = made.network.eval()
    reading = reading_of(shape, facts.get("reading") or {})
    return Student(classes, reading, facts["mean"], facts["std"], network, None, network)


def _own_network(
    file: Path,
    facts: Mapping[str, Any],
    own: str | None,
    shape: Sequence[int],
    classes: Sequence[str],
) -> nn.Module | None:
    """Builds the network that the user names for a file, with the settings that the file records of it; None without a name."""
    if own is None:
        return None
    if packed.rebuilds(facts):
        raise Mistake(f"--model has no effect for {file}: it names its network, {facts['net']['model']}")
    if len(shape) != 3 or not classes:
        raise Mistake(f"{file}: was packed without shape or classes: its network cannot be built")
    net = facts.get("net") or {}
    settings = net if net.get("model") == own else {"model": own}
    return build(dict(settings), (shape[0], shape[1], shape[2]), len(classes))


def _open_onnx(file: Path) -> Student:
    opened = runtime.open_onnx(file)

    def answer(images: Tensor) -> Tensor:
        return torch.from_numpy(opened.answer(images.numpy()))

    return Student(opened.classes, opened.reading, opened.mean, opened.std, answer)


def _open_program(file: Path, allow_python: bool) -> Student:
    """Opens a file of `torch.export`, whose loading unpickles."""
    if not allow_python:
        raise Mistake(f"{file}: a .pt2 file can hold code, which opening it runs: allow it by --allow-python")
    read_bytes(file)  # says why a file cannot be read
    extra = {"facts.json": ""}
    try:
        network = torch.export.load(file, extra_files=extra).module()
        facts = json.loads(extra["facts.json"] or "{}")
    except Exception as error:  # torch's own types, and whatever a damaged archive raises
        raise Mistake(
            f"{file}: is no torch.export file that can be run: {str(error).splitlines()[:1]}"
        ) from None
    most = facts.get("batch", 1)
    told = runtime.told_by(file, facts, lambda images: images)

    def answer(images: Tensor) -> Tensor:
        logits = torch.cat([network(part) for part in images.split(most)])
        runtime.check_answers(file, logits.shape[-1], told.classes)
        return logits

    return Student(told.classes, told.reading, told.mean, told.std, answer)
