"""Chains of teachers: the student becomes the teacher, of itself or of the next student."""

import json
import shutil

import pytest
import torch
import yaml

import trainer
from trainer.cli import main
from trainer.reporting import report
from trainer.storage import checkpoint

TRAINING = {"epochs": 1, "batch_size": 30, "lr": 1e-2}
CHAIN = {
    "name": "x",
    "data": {"dataset": "digits", "subset": 90, "validation": 60},
    "student": {"model": "lenet5", "width": 4, "batch_norm": True},
    "stages": [
        {"stage": "train", "training": TRAINING},
        {"stage": "prune", "method": "magnitude", "sparsity": 0.5, "training": TRAINING},
        {"stage": "promote", "student": {"model": "lenet5", "width": 2}},
        {"stage": "distill", "training": TRAINING, "losses": [{"loss": "kl"}, {"loss": "hint"}]},
        {"stage": "promote"},
        {"stage": "prune", "sensitivity": 0.5, "training": TRAINING, "losses": [{"loss": "kl"}]},
    ],
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(report, "write", lambda folder, *_: (folder / "report.json").write_text("{}"))


def write(folder, **changes):
    (folder / "x.yaml").write_text(json.dumps(CHAIN | changes))
    return folder / "x.yaml"


def plain(result):
    return [{k: v for k, v in row.items() if "second" not in k} for row in result["rows"]]


def tensors_of(folder, stage):
    return checkpoint.load(folder / f"x/checkpoints/{stage}")[0]


def test_a_chain_of_three_teachers(tmp_path, capsys):
    found = trainer.run(write(tmp_path), folder=tmp_path)
    rows = found["rows"]
    names = [row["stage"] for row in rows]
    assert names == [
        "trained",
        "pruned",
        "recovered",
        "teacher",
        "distilled",
        "teacher",
        "pruned",
        "recovered",
    ]
    # The teacher is the student as it was: its accuracy, and its bytes dense.
    assert rows[3]["top1"] == rows[2]["top1"] and rows[5]["top1"] == rows[4]["top1"]
    assert rows[3]["num_nonzero"] < rows[3]["num_weights"] == rows[2]["num_weights"]
    assert rows[5]["num_weights"] == rows[4]["num_weights"] < rows[3]["num_weights"]
    assert rows[0]["agreement"] is None and rows[4]["agreement"] is not None
    assert rows[4]["ratio_teacher"] == rows[3]["file_bytes"] / rows[4]["file_bytes"]
    assert found["student_bytes"] == rows[5]["file_bytes"] == found["teacher_bytes"]
    # Both times the answers are kept, of another teacher.
    assert capsys.readouterr().out.count("the teacher's answers are kept") == 2
    taught, pupil = tensors_of(tmp_path, "02-promote"), tensors_of(tmp_path, "01-prune")
    kept, mask = taught["teacher-0"]["conv1.weight"], pupil["student"]["conv1.parametrizations.weight.0.mask"]
    assert torch.equal(kept != 0, mask) and (kept == 0).any()
    assert taught["student"]["conv1.weight"].shape[0] == 2  # the next student, new


@pytest.mark.parametrize("stage", ["02-promote", "03-distill", "04-promote", "05-prune"])
def test_it_goes_on_after_any_stage_to_the_same_bits(stage, tmp_path):
    once = trainer.run(write(tmp_path), folder=tmp_path)
    before = tensors_of(tmp_path, "05-prune")
    for folder in (tmp_path / "x/checkpoints").iterdir():
        if folder.name >= stage:
            shutil.rmtree(folder)
    (tmp_path / "x/done").unlink()
    again = trainer.run(write(tmp_path), folder=tmp_path)
    assert plain(once) == plain(again) and once["student_bytes"] == again["student_bytes"]
    after = tensors_of(tmp_path, "05-prune")
    assert all(torch.equal(t, after[part][key]) for part in before for key, t in before[part].items())


def test_it_follows_a_teacher_that_the_recipe_names(tmp_path, taught):
    stages = [
        {"stage": "distill", "training": TRAINING, "losses": [{"loss": "kl"}]},
        {"stage": "promote", "student": {"model": "lenet5", "width": 1, "from_teacher": "copy"}},
        {"stage": "distill", "training": TRAINING, "losses": [{"loss": "kl"}]},
    ]
    found = trainer.run(write(tmp_path, teacher=taught, stages=stages), folder=tmp_path)
    names = [row["stage"] for row in found["rows"]]
    assert names == ["teacher", "distilled", "teacher", "distilled"]
    assert found["rows"][2]["top1"] == found["rows"][1]["top1"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    given = {
        "name": "t",
        "student": {"model": "lenet5", "width": 3},
        "data": {"dataset": "digits", "subset": 300, "validation": 60},
    }
    given |= {"stages": [{"stage": "train", "training": TRAINING | {"epochs": 5}}]}
    (folder / "t.yaml").write_text(yaml.safe_dump(CHAIN | given))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda folder, *_: (folder / "report.json").write_text("{}"))
        trainer.run(folder / "t.yaml", folder=folder)
    file = next((folder / "t/checkpoints/00-train").glob("*/student.safetensors"))
    return {"model": "lenet5", "width": 3, "checkpoint": str(file)}


TRAIN, PROMOTE = CHAIN["stages"][0], {"stage": "promote"}
DISTILL = CHAIN["stages"][3]


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([PROMOTE, DISTILL], "stages[0]: makes the student the teacher, and no stage before it trains this"),
        ([DISTILL, PROMOTE], "stages[0].losses[0]: loss 'kl' needs a teacher, and there is none"),
        (
            [TRAIN, PROMOTE | {"student": {"model": "lenet6"}}],
            "stages[1].student.model: there is no model 'lenet6' (did you mean 'lenet5'?)",
        ),
        (
            [TRAIN, PROMOTE | {"student": {"model": "lenet5", "checkpoint": "none.pth"}}],
            "stages[1].student.checkpoint: there is no file 'none.pth'",
        ),
        ([TRAIN, {"stage": "pack"}, PROMOTE], "stages[2]: changes the student after it was packed"),
    ],
)
def test_check_tells_what_cannot_be(stages, told, tmp_path, capsys):
    assert main(["check", str(write(tmp_path, stages=stages))]) == 2
    assert told in capsys.readouterr().err


NEW = PROMOTE | {"student": {"model": "lenet5", "width": 2, "batch_norm": True}}
SHARE = {"stage": "share", "bits": 4}
FOLD = {"stage": "fold"}


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ([NEW, DISTILL, CHAIN["stages"][1], FOLD, SHARE, {"stage": "quantize"}], None),
        ([NEW, DISTILL, {"stage": "quantize"}], None),
        ([PROMOTE, DISTILL, CHAIN["stages"][1]], "stages[4]: prunes after sharing"),
        ([PROMOTE, FOLD], "stages[3]: folds after sharing"),
        ([NEW, SHARE, FOLD], "stages[4]: folds after sharing"),
        ([NEW, SHARE, {"stage": "quantize"}], "stages[4]: layer 'conv1' shares its weights by then"),
        (
            [NEW, PROMOTE],
            "stages[3]: makes the student the teacher, and no stage before it trains this student",
        ),
        ([NEW, DISTILL, PROMOTE], None),
        ([PROMOTE | {"student": {"model": "lenet5", "width": 2, "from_teacher": "copy"}}, PROMOTE], None),
        ([NEW, {"stage": "export", "to": ["onnx"]}], "stages[3]: exports the packed student"),
    ],
)
def test_a_new_student_is_not_judged_by_what_was_made_of_the_one_before(stages, told, tmp_path, capsys):
    path = write(tmp_path, stages=[TRAIN, SHARE, *stages])
    assert main(["check", str(path), "--build"]) == (0 if told is None else 2)
    error = capsys.readouterr().err
    assert told is None or told in error


def test_layers_are_those_of_the_new_teacher_and_student(tmp_path, capsys):
    later = DISTILL | {"losses": [{"loss": "hint", "at": {"conv1": "conv9"}}]}
    path = write(tmp_path, stages=[TRAIN, PROMOTE | {"student": {"model": "lenet300"}}, later])
    assert main(["check", "--build", str(path)]) == 2
    assert "stages[2].losses[0].at: student has no layer 'conv1'" in capsys.readouterr().err


# Without BatchNorm, whose statistics a training at no rate would change.
LIKE_THE_TEACHER = {"model": "lenet5", "width": 4, "from_teacher": "copy"}
STILL = {"stage": "distill", "training": TRAINING | {"lr": 1e-9}, "losses": [{"loss": "kl"}]}


@pytest.mark.parametrize("method", [{"method": "magnitude", "sparsity": 0.3}, {"sensitivity": 0.5}])
def test_a_copied_student_has_the_pruned_weights_of_its_teacher(tmp_path, method):
    first = {"student": {"model": "lenet5", "width": 4}}
    stages = [CHAIN["stages"][0], {"stage": "prune", "training": TRAINING, **method}]
    stages += [{"stage": "share", "bits": 4}, {"stage": "promote", "student": LIKE_THE_TEACHER}, STILL]
    path = write(tmp_path, stages=stages, allow_untrained=True, **first)
    rows = trainer.run(path, folder=tmp_path)["rows"]
    teacher, student = rows[-2:]
    assert teacher["stage"] == "teacher" and student["agreement"] == 100
    weights = tensors_of(tmp_path, "04-distill")["student"].items()
    copied = [tensor for name, tensor in weights if name.startswith("fc") and tensor.dim() > 1]
    assert copied and all((t == 0).float().mean() > 0.1 and t.abs().sum() > 0 for t in copied)


def test_a_student_copies_a_teacher_that_the_recipe_trains_once_it_is_trained(tmp_path):
    teach = {"stage": "train", "who": "teacher", "training": TRAINING}
    teacher = {key: value for key, value in LIKE_THE_TEACHER.items() if key != "from_teacher"}
    changes = {"teacher": teacher, "student": LIKE_THE_TEACHER, "stages": [teach, STILL]}
    rows = trainer.run(write(tmp_path, allow_untrained=True, **changes), folder=tmp_path)["rows"]
    assert [row["stage"] for row in rows] == ["teacher", "distilled"]
    assert rows[1]["top1"] == rows[0]["top1"] > 15 and rows[1]["agreement"] == 100
