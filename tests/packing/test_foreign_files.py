"""A packed file never has code run: what it names must be on the shelf, or be brought by the reader."""

import numpy as np
import pytest
import torch
from torch import nn

from trainer.cli import main
from trainer.networks import build as building
from trainer.packing import container
from trainer.packing import network as packed
from trainer.packing import tensors as packing_tensors
from trainer.packing.loading import load

FACTS = {"shape": [1, 8, 8], "mean": [0.1], "std": [0.3], "classes": ["a", "b"]}


@pytest.mark.parametrize(
    "net",
    [
        {"model": "python:os:system"},
        {"model": "hf-hub:somebody/net"},
        {"model": "timm/hf-hub:timm/resnet18.a1_in1k"},
        {"model": "timm/local-dir:/tmp"},
        {"model": "timm/resnet18", "pretrained": True},
    ],
)
def test_a_file_that_names_code_or_a_hub_builds_nothing(net, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(building, "build", lambda *a: pytest.fail("built a network that the file named"))
    monkeypatch.setattr(packed, "build", lambda *a: pytest.fail("built a network that the file named"))
    model = nn.Linear(4, 2)
    path = tmp_path / "x.tiny"
    path.write_bytes(packed.encode(model, net, FACTS))
    assert main(["inspect", str(path)]) == 0
    with pytest.raises(ValueError, match="x.tiny: holds the weights of .* give the network as `into`"):
        load(path)
    decoded = load(path, into=nn.Linear(4, 2))
    assert torch.equal(decoded.weight, model.weight)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"classes": 10**9}, "classes are neither names nor a number up to 1,048,576"),
        ({"classes": None}, "classes are neither names nor a number"),
        ({"classes": True}, "classes are neither names nor a number"),
        ({"classes": [1, 2]}, "classes are not names"),
        ({"net": "lenet5"}, "net names no model"),
        ({"net": {"width": 3}}, "net names no model"),
        ({"net": {"model": 5}}, "net names no model"),
        ({"net": {"model": "lenet5"}, "shape": []}, "shape is missing"),
        ({"shape": None}, "shape is not channels, height and width"),
        ({"shape": [1, 28]}, "shape is not channels, height and width"),
        ({"shape": [1, 28, -28]}, "shape is not channels, height and width"),
        ({"mean": "0.1"}, "mean and std are not numbers"),
    ],
)
def test_headers_that_nobody_here_wrote(change, told, tmp_path, capsys):
    data = container.encode(FACTS | change, {"a": np.zeros(3, np.float32)})
    for read in (packed.header, packed.tensors, packed.account, packed.decode):
        with pytest.raises(ValueError, match="x.tiny: its header is not that of a packed network: .*" + told):
            read(data, "x.tiny")
    path = tmp_path / "x.tiny"
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("header", [{}, [1, 2], 5, None])
def test_headers_that_are_something_else(header):
    data = container.encode(header, {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="its header is not that of a packed network"):
        packed.header(data)


def test_a_header_nested_too_deeply(monkeypatch):
    deep = "[" * 100_000
    with monkeypatch.context() as patch:
        patch.setattr(container.json, "dumps", lambda *a, **k: deep)
        patch.setattr(container.json, "loads", lambda text: None)
        data = container.encode({}, {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="x.tiny: the header is nested too deeply"):
        packed.header(data, "x.tiny")


@pytest.mark.parametrize("shape", [(2**25,), (2**28,), (1, 2**25), (2**14, 2**14)])
def test_a_few_bytes_do_not_announce_millions_of_positions(shape, monkeypatch):
    """Files whose layout names a large tensor and whose stream ends there: refused before memory is taken for it."""
    known = {"a": (shape, "float32")}
    small = np.array([0, 1.5, 0, 2.5], np.float32)
    data = container.encode(FACTS, {"a": small if len(shape) == 1 else small[None]})
    real = container._code_layout
    monkeypatch.setattr(container, "_code_layout", lambda *a: real(*a) and known)
    monkeypatch.setattr(packing_tensors, "code_mask", lambda *a: pytest.fail("took the stream at its word"))
    with pytest.raises(ValueError, match=f"cannot hold the {np.prod(shape):,} positions of tensor a"):
        container.decode(data)


def test_settings_of_timm_that_would_read_files_are_refused():
    with pytest.raises(ValueError, match="options holds checkpoint_path"):
        building.build({"model": "timm/resnet18", "options": {"checkpoint_path": "x.pth"}}, (1, 32, 32), 2)
    data = container.encode(
        {"net": {"model": "timm/resnet18", "options": {"checkpoint_path": "x.pth"}}, **FACTS}, {}
    )
    with pytest.raises(ValueError, match="options holds checkpoint_path"):
        packed.decode(data)
