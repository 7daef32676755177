"""A class with few images: what the report says of it, and that weights and sampler make a student learn it."""

import json

import numpy as np
import pytest
from PIL import Image

import trainer
from trainer.recipe.recipe import read


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """120 pictures of some grey and 12 of a grey that is mostly brighter, in folders by class."""
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for name, count, level in (("common", 120, 100), ("rare", 12, 130)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(count):
            grey = int(draw.normal(level, 15))
            Image.new("L", (6, 6), grey).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path


def run(folder, name, **training):
    recipe = {
        "name": name,
        "data": {"dataset": "image_folder", "folder": str(folder / "photos"), "test": 0.25, "validation": 0.2, "size": 6,
                 "channels": 1, "workers": 0},
        "student": {"model": "lenet300", "hidden": [4]},
        "stages": [{"stage": "train", "training": {"epochs": 2, "lr": 2e-3, "batch_size": 16} | training}],
        "allow_untrained": True,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(recipe))
    report = trainer.run(folder / f"{name}.yaml", folder=folder / "runs")
    return report, (folder / "runs" / name / "report.md").read_text(), folder / "runs" / name


def test_a_class_that_is_never_the_answer_is_said(photographs, capsys):
    report, text, folder = run(photographs, "plain")
    row = report["rows"][-1]
    assert row["never_answered"] == ["rare"] and row["balanced"] == 50 and row["top1"] > 90
    told = capsys.readouterr().out
    assert "balanced 50.00 %" in told and "never the answer: rare" in told
    assert any("never answers rare" in warning for warning in report["warnings"])
    assert "never answers rare" in text and "balanced %" in text and "## Classes" in text
    assert "| rare" in text and "true class" in text
    page = (folder / "report.html").read_text()
    assert "<th>balanced</th>" in page and "never answers rare" in page


@pytest.mark.parametrize("how", [{"class_weights": "balanced"}, {"sampler": "balanced"}])
def test_a_rare_class_is_learnt(photographs, how):
    report, _, _ = run(photographs, "even", epochs=15, lr=1e-2, **how)
    row = report["rows"][-1]
    assert "never_answered" not in row and row["balanced"] > 60


@pytest.mark.parametrize(
    ("training", "losses", "words"),
    [
        ({"class_weights": "balanced", "sampler": "balanced"}, None, "one of them is allowed"),
        (
            {"class_weights": "balanced"},
            [{"loss": "binary_cross_entropy"}],
            "class_weights: has no effect: no loss",
        ),
        ({"sampler": "even"}, None, "'balanced'"),
    ],
)
def test_settings_that_cannot_work(tmp_path, training, losses, words):
    stage = {"stage": "train", "training": {"epochs": 1} | training} | ({"losses": losses} if losses else {})
    recipe = {"name": "x", "data": {"dataset": "digits"}, "student": {"model": "lenet5"}, "stages": [stage]}
    (tmp_path / "x.yaml").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "x.yaml")
