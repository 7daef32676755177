"""The table of what the losses are worth: small, on digits."""

import importlib
import json
from pathlib import Path

import pytest

import trainer
from trainer.recipe import shelves

RECIPE = """
name: digits_teacher
data: {dataset: digits, size: 12, views: 2, augment: {shift: 1}, validation: 60}
teacher: {model: lenet5, width: 3}
student: {model: lenet5, width: 2}
stages:
  - {stage: train, who: teacher, training: {epochs: 1, lr: 1e-2}}
  - {stage: distill, training: {epochs: 1}, losses: [{loss: kl}]}
"""


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(trainer.__file__).parents[1] / "scripts")
    return importlib.import_module("compare_losses")


def test_every_row_is_of_losses_on_the_shelf(script):
    """Not the other way round: whoever drops a loss in need not know of the table."""
    compared = {term["loss"] for terms in script.TERMS.values() for term in terms}
    assert compared <= set(shelves.names("loss")) and len(compared) > 25
    for terms in script.TERMS.values():  # as the recipe's checker sees them
        script.recipe_of(Path(trainer.__file__).parents[1] / script.RECIPE, {}, terms)


def test_a_small_table_and_what_a_second_call_takes_from_the_first(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE)
    settings = [
        "data.subset=100",
        "stages.1.training.epochs=2",
        "stages.1.training.validate_every=2",
        "student.width=2",
    ]
    asked = ["--recipe", str(tmp_path / "r.yaml"), "--folder", str(tmp_path / "runs"), "--seeds", "2"]
    asked += [word for setting in settings for word in ("--set", setting)]
    text = script.main(["kl", "hint", *asked])
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert set(rows) == {"labels alone", "kl", "hint"}
    assert rows["kl"][0] == "0.1 cross_entropy + 0.9 kl" and rows["labels alone"][-1] == "1.00×"
    folder = tmp_path / "runs" / "compare_losses"
    assert (folder / "table.md").read_text() == text
    found = json.loads((folder / "kl-seed1.json").read_text())
    base = json.loads((folder / "labels_alone-seed1.json").read_text())
    assert 0 <= found["top1"] <= 100 and found["step_seconds"] > 0 and base["facts"]["seed"] == 1
    assert not list(folder.glob("*-seed?"))  # checkpoints of the trainings are gone

    (folder / "hint-seed0.json").unlink()
    trained = []
    real = script.fit
    monkeypatch.setattr(script, "fit", lambda run, *rest: trained.append(run.seed) or real(run, *rest))
    again = script.main(["kl", "hint", *asked])
    assert trained == [0]
    assert [line.split("|")[:4] for line in again.splitlines()] == [
        line.split("|")[:4] for line in text.splitlines()
    ]

    with pytest.raises(ValueError, match="labels_alone-seed0.json: is of another training; remove it"):
        script.main(["kl", *asked, "--set", "stages.1.training.lr=1e-4"])
