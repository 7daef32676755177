"""The bar of a recipe: the time left against sums by hand, on a terminal and off one."""

import io
import sys

import pytest

from trainer.training import bar as bars
from trainer.training.bar import DRAWING_SECONDS, Bar, Due, seconds_left

STAGES = [Due("train", "teacher", 1000), Due("distill", "student", 600), Due("pack", "student", 0)]


def test_seconds_of_stages_that_have_not_begun():
    assert seconds_left(STAGES, {"teacher": 100.0, "student": 50.0}, 2.0) == 10 + 12 + 3 * 2
    assert (
        seconds_left(STAGES[1:], {"teacher": 100.0}, 2.0) == 6 + 2 * 2
    )  # as fast as the other, until it is known
    assert seconds_left(STAGES, {}, 2.0) is None and seconds_left(STAGES[1:], {"student": 1.0}, None) is None
    assert seconds_left([], {}, None) == 0
    assert seconds_left(STAGES[2:], {}, 3.0) == 3


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [0.0]
    monkeypatch.setattr(Bar, "_clock", staticmethod(lambda: now[0]))
    return now


def test_the_time_left_follows_what_was_taken(clock):
    bar = Bar(STAGES)
    bar.stage(0)
    assert bar.left is None
    bar.learns(1000, 0)
    clock[0] = 2.0
    bar.learnt(200, 0.5)  # 100 a second; how long a stage takes beside its learning is not known yet
    assert bar.left is None
    clock[0] = 10.0
    bar.learnt(1000, 0.4, ends_epoch=True)
    clock[0] = 13.0  # measured for three seconds
    bar.stage(1)
    bar.learns(600, 0)
    clock[0] = 17.0
    bar.learnt(200, 0.3)  # 50 a second
    assert bar.left == pytest.approx(400 / 50 + 3 + 3 + DRAWING_SECONDS)
    bar.learnt(200, 0.3, ends_epoch=True)
    assert bar.left == pytest.approx(400 / 50 + 3 + 3 + DRAWING_SECONDS)
    clock[0] = 27.0
    bar.learnt(600, 0.3, ends_epoch=True)  # a slower epoch
    assert bar.left == pytest.approx(3 + 3 + DRAWING_SECONDS)
    clock[0] = 28.0
    bar.stage(2)
    assert bar.left == pytest.approx(1 + DRAWING_SECONDS)
    bar.stage(3)
    assert bar.left == DRAWING_SECONDS


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_lines_stand_above_the_bar(clock, monkeypatch):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(bars, "DRAWING_SECONDS", 30.0)
    bar = Bar(STAGES[:1], wanted=True)
    assert not bar.hidden
    bar.went_on(60.0)
    with bar.shown():
        bar.stage(0)
        bar.learns(1000, 500)
        print("a line")
        clock[0] = 5.0
        bar._rest = 0.0
        bar.learnt(1000, 0.25, ends_epoch=True)
        bar._bar.refresh()
    shown = err.getvalue().replace("\r", "\n")
    assert "[1/1] train" in shown and "loss 0.2500" in shown
    assert "68%|" in shown and "01:05<00:30" in shown
    assert out.getvalue().count("a line\n") == 1


def test_elsewhere_nothing_is_shown(monkeypatch, capfd):
    for bar in (Bar(STAGES), Bar(STAGES, wanted=True), Bar([], wanted=True)):
        assert bar.hidden
        with bar.shown():
            bar.stage(0)
            print("a line")
            bar.learnt(10, 0.5)
    out, err = capfd.readouterr()
    assert out == "a line\n" * 3 and err == ""
