"""A teacher whose classes stand in another order than the data's is told, with the order; `classes:` then gives it."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests import making
from trainer.mistakes import Mistake
from trainer.recipe.recipe import read
from trainer.recipe.text import RecipeError
from trainer.runs import orders, runner
from trainer.storage.weights_file import read_file, save_file

DATA = "data: {dataset: digits, subset: 400, validation: 200}"
LENET = "model: lenet5, width: 4"
ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]  # what each output of the teacher means


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A teacher's file with its classes in another order, and its accuracy."""
    folder = tmp_path_factory.mktemp("taught")
    text = f"name: first\n{DATA}\nstudent: {{{LENET}}}\n"
    (folder / "first.yaml").write_text(
        f"{text}stages: [{{stage: train, training: {{epochs: 6, batch_size: 40, lr: 5e-3}}}}]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        making.leave_plots_out(patch)
        row = runner.run(folder / "first.yaml", folder=folder)["rows"][-1]
    [file] = folder.glob("first/checkpoints/00-train/*/student.safetensors")
    state, _ = read_file(file)
    for key in ("fc3.weight", "fc3.bias"):
        state[key] = state[key][torch.tensor(ORDER)]
    save_file(folder / "other.safetensors", state)
    return folder / "other.safetensors", row


def recipe(folder, file, more="", stage="{stage: distill, training: {epochs: 1}, losses: [{loss: kl}]}"):
    path = folder / "x.yaml"
    path.write_text(
        f"name: x\n{DATA}\nteacher: {{{LENET}, checkpoint: {file}{more}}}\nstudent: {{{LENET}}}\nstages: [{stage}]\n"
    )
    return path


@pytest.mark.parametrize("longest", [120, 30])
def test_another_order_is_told_and_given_it_teaches(tmp_path, monkeypatch, taught, longest):
    making.leave_plots_out(monkeypatch)
    monkeypatch.setattr(orders, "LONGEST", longest)
    file, row = taught
    assert row["top1"] > 60
    with pytest.raises(Mistake) as caught:
        runner.run(recipe(tmp_path, file), folder=tmp_path)
    message = str(caught.value)
    assert len(message) <= 300 and "since its classes stand in another order" in message
    if longest == 120:
        given = re.search(r"with (classes: \[.*?\]) in its entry", message)[1]
        assert json.loads(given.removeprefix("classes: ")) == [str(number) for number in ORDER]
    else:
        [path] = re.findall(r"the classes in (\S+)", message)
        given = Path(path).read_text().strip()
    report = runner.run(recipe(tmp_path, file, f", {given}"), folder=tmp_path)
    teacher = report["rows"][0]
    assert teacher["stage"] == "teacher" and teacher["top1"] == pytest.approx(row["top1"])


def test_an_order_by_index_and_a_stage_that_loads_the_teacher(tmp_path, monkeypatch, taught):
    making.leave_plots_out(monkeypatch)
    file, row = taught
    path = tmp_path / "x.yaml"
    stages = f"[{{stage: train, who: teacher, checkpoint: {file}}}, {{stage: distill, training: {{epochs: 1}}, losses: [{{loss: kl}}]}}]"
    path.write_text(
        f"name: x\n{DATA}\nteacher: {{{LENET}, classes: {ORDER}}}\nstudent: {{{LENET}}}\nstages: {stages}\n"
    )
    assert runner.run(path, folder=tmp_path)["rows"][0]["top1"] == pytest.approx(row["top1"])


def test_classes_of_a_teacher_that_nothing_is_loaded_into_have_no_effect(tmp_path):
    path = tmp_path / "x.yaml"
    stages = "[{stage: train, who: teacher, training: {epochs: 1}}]"
    path.write_text(
        f"name: x\n{DATA}\nteacher: {{{LENET}, classes: {ORDER}}}\nstudent: {{{LENET}}}\nstages: {stages}\n"
    )
    with pytest.raises(
        RecipeError, match="teacher.classes: has no effect on a teacher that nothing is loaded"
    ):
        read(path)
