"""ONNX files: every operator answers as torch, and compressed weights become the dense file's, bit for bit, when a session loads."""

import collections
import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainer
from trainer.compression.states import bake
from trainer.exporting import huffman, onnx_huffman, onnx_rice, onnx_weights
from trainer.exporting.export import export, subject_of
from trainer.exporting.onnx_file import serialized, write_onnx
from trainer.exporting.onnx_nodes import write_nodes
from trainer.exporting.onnx_session import session_of
from trainer.exporting.onnx_weights import compress
from trainer.exporting.shared_values import shared_values
from trainer.exporting.subject import NotInstalled
from trainer.mistakes import Mistake

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


class Zoo(nn.Module):
    """Most operators of the plain graph, each with settings that are not the default."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, stride=(1, 2), padding=(2, 1), dilation=(2, 1), bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.group = nn.GroupNorm(2, 8)
        self.prelu = nn.PReLU(8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.layer = nn.LayerNorm(8)
        self.query = nn.Linear(8, 24)
        self.conv1d = nn.Conv1d(8, 6, 3, padding=1)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 4, bidirectional=True)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 10, 1))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu6(self.norm(self.conv(x)))  # [N, 8, 10, 5]
        x = x * F.hardsigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = x + F.hardswish(self.depth(x)) - 0.5
        x = self.prelu(F.pad(self.group(x), (1, 0, 0, 0), value=0.25))  # [N, 8, 10, 6]
        x = torch.cat([F.max_pool2d(x, (3, 2), ceil_mode=True), F.avg_pool2d(x, 3, 2, 1)], 2)  # [N, 8, 9, 3]
        x = F.adaptive_avg_pool2d(F.silu(x) + F.mish(x) / 2, (3, 3)) + F.adaptive_avg_pool2d(x, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)  # [N, 10, 8]
        x = x + self.places.repeat(x.shape[0], 1, 8)
        q, k, v = self.query(self.layer(x)).reshape(-1, 10, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = (
            F.gelu(x)
            + F.gelu(x, approximate="tanh")
            + F.leaky_relu(x, 0.2)
            + F.elu(x)
            + F.softplus(x, beta=2)
        )
        x = self.conv1d((1 - x).transpose(1, 2).exp().clamp(max=5).sqrt())
        x, _ = self.lstm(x.transpose(1, 2))
        x, _ = self.gru(x.transpose(0, 1))
        first, second = x[::3].split([2, 2])
        x = torch.tanh(first[-1]) + torch.sigmoid(second[1]) * second.mean(0) ** 2
        return self.fc(torch.matmul(x.softmax(1)[:, None], x[:, :, None]).reshape(-1, 1) + x)


@pytest.fixture(scope="module")
def zoo():
    torch.manual_seed(0)
    net = Zoo()
    net(torch.randn(16, 2, 10, 10))  # statistics of BatchNorm
    return subject_of(
        net.eval(), (2, 10, 10), mean=[0.4, 0.5], std=[0.2, 0.3], classes=[str(n) for n in range(10)]
    )


def test_every_operator_answers_as_torch(zoo, tmp_path):
    ops = {node.op for node in zoo.graph.nodes}
    assert len(ops) >= 30, sorted(ops)
    found = write_onnx(zoo, tmp_path / "x.onnx", compressed=False)
    images = np.random.default_rng(1).normal(size=(7, 2, 10, 10)).astype(np.float32)
    for number in (1, 7):
        np.testing.assert_allclose(
            found.run(images[:number]), zoo.logits(images[:number]), rtol=2e-4, atol=2e-5
        )


def test_the_file_says_what_it_is(zoo, tmp_path):
    zoo.packed = b"student.tiny"
    found = write_onnx(zoo, tmp_path / "x.onnx", compressed=True)
    model = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8 and [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    facts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    test = facts.pop("test")
    assert facts == {
        "classes": zoo.classes, "mean": [0.4, 0.5], "std": [0.2, 0.3], "shape": [2, 10, 10],
        "sha256": hashlib.sha256(b"student.tiny").hexdigest(),
    }  # fmt: skip
    image, _ = zoo.test_vector()
    logits = found.run(zoo.normalized(image[None]))[0]
    assert [c for c, _ in test] == np.argsort(-logits)[:5].tolist()
    assert [value for _, value in test] == pytest.approx(np.sort(logits)[:-6:-1].tolist(), rel=1e-4)
    assert found.numbers["peak_bytes"] > 10_000_000 and 0 < found.numbers["load_seconds"] < 20


class Mixed(nn.Module):
    """A pruned and shared layer, a dense shared one, one of a single value, one of zeros alone, one as it was, a recurrent one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.gru = nn.GRU(32, 16, batch_first=True)
        self.dense, self.one, self.none = nn.Linear(16, 40), nn.Linear(40, 40), nn.Linear(40, 40)
        self.fc = nn.Linear(40, 10)

    def forward(self, x):
        x, _ = self.gru(F.relu(self.norm(self.conv(x))).transpose(1, 2).flatten(2))
        x = F.relu(self.dense(x[:, -1]))
        return self.fc(x + self.one(x) + self.none(x))


def mixed():
    torch.manual_seed(2)
    net = Mixed()
    net(torch.randn(9, 1, 8, 8))
    trainer.prune(net, sparsity=0.8, exclude=["dense", "one", "none", "fc"])
    trainer.share(net, bits=4, exclude=["one", "none", "fc"])
    bake(net)
    with torch.no_grad():
        net.one.weight.copy_(torch.where(torch.rand(40, 40) < 0.02, 0.3, 0.0))  # long gaps
        net.one.weight[0, 0], net.one.weight[-1, -1] = -0.0, 0.3
        net.none.weight.zero_()
    return net.eval()


def operators(path):
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("coder", "large"),
    [(onnx_huffman.read_huffman, 10**9), (onnx_huffman.read_huffman, 1), (onnx_rice.read_rice, 1)],
    ids=["Huffman", "Huffman, pairs of bits", "Rice"],
)
def test_compressed_weights_are_those_of_the_dense_file_bit_for_bit(coder, large, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_huffman, "LARGE", large)
    monkeypatch.setattr(onnx_weights, "CODERS", (coder,))
    subject = subject_of(mixed(), (1, 8, 8))
    answers, graphs, weights = [], [], []
    for compressed in (False, True):
        made = write_nodes(subject.graph)
        if compressed:
            assert compress(made) == 5  # conv is too small, fc has too many values
        (tmp_path / "x.onnx").write_bytes(serialized(made, subject.shape, None, {}))
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(tmp_path / "run.onnx")
        session = runtime.InferenceSession(
            str(tmp_path / "x.onnx"), options, providers=["CPUExecutionProvider"]
        )
        images = np.random.default_rng(3).normal(size=(5, 1, 8, 8)).astype(np.float32)
        answers.append(session.run(None, {"image": images})[0])
        graphs.append(operators(tmp_path / "run.onnx"))
        loaded = onnx.load(tmp_path / "run.onnx").graph.initializer
        weights.append(sorted(onnx.numpy_helper.to_array(one).tobytes() for one in loaded))
    assert graphs[0] == graphs[1]  # nothing is decoded at a call
    assert weights[0] == weights[1]
    assert np.array_equal(answers[0].view(np.uint32), answers[1].view(np.uint32))


def few_values(zeros):
    """A linear layer of 784 x 400 weights, -1, 0 and 1."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 3))
    with torch.no_grad():
        net[1].weight.copy_(net[1].weight.sign() * (torch.rand(400, 784) >= zeros))
    return net.eval()


def test_rows_whose_bits_differ_by_more_than_two_bytes_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_weights, "CODERS", (onnx_huffman.read_huffman,))
    monkeypatch.setattr(
        onnx_huffman, "LEVEL_BYTES", 0
    )  # the longest rows: 131,072 codes of a bit, then some thousand
    net = few_values(zeros=0.55)
    assert (net[1].weight != 0).sum() > 140_000
    found = write_onnx(subject_of(net, (1, 28, 28)), tmp_path / "x.onnx", compressed=True)
    images = np.random.default_rng(3).normal(size=(5, 1, 28, 28)).astype(np.float32)
    np.testing.assert_allclose(
        found.run(images), net(torch.from_numpy(images)).detach().numpy(), rtol=1e-4, atol=1e-4
    )


def test_a_compressed_file_that_holds_other_weights_is_refused(tmp_path, monkeypatch):
    def wrong(made):
        name = next(name for name, array in made.constants.items() if array.ndim == 2)
        made.constants[name] = np.nextafter(made.constants[name], np.float32(9))
        return 1

    monkeypatch.setattr("trainer.exporting.onnx_file.compress", wrong)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(RuntimeError, match=r"x\.onnx: its weights are not those of the dense file"):
        write_onnx(subject_of(net, (1, 4, 4)), tmp_path / "x.onnx", compressed=True)


def test_it_is_smaller_by_what_sharing_saves(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    trainer.prune(net, sparsity=0.94)
    trainer.share(net, bits=3)
    to = ["onnx", {"to": "onnx", "folder": "dense", "compressed": False}]
    small, dense = export(net, tmp_path, to, shape=(1, 28, 28))
    assert small["agreement_student"] == dense["agreement_student"] == 100
    assert small["max_difference"] == dense["max_difference"] < 1e-5
    num = int(sum((layer.weight != 0).sum() for layer in (net[1], net[3])))
    # under 9 bits for each survivor at this density, and under 3 KB for nodes, tables, biases and metadata
    assert small["file_bytes"] < 9 / 8 * num + 3000 < dense["file_bytes"] / 35


def test_constants_of_zeros_alone_are_written(tmp_path):
    """A network fresh from its constructor: the means of its normalizations are zero, its weights share nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 70, 3), nn.BatchNorm2d(70), nn.Flatten(), nn.Linear(280, 3))
    [row] = trainer.export(net, tmp_path / "out", "onnx", shape=(1, 4, 4))
    assert row["agreement_student"] == 100


@pytest.mark.parametrize("coder", onnx_weights.CODERS)
@pytest.mark.parametrize("role", ["weight", "bias"])
def test_zeros_are_all_that_is_compressed(coder, role, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_weights, "CODERS", (coder,))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    nn.init.zeros_(getattr(net[1], role))
    [row] = trainer.export(net, tmp_path / "out", "onnx", shape=(1, 8, 8))
    assert row["agreement_student"] == 100 and row["max_difference"] < 1e-6


def test_shared_values():
    array = np.array([[0.0, -0.0, 1.5], [0.0, -2.0, 1.5]], np.float32)
    found = shared_values(array)
    assert found.positions.tolist() == [1, 2, 4, 5] and found.gaps().tolist() == [1, 0, 1, 0]
    assert np.array_equal(found.dense().view(np.uint32), array.view(np.uint32))
    assert shared_values(np.arange(1, 258, dtype=np.float32)) is None
    full = shared_values(np.array([3.0, 2.0, 3.0], np.float32))
    assert full.positions is None and full.values.tolist() == [2, 3] and full.codes.tolist() == [1, 0, 1]
    assert shared_values(np.zeros((2, 2), np.float32)).values.size == 0


@pytest.mark.parametrize("unit", [1, 2])
def test_huffman_codes(unit):
    counts = np.array([1000, 900, 40, 7, 3, 1, 0])
    sizes = np.sort(huffman.lengths(counts, 12, unit))
    assert (sizes % unit == 0).all() and sum(0.5**sizes) == 1
    assert huffman.lengths(counts, 4, unit).max() <= 4
    order = np.argsort(huffman.lengths(counts, 12, unit), kind="stable")
    symbols = np.random.default_rng(0).integers(0, 7, 200)
    where = np.argsort(order)
    stream = huffman.bits(huffman.codes(sizes, 12)[where[symbols]], sizes[where[symbols]], 12)
    words = {
        format(code >> (12 - size), f"0{size}b"): order[n]
        for n, (code, size) in enumerate(zip(huffman.codes(sizes, 12), sizes))
    }
    read, word = [], ""
    for bit in stream:
        word += str(bit)
        if word in words:
            read.append(words[word])
            word = ""
    assert word == "" and read == symbols.tolist()


def test_without_onnxruntime_the_extra_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        NotInstalled,
        match=r"to onnx: needs the package onnxruntime: pip install onnxruntime, or the extra onnx",
    ):
        export(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path, "onnx", shape=(1, 2, 2))
    assert not list(tmp_path.iterdir())


def test_a_session_runs_with_torchs_threads(tmp_path):
    subject = subject_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))
    write_onnx(subject, tmp_path / "x.onnx", True)
    options = session_of(runtime, tmp_path / "x.onnx").get_session_options()
    assert options.intra_op_num_threads == torch.get_num_threads()


INT8 = """
name: x
data: {dataset: digits, subset: 100, validation: 60}
student: {model: lenet300, hidden: [6]}
stages: [{stage: train, training: {epochs: 1}}]
"""


@pytest.mark.parametrize(
    ("settings", "largest"), [({}, 64), ({"reduce_range": True}, 64), ({"reduce_range": False}, 127)]
)
def test_int8_weights_leave_a_bit_for_processors_that_add_two_products_in_16(tmp_path, settings, largest):
    (tmp_path / "x.yaml").write_text(INT8)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    to = [{"to": "onnx_int8", "images": 40, **settings}]
    export(net, tmp_path / "out", to, shape=(1, 8, 8), recipe=tmp_path / "x.yaml")
    tensors = [
        onnx.numpy_helper.to_array(one)
        for one in onnx.load(tmp_path / "out/onnx_int8/student_int8.onnx").graph.initializer
    ]
    weights = [one for one in tensors if one.dtype == np.int8 and one.ndim >= 2]
    assert len(weights) == 2 and all(abs(one.astype(int)).max() == largest for one in weights)


def test_int8_is_measured_and_its_verdict_said(tmp_path):
    (tmp_path / "x.yaml").write_text(INT8)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )
    ways = ("minmax", "entropy", "percentile")
    to = [{"to": "onnx_int8", "calibration": way, "images": 40, "folder": way} for way in ways]
    rows = export(net, tmp_path / "out", to, shape=(1, 8, 8), recipe=tmp_path / "x.yaml")
    for way, row in zip(ways, rows):
        assert row["num_images"] == 360 and row["agreement_student"] > 80
        assert 0 < row["max_difference"] < 1
        [verdict] = row["notes"]
        assert (
            f"{row['top1'] - row['top1_student']:+.2f} points of top-1" in verdict
            and "of the dense float file" in verdict
        )
        kinds = operators(tmp_path / f"out/{way}/student_int8.onnx")
        assert kinds["QuantizeLinear"] and kinds["DequantizeLinear"] and not kinds["BatchNormalization"]
    with pytest.raises(Mistake, match="to onnx_int8: without a recipe there is no data: name one"):
        export(net, tmp_path / "other", ["onnx", "onnx_int8"], shape=(1, 8, 8))
    assert not (tmp_path / "other").exists()
