"""`python:module:name` on every shelf: refused unless it is allowed, then checked, run and packed like our own."""

import json
import sys

import pytest

import trainer
from trainer.cli import main
from trainer.mistakes import Mistake
from trainer.recipe.recipe import read, schema
from trainer.recipe.text import RecipeError

MODULE = '''
"""Methods of somebody else's."""
import torch
from pydantic import PositiveFloat
from torch import nn

from trainer.data.images import InMemory, Source
from trainer.recipe.keys import Exclude
from trainer.training.rows import record


def focal(student_logits, teacher_logits, labels, *, gamma: PositiveFloat = 2.0):
    """Cross-entropy, less of it where the student is sure."""
    log = student_logits.log_softmax(1).gather(1, labels[:, None])
    return (-((1 - log.exp()) ** gamma) * log).mean()


def stripes(*, num_images: int = 60):
    """Images of stripes, three classes."""
    labels = torch.arange(num_images) % 3
    images = torch.zeros(num_images, 1, 16, 16, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        images[i, :, :: label + 1] = 255
    images += torch.randint(0, 9, images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Source(InMemory(images, labels), InMemory(images, labels), ["a", "b", "c"], (0.5,), (0.5,), (1, 16, 16))


def little(input_shape, num_classes, *, hidden: int = 8):
    channels, height, width = input_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ReLU(), nn.Linear(hidden, num_classes))


def jitter(run, *, amount: PositiveFloat, exclude: Exclude = []):
    """Moves all weights a little."""
    with torch.no_grad():
        for name, parameter in run.student.named_parameters():
            if not any(name.startswith(layer) for layer in exclude):
                parameter.add_(amount * torch.sign(parameter))
    record(run, "jittered", amount=amount)


def furthest(weight, alive, *, power: PositiveFloat = 1.0):
    """Weights nearest to the layer's mean go first."""
    return (weight - weight[alive].mean()).abs() ** power
'''
RECIPE = """
name: own
data: {dataset: "python:own_methods:stripes", num_images: 90, validation: 30}
teacher: {model: lenet5, width: 2}
student: {model: "python:own_methods:little", hidden: 6}
stages:
  - {stage: train, who: teacher, training: {epochs: 2, batch_size: 20}}
  - {stage: distill, training: {epochs: 2, batch_size: 20}, losses: [{loss: "python:own_methods:focal", gamma: 1.5}]}
  - {stage: "python:own_methods:jitter", amount: 1e-4, exclude: ["1"]}
  - {stage: prune, method: "python:own_methods:furthest", sparsity: 0.5, power: 2}
  - {stage: pack}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with the module and the recipe, which is the folder that the program is started in."""
    (tmp_path / "own_methods.py").write_text(MODULE)
    (tmp_path / "own.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_methods", None)


def told(path, allow_python=True):
    with pytest.raises(RecipeError) as caught:
        read(path, allow_python=allow_python)
    return str(caught.value).replace(f"{path}:", "").splitlines()


def test_code_that_a_recipe_names_does_not_run_unless_it_is_allowed(own):
    (own / "own_methods.py").write_text("raise SystemExit('it ran')")
    sentence = "it runs the code of that module: allow it by --allow-python (in Python by allow_python=True)"
    found = told(own / "own.yaml", allow_python=False)
    assert [line.split(": ")[1] for line in found] == [
        "data.dataset",
        "student.model",
        "stages[1].losses[0].loss",
        "stages[2].stage",
        "stages[3].method",
    ]
    assert all(line.endswith(sentence) for line in found)
    assert "own_methods" not in sys.modules


def test_every_shelf_takes_somebody_elses_methods(own, fresh_process, capsys):
    report = trainer.run(own / "own.yaml", folder=own / "runs", allow_python=True)
    assert [row["stage"] for row in report["rows"]] == [
        "teacher",
        "distilled",
        "jittered",
        "pruned",
        "decoded",
    ]
    assert report["rows"][2]["amount"] == 1e-4
    pruned, decoded = report["rows"][3:]
    assert pruned["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert decoded["top1"] == pruned["top1"]  # by a fresh process, which is allowed it too
    assert "going on" not in capsys.readouterr().out
    assert main(["run", "own.yaml", "--folder", "runs"]) == 2
    assert "--allow-python" in capsys.readouterr().err
    assert main(["run", "own.yaml", "--folder", "runs", "--allow-python"]) == 0
    assert "has run already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("gamma: 1.5", "gama: 1.5", "stages[1].losses[0].gama: is no key here (did you mean 'gamma'?)"),
        ("gamma: 1.5", "gamma: -1", "stages[1].losses[0].gamma: got -1; it should be greater than 0"),
        ("methods:focal", "methods:fokal", "stages[1].losses[0].loss: module 'own_methods' has no function 'fokal' (did you mean 'focal'?)"),
        ("own_methods:focal", "own_method:focal", "stages[1].losses[0].loss: there is no module 'own_method'"),
        ("hidden: 6", "hidden: x", "student.hidden: got 'x'; it should be a valid integer"),
        ("hidden: 6", "hiden: 6", "student.hiden: is no key here (did you mean 'hidden'?)"),
        ("amount: 1e-4, ", "", "stages[2].amount: is missing, and required"),
        ("power: 2", "power: 2, sensitivity: 1", "stages[3].sensitivity: is no key with method 'furthest'; with std"),
        ("num_images: 90", "num_images: many", "data.num_images: got 'many'; it should be a valid integer"),
        ("python:own_methods:stripes", "python:own_methods", "data.dataset: got 'python:own_methods'; python:module:name"),
    ],
)  # fmt: skip
def test_their_keys_are_checked_like_ours(own, old, new, wanted):
    (own / "own.yaml").write_text(RECIPE.replace(old, new))
    assert [line.partition(": ")[2][: len(wanted)] for line in told(own / "own.yaml")] == [wanted]


def test_a_layer_that_their_stage_excludes_and_nobody_has_is_found_before_the_first_training(own, capsys):
    (own / "own.yaml").write_text(RECIPE.replace('exclude: ["1"]', 'exclude: ["fc9"]'))
    assert main(["run", "own.yaml", "--allow-python"]) == 2
    assert "stages[2].exclude[0]: there is no layer 'fc9'; there are: 1, 3" in capsys.readouterr().err
    assert not (own / "runs/own/checkpoints").exists()


def test_their_stage_after_pack_is_refused(own):
    lines = RECIPE.splitlines(keepends=True)
    (own / "own.yaml").write_text("".join(lines[:-3] + lines[-1:] + lines[-3:-2]))
    assert told(own / "own.yaml") == [
        "10: stages[3]: changes the student after it was packed: the file would be another network's"
    ]


def test_their_module_without_type_hints_says_so(own):
    (own / "own_methods.py").write_text(MODULE.replace("gamma: PositiveFloat = 2.0", "gamma=2.0"))
    assert "own_methods.focal: gamma has no type hint" in told(own / "own.yaml")[0]


def test_the_schema_lets_them_pass():
    json.dumps(schema())
    for name in ("StageKeys", "TermKeys", "DataKeys"):
        last = schema()["$defs"][name]["oneOf"][-1]
        [pattern] = [found["pattern"] for found in last["properties"].values()]
        assert pattern == "^python:"


def test_the_old_name_of_exclude_is_taken_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = """name: old
data: {dataset: digits, size: 16}
student: {model: lenet5, width: 2}
stages:
  - {stage: train, training: {epochs: 1}}
  - {stage: prune, sensitivity: 1, keep: [last]}
"""
    (tmp_path / "old.yaml").write_text(text)
    recipe, _ = read(tmp_path / "old.yaml")
    assert recipe.stages[1].exclude == ["last"]
    assert main(["check", "old.yaml"]) == 0
    assert capsys.readouterr().err == (
        "trainer: old.yaml:6: stages[1].exclude: keep is called exclude now (the old name still works)\n"
    )
    recipe, _ = read(tmp_path / "old.yaml", {"stages.1.keep": ["first"]})
    assert recipe.stages[1].exclude == ["first"]
    (tmp_path / "old.yaml").write_text(text.replace("keep: [last]", "keep: [last], exclude: [first]"))
    assert told(tmp_path / "old.yaml") == [
        "6: stages[1].keep: is called exclude now, and exclude is given too"
    ]


def test_the_old_name_of_a_teachers_weight_is_taken_with_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "known.safetensors").touch()
    text = """name: old
data: {dataset: digits, size: 16}
teachers:
  - {model: lenet5, checkpoint: known.safetensors, share: 2}
  - {model: lenet5, checkpoint: known.safetensors}
student: {model: lenet5, width: 2}
stages:
  - {stage: distill, training: {epochs: 1}, losses: [{loss: kl}]}
"""
    (tmp_path / "old.yaml").write_text(text)
    recipe, _ = read("old.yaml")
    assert [keys.weight for keys in recipe.teachers] == [2.0, 1.0]
    assert recipe.written.notes == [
        "old.yaml:4: teachers[0].weight: share is called weight now (the old name still works)"
    ]
    assert read("old.yaml", {"teachers.1.share": 3})[0].teachers[1].weight == 3
    (tmp_path / "old.yaml").write_text(text.replace("share: 2", "share: 2, weight: 3"))
    assert told(tmp_path / "old.yaml") == [
        "4: teachers[0].share: is called weight now, and weight is given too"
    ]
    (tmp_path / "old.yaml").write_text(text.replace("share: 2", "wieght: 2"))
    assert told(tmp_path / "old.yaml") == ["4: teachers[0].wieght: is no key here (did you mean 'weight'?)"]


def test_type_hints_may_be_texts(own):
    """As `from __future__ import annotations` makes them."""
    (own / "own_methods.py").write_text(
        MODULE.replace("import torch\n", "from __future__ import annotations\n\nimport torch\n", 1)
    )
    recipe, _ = read(own / "own.yaml", allow_python=True)
    assert recipe.stages[1].losses[0].gamma == 1.5 and recipe.stages[2].exclude == ["1"]
    (own / "own.yaml").write_text(RECIPE.replace("gamma: 1.5", "gamma: -1").replace('["1"]', '["2"]'))
    assert told(own / "own.yaml") == ["8: stages[1].losses[0].gamma: got -1; it should be greater than 0"]
    sys.modules.pop("own_methods")
    (own / "own_methods.py").write_text(MODULE.replace("gamma: PositiveFloat", "gamma: 'Unknown'"))
    assert "focal: gamma: its type hint 'Unknown' has no meaning: name 'Unknown'" in told(own / "own.yaml")[0]


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("def focal(student_logits, teacher_logits, labels, *,", "class focal:\n  def __init__(self, *,",
         "loss 'python:own_methods:focal' is a class without forward; a function or an nn.Module is allowed"),
        ("weight, alive, *, power", "weight, alive, layer, *, power",
         "method 'python:own_methods:furthest' asks for 'layer'; there are: weight, alive, parts"),
        ("weight, alive, *, power", "weight, gradient, *, power",
         "method 'python:own_methods:furthest' has no schedule 'once'; it has cubic"),
    ],
)  # fmt: skip
def test_what_they_ask_for_is_checked_before_anything_is_trained(own, old, new, wanted):
    (own / "own_methods.py").write_text(MODULE.replace(old, new))
    assert wanted in "\n".join(told(own / "own.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("* log).mean()", "* log)", "loss 'python:own_methods:focal' returned a tensor 2x1; a tensor of one number"),
        ("* log).mean()", "* log).mean().item()", "loss 'python:own_methods:focal' returned float"),
        ("** power\n", "** power * float('nan')\n", "layer '1': method 'furthest' returned NaN; numbers are allowed"),
        (".abs() ** power\n", ".abs().sum(0)\n", r"method 'furthest' returned \[256\]; the weight's shape \[6, 256\]"),
    ],
)  # fmt: skip
def test_what_they_return_is_checked(own, old, new, wanted):
    (own / "own_methods.py").write_text(MODULE.replace(old, new))
    with pytest.raises(Mistake, match=wanted):
        trainer.run(own / "own.yaml", folder=own / "runs", allow_python=True)
