"""An export is proven before it is in place: ties, failures, what is there already, what is not installed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trainer
from trainer.exporting import export as exporting
from trainer.exporting.proof import prove
from trainer.exporting.subject import Exported, NotInstalled, Subject
from trainer.exporting.tracing import trace
from trainer.mistakes import Mistake
from trainer.recipe import shelves
from trainer.recipe.recipe import targets_of


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


def subject():
    return exporting.subject_of(net(), (1, 2, 2), mean=[0.5], std=[0.25])


def answering(change, **facts) -> Exported:
    mine = subject()
    return Exported([], lambda images: change(mine.logits(images)), 1, **facts)


def test_the_rules_of_agreement():
    row = prove(subject(), answering(lambda logits: logits + 1e-7))
    assert row["agreement_student"] == 100 and row["num_near_ties"] == 0 and row["num_images"] == 256
    assert 0 < row["max_difference"] < 1e-6 and row["random_inputs"] and row["top1"] != row["top1"]
    with pytest.raises(RuntimeError, match=r"not the student's for \d+ of 256 images"):
        prove(subject(), answering(lambda logits: -logits))
    with pytest.raises(RuntimeError, match="not finite"):
        prove(subject(), answering(lambda logits: logits * np.nan))
    with pytest.raises(RuntimeError, match="answers"):
        prove(subject(), answering(lambda logits: logits[:, :2]))
    # An integer target's logits are equal, all of them.
    with pytest.raises(RuntimeError, match="not the student's for 256 of 256"):
        prove(subject(), answering(lambda logits: logits + 1e-5, compared="integer"))
    assert prove(subject(), answering(lambda logits: logits, compared="integer"))["max_difference"] == 0
    # What is only measured may differ.
    assert prove(subject(), answering(lambda logits: -logits, compared="measured"))["agreement_student"] < 50


def test_a_logit_may_be_a_hundredth_of_the_largest_off_where_the_classes_are_the_same():
    def reference(images):
        logits = np.full((len(images), 2), [-10, 8], np.float32)
        logits[3:4, 0] = -20
        return logits

    def off(by):
        def run(images):
            logits = reference(images)
            logits[7:8, 1] += by
            return logits

        return Exported([], run, 1, reference=reference)

    assert prove(subject(), off(0.19))["max_difference"] == pytest.approx(0.19, rel=1e-5)
    words = r"not the student's: at image 7 of 256 one is 0.21 off; 0.2 is allowed"
    with pytest.raises(RuntimeError, match=words):
        prove(subject(), off(0.21))
    one = Exported(
        [], lambda images: images[:, 0, 0, :1] + 1, 1, reference=lambda images: images[:, 0, 0, :1]
    )
    with pytest.raises(
        RuntimeError, match="not the student's: at image"
    ):  # a single class is always the same
        prove(subject(), one)


def test_a_class_may_change_at_a_tie_alone():
    def two(distance):
        def reference(images):
            logits = np.zeros((len(images), 3), np.float32)
            logits[:, :2] = 8, 8 + distance
            return logits

        return reference

    def swapped(reference):
        return lambda images: reference(images)[:, [1, 0, 2]]

    near, far = two(8e-5 * 8), two(1.2e-4 * 8)
    row = prove(subject(), Exported([], swapped(near), 1, reference=near))
    assert row["num_near_ties"] == 256 and len(row["near_ties"]) == 20 and row["agreement_student"] == 0
    with pytest.raises(RuntimeError, match="not the student's for 256 of 256"):
        prove(subject(), Exported([], swapped(far), 1, reference=far))


def target(subject, folder, *, answer: str = "right") -> Exported:
    """Writes a file."""
    if answer == "missing":
        raise NotInstalled("needs the package nothing: pip install nothing")
    (folder / "net.txt").write_text(answer)
    return Exported(
        [folder / "net.txt"], (lambda x: -subject.logits(x)) if answer == "wrong" else subject.logits, 5
    )


@pytest.fixture
def shelf(monkeypatch):
    found = shelves.find
    monkeypatch.setattr(shelves, "ones_own", lambda value: target)
    return found


def wanted(*answers):
    entries = [{"to": "python:m:t", "answer": answer, "folder": answer} for answer in answers]
    return targets_of(entries, allow_python=True)


def test_what_fails_leaves_nothing_and_what_is_missing_stops_no_other(shelf, tmp_path):
    rows, missing = exporting.export_all(subject(), wanted("missing", "right"), tmp_path)
    assert [row["stage"] for row in rows] == ["right"] and rows[0]["file_bytes"] == 5
    assert missing == ["to missing: needs the package nothing: pip install nothing"]
    assert [p.name for p in tmp_path.iterdir()] == ["right"]
    with pytest.raises(RuntimeError, match="export to wrong: .*files are removed"):
        exporting.export_all(subject(), wanted("wrong"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["right"]


def test_an_export_that_is_there_is_kept_until_the_new_one_is_proven(shelf, tmp_path):
    exporting.export_all(subject(), wanted("right"), tmp_path)
    (tmp_path / "right/net.txt").write_text("old")
    with pytest.raises(Mistake, match="right: is there already; --force"):
        exporting.export_all(subject(), wanted("right"), tmp_path)
    [bad] = wanted("wrong")
    with pytest.raises(RuntimeError):
        exporting.export_all(subject(), [bad.model_copy(update={"folder": "right"})], tmp_path, force=True)
    assert (tmp_path / "right/net.txt").read_text() == "old"
    exporting.export_all(subject(), wanted("right"), tmp_path, force=True)
    assert (tmp_path / "right/net.txt").read_text() == "right" and len(list(tmp_path.iterdir())) == 1


def test_targets_are_checked():
    with pytest.raises(Mistake, match=r"to\[0\]: there is no to 'onix' \(did you mean 'onnx'"):
        targets_of(["onix"])
    with pytest.raises(Mistake, match="'onnx' is given twice; a folder of its own"):
        targets_of(["onnx", {"to": "onnx", "compressed": False}])
    with pytest.raises(Mistake, match="compresed: is no key here .did you mean 'compressed'"):
        targets_of([{"to": "onnx", "compresed": False}])
    with pytest.raises(Mistake, match="allow it by --allow-python"):
        targets_of(["python:m:t"])
    assert [
        t.label for t in targets_of(["onnx", {"to": "onnx", "folder": "plain", "compressed": False}])
    ] == ["onnx", "plain"]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_before_anything_is_written(number, tmp_path):
    broken = net()
    with torch.no_grad():
        broken[1].weight[1, 2] = number
    with pytest.raises(Mistake, match="^layer '1': its weight has numbers that are infinite or NaN$"):
        exporting.export(broken, tmp_path / "out", "c", shape=(1, 2, 2))
    assert not list(tmp_path.iterdir())


class Infinite(nn.Module):
    """Bounds, paddings and a mask that are infinite."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, x):
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2)
        x = x.clamp(min=-torch.inf, max=2) + F.hardtanh(x, -1, torch.inf)
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask) + 1 / (x * 0 + torch.inf)
        return self.fc(x.mean((1, 2)))


@pytest.mark.parametrize("to", ["c", "page", "onnx"])
def test_infinite_constants_are_written(to, tmp_path):
    torch.manual_seed(0)
    try:
        [row] = exporting.export(Infinite(), tmp_path, to, shape=(1, 8, 8))
    except NotInstalled as error:
        pytest.skip(str(error))
    assert row["max_difference"] < 1e-5


def test_an_infinite_bound_is_none():
    graph = trace(Infinite(), (1, 8, 8))
    bounds = [(n.attributes["least"], n.attributes["most"]) for n in graph.nodes if n.op == "clamp"]
    assert bounds == [(None, 2), (-1, None)]


def test_images_of_unknown_size(tmp_path):
    with pytest.raises(Mistake, match="an export needs the images'"):
        trainer.export(net(), tmp_path, "onnx", shape=())


def test_the_scale_is_what_normalizing_multiplies_by():
    """One channel is divided in double precision: float32 alone differs by a bit for MNIST's 0.3081."""
    white = np.full((1, 1, 1, 1), 255, np.uint8)
    for std in [0.3081, 0.353, *np.random.default_rng(0).uniform(0.1, 1, 200).tolist()]:
        one = Subject(nn.Identity(), None, (1, 1, 1), mean=[0.0], std=[std])
        assert one.scale == one.normalized(white)[0, 0, 0]
        three = Subject(nn.Identity(), None, (3, 1, 1), mean=[0.0] * 3, std=[std, 0.3, 2 * std])
        assert (three.scale == three.normalized(white.repeat(3, 1))[0, :, 0, 0]).all()
    assert np.float32(1) / np.float32(0.3081) != np.float32(1 / 0.3081)
    assert Subject(nn.Identity(), None, (2, 1, 1)).scale.tolist() == [1, 1]


def test_the_test_vector_is_what_it_says():
    image, logits = subject().test_vector()
    assert image.reshape(-1).tolist() == [0, 37, 74, 111]
    inputs = (torch.tensor(image).float() / 255 - 0.5) * 4
    assert np.array_equal(net()(inputs[None]).detach().numpy()[0], logits)


def test_the_command(tmp_path, capsys):
    from trainer.cli import main

    pytest.importorskip("onnxruntime")
    spec = {"model": "lenet300", "hidden": [5]}
    from trainer.networks.build import build

    trainer.pack(
        build(spec, (1, 8, 8), 10),
        tmp_path / "s.tiny",
        (1, 8, 8),
        [0.5],
        [0.5],
        [str(i) for i in range(10)],
        spec,
    )
    assert main(["export", str(tmp_path / "s.tiny"), "--to", "onnx"]) == 0
    said = capsys.readouterr().out
    assert "256 random" in said and str(Path("export/onnx")) in said
    assert (tmp_path / "export/onnx/student.onnx").is_file()
    assert main(["export", str(tmp_path / "s.tiny"), "--to", "onnx"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "s.tiny"), "--to", "onnx", "--force"]) == 0
    plain = ["export", str(tmp_path / "s.tiny"), "--to", "{to: onnx, compressed: false, folder: plain}"]
    assert main(plain) == 0
    assert (tmp_path / "export/plain/student.onnx").is_file()
    assert main(["export", str(tmp_path / "s.tiny"), "--to", "{to: onnx, compresed: false}"]) == 2
    assert "compresed" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "s.tiny"), "--to", "{to: onnx"]) == 2


ODD = """
import torch
from torch import nn
from torch.nn import functional as F


class Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1).sort(1).values)


def odd(input_shape, num_classes):
    return nn.Sequential(nn.Identity(), Sorts())
"""
RECIPE = """
name: odd
data: {dataset: digits, subset: 60, validation: 60}
student: {model: "python:odd_net:odd"}
stages:
  - {stage: train, training: {epochs: 1}}
  - {stage: pack}
  - {stage: export, to: [{to: onnx, compressed: false}]}
"""


def test_a_stage_refuses_what_it_cannot_export_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "odd_net.py").write_text(ODD)
    (tmp_path / "odd.yaml").write_text(RECIPE)
    with pytest.raises(
        Mistake, match=r"odd.yaml:8: stages\[2\]: layer '1': operator sort cannot be exported"
    ):
        trainer.run("odd.yaml", allow_python=True)
    assert not list((tmp_path / "runs/odd").glob("checkpoints/*"))
    (tmp_path / "early.yaml").write_text(RECIPE.replace("  - {stage: pack}\n", ""))
    with pytest.raises(
        Mistake, match=r"early.yaml:7: stages\[1\]: exports the packed student: a stage pack before"
    ):
        trainer.run("early.yaml", allow_python=True)
