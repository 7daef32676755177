"""A student in C: every operator answers as torch does, weights keep their bits, memory is planned, sanitizers find nothing."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainer.exporting import c_machines
from trainer.exporting.c_machines import Native, answers_of_example, cortex
from trainer.exporting.c_memory import plan
from trainer.exporting.c_operators import check
from trainer.exporting.c_weights import literal, stream_of, vector, weight
from trainer.exporting.export import export, subject_of
from trainer.exporting.graph import Graph, Node, Value
from trainer.exporting.shared_values import shared_values
from trainer.exporting.subject import NotInstalled
from trainer.exports.c import c
from trainer.mistakes import Mistake


def needs(*programs):
    absent = c_machines.missing(programs)
    return pytest.mark.skipif(absent is not None, reason=str(absent))


class Images(nn.Module):
    """Convolutions of all kinds, pooling with and without padding, squeeze-excite, concat, slices."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, (3, 2), stride=2, padding=(1, 0))
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.line = nn.Conv1d(8, 6, 3, padding=1, stride=2)
        self.last = nn.Linear(6 * 5 + 16, 10)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        x = F.hardswish(self.norm(self.first(x)))
        y = F.silu(self.depth(x))
        y = y * torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))
        x = F.max_pool2d(x + F.gelu(y) - self.shift, 3, 2, 1)
        x = torch.cat([x, torch.tanh(x) / 2], 1)[:, 3:11]
        z = F.relu6(self.line(F.avg_pool2d(x, 2, 2, padding=1).flatten(2)[..., :9]))
        w = F.hardsigmoid(F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False))
        return self.last(torch.cat([z.flatten(1), w.flatten(1)[:, ::2][:, :24]], 1))


class Sequence(nn.Module):
    """Rows as steps of a sequence: turned axes, softmax, reductions, numbers on both sides, broadcasting."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 10)

    def forward(self, x):
        x = F.leaky_relu(self.first(x.squeeze(1).transpose(1, 2)), 0.1)
        x = F.softmax(x, 1) * x.amax(2, keepdim=True) + 1 / (x.abs() + 1)
        x = 2 - x.clamp(max=0.9) - x.mean(1, keepdim=True) + torch.exp(-x) + torch.erf(x)
        return self.last(F.gelu(x, approximate="tanh").mean(1))


class Tokens(nn.Module):
    """Attention with and without a mask, products, normalizations, padding, windows, and the rest of the functions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 2, stride=2)
        self.group, self.layer, self.plain = nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.LayerNorm(4, bias=False)
        self.slopes, self.slope = nn.PReLU(8), nn.PReLU()
        self.qkv, self.last = nn.Linear(8, 24), nn.Linear(8, 10)
        self.mask = nn.Parameter(torch.randn(4, 1, 6, 6))
        for norm in (self.group, self.layer, self.plain):
            nn.init.normal_(norm.weight)
        nn.init.normal_(self.group.bias)
        nn.init.uniform_(self.slopes.weight, -1, 1)

    def forward(self, x):
        x = F.max_pool2d(F.conv2d(x.reshape(-1, 1, 3, 8), self.mask[:2, :, :3, :3], padding=1), 1).reshape(
            -1, 1, 6, 16
        )[..., 3:11]
        x = self.slopes(self.group(self.first(F.pad(x, (1, 3, 2, 0), value=0.5))))  # [N, 8, 4, 6]
        x = self.slope(x) + F.elu(x, 0.7) - F.softplus(x, beta=3) * F.mish(x)
        x = x + x.abs().sqrt() + (x**2 + 1) ** -1.5 + x**3 / 10
        # windows of 2 x 3, shifted by one
        x = x.roll((1, -1), (2, 3)).view(-1, 8, 2, 2, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 6, 8)
        q, k, v = self.qkv(self.layer(x)).view(-1, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, self.mask[0]) + F.scaled_dot_product_attention(q, k, v)
        z = (q @ k.transpose(-2, -1)) @ self.plain(v)
        x = (y + z).transpose(1, 2).flatten(2).view(-1, 4, 6, 8)
        return self.last((x * self.mask.mean()).mean((1, 2)))


class Recurrent(nn.Module):
    """Two layers in both directions, then one."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.gru, self.last = nn.GRU(12, 7, batch_first=True, bias=False), nn.Linear(7, 4)

    def forward(self, x):
        return self.last(self.gru(self.lstm(x.squeeze(1))[0])[0][:, -1])


def coarse(net, zeros=0.7):
    """Returns a network whose larger weights are sparse and shared, its biases on a grid."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.copy_((parameter * 64).round() / 64)
            elif parameter.numel() > 100:
                kept = torch.rand_like(parameter) >= zeros
                parameter.copy_((parameter * 30).round() / 30 * kept)
    return net.eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return subject_of(coarse(Images()), (3, 16, 16), mean=[0.4, 0.5, 0.3], std=[0.2, 0.3, 0.25])


@pytest.fixture(scope="module")
def sequence():
    torch.manual_seed(1)
    return subject_of(Sequence().eval(), (1, 8, 5))


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(1)
    return subject_of(coarse(Tokens()), (1, 6, 8))


@pytest.fixture(scope="module")
def recurrent():
    return subject_of(coarse(Recurrent()), (1, 8, 5))


@pytest.mark.device
@needs("gcc")
@pytest.mark.parametrize("name", ["images", "sequence", "tokens", "recurrent"])
def test_it_answers_as_torch_and_sanitizers_find_nothing(name, request, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.exports.c.LINUX", {})
    monkeypatch.setattr("trainer.exports.c.CORTEX", ("no compiler",))
    monkeypatch.setitem(c_machines.PACKAGES, "no compiler", "nothing")
    subject = request.getfixturevalue(name)
    exported = c(subject, tmp_path)
    names = ["student.c", "student.h", "example.c", "CMakeLists.txt"]
    assert [file.name for file in exported.files if "arduino" not in str(file.relative_to(tmp_path))] == names
    assert "Cortex-M3: needs no compiler: apt-get install nothing" in exported.notes
    pixels = np.random.default_rng(0).integers(0, 256, (20, *subject.shape), np.uint8)
    expected = subject.logits(subject.normalized(pixels))
    found = exported.run(subject.normalized(pixels))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6 * np.abs(expected).max())
    safe = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    again = answers_of_example(tmp_path, pixels, "gcc", flags=safe)
    assert np.array_equal(found.view(np.uint32), again.view(np.uint32))


@pytest.mark.device
@needs(
    "gcc", "aarch64-linux-gnu-gcc", "qemu-aarch64", "arm-linux-gnueabihf-gcc", "qemu-arm", *c_machines.CORTEX
)
def test_all_machines_give_the_same_bits(images, tmp_path):
    exported = c(images, tmp_path)  # compares them
    assert all(
        any(note.startswith(f"{machine}: the same bits") for note in exported.notes)
        for machine in ("aarch64", "armhf", *c_machines.CORES)
    )
    assert 4000 < exported.numbers["flash_bytes"] < 12000
    assert plan(images.graph).size * 4 < exported.numbers["ram_bytes"] < plan(images.graph).size * 4 + 800


@pytest.mark.device
@needs("gcc")
def test_a_network_too_large_for_the_board_is_exported_all_the_same(sequence, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.exports.c.LINUX", {})
    monkeypatch.setattr("trainer.exports.c.BOARD_BYTES", 100)
    exported = c(sequence, tmp_path)
    assert (
        exported.notes[-1] == "Cortex-M3: not run, it is too large for the emulated board"
        and not exported.numbers
    )


@pytest.mark.device
@needs(*c_machines.CORTEX)
def test_instructions_are_counted_one_by_one(tmp_path):
    sizes = "".join(f"#define STUDENT_{name} 2\n" for name in ("CHANNELS", "HEIGHT", "WIDTH", "CLASSES"))
    (tmp_path / "student.h").write_text(
        sizes
        + "typedef float student_pixel, student_logit;\nint student_run(const float *image, float *logits);\n"
    )
    (tmp_path / "student.c").write_text("""#include "student.h"
int student_run(const float *image, float *logits)
{
    unsigned n = 500000;
    logits[0] = image[7];
    logits[1] = 0;
    __asm volatile("1: subs %0, #1\\n bne 1b" : "+r"(n));
    return 0;
}
""")
    images = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)
    logits, numbers = cortex(tmp_path, images, 2)
    assert logits.tolist() == [[7, 0], [15, 0], [23, 0]]
    assert 1_000_000 < numbers["instructions"] < 1_000_050
    assert numbers["flash_bytes"] < 1000 and numbers["ram_bytes"] < 150  # of the start code and semihosting


def test_a_stream_gives_back_gaps_and_codes():
    values = np.zeros(2000, np.float32)
    values[[0, 3, 4, 258, 513, 1999]] = [0.5, -1, 2, 0.5, -1, 0.5]  # gaps of 253, 254 and more
    stream = stream_of(shared_values(values))
    bits = iter(np.unpackbits(stream.bits, bitorder="little").tolist())

    def symbol(words):
        word = first = before = 0
        for count in words:
            word, first = 2 * word + next(bits), 2 * first
            if word - first < count:
                return before + word - first
            before, first = before + count, first + count

    found, at = np.zeros(2000, np.float32), -1
    for _ in range(stream.count):
        at += 1
        while (gap := stream.gaps[symbol(stream.gap_words)]) == 254:
            at += 254
        at += gap
        found[at] = stream.values[symbol(stream.code_words)]
    assert np.array_equal(found, values)
    assert stream.code_words == [1, 2] and stream.values[0] == 0.5  # the frequent one has the short word


def test_weights_take_the_smallest_form():
    random = np.random.default_rng(0)
    dense = random.normal(size=(50, 50)).astype(np.float32)
    assert weight("w", dense)[1] == 10_000
    sparse = np.where(random.random((50, 50)) < 0.1, np.sign(dense), 0).astype(np.float32)
    entropy = -(0.1 * np.log2(0.1 / 2) + 0.9 * np.log2(0.9)) * 2500 / 8
    assert entropy < weight("w", sparse)[1] < 1.1 * entropy + 100  # a Huffman code, its tables and values
    assert weight("w", np.sign(dense))[1] == 2500 // 8 + 1 + 8 + 2
    assert weight("w", np.zeros((3, 3), np.float32))[1] == 4
    assert vector("b", np.array([0.5, -0.25, 3], np.float32))[1] == 3
    assert vector("b", np.array([0.1, 1.7, 3], np.float32))[1] == 12


@pytest.mark.parametrize("value", [0.1, -0.0, 1e-30, 3, 123456789, np.float32(1) / 3])
def test_a_literal_reads_as_the_same_bits(value):
    text = literal(value)
    assert text.endswith("f") and ("." in text or "e" in text)
    assert np.float32(text[:-1]).view(np.uint32) == np.float32(value).view(np.uint32)


def test_memory_is_two_neighbouring_maps():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    )  # fmt: skip
    subject = subject_of(nn.Sequential(*net, nn.Flatten(), nn.Linear(6 * 4, 10)).eval(), (1, 8, 8))
    memory = plan(subject.graph)
    assert memory.size == 4 * 64  # the first map alone; its pooled quarter and the second map: 64 + 96
    assert memory.places[subject.graph.output] == "logits"


@pytest.mark.parametrize(
    ("node", "constant", "trouble"),
    [
        (Node("power", ("x",), ("y",), attributes={"exponent": 0.3}, layer="a.b"), (), "the exponent 0.3"),
        (Node("mean", ("x",), ("y",), attributes={"axes": (1, 3)}, layer="a.b"), (), "axes that are not neighbours"),
        (Node("matmul", ("x", "w"), ("y",), layer="a.b"), (5,), "a vector"),
        (Node("attention", ("x", "x", "x", "w"), ("y",), layer="a.b"), (1, 4), "a mask that is not of each query and key"),
    ],
    ids=lambda one: getattr(one, "op", ""),
)  # fmt: skip
def test_more_than_is_written_is_refused_with_its_layer(node, constant, trouble):
    shapes = dict.fromkeys(("x", "y"), Value((1, 2, 4, 5), 0))
    graph = Graph("x", "y", [node], shapes, {"w": np.zeros(constant, np.float32)} if constant else {})
    with pytest.raises(
        Mistake, match=rf"to c: layer 'a\.b': operator {node.op} with {trouble}.* cannot be written"
    ):
        check(graph)


def test_an_operator_that_a_target_does_not_have_is_refused_with_its_layer(monkeypatch):
    monkeypatch.setattr("trainer.exports.c.OPS", frozenset({"reshape"}))
    with pytest.raises(Mistake, match=r"layer '1': operator softplus cannot be written"):
        export(nn.Sequential(nn.Flatten(), nn.Softplus()), "unused", "c", shape=(1, 4, 4))


def test_without_gcc_it_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NotInstalled, match="needs gcc: apt-get install gcc"):
        Native(tmp_path, 10)
