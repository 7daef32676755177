"""A packed file never has code run: what it names must be on the shelf, or be brought by the reader."""

import pytest
import torch
from torch import nn

from trainer import codec, packed, teacher
from trainer.__main__ import main

FACTS = {"shape": [1, 8, 8], "mean": [0.1], "std": [0.3], "classes": ["a", "b"]}


@pytest.mark.parametrize("net", [{"model": "python:os:system"}, {"model": "hf-hub:somebody/net"}])
def test_a_file_that_names_code_or_a_hub_builds_nothing(net, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher, "build", lambda *a: pytest.fail("built a network that the file named"))
    monkeypatch.setattr(packed, "build", lambda *a: pytest.fail("built a network that the file named"))
    model = nn.Linear(4, 2)
    path = tmp_path / "x.tiny"
    path.write_bytes(packed.encode(model, net, FACTS))
    assert main(["inspect", str(path)]) == 0
    with pytest.raises(ValueError, match="x.tiny: holds the weights of .* give the network as `into`"):
        packed.load(path)
    decoded = packed.load(path, into=nn.Linear(4, 2))
    assert torch.equal(decoded.weight, model.weight)
    capsys.readouterr()


def test_settings_of_timm_that_would_read_files_are_refused():
    with pytest.raises(ValueError, match="options holds checkpoint_path"):
        teacher.build({"model": "timm/resnet18", "options": {"checkpoint_path": "x.pth"}}, (1, 32, 32), 2)
    data = codec.encode({"net": {"model": "timm/resnet18", "options": {"checkpoint_path": "x.pth"}}, **FACTS}, {})
    with pytest.raises(ValueError, match="options holds checkpoint_path"):
        packed.decode(data)
