"""The teacher by onnxruntime beside the student: its rows, and what they say the student is worth."""

import json
import math
import re

import numpy as np
import pytest

import trainer
from trainer.exporting.onnx_int8 import _kept
from trainer.exporting.teacher import worth
from trainer.recipe.recipe import read

RECIPE = {
    "name": "beside",
    "data": {"dataset": "digits", "subset": 200, "validation": 60, "size": 12},
    "teacher": {"model": "lenet5", "width": 3},
    "student": {"model": "lenet300", "hidden": [6]},
    "stages": [
        {"stage": "train", "who": "teacher", "training": {"epochs": 1, "lr": 5e-3, "batch_size": 20}},
        {"stage": "distill", "training": {"epochs": 1, "lr": 5e-3}, "losses": [{"loss": "kl"}]},
        {"stage": "pack"},
        {"stage": "export", "to": ["onnx"], "teacher": True},
    ],
    "allow_untrained": True,
}


def written(folder, **changes):
    (folder / "beside.yaml").write_text(json.dumps(RECIPE | changes))
    return folder / "beside.yaml"


def test_the_teachers_rows_stand_before_the_students(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    report = trainer.run(written(tmp_path), folder=tmp_path)
    *_, dense, int8, student = rows = report["rows"]
    assert [row["stage"] for row in rows] == [
        "teacher",
        "distilled",
        "decoded",
        "teacher_onnx",
        "teacher_int8",
        "onnx",
    ]
    teacher = rows[0]
    assert dense["top1"] == pytest.approx(teacher["top1"]) and dense["agreement"] == 100
    assert int8["file_bytes"] < dense["file_bytes"] and int8["latency_seconds"] > 0
    assert (
        dense["num_weights"] == teacher["num_weights"] != student["num_weights"]
        and dense["ratio_student"] is None
    )
    assert "beside the teacher in 8-bit integers: " in student["notes"][-1]
    assert f"{student['top1'] - int8['top1']:+.2f} points (" in student["notes"][-1]
    gained, lost = map(int, re.search(r"\((\d+) images .* (\d+) the teacher", student["notes"][-1]).groups())
    assert gained - lost == round((student["top1"] - int8["top1"]) * 3.6)  # of 360 images
    assert (tmp_path / "beside/export/teacher_int8/student_int8.onnx").is_file()
    text = (tmp_path / "beside/report.md").read_text()
    assert "| teacher_int8" in text and "beside the teacher in 8-bit integers" in text


def row(stage, file_bytes, num_right, seconds):
    """Of 200 images of class 1, whose last `num_right` it gets right."""
    classes = np.r_[np.zeros(200 - num_right, int), np.ones(num_right, int)]
    top1 = num_right / 2
    return {
        "stage": stage,
        "file_bytes": file_bytes,
        "top1": top1,
        "latency_seconds": seconds,
        "classes": classes,
    }


def test_what_a_student_is_worth():
    labels = np.ones(200, int)
    teachers = [row("teacher_onnx", 4000, 180, 0.004), row("teacher_int8", 1000, 178, 0.006)]
    said = worth(row("onnx", 125, 177, 0.001), teachers, labels)
    assert said == (
        "beside the teacher in 8-bit integers: 1/8.0 of its bytes, -0.50 points (0 images that it alone gets right, 1 the teacher "
        "alone: McNemar's p = 1); 4.00 times as quick as the quicker of the teacher's two (teacher_onnx)"
    )
    said = worth(row("onnx", 2000, 188, 0.008), teachers, labels)
    assert "2.0 times its bytes, +5.00 points (10 images that it alone gets right, 0 the teacher" in said
    assert "p = 0.002);" in said and "0.50 times" in said  # 2 / 2^10: heads ten times in a row, or tails
    # Without labels nothing is said of accuracy.
    said = worth(row("onnx", 125, 177, 0.001) | {"top1": math.nan}, teachers, np.full(200, -1))
    assert said == (
        "beside the teacher in 8-bit integers: 1/8.0 of its bytes; 4.00 times as quick as the quicker of the teacher's two "
        "(teacher_onnx)"
    )
    row_of_file = {"top1": math.nan, "top1_student": math.nan, "agreement_student": 97.5}
    assert _kept(row_of_file) == "97.50 % of the student's answers"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, "compares the student with a teacher, and there is no teacher"),
        (
            {"stages": [*RECIPE["stages"][:3], {"stage": "export", "to": ["page"], "teacher": True}]},
            "no effect without onnx",
        ),
    ],
)
def test_what_cannot_be_compared(tmp_path, changes, words):
    content = {key: value for key, value in (RECIPE | changes).items() if value is not None}
    (tmp_path / "beside.yaml").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "beside.yaml")
