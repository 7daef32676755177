"""A quantized student in C counts in integers alone, and gives the bits that torch gives, on every machine."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from tests.quantized import NETS, made
from trainer.exporting import c_machines
from trainer.exporting.c_integer import IntegerSource, half_of
from trainer.exporting.c_machines import answers_of_example
from trainer.exporting.c_rows import program_of
from trainer.exporting.dead_units import without_dead
from trainer.exporting.export import export, subject_of
from trainer.exporting.integer_steps import steps_of
from trainer.exporting.quantizing import quantized
from trainer.exports.c import c
from trainer.mistakes import Mistake
from trainer.models.lenet300 import lenet300
from trainer.networks.quantizers import Quantizer, rounded, set_quantizer

FLOATING = re.compile(r"\b(float|double|\d+\.\d*f?)\b")


def needs(*programs):
    absent = c_machines.missing(programs)
    return pytest.mark.skipif(absent is not None, reason=str(absent))


@pytest.fixture(scope="module", params=list(NETS))
def subject(request):
    return NETS[request.param]()


@pytest.mark.device
@needs("gcc")
def test_it_gives_the_bits_of_torch_and_sanitizers_find_nothing(subject, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.exports.c.LINUX", {})
    monkeypatch.setattr("trainer.exports.c.CORTEX", ("no compiler",))
    monkeypatch.setitem(c_machines.PACKAGES, "no compiler", "nothing")
    exported = c(subject, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (60, *subject.shape), np.uint8)
    pixels[0], pixels[1] = 0, 255
    expected = subject.logits(subject.normalized(pixels))
    assert exported.compared == "integer" and exported.takes == "uint8"
    assert np.array_equal(exported.run(pixels), expected)
    safe = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    again = answers_of_example(tmp_path, pixels, "gcc", flags=safe, dtype=np.int32)
    exponent = IntegerSource(subject.graph).exponent
    assert np.array_equal(again * 2.0**exponent, expected)
    code = re.sub(r"//.*", "", (tmp_path / "student.c").read_text())
    assert not FLOATING.search(code)


@pytest.mark.device
@needs(
    "gcc", "aarch64-linux-gnu-gcc", "qemu-aarch64", "arm-linux-gnueabihf-gcc", "qemu-arm", *c_machines.CORTEX
)
def test_all_machines_give_the_same_bits(tmp_path):
    subject = NETS["residual"]()
    exported = c(subject, tmp_path)  # compares them
    assert all(
        any(note.startswith(f"{machine}: the same bits") for note in exported.notes)
        for machine in ("aarch64", "armhf", *c_machines.CORES)
    )
    assert exported.numbers["flash_bytes"] < 4000
    assert exported.numbers["ram_bytes"] < program_of(subject.graph, steps_of(subject.graph)).size + 500


def test_only_the_rows_that_are_still_read_are_kept():
    subject = NETS["residual"]()
    rows = {
        (one.channels, one.height): one.rows
        for one in program_of(subject.graph, steps_of(subject.graph)).maps[1:-1]
    }
    assert rows[8, 9] == 1  # its mean is added up row by row
    maps = program_of(subject.graph, steps_of(subject.graph)).maps
    # conv1, then depthwise, pointwise, depthwise, pointwise, mean
    assert [one.rows for one in maps[1:7]] == [3, 1, 3, 1, 1, 1]


def test_dead_units_are_left_out_and_the_logits_stay():
    net = lenet300((1, 12, 12), 10, hidden=(30, 20))
    with torch.no_grad():
        net.fc1.weight[4:9] = 0
        net.fc1.bias[4:9] = 0
        net.fc2.weight[:, 20:25] = 0
        net.fc3.weight[:, 3] = 0
    subject = made(net, (1, 12, 12), [0.0], [1.0])
    graph = without_dead(subject.graph)
    sizes = [graph.weights[node.weights["weight"]].shape for node in graph.nodes if node.op == "linear"]
    assert sizes[0][0] == sizes[1][1] <= 20 and sizes[1][0] == sizes[2][1] <= 19
    assert IntegerSource(subject.graph).memory_bytes <= 40


@pytest.mark.parametrize("shift", range(13, 18))
def test_a_sum_is_rounded_as_torch_rounds(shift):
    near = torch.cat([torch.arange(-9, 10) + (whole << shift) + (1 << shift - 1) for whole in range(-4, 4)])
    assert torch.equal((near + half_of(shift)) >> shift, rounded(near / 2**shift).long())


def test_a_mean_that_may_lie_between_the_tie_and_a_half_is_refused():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AvgPool2d((8, 16)), nn.Flatten(), nn.Linear(2, 3, bias=False)
    )
    subject = made(net, (1, 8, 16), [0.0], [1.0])
    [x] = [step.x for step in steps_of(subject.graph) if step.node.op == "avg_pool"]
    for shift in (7, 8):  # 2^14 and 2^15 parts of a step
        set_quantizer(subject.network[4], Quantizer(x.exponent + shift, 0))
        source = lambda: IntegerSource(subject_of(subject.network, subject.shape).graph)
        if shift == 7:
            source()
        else:
            with pytest.raises(Mistake, match="such a mean cannot be computed in integers"):
                source()


def test_what_is_not_whole_is_refused():
    net, _ = quantized(lenet300((1, 6, 6), 10, hidden=(5,)).eval(), {"model": "x"}, (1, 6, 6), [0.0], [1.0])
    with pytest.raises(Mistake, match="layer 'fc1': its weights are not of 8 bits: quantize the student"):
        export(net, "unused", "c", shape=(1, 6, 6))
    two = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Hardswish(), nn.Flatten())
    with pytest.raises(Mistake, match="layer '3': operator hardswish cannot be computed in integers"):
        quantized(two, {"model": "x"}, (1, 6, 6), [0.0], [1.0])
