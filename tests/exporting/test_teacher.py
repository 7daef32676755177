"""The teacher by onnxruntime beside the student: its rows, and what they say the student is worth."""

import json

import pytest

import trainer
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
    assert student["notes"][-1] == worth(student, [dense, int8])
    assert (tmp_path / "beside/export/teacher_int8/student_int8.onnx").is_file()
    text = (tmp_path / "beside/report.md").read_text()
    assert "| teacher_int8" in text and "beside the teacher in 8-bit integers" in text


def row(stage, file_bytes, top1, seconds):
    return {"stage": stage, "file_bytes": file_bytes, "top1": top1, "latency_seconds": seconds}


def test_what_a_student_is_worth():
    teachers = [row("teacher_onnx", 4000, 90.0, 0.004), row("teacher_int8", 1000, 89.0, 0.006)]
    said = worth(row("onnx", 125, 88.5, 0.001), teachers)
    assert said.startswith(
        "beside the teacher in 8-bit integers: 1/8.0 of its bytes, -0.50 points; 4.00 times as quick"
    )
    assert said.endswith("(teacher_onnx)")
    assert "2.0 times its bytes, +1.00 points; 0.50 times" in worth(row("onnx", 2000, 90.0, 0.008), teachers)


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
