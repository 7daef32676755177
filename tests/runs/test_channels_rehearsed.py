"""Removing channels is rehearsed on a copy of the student, with everything that later stages need, before any training."""

import sys

import pytest

import trainer
from trainer.cli import main
from trainer.recipe.text import RecipeError

pytest.importorskip("torch_pruning")

OWN = """
import torch
from torch import nn

class Mixer(nn.Module):
    '''MLP-Mixer: linear layers over the tokens, too.'''
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 6, 4, stride=4), nn.LayerNorm(6)
        self.tokens, self.channels, self.fc = nn.Linear(4, 4), nn.Linear(6, 6), nn.Linear(6, 10)
    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.fc((x + self.channels(x)).mean(1))

class Split(nn.Module):
    '''Res2Net: each part of a split goes to a layer of its own, together with the last one's output.'''
    def __init__(self):
        super().__init__()
        self.conv, self.convs = nn.Conv2d(1, 8, 3), nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.last, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 10)
    def forward(self, x):
        parts = torch.split(self.conv(x), 2, 1)
        found = [self.convs[0](parts[0])]
        for part, conv in zip(parts[1:3], self.convs[1:]):
            found.append(conv(found[-1] + part))
        return self.fc(self.last(torch.cat([*found, parts[-1]], 1)).mean((2, 3)))

class Counts(nn.Module):
    '''Works on its own number of channels while it trains only.'''
    def __init__(self):
        super().__init__()
        self.conv, self.next, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 10)
    def forward(self, x):
        x = self.conv(x)
        x = x.view(len(x), 8, 36).view(len(x), 8, 6, 6) if self.training else x
        return self.fc(self.next(x).mean((2, 3)))

class Plain(Counts):
    def forward(self, x): return self.fc(self.next(self.conv(x)).mean((2, 3)))

mixer, split, counts, plain = (lambda shape, classes, cls=cls: cls() for cls in (Mixer, Split, Counts, Plain))
chain = lambda shape, classes: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, classes))
"""
RECIPE = """
name: own
data: {{dataset: digits, subset: 60, validation: 60}}
student: {{model: "python:own_channels:{name}"}}
stages:
  - {{stage: train, training: {{epochs: 1, batch_size: 30}}}}
  - {{stage: prune, method: channels, sparsity: 0.3, training: {{epochs: 1, batch_size: 30}}}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_channels.py").write_text(OWN)
    sys.modules.pop("own_channels", None)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str):
        (tmp_path / "own.yaml").write_text(RECIPE.format(name=name))
        return tmp_path / "own.yaml"

    return write


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mixer", r"method 'channels' cannot follow this network \(IndexError in torch-pruning: "),
        ("split", r"method 'channels' cannot follow this network \(IndexError in torch-pruning: "),
        ("counts", "the student after this stage fails in training mode: RuntimeError: "),
    ],
)
def test_refused_before_the_first_step(name, told, recipe, tmp_path):
    with pytest.raises(RecipeError, match=rf"own.yaml:7: stages\[1\]: {told}") as refused:
        trainer.run(recipe(name), allow_python=True)
    assert len(str(refused.value)) < 330
    assert not list((tmp_path / "runs").rglob("checkpoints"))


def test_one_that_works_is_left_as_it_was_by_the_check(recipe, capsys):
    assert main(["check", "--build", "--allow-python", str(recipe("plain"))]) == 0
    assert "own.yaml: fine: train, prune" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixer_s32_224", "res2net50_14w_8s"])
def test_networks_of_timm(name, tmp_path):
    size = ", img_size: 32" if "mixer" in name else ""
    (tmp_path / "x.yaml").write_text(
        f"name: x\ndata: {{dataset: digits, size: 32, subset: 60}}\nstudent: {{model: timm/{name}{size}}}\n"
        "stages:\n  - {stage: train, training: {epochs: 1}}\n  - {stage: prune, method: channels, sparsity: 0.3}\n"
    )
    with pytest.raises(RecipeError, match=r"stages\[1\]: "):
        trainer.run(tmp_path / "x.yaml", folder=tmp_path)


def test_what_stages_change_of_ones_own_network_is_packed_and_measured_in_a_fresh_process(recipe):
    path = recipe("chain")
    text = (
        path.read_text() + "  - {stage: quantize, training: {epochs: 1, batch_size: 30}}\n  - {stage: pack}\n"
    )
    path.write_text(text.replace("data:", "allow_untrained: true\ndata:"))
    rows = trainer.run(path, folder=path.parent / "runs", allow_python=True)["rows"]
    quantized, decoded = (
        next(row for row in rows if row["stage"] == name) for name in ("quantized", "decoded")
    )
    assert decoded["top1"] == quantized["top1"] and decoded["sparsity"] == quantized["sparsity"]
