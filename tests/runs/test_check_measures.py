"""`check --measure`: what each loss weighs before anything is trained, and losses that can weigh nothing."""

import re

import pytest

from trainer.cli import main

RECIPE = """
name: weighed
data: {dataset: digits, subset: 200, validation: 40}
teacher: {model: lenet5, width: 4}
student: {model: lenet5, width: 2}
stages:
  - {stage: train, who: teacher, training: {epochs: 1, batch_size: 50}}
  - stage: distill
    training: {epochs: 2, batch_size: 50}
    losses: [{loss: cross_entropy}, {loss: attention, weight: 1000}, {loss: kl, weight: auto}]
"""
MODULE = '''
"""Losses that give the student nothing."""
from torch import nn


def detached(student_logits, teacher_logits):
    return (student_logits.detach() - teacher_logits).square().mean()


class alone(nn.Module):
    """Learns something of the teacher's, and takes nothing of the student's."""

    def __init__(self, teacher_map):
        super().__init__()
        self.decode = nn.Conv2d(teacher_map[1], teacher_map[1], 1)

    def forward(self, teacher_map):
        return (self.decode(teacher_map) - teacher_map).square().mean()
'''


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "weighing_nothing.py").write_text(MODULE)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def test_each_loss_is_weighed_and_named_with_the_weight_that_balances_it(recipe, capsys):
    assert main(["check", str(recipe), "--measure"]) == 0
    before = capsys.readouterr().out
    assert "the teacher has learnt nothing yet" in before
    row = re.search(r"\| attention .*?\| +1e\+03 \| +([\d.e+]+) \| +([\d.]+) \|", before)
    assert float(row[1]) > 10 and float(row[1]) * float(row[2]) == pytest.approx(1000, rel=0.02)
    assert f"attention: its gradient is {row[1]} times" in before and f"weight {row[2]} " in before
    assert re.search(r"\| kl .*\| +1 \|", before)
    assert main(["run", str(recipe)]) == 0
    ran = capsys.readouterr().out
    report = (recipe.parent / "runs" / "weighed" / "report.md").read_text()
    assert "## What the losses weigh" in report and re.search(r"\| distilled .*\| attention", report)
    page = (recipe.parent / "runs" / "weighed" / "report.html").read_text()
    assert "What the losses weigh" in page and "drown" in page
    assert main(["check", str(recipe), "--measure"]) == 0
    after = capsys.readouterr().out
    assert "the teacher is that of runs/weighed" in after
    first = re.search(r"attention +\| +[\d.e+]+ \| +([\d.e+]+)", after)[1]
    assert re.search(
        rf"\| attention +\| +1e\+03 \| +{re.escape(first)} \|", ran + report
    )  # as its first batch


def test_what_can_have_no_ratio_is_refused(recipe, capsys):
    for loss, options, wanted in (
        (
            "alone",
            [],
            "takes nothing of the student (it wants teacher_map): whatever it learns, it gives the student no",
        ),
        ("detached", ["--build"], "loss 'python:weighing_nothing:detached' gives the student no gradient"),
    ):
        recipe.write_text(RECIPE.replace("loss: kl", f'loss: "python:weighing_nothing:{loss}"'))
        assert main(["check", str(recipe), "--allow-python", *options]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"trainer: {recipe}:10: stages[1].losses[2]: ") and wanted in told
        assert told.count("\n") == 1
    recipe.write_text(RECIPE)
    assert main(["check", str(recipe), "--folder", "elsewhere"]) == 2
    assert "no effect without --measure" in capsys.readouterr().err
