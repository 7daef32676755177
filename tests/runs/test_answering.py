"""Files of every form opened as networks that classify: packed, exported, checkpoints, and networks of somebody else's code."""

import json

import pytest
import torch
from torch import nn

import trainer
from trainer.exporting.export import export
from trainer.mistakes import Mistake
from trainer.networks.build import build
from trainer.packing import network as packed
from trainer.runs.answering import in_precision, open_student
from trainer.storage.weights_file import save_file

SPEC, SHAPE = {"model": "lenet5", "width": 2}, (1, 28, 28)
FACTS = {"shape": list(SHAPE), "mean": [0.2], "std": [0.4], "classes": ["a", "b", "c"]}
OWN = """
from torch import nn

def net(shape, num_classes, *, width: int = 3):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], width), nn.ReLU(), nn.Linear(width, num_classes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    here = tmp_path_factory.mktemp("opened")
    torch.manual_seed(0)
    net = build(SPEC, SHAPE, 3).eval()
    (here / "s.tiny").write_bytes(packed.encode(net, SPEC, FACTS))
    export(net, here, ["onnx", {"to": "pt2", "batch": 4}], **FACTS)
    save_file(here / "s.safetensors", net.state_dict(), {"facts": json.dumps({**FACTS, "net": SPEC})})
    return here


@pytest.mark.parametrize("name", ["s.tiny", "onnx/student.onnx", "pt2/student.pt2", "s.safetensors"])
def test_every_form_answers_the_same(folder, name):
    images = torch.randn(9, *SHAPE)
    with torch.inference_mode():
        expected = open_student(folder / "s.tiny").answer(images)
        found = open_student(folder / name, allow_python=True)
        torch.testing.assert_close(found.answer(images), expected, atol=1e-5, rtol=1e-5)
    assert list(found.classes) == FACTS["classes"] and found.reading.shape == SHAPE
    assert (list(found.mean), list(found.std)) == ([0.2], [0.4])


@pytest.mark.parametrize("name", ["s.tiny", "s.safetensors"])
@pytest.mark.parametrize(("precision", "largest"), [("bf16", 0.03), ("fp16", 0.004)])
def test_mixed_precision_rounds_as_it_is_asked_to_and_only_then(folder, name, precision, largest):
    pixels = torch.randint(0, 256, (9, *SHAPE), dtype=torch.uint8).numpy()
    student = open_student(folder / name)
    expected = student.logits(pixels)
    assert (in_precision(student, "no").logits(pixels) == expected).all()
    found = in_precision(student, precision).logits(pixels)
    difference = abs(found - expected).max() / abs(expected).max()
    assert found.dtype == "float32" and 1e-5 < difference < largest
    assert (student.logits(pixels) == expected).all()


def test_mixed_precision_of_a_recurrent_student_and_of_a_graph(folder, tmp_path):
    torch.manual_seed(0)
    spec = {"model": "lstm", "hidden": 8}
    net = build(spec, SHAPE, 3).eval()
    (tmp_path / "l.tiny").write_bytes(packed.encode(net, spec, FACTS))
    pixels = torch.randint(0, 256, (9, *SHAPE), dtype=torch.uint8).numpy()
    student = open_student(tmp_path / "l.tiny")
    expected, found = student.logits(pixels), in_precision(student, "bf16").logits(pixels)
    assert abs(found - expected).max() < 0.03 * abs(expected).max()
    with pytest.raises(Mistake, match=r"--precision bf16 has no effect: the file holds its own graph"):
        in_precision(open_student(folder / "onnx/student.onnx"), "bf16")


def test_a_program_is_opened_when_its_code_may_run(folder, tmp_path):
    with pytest.raises(Mistake, match=r"student.pt2: a .pt2 file can hold code.*--allow-python"):
        open_student(folder / "pt2/student.pt2")
    (tmp_path / "x.pt2").write_bytes(b"no archive")
    with pytest.raises(Mistake, match=r"x.pt2: is no torch.export file that can be run"):
        open_student(tmp_path / "x.pt2", allow_python=True)
    with pytest.raises(Mistake, match=r"none.pt2: cannot be read"):
        open_student(tmp_path / "none.pt2", allow_python=True)


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine_for_predict.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = "python:mine_for_predict:net"
    torch.manual_seed(0)
    net = build({"model": own, "width": 5}, (1, 4, 4), 2).eval()
    facts = {**FACTS, "shape": [1, 4, 4], "classes": ["x", "y"]}
    (tmp_path / "named.tiny").write_bytes(packed.encode(net, {"model": own, "width": 5}, facts))
    images = torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        expected = net(images)
    found = open_student(tmp_path / "named.tiny", own, allow_python=True)
    torch.testing.assert_close(found.answer(images), expected)  # with the width that the file records
    save_file(
        tmp_path / "w.safetensors",
        net.state_dict(),
        {"facts": json.dumps({**facts, "net": {"model": own, "width": 5}})},
    )
    torch.testing.assert_close(open_student(tmp_path / "w.safetensors", own, True).answer(images), expected)
    plain = build({"model": own}, (1, 4, 4), 2).eval()
    trainer.pack(plain, tmp_path / "bare.tiny", **facts)
    with torch.no_grad():
        torch.testing.assert_close(
            open_student(tmp_path / "bare.tiny", own, True).answer(images), plain(images)
        )
    for file in ("named.tiny", "w.safetensors"):
        with pytest.raises(Mistake, match=file):
            open_student(tmp_path / file)
    with pytest.raises(Mistake, match=r"--model python:mine_for_predict:net: .*--allow-python"):
        open_student(tmp_path / "named.tiny", own)


def test_a_model_that_has_no_effect(folder):
    with pytest.raises(Mistake, match=r"--model has no effect for .*s.tiny: it names its network, lenet5"):
        open_student(folder / "s.tiny", "lenet300")
    with pytest.raises(Mistake, match=r"--model has no effect for .*student.onnx"):
        open_student(folder / "onnx/student.onnx", "lenet300")


def test_a_checkpoint_of_somebody_else(tmp_path):
    save_file(tmp_path / "x.safetensors", nn.Linear(2, 2).state_dict())
    with pytest.raises(Mistake, match=r"x.safetensors: does not say classes, shape, mean, std"):
        open_student(tmp_path / "x.safetensors")
