"""Compiles a student in C for this and other machines, and runs it there: natively, under qemu, on an emulated Cortex-M3."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.exporting.c_library import template
from trainer.exporting.fresh import Load
from trainer.exporting.installed import NotInstalled

FLAGS = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-ffp-contract=off"]
# {machine: (compiler, emulator)} of Linux machines
LINUX = {
    "aarch64": ("aarch64-linux-gnu-gcc", "qemu-aarch64"),
    "armhf": ("arm-linux-gnueabihf-gcc", "qemu-arm"),
}
CORTEX = ("arm-none-eabi-gcc", "qemu-system-arm")
# {core: (the compiler's flags, qemu's board)}; what is compiled for an M0 runs on the M3's board, which has all its instructions
CORES = {
    "Cortex-M3": ("-mcpu=cortex-m3", "mps2-an385"),
    "Cortex-M0": ("-mcpu=cortex-m0", "mps2-an385"),
    "Cortex-M4F": ("-mcpu=cortex-m4 -mfpu=fpv4-sp-d16 -mfloat-abi=hard", "mps2-an386"),
}
PACKAGES = {
    "gcc": "gcc libc6-dev",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "arm-linux-gnueabihf-gcc": "gcc-arm-linux-gnueabihf libc6-dev-armhf-cross",
    "qemu-aarch64": "qemu-user",
    "qemu-arm": "qemu-user",
    "arm-none-eabi-gcc": "gcc-arm-none-eabi libnewlib-arm-none-eabi",
    "qemu-system-arm": "qemu-system-arm",
}
BOARD_BYTES = 3_500_000  # of weights, and of maps and image, that the emulated board certainly holds
TICK, INSTRUCTION = 40, 64  # nanoseconds of the board's timer and, by -icount shift=6, of one instruction
LONGEST = 300  # seconds


def missing(programs: Sequence[str]) -> str | None:
    """Returns what to install for programs that are not there; None if all are."""
    absent = [name for name in programs if shutil.which(name) is None]
    return f"needs {absent[0]}: apt-get install {PACKAGES[absent[0]]}" if absent else None


def called(command: Sequence[str | Path], **given: Any) -> bytes:
    """Runs a program and returns its output. Raises RuntimeError with what it complains of."""
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, timeout=LONGEST, **given)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} takes longer than {LONGEST} s") from None
    if done.returncode:
        told = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise RuntimeError(f"{command[0]} fails ({done.returncode}): {told[:2000]}")
    return done.stdout


class Native:
    """student.c as a library of this machine. Raises NotInstalled without gcc.

    integer: whether it takes bytes and gives whole logits, else float32.
    """

    def __init__(self, folder: Path, classes: int, integer: bool = False) -> None:
        absent = missing(["gcc"])
        if absent:
            raise NotInstalled(absent)
        self._classes = classes
        with tempfile.TemporaryDirectory() as aside:
            library = Path(aside) / "student.so"
            called(["gcc", *FLAGS, "-fPIC", "-shared", "-o", library, folder / "student.c"])
            self._run = ctypes.CDLL(str(library)).student_run
        self._types = (np.uint8, np.int32) if integer else (np.float32, np.float32)
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Takes normalised float32 images [N, C, H, W], or bytes; returns logits [N, K]."""
        images = np.ascontiguousarray(images, self._types[0])
        logits = np.empty((len(images), self._classes), self._types[1])
        for image, answer in zip(images, logits, strict=True):
            self._run(image.ctypes.data, answer.ctypes.data)
        return logits


def prepare(folder: str, classes: int, integer: bool, threads: int) -> Load:
    """Prepares a student in C for `fresh.measured`: gcc compiles it; it has one thread."""
    native = Native(Path(folder), classes, integer)
    return lambda: native


def object_bytes(folder: Path) -> int:
    """Returns the bytes of code and constants that student.c takes as gcc builds it here. Raises NotInstalled without gcc."""
    absent = missing(["gcc"])
    if absent:
        raise NotInstalled(absent)
    with tempfile.TemporaryDirectory() as aside:
        built = Path(aside) / "student.o"
        called(["gcc", *FLAGS, "-c", "-o", built, folder / "student.c"])
        text, data = called(["size", built]).decode().splitlines()[1].split()[:2]
    return int(text) + int(data)


def answers_of_example(
    folder: Path,
    images: np.ndarray,
    compiler: str,
    emulator: Sequence[str] = (),
    flags: Sequence[str] = (),
    dtype: Any = np.float32,
) -> np.ndarray:
    """Builds example.c, runs its self-check, and returns its logits [N, K] of uint8 images [N, C, H, W].

    Args:
        folder: Where student.c, student.h and example.c are.
        images: As bytes.
        compiler: The program.
        emulator: What runs the built program.
        flags: Of the compiler, beside `FLAGS`.
        dtype: Of the logits.

    Raises:
        RuntimeError: If it does not compile, run, or pass its self-check.
    """
    with tempfile.TemporaryDirectory() as aside:
        program = Path(aside) / "example"
        called([compiler, *FLAGS, *flags, "-o", program, folder / "student.c", folder / "example.c"])
        called([*emulator, program, "check"])
        lines = called([*emulator, program], input=images.tobytes()).decode().splitlines()
    return np.array([line.split()[1:] for line in lines], dtype).reshape(len(images), -1)


def cortex(
    folder: Path, images: np.ndarray, classes: int, optimize: str = "-O2", core: str = "Cortex-M3"
) -> tuple[np.ndarray, dict[str, int]]:
    """Runs a student on an emulated microcontroller.

    Args:
        folder: Where student.c and student.h are.
        images: Normalised float32 [N, C, H, W], or bytes for a student of integers.
        classes: How many logits there are.
        optimize: The compiler's level, and further flags.
        core: Of `CORES`.

    Returns:
        The logits [N, K], float32 or int32, and {"flash_bytes", "ram_bytes", "instructions"}: the whole firmware with start code and
        semihosting; static memory, logits and used stack without the caller's image; instructions of one call of student_run
        (emulated with a fixed time for each, read from the board's timer).

    Raises:
        RuntimeError: If it does not compile or run.
    """
    with tempfile.TemporaryDirectory() as aside:
        here = Path(aside)
        for name in ("c_cortex_m.c", "c_cortex_m.ld"):
            (here / name).write_text(template(name))
        own, machine = CORES[core]
        flags = f"{own} -mthumb {optimize} -std=gnu99 -ffp-contract=off -Wall -Werror -ffunction-sections -fdata-sections".split()
        link: list[str | Path] = [
            "-Wl,--gc-sections",
            "-nostartfiles",
            "--specs=nano.specs",
            "-T",
            here / "c_cortex_m.ld",
        ]
        firmware = here / "firmware.elf"
        sources = [folder / "student.c", here / "c_cortex_m.c"]
        called([CORTEX[0], *flags, f"-I{folder}", *link, "-o", firmware, *sources])
        parts = {
            line.split()[0]: int(line.split()[1])
            for line in called(["arm-none-eabi-size", "-A", firmware]).decode().splitlines()
            if line.startswith(".")
        }
        given, answered = ("u1", "<i4") if images.dtype == np.uint8 else ("<f4", "<f4")
        np.ascontiguousarray(images, given).tofile(here / "images.bin")
        board = f"-M {machine} -nographic -monitor none -serial none -icount shift=6 -semihosting-config enable=on,target=native"
        called([CORTEX[1], *board.split(), "-kernel", firmware], cwd=here, stdin=subprocess.DEVNULL)
        logits = np.fromfile(here / "logits.bin", answered).reshape(len(images), classes)
        stack, ticks = np.fromfile(here / "facts.bin", "<u4").tolist()
    data = parts.get(".data", 0)
    return logits, {
        "flash_bytes": parts[".text"] + parts.get(".ARM.exidx", 0) + data,
        "ram_bytes": data + parts.get(".bss", 0) + stack,
        "instructions": ticks * TICK // INSTRUCTION // len(images),
    }
