"""What a teacher is worth: both arms of the comparison, and the figures that it gives."""

import json
import statistics
from pathlib import Path

import pytest
import yaml

from tests.runs.several_here import run_here, without_test_labels
from trainer.cli import main
from trainer.recipe.recipe import read
from trainer.recipe.training import Training
from trainer.runs import gain
from trainer.training.schedule import learning_rate

RECIPE = """
name: worth
data: {dataset: digits, subset: 300, validation: 60, augment: {shift: 1}, views: 2}
teacher: {model: lenet5, width: 3}
student: {model: lenet5, width: 2}
allow_untrained: true
cache: {where: memory}
stages:
  - {stage: train, who: teacher, training: {epochs: 6, batch_size: 20, lr: 1e-2}}
  - stage: distill
    training: {epochs: 2, batch_size: 50, lr: 1e-2}
    losses: [{loss: cross_entropy, weight: 0.1, label_smoothing: 0.1}, {loss: kl, weight: 0.9}]
  - {stage: prune, method: magnitude, sparsity: 0.5, training: {epochs: 1, batch_size: 50}, losses: [{loss: kl}]}
  - {stage: pack}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"


def test_gain_is_that_of_the_same_student_without_a_teacher(recipe, monkeypatch, capsys):
    commands = run_here(monkeypatch)
    assert main(["gain", str(recipe), "--seeds", "2"]) == 0
    assert len(commands) == 5  # the teacher, and two arms of two seeds
    here = Path("runs/worth-gain")
    labels = yaml.safe_load((here / "recipes" / "labels-seed1.yaml").read_text())
    first, second = labels["stages"]
    assert labels["seed"] == 1 and first["stage"] == "train" and second["stage"] == "prune"
    assert first["losses"] == [{"loss": "cross_entropy", "label_smoothing": 0.1}]
    assert second["losses"] == [{"loss": "cross_entropy"}] and second["sparsity"] == 0.5
    taught = yaml.safe_load((here / "recipes" / "taught-seed1.yaml").read_text())
    assert taught["stages"][0]["losses"][1] == {"loss": "kl", "weight": 0.9}
    assert taught["teacher"]["checkpoint"] == labels["teacher"]["checkpoint"]
    assert taught["data"] == labels["data"] and taught["student"] == labels["student"]

    found = json.loads((here / "gain.json").read_text())
    assert [row["stage"] for row in found["rows"]] == ["distilled", "pruned", "recovered"]
    assert found["rates"] == {"taught": 0.01, "labels": 0.01}
    tops = {}
    for arm in ("taught", "labels"):
        reports = [json.loads((here / f"{arm}-seed{seed}" / "report.json").read_text()) for seed in (0, 1)]
        tops[arm] = [report["rows"][-1]["top1"] for report in reports]
        assert [row["stage"] for row in reports[0]["rows"]][-1] == "recovered"
        assert found["rows"][-1][arm]["top1"] == tops[arm]
    gains = [a - b for a, b in zip(tops["taught"], tops["labels"], strict=True)]
    assert found["rows"][-1]["gain"] == pytest.approx(statistics.fmean(gains))
    assert found["rows"][-1]["error"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
    told = capsys.readouterr().out
    assert f"{statistics.fmean(gains):+.2f} ± {abs(gains[0] - gains[1]) / 2:.2f}" in told

    # The second seed's student was taught by the answers that the first one's had kept.
    lines = [json.loads(line) for line in (here / "taught-seed1" / "log.jsonl").read_text().splitlines()]
    assert sum(line.get("teacher_images", 0) for line in lines) == 0
    assert not (here / "views").exists() and not (here / "taught-seed1" / "views").exists()
    commands.clear()
    assert main(["gain", str(recipe), "--seeds", "2"]) == 0
    assert commands == []


def test_each_arm_takes_the_rate_that_validates_best(recipe, monkeypatch, capsys):
    rows = {
        ("taught", 1e-3): (60, 90), ("taught", 4e-3): (70, 10), ("labels", 1e-3): (80, 20), ("labels", 4e-3): (75, 99)
    }  # fmt: skip

    def run_all(jobs, *_):
        reports = []
        for job in jobs:
            name = job.changes["name"]
            plain = yaml.safe_load(Path(job.path).read_text())
            rate = plain["stages"][0]["training"]["lr"]
            validation, top1 = rows.get((name.partition("-")[0], rate), (1, 1))
            row = {"stage": "x", "top1": top1, "top1_validation": validation, "agreement": 50.0}
            reports.append({"rows": [row], "seconds": 1, "seed": 0, "hardware": hardware})
            if "tried" in name:
                assert len(plain["stages"]) == 1  # the first training of the student alone
        return reports

    hardware = {"gpu": None, "cpu": "some", "torch_threads": 1, "cores": 2}
    monkeypatch.setattr(gain, "run_all", run_all)
    monkeypatch.setattr(gain.checkpoint, "newest", lambda folder: folder)
    monkeypatch.setattr(gain, "share_answers", lambda *_: None)
    assert main(["gain", str(recipe), "--seeds", "1", "--rates", "1e-3,4e-3"]) == 0
    found = json.loads(Path("runs/worth-gain/gain.json").read_text())
    assert found["rates"] == {"taught": 4e-3, "labels": 1e-3}
    assert found["rows"][0]["gain"] == -10 and found["rows"][0]["error"] is None
    told = capsys.readouterr().out
    assert "taught: validation 60.00 % at 0.001, 70.00 % at 0.004" in told and "-10.00 ± –" in told


@pytest.mark.parametrize(
    "old, new, wanted",
    [
        ("teacher: {model: lenet5, width: 3}\n", "", "there is no teacher"),
        ("  - {stage: pack}", "  - {stage: pac}", "stages[3]"),
    ],
)
def test_recipes_without_a_gain_to_show_are_refused(recipe, capsys, old, new, wanted):
    text = RECIPE.replace(old, new)
    if not new:
        text = text.partition("cache:")[0] + "stages: [{stage: train, training: {epochs: 1}}]\n"
    recipe.write_text(text)
    assert main(["gain", str(recipe)]) == 2
    assert wanted in capsys.readouterr().err
    assert not Path("runs").exists()


def test_test_images_without_a_label_are_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    recipe = without_test_labels(tmp_path, monkeypatch)
    assert main(["gain", str(recipe), "--allow-python"]) == 2
    wanted = f"trainer: {recipe}: no test image has a label, so no gain can be measured\n"
    assert capsys.readouterr().err == wanted and not Path("runs").exists()


def test_a_teacher_without_classes_has_a_dash_for_agreement():
    arms = {arm: {"top1": [50.0, 60.0], "agreement": [None, None]} for arm in gain.ARMS}
    text = gain.table({"rows": [{"stage": "distilled", "gain": 0.0, "error": 0.0, **arms}]})
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")]
    assert cells[1:5] == ["distilled", "+0.00 ± 0.00", "55.00 ± 7.07", "–"]


def test_labels_alone_have_the_same_course_where_few_images_have_a_label(recipe):
    """All that is counted in epochs is, in those of a quarter of the images: else the rate falls four times as early."""
    training = {
        "epochs": 10, "batch_size": 50, "lr": 1e-2, "schedule": "step", "milestones": [5, 8], "warmup": 0.5,
        "patience": 3, "validate_every": 2, "freeze_epochs": 1,
    }  # fmt: skip
    weight = {"value": 1, "schedule": "linear", "epochs": 5, "to": 0.5}
    labels = {"loss": "cross_entropy", "weight": weight}
    losses = [labels, {"loss": "binary_cross_entropy"}, {"loss": "kl"}]
    checked, plain = read(recipe, {"stages.1.training": training, "stages.1.losses": losses})
    stages = {arm: made["stages"] for arm, made in gain._arms(checked, plain, None, 0.25, False).items()}
    taught, alone = (Training(**stages[arm][0]["training"]) for arm in gain.ARMS)
    rates = [
        [learning_rate(t, step, n) for step in range(t.epochs * n)] for t, n in ((taught, 20), (alone, 5))
    ]
    assert rates[0] == rates[1]
    assert (alone.patience, alone.validate_every, alone.freeze_epochs) == (12, 8, 4)
    assert stages["labels"][0]["losses"] == [labels | {"weight": weight | {"epochs": 20}}, losses[1]]
    assert stages["taught"][0]["training"] == training and stages["labels"][1]["training"]["epochs"] == 1


@pytest.mark.parametrize("share", [0.3, 0.47, 0.69, 0.83, 0.99])
def test_what_labels_alone_are_trained_by_is_allowed_whatever_the_share(recipe, share):
    for given in (
        {"epochs": 1, "warmup": 0.9},
        {"epochs": 10, "patience": 6, "validate_every": 3},
        {"epochs": 3, "patience": 1, "freeze_epochs": 2, "schedule": "step", "milestones": [1, 2]},
    ):
        checked, plain = read(recipe, {"stages.1.training": given})
        labels = gain._arms(checked, plain, None, share, False)["labels"]["stages"][0]["training"]
        assert Training(**labels).epochs == round(given["epochs"] / share)


def test_a_taught_teachers_classes_are_put_in_order_once(recipe, monkeypatch):
    """Its kept weights are in the data's order: the recipe's `classes` would put them in another."""
    monkeypatch.setattr(gain, "run_all", lambda *_: None)
    monkeypatch.setattr(gain.checkpoint, "newest", lambda folder: folder)
    Path("t.safetensors").touch()
    classes, folder = [*range(1, 10), 0], Path("worth-teacher")
    own = {
        "checkpoint": "t.safetensors",
        "prefix": "net",
        "classes": classes,
        "mean": [0.5],
        "std": [0.2],
        "resize": 8,
    }
    checked, plain = read(recipe, {f"teacher.{key}": value for key, value in own.items()})
    files = gain._taught(checked, plain, Path("here"), ".", False)
    for arm in gain._arms(checked, plain, files, 1.0, False).values():
        [file] = files
        assert file.is_relative_to(folder) and arm["teacher"] == {
            "model": "lenet5", "width": 3, "checkpoint": str(file), "mean": [0.5], "std": [0.2], "resize": 8,
        }  # fmt: skip


def test_labels_alone_take_as_many_steps_where_few_images_have_a_label(recipe, monkeypatch, capsys):
    run_here(monkeypatch)
    changes = ["data.labelled=60", "data.subset=240", "data.validation=60"]
    words = [word for change in changes for word in ("--set", change)]
    assert main(["gain", str(recipe), "--seeds", "1", *words]) == 0
    here = Path("runs/worth-gain")
    epochs = {}
    for arm in ("taught", "labels"):
        plain = yaml.safe_load((here / "recipes" / f"{arm}-seed0.yaml").read_text())
        epochs[arm] = [stage["training"]["epochs"] for stage in plain["stages"]]
    assert epochs == {"taught": [2, 1], "labels": [8, 1]}  # a quarter of the images has a label
    lines = [json.loads(line) for line in (here / "labels-seed0" / "log.jsonl").read_text().splitlines()]
    assert (
        max(line.get("step", 0) for line in lines if line.get("stage") == "train") == 16
    )  # of 50 and 10 images
