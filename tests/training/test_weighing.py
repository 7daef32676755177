"""What the terms of a training weigh: measured as it goes on, kept over kills, and changing nothing else."""

import pytest
import torch

from tests.training.test_fit import Killed, Tiny, assert_same, lines, make_run, train, weights
from trainer.distillation.teacher import Teacher
from trainer.recipe import shelves
from trainer.recipe.keys import TeacherKeys, TermKeys
from trainer.training import fit as fitting
from trainer.training import weighing


def term(loss, **keys):
    return shelves.checker(shelves.find("loss", loss), TermKeys).model_validate({"loss": loss, **keys})


def taught(folder, **more):
    run = make_run(folder, **more)
    torch.manual_seed(1)
    run.teacher = Teacher([Tiny()], [TeacherKeys(model="x")], run.data.mean, run.data.std)
    return run


TERMS = [term("cross_entropy", weight=0.5), term("kl", weight=0.9, temperature=2)]
FOUND = [term("cross_entropy"), term("kl", weight="auto"), term("dist", weight={"ratio": 0.25})]


def ratios_of(folder, name):
    return [(line["step"], line[f"ratio/{name}"]) for line in lines(folder) if f"ratio/{name}" in line]


def test_an_epoch_is_measured_at_its_start_and_short_ones_seldom(tmp_path):
    numbers = train(taught(tmp_path / "short"), terms=TERMS, epochs=40)  # epochs of 3 steps
    assert [step for step, _ in ratios_of(tmp_path / "short", "kl")] == [0, 102]
    measured = [ratio for _, ratio in ratios_of(tmp_path / "short", "kl")]
    assert numbers["ratios"]["kl"] == {"weight": 0.9, "first": measured[0], "last": measured[-1]}
    assert numbers["ratios"]["cross_entropy"]["last"] == pytest.approx(0.5)
    train(taught(tmp_path / "long"), terms=TERMS, batch_size=1, epochs=3)
    assert [step for step, _ in ratios_of(tmp_path / "long", "kl")] == [0, 120]
    train(make_run(tmp_path / "alone"), epochs=2)
    assert not any(key.startswith("ratio/") for line in lines(tmp_path / "alone") for key in line)


def test_weights_are_found_in_the_first_steps_and_then_stay(tmp_path):
    numbers = train(taught(tmp_path), terms=FOUND, epochs=60)
    found = ratios_of(tmp_path, "kl")
    assert [step for step, _ in found] == [0, 1, 2, 4, 8, 16, 32, 64, 102]
    assert all(ratio == pytest.approx(1, rel=1e-5) for step, ratio in found if step in weighing.FINDING)
    assert all(
        ratio == pytest.approx(0.25, rel=1e-5)
        for step, ratio in ratios_of(tmp_path, "dist")
        if step in weighing.FINDING
    )
    assert found[-1][1] != pytest.approx(1, rel=1e-5)
    assert numbers["ratios"]["kl"]["last"] == found[-1][1]


def test_measuring_changes_nothing_of_a_training(tmp_path, monkeypatch):
    run = taught(tmp_path / "weighed", augment={"shift": 1}, mixup=0.3, student=lambda: Tiny(batch_norm=True))
    train(run, terms=TERMS, epochs=3)
    assert ratios_of(tmp_path / "weighed", "kl")
    monkeypatch.setattr(fitting, "weigh_if_due", lambda *_: None)
    other = taught(tmp_path / "not", augment={"shift": 1}, mixup=0.3, student=lambda: Tiny(batch_norm=True))
    train(other, terms=TERMS, epochs=3)
    assert_same(weights(run), weights(other))


@pytest.mark.parametrize("every", [2, 5])
def test_killed_again_and_again_it_finds_the_same_weights(tmp_path, monkeypatch, every):
    monkeypatch.setattr(fitting, "LOG_STEPS", 1)
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", -1.0)

    def attempt(folder, steps=None):
        run = taught(folder)
        left = [steps]

        def before_step(step, num_steps):
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return False

        try:
            numbers = train(run, before_step, terms=FOUND, epochs=7, ema=0.9)
        except Killed:
            return None
        return weights(run), numbers["ratios"]

    expected, kills = attempt(tmp_path / "whole"), 0
    while (got := attempt(tmp_path / "killed", every)) is None:
        kills += 1
        assert kills < 20
    assert kills > 3
    assert_same(expected[0], got[0])
    assert expected[1] == got[1]


def test_a_term_that_drowns_the_labels_is_named_once(tmp_path, capsys):
    terms = [term("cross_entropy"), term("kl", weight=1000), term("dist", weight=1e-4)]
    train(taught(tmp_path), terms=terms, epochs=60)
    told = [line["text"] for line in lines(tmp_path) if line["kind"] == "warning"]
    assert [text.partition(":")[0] for text in told] == ["kl", "dist"]
    assert "drowns the labels; weight " in told[0] and "hardly counts; weight " in told[1]
    assert capsys.readouterr().out.count("drowns") == 1
