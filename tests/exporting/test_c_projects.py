"""What is written beside a student in C for other people's build systems: CMake's project, and a library folder of Arduino."""

import functools
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from tests.quantized import NETS
from trainer.exporting import c_machines
from trainer.exporting.c_integer import IntegerSource
from trainer.exporting.c_machines import called
from trainer.exporting.export import subject_of
from trainer.exports.c import c

ARDUINO = """#pragma once
#include <stdint.h>
#include <stdio.h>
struct Port {
    int next = -2;
    void begin(long) {}
    operator bool() { return true; }
    int available() { if (next == -2) next = getchar(); return next == -1 ? 0 : 1; }
    int read() { int found = next; next = getchar(); return found; }
    void print(const char *text) { fputs(text, stdout); }
    void print(long value) { printf("%ld", value); }
    void print(double value, int digits) { printf("%.*f", digits, value); }
    void println(unsigned long value) { printf("%lu\\n", value); }
    void println() { puts(""); }
};
static Port Serial;
static unsigned long millis() { return 4000; }
static unsigned long micros() { static unsigned long now = 0; return now += 10; }
"""
MAIN = '#include "Arduino.h"\n#include "Classify.ino"\nint main() { setup(); for (int i = 0; i < 9; i++) loop(); }\n'
STRICT = ["-O2", "-Wall", "-Wextra", "-Werror"]


def needs(*programs):
    absent = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {' and '.join(absent)}: scripts/install --devices")


@pytest.fixture
def here(monkeypatch):
    """Only this machine is asked."""
    monkeypatch.setattr("trainer.exports.c.LINUX", {})
    monkeypatch.setattr("trainer.exports.c.CORTEX", ("no compiler",))
    monkeypatch.setitem(c_machines.PACKAGES, "no compiler", "nothing")


@functools.cache
def subject(integer):
    if integer:
        return next(iter(NETS.values()))()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 10)).eval()
    return subject_of(net, (2, 6, 6), mean=[0.4, 0.2], std=[0.3, 0.5])


@pytest.mark.device
@needs("gcc", "cmake", "ctest")
@pytest.mark.parametrize("integer", [False, True])
def test_cmake_builds_it_and_its_check_passes(integer, here, tmp_path):
    (tmp_path / "c").mkdir()
    c(subject(integer), tmp_path / "c")
    build = tmp_path / "build"
    called(["cmake", "-S", tmp_path / "c", "-B", build])
    called(["cmake", "--build", build])
    assert b"100% tests passed" in called(["ctest", "--test-dir", build])


@pytest.mark.device
@needs("gcc")
@pytest.mark.parametrize("integer", [False, True])
def test_the_library_folder_is_one_of_arduino(integer, here, tmp_path):
    found = subject(integer)
    c(found, tmp_path)
    library = tmp_path / "arduino/TinyStudent"
    lines = (library / "library.properties").read_text().splitlines()
    facts = dict(line.split("=", 1) for line in lines)
    # What the library specification of Arduino asks for; the folder has the library's name, a sketch its folder's.
    asked = "name version author maintainer sentence paragraph category url architectures includes"
    assert list(facts) == asked.split() and facts["name"] == library.name
    assert facts["category"] == "Data Processing" and (library / "src" / facts["includes"]).is_file()
    channels, height, width = found.shape
    assert (
        f"{found.graph.shape(found.graph.output)[-1]} classes of images of {width} x {height} with {channels} channels"
        in facts["paragraph"]
    )
    for name in ("student.c", "student.h"):
        assert (library / "src" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert [path.name for path in (library / "examples/Classify").iterdir()] == ["Classify.ino"]
    assert "$" not in (library / "examples/Classify/Classify.ino").read_text()


def compiled(folder, library, compiler, flags=()):
    """Compiles the library's sketch with a stand-in for Arduino.h; returns the objects."""
    (folder / "Arduino.h").write_text(ARDUINO)
    (folder / "main.cpp").write_text(MAIN)
    objects = [folder / "main.o", folder / "student.o"]
    includes = [f"-I{library}/src", f"-I{library}/examples/Classify", f"-I{folder}"]
    plus = compiler.replace("gcc", "g++")
    called([plus, *flags, *STRICT, "-std=gnu++11", *includes, "-c", "-o", objects[0], folder / "main.cpp"])
    source = library / "src/student.c"
    called([compiler, *flags, *STRICT, "-ffp-contract=off", "-c", "-o", objects[1], source])
    return objects


@pytest.mark.device
@needs("gcc", "g++")
@pytest.mark.parametrize("integer", [False, True])
def test_the_sketch_checks_itself_and_answers_as_the_student(integer, here, tmp_path):
    found = subject(integer)
    exported = c(found, tmp_path)
    library = tmp_path / "arduino/TinyStudent"
    called(["g++", "-o", tmp_path / "sketch", *compiled(tmp_path, library, "gcc")])
    pixels = np.random.default_rng(0).integers(0, 256, (5, *found.shape), np.uint8)
    lines = called([tmp_path / "sketch"], input=pixels.tobytes() + b"half").decode().splitlines()
    assert lines[0] == "the self-check passes, microseconds for an image: 10"
    expected = exported.run(pixels if integer else found.normalized(pixels))
    told = np.array([line.split() for line in lines[1:]], np.float64)
    assert told.shape == (5, expected.shape[1] + 1) and (told[:, 0] == expected.argmax(1)).all()
    logits = told[:, 1:] * (2.0 ** IntegerSource(found.graph).exponent if integer else 1)
    np.testing.assert_allclose(logits, expected, atol=1e-5)

    sketch = library / "examples/Classify/Classify.ino"
    text = sketch.read_text()
    start, _, rest = text.partition("expected[] = {")
    sketch.write_text(f"{start}expected[] = {{99, {rest.partition(',')[2]}")
    called(["g++", "-o", tmp_path / "sketch", *compiled(tmp_path, library, "gcc")])
    assert called([tmp_path / "sketch"], input=b"").startswith(b"the self-check fails")


@pytest.mark.device
@needs("gcc", "arm-none-eabi-gcc", "arm-none-eabi-g++")
def test_the_sketch_compiles_for_a_microcontroller(here, tmp_path):
    c(subject(True), tmp_path)
    flags = ["-mcpu=cortex-m3", "-mthumb"]
    objects = compiled(tmp_path, tmp_path / "arduino/TinyStudent", "arm-none-eabi-gcc", flags)
    symbols = subprocess.run(["arm-none-eabi-nm", objects[1]], capture_output=True, text=True, check=True)
    assert " T student_run" in symbols.stdout
