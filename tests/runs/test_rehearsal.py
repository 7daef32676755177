"""Networks of one's own are rehearsed in both modes before anything is trained; `output` takes one of several outputs."""

import sys
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import trainer
from trainer.cli import main
from trainer.networks.build import build
from trainer.networks.output import take_output
from trainer.recipe.text import RecipeError
from trainer.reporting import report
from trainer.runs.rehearsal import rehearse

OWN = """
from dataclasses import dataclass
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, classes))
    def forward(self, x): return self.body(x)

class Aux(Net):
    def forward(self, x): return (x.mean(), self.body(x)) if self.training else self.body(x)

class Named(Net):
    def forward(self, x): return {"hidden": x, "logits": self.body(x)}

class Random(Net):
    def forward(self, x): return self.body(x + torch.randn_like(x))

class Extra(Net):
    def get_extra_state(self): return {"version": 3}
    def set_extra_state(self, state): pass

class Complex(Net):
    def __init__(self, classes):
        super().__init__(classes)
        self.register_buffer("spectrum", torch.zeros(4, dtype=torch.complex64))

class FailsInTraining(Net):
    def forward(self, x): return self.body(x) if not self.training else self.missing(x)

class Detached(Net):
    def forward(self, x): return self.body(x).detach()

class NoNumbers(Net):
    def forward(self, x): return self.body(x) * float("nan")

class Soft(Net):
    def forward(self, x): return self.body(x).softmax(-1)

class Lazy(nn.Sequential):
    def __init__(self, classes): super().__init__(nn.Flatten(), nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(classes))

def of(cls): return lambda shape, classes: cls(classes)
net, aux, named, random, extra, complex_, fails, detached, soft, lazy, no_numbers = map(
    of, (Net, Aux, Named, Random, Extra, Complex, FailsInTraining, Detached, Soft, Lazy, NoNumbers))
def old_norm(shape, classes):
    net = Net(classes)
    net.body[1] = torch.nn.utils.weight_norm(net.body[1])
    return net
"""
RECIPE = """
name: own
data: {{dataset: digits, subset: 60, validation: 60}}
student: {{model: "python:own_nets:{name}"{more}}}
stages:
  - {{stage: train, training: {{epochs: 1, batch_size: 30}}}}
  - {{stage: pack}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "write", lambda folder, *_: (folder / "report.json").write_text("{}"))
    (tmp_path / "own_nets.py").write_text(OWN)
    sys.modules.pop("own_nets", None)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, more: str = ""):
        (tmp_path / "own.yaml").write_text(RECIPE.format(name=name, more=more))
        return tmp_path / "own.yaml"

    return write


REFUSED = {
    "aux": r"the student gives while it trains tuple \(0: , 1: 2x10\); logits \[N, 10\] are needed; output: NUMBER or NAME",
    "named": r"the student gives dict \(hidden: 2x1x8x8, logits: 2x10\); logits \[N, 10\] are needed; output: NUMBER or NAME",
    "random": "the student gives other logits for the same images each time, in evaluation mode",
    "extra": r"the student has state that is no tensor \('_extra_state': dict\)",
    "complex_": r"the student has complex numbers in its state \('spectrum': torch.complex64\)",
    "fails": "the student fails in training mode: AttributeError: .* no attribute 'missing'",
    "detached": "the student has no gradient: RuntimeError",
    "no_numbers": "the student gives logits that are no numbers",
    "old_norm": r"layer 'body.1': its weight is computed by a hook \(WeightNorm\)",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_step(name, recipe, tmp_path):
    with pytest.raises(RecipeError, match=rf"own.yaml:4: student: {REFUSED[name]}") as refused:
        trainer.run(recipe(name), allow_python=True)
    assert len(str(refused.value)) < 330 and "\n" not in str(refused.value)
    assert (
        not list((tmp_path / "runs").rglob("checkpoints"))
        and "loss" not in (tmp_path / "runs/own/log.jsonl").read_text()
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (", output: 5", r"student.output: there is no 5 in what the network returns: tuple \(0: , 1: 2x10\)"),
        (", output: logits", "student.output: there is no 'logits' in what the network returns"),
        (", output: 0", "the student gives while it trains a tensor ; logits"),
    ],
)
def test_a_wrong_output_is_refused(more, told, recipe):
    with pytest.raises(RecipeError, match=told):
        trainer.run(recipe("aux", more), allow_python=True)


def test_an_output_without_effect_is_refused(recipe):
    with pytest.raises(
        RecipeError, match="student.output: has no effect: the student returns one tensor in both modes"
    ):
        trainer.run(recipe("net", ", output: 0"), allow_python=True)


@pytest.mark.parametrize(
    ("name", "more"), [("aux", ", output: 1"), ("named", ", output: logits"), ("lazy", "")]
)
def test_the_answer_is_taken_everywhere(name, more, recipe, tmp_path):
    """Trains, packs, decodes in a fresh process with the same accuracy, and loads."""
    result = trainer.run(recipe(name, more), allow_python=True)
    packed = result["rows"][-1]
    assert packed["stage"] == "decoded" and packed["digest"]
    import own_nets

    net = getattr(own_nets, name)((1, 8, 8), 10)
    if name == "lazy":
        net(torch.zeros(1, 1, 8, 8))
    same = trainer.load(tmp_path / "runs/own/student.tiny", into=net)
    images = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    logits = same(same.preprocess(images))
    assert logits.shape == (5, 10) and len(same.predict(images)) == 5
    assert same.train()(same.preprocess(images)).shape == (5, 10)


def test_probabilities_are_told(recipe, capsys):
    assert main(["check", "--build", "--allow-python", str(recipe("soft"))]) == 0
    assert "the student returns probabilities, and losses take them as logits" in capsys.readouterr().out


def test_a_teacher_has_an_output_too(recipe, tmp_path):
    text = (
        recipe("net")
        .read_text()
        .replace("student:", 'teacher: {model: "python:own_nets:named", output: logits}\nstudent:')
    )
    text = text.replace(
        "  - {stage: train,",
        "  - {stage: train, who: teacher, training: {epochs: 1, batch_size: 30}}\n  - {stage: train,",
        1,
    )
    text = text.replace(
        "  - {stage: pack}",
        "  - {stage: distill, training: {epochs: 1, batch_size: 30}, losses: [{loss: kl}]}",
    )
    (tmp_path / "own.yaml").write_text(text)
    rows = trainer.run(tmp_path / "own.yaml", allow_python=True)["rows"]
    assert [row["stage"] for row in rows] == ["teacher", "trained", "distilled"]


def test_a_checkpoint_of_a_network_with_several_outputs(recipe, tmp_path):
    """What a loaded network knows is measured before the rehearsal: it is refused in words there, too."""
    trainer.run(recipe("net"), allow_python=True)
    file = next((tmp_path / "runs/own").rglob("student.safetensors"))
    (tmp_path / "own.yaml").write_text(
        recipe("named", f", checkpoint: {file}").read_text().replace("name: own", "name: two")
    )
    with pytest.raises(
        RecipeError,
        match=r"own.yaml:4: student: the student gives dict \(hidden: 2x1x8x8, logits: 2x10\); logits \[N, 10\] are",
    ):
        trainer.run(tmp_path / "own.yaml", allow_python=True)


Outputs = namedtuple("Outputs", ["first", "logits"])


@dataclass
class Data:
    first: Tensor
    logits: Tensor


class Object:
    def __init__(self, first: Tensor, logits: Tensor) -> None:
        self.first, self.logits = first, logits


class Returns(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 3), kind

    def forward(self, x: Tensor):
        return self.kind(x, self.fc(x))


KINDS = [
    Outputs,
    Data,
    Object,
    lambda a, b: (a, b),
    lambda a, b: [a, b],
    lambda a, b: {"first": a, "logits": b},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", [1, "logits"])
def test_kinds_of_outputs(kind, output):
    net, x = Returns(kind), torch.randn(2, 4)
    if isinstance(kind(0, 0), tuple | list) and kind is not Outputs and output == "logits":
        output = 1
    take_output(net, output)
    take_output(net, output)  # as a loaded network that has the hook already
    assert torch.equal(net(x), net.fc(x)) and len(net._forward_hooks) == 1
    assert rehearse(net, x, 3, "the student", is_trained=True) == []


def test_the_rehearsal_leaves_the_network_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(72, 3))
    images = torch.randn(2, 1, 8, 8)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    rehearse(net, images, 3, "the student", is_trained=True)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and net.training
    assert all(p.grad is None for p in net.parameters())


def test_a_spec_keeps_the_output():
    spec = {"model": "lenet5", "width": 2, "output": "logits"}
    net = build(spec, (1, 28, 28), 10)
    assert len(net._forward_hooks) == 1


def test_check_reads_only_without_flags(recipe, capsys, monkeypatch):
    monkeypatch.setattr("trainer.data.batches.make_data", lambda *_: pytest.fail("the data was opened"))
    assert main(["check", "--allow-python", str(recipe("aux"))]) == 0
    assert capsys.readouterr().out.endswith("own.yaml: fine: train, pack\n")


def test_check_build_and_data(recipe, capsys):
    assert main(["check", "--build", "--allow-python", str(recipe("aux"))]) == 2
    assert "the student gives while it trains tuple" in capsys.readouterr().err
    assert main(["check", "--build", "--data", "--allow-python", str(recipe("net"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.split()[0] in ("class", "3", "all")]
    assert table[0] == ["class", "train", "validation", "test"] and table[-1] == ["all", "60", "60", "360"]
    assert len(table[1]) == 4 and sum(map(int, table[1][1:])) > 0
    assert "student python:own_nets:net: 460 weights" in lines
    assert lines[-1].endswith("own.yaml: fine: train, pack")
