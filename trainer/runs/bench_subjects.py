"""Opens the files that a bench measures: each in its runtime, a packed file also by sparse products and as C."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.data.reading import Reading
from trainer.exporting import c_machines, onnx_session
from trainer.exporting.c_machines import Native, object_bytes
from trainer.exporting.export import check, subject_of
from trainer.exporting.fresh import Load
from trainer.exporting.sparse_products import Layout, with_sparse_products
from trainer.exporting.subject import NotInstalled
from trainer.mistakes import Mistake
from trainer.recipe.recipe import targets_of
from trainer.runs.answering import FORMS, Student, open_student
from trainer.runs.c_files import told_by, write_c
from trainer.runs.runtimes import network_of, on_arrays, prepare_sparse, prepare_torch
from trainer.storage.files import read_bytes

LAYOUTS: tuple[Layout, ...] = ("scipy CSR", "torch CSR")
TOLERANCE = 1e-3  # of the largest logit, between sparse and dense products


class Subject(NamedTuple):
    """One file in one runtime.

    name: short, for a table. student: what it holds; without class names where the file has none. answer: normalised images to logits, for its accuracy; None
    where that is another row's. prepare, arguments: for `fresh.measured`. most_threads: that the runtime can use, None for any.
    """

    file: str
    name: str
    runtime: str
    num_bytes: int
    student: Student
    answer: Callable[[Tensor], Tensor] | None
    prepare: Callable[..., Load]
    arguments: Mapping[str, Any]
    most_threads: int | None = None


def subjects(
    files: Sequence[Path], own: str | None, allow_python: bool, folder: Path
) -> tuple[list[Subject], list[str], dict[str, float]]:
    found: list[Subject] = []
    faults: list[str] = []
    missing: list[str] = []
    sparsity: dict[str, float] = {}
    used = False
    names = short_names(files)
    for number, file in enumerate(files):
        try:
            if file.suffix.lower() == ".c":
                found.append(_compiled(file, names[number]))
                continue
            if file.suffix.lower() not in FORMS:
                raise Mistake(
                    f"{file}: is of no form that is known here: {', '.join((*FORMS, '.c'))} are allowed"
                )
            brings = own is not None and file.suffix.lower() in (".tiny", ".safetensors")
            used |= brings
            student = open_student(file, own if brings else None, allow_python)
        except NotInstalled as error:
            missing.append(f"{file}: {error}")
            continue
        except Mistake as error:
            faults.append(str(error) if str(file) in str(error) else f"{file}: {error}")
            continue
        found.append(_opened(file, names[number], student, own if brings else None, allow_python))
        if file.suffix.lower() == ".tiny":
            here = folder / str(number)
            here.mkdir()
            more, not_here, share = _sparse(
                file, names[number], student, own if brings else None, allow_python, here
            )
            found += more
            missing += not_here
            sparsity[str(file)] = share
    if own is not None and not used:
        faults.append("--model has no effect: no .tiny or .safetensors file is given")
    if faults:
        raise Mistake("\n".join(faults))
    return found, missing, sparsity


def _opened(file: Path, name: str, student: Student, own: str | None, allow_python: bool) -> Subject:
    arguments: dict[str, Any] = {"file": str(file)}
    prepare: Callable[..., Load]
    if file.suffix.lower() == ".onnx":
        runtime, prepare = "onnxruntime", onnx_session.prepare
    else:
        runtime, prepare = "torch.export" if file.suffix.lower() == ".pt2" else "torch", prepare_torch
        arguments |= {"own": own, "allow_python": allow_python}
    size = file.stat().st_size
    return Subject(str(file), name, runtime, size, student, student.answer, prepare, arguments)


def _compiled(file: Path, name: str) -> Subject:
    """Returns the student of an export to C."""
    read_bytes(file)
    folder, told = file.parent, told_by(file.parent)
    native = Native(folder, told.classes, told.integer)
    answer = _on_tensors((lambda images: native(np.rint(images))) if told.integer else native)
    student = Student((), Reading(told.shape), told.mean, told.std, answer)
    return _in_c(file, name, folder, told.classes, told.integer, student, answer)


def _in_c(
    file: Path,
    name: str,
    folder: Path,
    classes: int,
    integer: bool,
    student: Student,
    answer: Callable[[Tensor], Tensor] | None,
) -> Subject:
    arguments = {"folder": str(folder), "classes": classes, "integer": integer}
    size = object_bytes(folder)
    return Subject(str(file), name, "C", size, student, answer, c_machines.prepare, arguments, 1)


def _sparse(
    file: Path, name: str, student: Student, own: str | None, allow_python: bool, folder: Path
) -> tuple[list[Subject], list[str], float]:
    """Returns a packed file's executions that walk only its weights that are left, what is missing for them, and its sparsity."""
    network, shape, size = network_of(student), student.reading.shape, file.stat().st_size
    found, missing, sparsity = [], [], math.nan
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).numpy()
    dense = on_arrays(network)(images)
    for layout in LAYOUTS:
        sparse, sparsity = with_sparse_products(network, layout)
        if math.isnan(sparsity):
            break
        if not _near(on_arrays(sparse)(images), dense):
            missing.append(f"{file} by {layout}: answers otherwise than torch")
            continue
        arguments: dict[str, Any] = {"file": str(file), "own": own, "allow_python": allow_python}
        arguments["layout"] = layout
        most = 1 if layout == "scipy CSR" else None
        found.append(Subject(str(file), name, layout, size, student, None, prepare_sparse, arguments, most))
    try:
        subject = subject_of(network, shape, classes=student.classes)
        check(targets_of(["c"]), subject.graph, has_data=False)
        integer = write_c(subject, folder)
        native = Native(folder, len(student.classes), integer)
        if not integer and not _near(native(images), dense):  # whole logits have another scale
            raise Mistake("answers otherwise than torch")
        found.append(_in_c(file, name, folder, len(student.classes), integer, student, None))
    except Mistake as error:  # no gcc, or a network that C does not have
        missing.append(f"{file} in C: {error}")
    return found, missing, sparsity


def _near(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return np.allclose(ours, theirs, rtol=0, atol=TOLERANCE * float(np.abs(theirs).max()))


def _on_tensors(run: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensor], Tensor]:
    return lambda images: torch.from_numpy(run(images.numpy()))


def short_names(paths: Sequence[Path]) -> list[str]:
    """Returns the last parts of each path, as many as tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]
