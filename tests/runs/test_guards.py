"""Networks that have learnt nothing: told, kept in the report, and stopped before anything is made of them."""

import json

import pytest
import torch

from tests.making import make_run
from trainer import cli
from trainer.reporting import report
from trainer.runs import guards, runner
from trainer.runs.guards import Untrained
from trainer.stages import train as train_module
from trainer.training.evaluate import guessing

pytestmark = pytest.mark.usefixtures("untrained_refused")

# A learning rate of 1e-9 teaches nothing.
RECIPE = """
name: idle
data: {dataset: digits, subset: 200, validation: 60}
student: {model: lenet5, width: 2}
stages:
  - {stage: train, training: {epochs: 1, batch_size: 50, lr: 1e-9}}
  - {stage: fold}
  - {stage: prune, sensitivity: 1}
  - {stage: share, bits: 2}
  - {stage: pack}
"""
WITHOUT_FOLD = RECIPE.replace("  - {stage: fold}\n", "")


def write(folder, text):
    path = folder / "given.yaml"
    path.write_text(text)
    return path


# what guessing gives


def test_guessing_is_the_mean_of_the_answers_dealt_out_at_random():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (50,), generator=generator) ** 2 % 5
    answers = torch.randint(0, 6, (50,), generator=generator)
    dealt = torch.stack(
        [(answers[torch.randperm(50, generator=generator)] == labels).double().mean() for _ in range(20_000)]
    )
    chance, better = guessing(answers, labels)
    assert chance == pytest.approx(dealt.mean().item() * 100, abs=0.1)
    assert better == pytest.approx(chance + 233 * dealt.std().item(), rel=0.02)
    assert 0.003 < (dealt * 100 >= better).double().mean() < 0.02


@pytest.mark.parametrize(
    ("frequencies", "named", "right", "learnt"),
    [
        ([600] * 10, "one", 600, False),  # always the same class: 10 %
        ([600] * 10, "any", 768, False),  # 12.8 %: far more than by chance, and nothing for ten classes
        ([600] * 10, "any", 1200, True),
        ([50] * 1000, "any", 500, True),  # 1 % of a thousand classes
        ([6] * 10, "any", 9, False),  # 15 % of 60 images
        ([6] * 10, "any", 18, True),
        ([950, 50], "one", 950, False),  # 95 %, always the larger class
        ([2, 2], "any", 4, True),  # few images
        ([2, 2], "any", 2, False),
    ],
)
def test_what_is_better_than_guessing(frequencies, named, right, learnt):
    labels = torch.arange(len(frequencies)).repeat_interleave(torch.tensor(frequencies))
    if named == "one":
        answers = torch.zeros_like(labels)
    else:  # every class is named as often as it is there
        spread = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        answers = labels.clone()
        wrong = spread[right:]
        answers[wrong] = (labels[wrong] + 1) % len(frequencies)
    fraction = (answers == labels).double().mean().item() * 100
    assert fraction == right / len(labels) * 100
    assert (fraction >= guessing(answers, labels)[1]) is learnt


def test_a_rare_class_that_is_found_counts_where_always_naming_the_other_has_more_right():
    labels = torch.tensor([0] * 950 + [1] * 50)
    answers = torch.tensor([0] * 910 + [1] * 40 + [1] * 30 + [0] * 20)  # 94.0 % right; 95 % are of class 0
    assert guessing(answers, labels)[1] < 94.0


def test_images_without_labels_do_not_count():
    labels, answers = torch.tensor([0, 1, 2, 0, 1, 2, -1, -1]), torch.tensor([0, 1, 2, 0, 1, 2, 9, 9])
    assert guessing(answers, labels) == guessing(answers[:6], labels[:6])
    assert all(value != value for value in guessing(answers, torch.full((8,), -1)))


# a run


def test_a_student_that_has_learnt_nothing_is_told_and_not_made_small(tmp_path, monkeypatch, capsys):
    path = write(tmp_path, WITHOUT_FOLD)
    arguments = ["run", str(path), "--folder", str(tmp_path)]
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    warning = "the student has "
    assert f"given.yaml:7: stages[1]: not begun, as {warning}" in told.err
    assert "% of the 60 validation images right, and guessing " in told.err
    assert "allow_untrained: true" in told.err and len(told.err) < 300
    assert "warning: stage 1 (train): the student has " in told.out
    here = tmp_path / "idle"
    found = report.read(here)
    assert [row["stage"] for row in found["rows"]] == ["trained"]
    assert found["rows"][0]["warning"].startswith(warning)
    assert found["warnings"] == [f"stage 1 (train): {found['rows'][0]['warning']}"]
    text = (here / "report.md").read_text()
    assert text.index(f"> **Warning**: {found['warnings'][0]}") < text.index("## Stages")
    lines = [json.loads(line) for line in (here / "log.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines if line["kind"] == "warning"] == [found["rows"][0]["warning"]]
    assert not (here / "done").exists() and not list(here.glob("*.tiny"))

    monkeypatch.setattr(train_module, "fit", None)  # it would fail
    assert cli.main(arguments) == 2  # the stage stands, and so does the refusal
    capsys.readouterr()
    assert cli.main([*arguments, "--set", "allow_untrained=true"]) == 0
    assert f"warning: stage 3 (share): {warning}" in capsys.readouterr().out
    assert report.read(here)["rows"][-1]["stage"] == "decoded"
    assert report.read(here)["warnings"][0].startswith(f"stage 3 (share): {warning}")


def test_the_last_stage_only_warns_and_a_later_training_may_still_teach(tmp_path, capsys):
    text = RECIPE.partition("  - {stage: fold}")[0]
    found = runner.run(write(tmp_path, text), folder=tmp_path)
    assert len(found["warnings"]) == 1 and (tmp_path / "idle" / "done").exists()
    assert capsys.readouterr().out.count("warning: stage 1 (train): ") == 2  # after the stage, and at the end
    text += "  - {stage: train, training: {epochs: 8, batch_size: 20, lr: 1e-2}}\n  - {stage: prune, sensitivity: 0.5}\n"
    found = runner.run(write(tmp_path, text.replace("idle", "later")), folder=tmp_path)
    assert "warning" in found["rows"][0] and found["warnings"] == []


def test_a_stage_that_leaves_the_student_as_bad_does_not_hide_it(tmp_path):
    text = RECIPE.replace("width: 2", "width: 2, batch_norm: true")
    with pytest.raises(Untrained, match=r"given.yaml:8: stages\[2\]: not begun, as the student has"):
        runner.run(write(tmp_path, text), folder=tmp_path)


def test_an_honest_small_run_is_not_refused(tmp_path, capsys):
    text = WITHOUT_FOLD.replace("epochs: 1, batch_size: 50, lr: 1e-9", "epochs: 6, batch_size: 20, lr: 1e-2")
    found = runner.run(write(tmp_path, text.replace("sensitivity: 1", "sensitivity: 0.5")), folder=tmp_path)
    assert found["rows"][-1]["stage"] == "decoded"
    # Its test images may lack a class among the answers; that is no ground to refuse it.
    assert all("never answers" in told for told in found["warnings"])
    assert "right, and guessing" not in capsys.readouterr().out


def test_at_least_holds_for_every_stage_and_replaces_the_guard(tmp_path):
    text = WITHOUT_FOLD.replace("lr: 1e-9}}", "lr: 1e-9}, at_least: 1}")
    strict = text.replace("sensitivity: 1}", "sensitivity: 1, at_least: 99.5}")
    with pytest.raises(
        Untrained,
        match=r"stages\[1\].at_least: the student has \d+.\d\d % of the validation images right; at_least asks for 99.5 %",
    ):
        runner.run(write(tmp_path, strict), folder=tmp_path)
    assert [row["stage"] for row in report.read(tmp_path / "idle")["rows"]] == ["trained", "pruned"]


@pytest.mark.parametrize(
    ("right", "taught", "fault"),
    [(20, 98.0, "33.33 % of the validation images right, less than half of the teacher's 98.00 %"),
     (31, 98.0, None), (20, 60.0, None)],
)  # fmt: skip
def test_half_of_the_teacher(tmp_path, right, taught, fault):
    run = make_run(tmp_path, {"model": "lenet5", "width": 2}, validation=60)
    run.teacher = object()
    run.rows.append({"stage": "teacher", "index": 0, "top1_validation": taught})
    labels = run.data.validation.labels
    run.student_answers = torch.where(torch.arange(60) < right, labels, (labels + 1) % 10)
    assert list(guards._student_faults(run)) == ([f"the student has {fault}"] if fault else [])


# the teacher

TAUGHT = """
name: spoiled
data: {dataset: digits, subset: 200, validation: 60}
teacher: {model: lenet5, width: 2}
student: {model: lenet5, width: 2}
stages:
  - {stage: train, who: teacher, training: {epochs: 1, batch_size: 50, lr: 1e+6}}
  - {stage: distill, training: {epochs: 1, batch_size: 50}, losses: [{loss: kl}]}
"""


def test_a_teacher_that_its_own_training_has_spoiled_does_not_teach(tmp_path):
    with pytest.raises(
        Untrained, match=r"given.yaml:8: stages\[1\]: not begun, as the teacher has \d+.\d\d % of the 60 "
    ):
        runner.run(write(tmp_path, TAUGHT), folder=tmp_path)
    assert report.read(tmp_path / "spoiled")["warnings"][0].startswith("stage 1 (train): the teacher has ")


def test_each_of_several_teachers_is_examined(tmp_path):
    text = TAUGHT.replace(
        "teacher: {model: lenet5, width: 2}",
        "teachers: [{model: lenet5, width: 2}, {model: lenet5, width: 3}]",
    )
    with pytest.raises(Untrained, match=r"not begun, as teachers\[0\] has "):
        runner.run(write(tmp_path, text), folder=tmp_path)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_weights_that_are_not_finite_are_never_allowed(tmp_path, monkeypatch, who):
    real = train_module.fit

    def spoiling(run, objective, training):
        numbers = real(run, objective, training)
        with torch.no_grad():
            next(iter(objective.parameters()))[0] = float("nan")
        return numbers

    monkeypatch.setattr(train_module, "fit", spoiling)
    text = (
        TAUGHT
        if who == "teacher"
        else TAUGHT.replace("who: teacher, ", "").replace("teacher: {model: lenet5, width: 2}\n", "")
    )
    text = text if who == "teacher" else text.partition("  - {stage: distill")[0]
    path = write(tmp_path, text + "allow_untrained: true\n")
    with pytest.raises(
        Untrained, match=rf"given.yaml:\d: stages\[0\]: the {who} has weights that are not finite"
    ):
        runner.run(path, folder=tmp_path)
    with pytest.raises(Untrained, match="not finite"):
        runner.run(path, folder=tmp_path)
    assert report.read(tmp_path / "spoiled")["warnings"] == [
        f"stage 1 (train): the {who} has weights that are not finite"
    ]
