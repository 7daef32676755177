"""C99 for anything with a compiler, down to a microcontroller."""

import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.exporting.c_integer import IntegerSource
from trainer.exporting.c_library import template
from trainer.exporting.c_machines import (
    BOARD_BYTES,
    CORES,
    CORTEX,
    LINUX,
    Native,
    answers_of_example,
    cortex,
    missing,
)
from trainer.exporting.c_operators import LINES, check
from trainer.exporting.c_rows import program_of
from trainer.exporting.c_source import Source
from trainer.exporting.c_weights import literal
from trainer.exporting.graph import Graph
from trainer.exporting.integer_steps import is_quantized, steps_of
from trainer.exporting.subject import Exported, Subject

OPS = frozenset({*LINES, "quantize"})
MOST_IMAGES, CORTEX_IMAGES = 500, 8  # that are run on the emulated machines, at most
CROSS_SECONDS, CORTEX_SECONDS = (
    1.0,
    0.01,
)  # as many as this machine answers in so long; they are 20 and 1000 times slower
SMALL = "-Os -fno-tree-loop-distribute-patterns"  # without a library's memset and memcpy
ARDUINO = "arduino/TinyStudent"
TOLERANCE = 1e-4  # of the largest logit, in the self-check


def check_graph(settings: Any, graph: Graph) -> None:
    """Raises Mistake for a node that cannot be written."""
    if is_quantized(graph):
        program_of(graph, steps_of(graph))
    else:
        check(graph)


def c(subject: Subject, folder: Path) -> Exported:
    """Writes student.c and student.h: C99 without dependency or allocation, int student_run(const float *image, float *logits).

    The weights stay compressed in flash and are walked as they lie; the maps lie in one static block. Beside them example.c, which
    reads images from stdin and checks itself, CMakeLists.txt, and arduino/TinyStudent, a library folder for Arduino's IDE with a
    sketch that does the same by the serial port. Proven as a library that gcc builds here; and with the same
    bits on aarch64, armhf and a Cortex-M3 under qemu, where their compilers and qemu are installed.
    After a stage quantize the code counts in integers alone, int student_run(const uint8_t *image, int32_t *logits), keeps only
    the rows of each map that are still to be read, and its logits equal the student's bit for bit.
    """
    integer = is_quantized(subject.graph)
    source = IntegerSource(subject.graph) if integer else Source(subject.graph)
    files = _written(subject, folder, source)
    size = int(np.prod(subject.graph.shape(subject.graph.output)))
    native = Native(folder, size, integer)
    notes = [
        f"the weights take {source.weight_bytes:,} bytes, the maps {source.memory_bytes:,} static bytes"
        + ("; whole numbers alone" if integer else "")
    ]
    images = np.concatenate([part for part, _ in islice(subject.proof_batches(MOST_IMAGES), 1)])
    numbers = _on_machines(subject, folder, native, images, source, notes)
    if not isinstance(source, IntegerSource):
        return Exported(files, native, num_bytes=source.weight_bytes, numbers=numbers, notes=notes)
    step = 2.0**source.exponent
    return Exported(
        files,
        lambda bytes_: (native(bytes_) * step).astype(np.float32),  # exact: sums are of 24 bits
        num_bytes=source.weight_bytes,
        takes="uint8",
        compared="integer",
        reference=lambda bytes_: subject.logits(subject.normalized(bytes_)),
        numbers=numbers,
        notes=notes,
    )


def _on_machines(
    subject: Subject,
    folder: Path,
    native: Native,
    images: np.ndarray,
    source: Source | IntegerSource,
    notes: list[str],
) -> dict[str, Any]:
    """Runs the student on other machines, adds a note of each, and returns the numbers of the Cortex-M3.

    Raises RuntimeError where one gives other bits than this machine.
    """
    integer = isinstance(source, IntegerSource)

    def given(pixels: np.ndarray) -> np.ndarray:
        return pixels if integer else subject.normalized(pixels)

    started = time.perf_counter()
    native(given(images[:1]))
    one = time.perf_counter() - started
    images = images[: max(1, int(CROSS_SECONDS / one))]
    expected = native(given(images))
    for machine, (compiler, emulator) in LINUX.items():
        absent = missing([compiler, emulator])
        if absent is None:
            found = answers_of_example(folder, images, compiler, [emulator], ["-static"], expected.dtype)
            _same(machine, found, expected)
        notes.append(f"{machine}: " + (absent or f"the same bits for {len(images)} images under {emulator}"))
    absent = missing(CORTEX)
    memory = source.memory_bytes + given(images[:1]).nbytes
    if max(source.weight_bytes, memory) > BOARD_BYTES:
        absent = "not run, it is too large for the emulated board"
    if absent is not None:
        notes.append(f"Cortex-M3: {absent}")
        return {}
    few = images[: max(1, min(CORTEX_IMAGES, int(CORTEX_SECONDS / one)))]
    numbers: dict[str, Any] = {}
    for core in CORES:
        found, of_core = cortex(folder, given(few), expected.shape[1], SMALL if integer else "-O2", core)
        _same(core, found, expected[: len(few)])
        notes.append(f"{core}: the same bits for {len(few)} images under {CORTEX[1]}")
        numbers = numbers or of_core
    notes[-len(CORES)] += (
        "; flash is the whole firmware with start code and semihosting, RAM is static and stack without the image, instructions are "
        "counted by qemu's -icount"
    )
    return numbers


def _written(subject: Subject, folder: Path, source: Source | IntegerSource) -> list[Path]:
    """Writes all files."""
    channels, height, width = subject.shape
    logits = subject.test_vector()[1]
    integer = isinstance(source, IntegerSource)

    def numbers(values: Any) -> str:
        return ", ".join(literal(value) for value in values)

    mean = numbers(subject.mean or [0.0] * channels)
    scale = numbers(subject.scale)
    facts: dict[str, Any] = {
        "channels": channels,
        "height": height,
        "width": width,
        "classes": len(logits),
        "memory": source.memory_bytes,
    }
    if isinstance(source, IntegerSource):
        facts |= {
            "pixel": "uint8_t",
            "logit": "int32_t",
            "about": "image: [channels][height][width], bytes. logits: [classes], whole; times 2^"
            f"{source.exponent} they are the student's.",
            "compile": "Whole numbers alone.",
            "expected": ", ".join(str(int(v)) for v in logits.astype(np.float64) * 2.0**-source.exponent),
            "exponent": source.exponent,
            "tolerance": "0",
            "statics": f"// Times 2^{source.exponent} the logits are the student's.",
            "normal": "value",
            "shown": "(long)logits[i]",
        }
    else:
        facts |= {
            "pixel": "float",
            "logit": "float",
            "about": "image: [channels][height][width], normalised: (pixel / 255 - mean) * scale, see example.c. "
            "logits: [classes].",
            "compile": "Compile with -ffp-contract=off for the same bits on all machines.",
            "statics": f"static const float mean[] = {{{mean}}};\nstatic const float scale[] = {{{scale}}};",
            "normal": "((float)value / 255.0f - mean[i / PLANE]) * scale[i / PLANE]",
            "shown": "(double)logits[i], 7",
            "expected": numbers(logits),
            "tolerance": literal(TOLERANCE * max(float(np.abs(logits).max()), 1e-6)),
        }
    templates = {
        "student.h": "student.h",
        "example.c": "c_integer_example.c" if integer else "c_example.c",
        f"{ARDUINO}/library.properties": "c_library.properties",
        f"{ARDUINO}/examples/Classify/Classify.ino": "c_arduino.ino",
    }
    filled = {name: template(held) for name, held in templates.items()}
    for name in filled:
        for fact, value in facts.items():
            filled[name] = filled[name].replace(f"${fact}", str(value))
    texts = {"student.c": source.text, **filled, "CMakeLists.txt": template("c_CMakeLists.txt")}
    texts |= {f"{ARDUINO}/src/{name}": texts[name] for name in ("student.c", "student.h")}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in sorted(texts, key=lambda name: name.startswith(ARDUINO))]


def _same(machine: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Raises RuntimeError unless the logits are the same bits."""
    if found.shape != expected.shape or not np.array_equal(found.view(np.uint32), expected.view(np.uint32)):
        raise RuntimeError(f"{machine} gives other bits than this machine")
