"""Writes a student in C for a measurement, and reads what an export to C says of its images."""

import re
from pathlib import Path
from typing import NamedTuple

from trainer.exporting.c_integer import IntegerSource
from trainer.exporting.c_source import Source
from trainer.exporting.integer_steps import is_quantized
from trainer.exporting.subject import Subject
from trainer.mistakes import Mistake

SIZES = ("CHANNELS", "HEIGHT", "WIDTH", "CLASSES")
DECLARED = """#include <stdint.h>
typedef {pixel} student_pixel;
typedef {logit} student_logit;
int student_run(const student_pixel *image, student_logit *logits);
"""


class Told(NamedTuple):
    """What an export to C says of itself.

    shape: (C, H, W) of the images. integer: whether it takes bytes and gives whole numbers. mean, std: of the normalisation of
    images in [0, 1]; where it takes bytes, those that make them.
    """

    shape: tuple[int, int, int]
    classes: int
    integer: bool
    mean: list[float]
    std: list[float]


def write_c(subject: Subject, folder: Path) -> bool:
    """Writes student.c, and of student.h what compiling it needs; returns whether it takes bytes and gives whole numbers."""
    integer = is_quantized(subject.graph)
    text = (IntegerSource(subject.graph) if integer else Source(subject.graph)).text
    pixel, logit = ("uint8_t", "int32_t") if integer else ("float", "float")
    (folder / "student.c").write_text(text, encoding="utf-8")
    (folder / "student.h").write_text(DECLARED.format(pixel=pixel, logit=logit), encoding="utf-8")
    return integer


def told_by(folder: Path) -> Told:
    """Reads student.h and example.c of an export to C. Raises Mistake if they do not say what the images are like."""
    header, example = ((folder / name).read_text(errors="replace") for name in ("student.h", "example.c"))
    found = [re.search(rf"^#define STUDENT_{name} (\d+)$", header, re.M) for name in SIZES]
    integer = re.search(r"\buint8_t student_pixel;", header) is not None
    arrays = [
        re.search(rf"^static const float {name}\[\] = {{(.*)}};$", example, re.M)
        for name in ("mean", "scale")
    ]
    if not all(found) or not (integer or all(arrays)):
        raise Mistake(
            f"{folder}: student.h and example.c do not say sizes, mean and scale, as those of an export to C do"
        )
    channels, height, width, classes = (int(match[1]) for match in found if match)
    if integer:
        mean, std = [0.0] * channels, [1 / 255] * channels
    else:
        mean, scale = ([float(n.rstrip("f")) for n in match[1].split(", ")] for match in arrays if match)
        std = [1 / value for value in scale]
    return Told((channels, height, width), classes, integer, mean, std)
