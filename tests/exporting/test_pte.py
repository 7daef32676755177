"""An ExecuTorch program answers as the network, by ExecuTorch's own runtime; without the package it is named."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from tests.exporting.test_c import Images, Sequence, coarse
from trainer.exporting.export import export, subject_of
from trainer.exporting.subject import NotInstalled
from trainer.exports.pte import pte
from trainer.mistakes import Mistake


@pytest.mark.slow
@pytest.mark.parametrize("name", ["images", "sequence"])
def test_it_answers_as_torch(name, tmp_path):
    pytest.importorskip("executorch")
    torch.manual_seed(1)
    net, shape = (coarse(Images()), (3, 16, 16)) if name == "images" else (Sequence().eval(), (1, 8, 5))
    subject = subject_of(net, shape, mean=[0.4] * shape[0], std=[0.3] * shape[0], classes=list("abcdefghij"))
    exported = pte(subject, tmp_path)
    assert [file.name for file in exported.files] == ["student.pte", "facts.json"]
    assert exported.num_bytes == (tmp_path / "student.pte").stat().st_size
    pixels = np.random.default_rng(0).integers(0, 256, (7, *shape), np.uint8)
    images = subject.normalized(pixels)
    expected = subject.logits(images)
    near = 2e-6 if name == "images" else 3e-4  # XNNPACK's gelu is no nearer
    assert np.abs(exported.run(images) - expected).max() < near * np.abs(expected).max()
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["mean"] == [0.4] * shape[0] and facts["shape"] == list(shape) and len(facts["classes"]) == 10


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    for name in [name for name in sys.modules if name.startswith("executorch.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(NotInstalled, match="to pte: needs the package executorch: .*the extra pte"):
        export(net(), tmp_path, "pte", shape=(1, 4, 4))


def test_what_executorch_refuses_is_a_mistake(tmp_path, monkeypatch):
    def refuse(program, partitioner):
        raise TypeError("no kernel for aten::sort\nmore")

    parts = {
        "executorch": {},
        "executorch.exir": {"to_edge_transform_and_lower": refuse},
        "executorch.backends.xnnpack.partition.xnnpack_partitioner": {"XnnpackPartitioner": object},
        "executorch.runtime": {"Runtime": SimpleNamespace(get=lambda: None)},
    }
    for name, held in parts.items():
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(Mistake, match=r"ExecuTorch cannot write it: TypeError: no kernel for aten::sort$"):
        export(net(), tmp_path, "pte", shape=(1, 4, 4))
    assert not list(tmp_path.iterdir())
