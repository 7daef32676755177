"""C99 for anything with a compiler, down to a microcontroller."""

import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from trainer.exporting.c_library import template
from trainer.exporting.c_machines import (
    BOARD_BYTES,
    CORTEX,
    LINUX,
    Native,
    answers_of_example,
    cortex,
    missing,
)
from trainer.exporting.c_source import LINES, Source, check
from trainer.exporting.c_weights import literal
from trainer.exporting.graph import Graph
from trainer.exporting.subject import Exported, Subject

OPS = frozenset(LINES)
MOST_IMAGES, CORTEX_IMAGES = 500, 8  # that are run on the emulated machines, at most
CROSS_SECONDS, CORTEX_SECONDS = (
    1.0,
    0.01,
)  # as many as this machine answers in so long; they are 20 and 1000 times slower
TOLERANCE = 1e-4  # of the largest logit, in the self-check


def check_graph(settings: Any, graph: Graph) -> None:
    """Raises Mistake for a node that cannot be written."""
    check(graph)


def c(subject: Subject, folder: Path) -> Exported:
    """Writes student.c and student.h: C99 without dependency or allocation, int student_run(const float *image, float *logits).

    The weights stay compressed in flash and are walked as they lie; the maps lie in one static block. Beside them example.c, which
    reads images from stdin and checks itself, and CMakeLists.txt. Proven as a library that gcc builds here; and with the same
    bits on aarch64, armhf and a Cortex-M3 under qemu, where their compilers and qemu are installed.
    """
    source = Source(subject.graph)
    files = _written(subject, folder, source)
    size = int(np.prod(subject.graph.shape(subject.graph.output)))
    run = Native(folder, size)
    weights, memory = source.weight_bytes, source.memory_bytes
    notes = [f"the weights take {weights:,} bytes, the maps {memory:,} static bytes"]
    images = np.concatenate([part for part, _ in islice(subject.proof_batches(MOST_IMAGES), 1)])
    started = time.perf_counter()
    run(subject.normalized(images[:1]))
    one = time.perf_counter() - started
    images = images[: max(1, int(CROSS_SECONDS / one))]
    expected = run(subject.normalized(images))
    for machine, (compiler, emulator) in LINUX.items():
        absent = missing([compiler, emulator])
        if absent is None:
            found = answers_of_example(folder, images, compiler, [emulator], ["-static"])
            _same(machine, found, expected)
        notes.append(f"{machine}: " + (absent or f"the same bits for {len(images)} images under {emulator}"))
    absent = missing(CORTEX)
    if max(weights, memory + 4 * images[0].size) > BOARD_BYTES:
        absent = "not run, it is too large for the emulated board"
    numbers: dict[str, Any] = {}
    if absent is None:
        few = images[: max(1, min(CORTEX_IMAGES, int(CORTEX_SECONDS / one)))]
        found, numbers = cortex(folder, subject.normalized(few), size)
        _same("Cortex-M3", found, expected[: len(few)])
        notes.append(
            f"Cortex-M3: the same bits for {len(few)} images under {CORTEX[1]}; flash is the whole firmware with start code and "
            "semihosting, RAM is static and stack without the image, instructions are counted by qemu's -icount"
        )
    else:
        notes.append(f"Cortex-M3: {absent}")
    return Exported(files, run, num_bytes=weights, numbers=numbers, notes=notes)


def _written(subject: Subject, folder: Path, source: Source) -> list[Path]:
    """Writes all files."""
    channels, height, width = subject.shape
    logits = subject.test_vector()[1]

    def numbers(values: Any) -> str:
        return ", ".join(literal(value) for value in values)

    facts = {
        "channels": channels,
        "height": height,
        "width": width,
        "classes": len(logits),
        "memory": source.memory_bytes,
        "mean": numbers(subject.mean or [0.0] * channels),
        "scale": numbers(1 / np.asarray(subject.std or [1.0] * channels, np.float32)),
        "expected": numbers(logits),
        "tolerance": literal(TOLERANCE * max(float(np.abs(logits).max()), 1e-6)),
    }
    texts = {"student.c": source.text, "student.h": template("student.h")}
    texts |= {name: template(f"c_{name}") for name in ("example.c", "CMakeLists.txt")}
    for name, text in texts.items():
        if name in ("student.h", "example.c"):
            for fact, value in facts.items():
                text = text.replace(f"${fact}", str(value))
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _same(machine: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Raises RuntimeError unless the logits are the same bits."""
    if found.shape != expected.shape or not np.array_equal(found.view(np.uint32), expected.view(np.uint32)):
        raise RuntimeError(f"{machine} gives other bits than this machine")
