"""The bar of a recipe: the time left against sums by hand, on a terminal of two widths and off one."""

import os
import signal
import sys
import threading
import time

import pytest

from tests.terminal import terminal
from trainer.training import bar as bars
from trainer.training.bar import DRAWING_SECONDS, REST_SECONDS, Bar, Due, seconds_left

STAGES = [Due("train", "teacher", 1000), Due("distill", "student", 600), Due("pack", "student", 0)]


def test_seconds_of_stages_that_have_not_begun():
    assert seconds_left(STAGES, {"teacher": 100.0, "student": 50.0}, 2.0) == 10 + 12 + 3 * 2
    # As fast as the other, until it is known.
    assert seconds_left(STAGES[1:], {"teacher": 100.0}, 2.0) == 6 + 2 * 2
    assert seconds_left(STAGES, {}, 2.0) is None
    assert seconds_left([], {}, 2.0) == 0
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
    bar.learnt(200, 0.5)  # 100 a second; what a stage takes beside its learning is a guess
    assert bar.left == pytest.approx(8 + 6 + 3 * REST_SECONDS + DRAWING_SECONDS)
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
    clock[0] = 30.0
    assert bar.left == DRAWING_SECONDS - 2


def test_the_time_left_goes_on_between_two_looks(clock):
    bar = Bar(STAGES)
    bar.stage(0)
    bar.learns(1000, 0)
    clock[0] = 2.0
    bar.learnt(200, 0.5)
    first = bar.left
    clock[0] = 7.0  # the next look comes late
    assert bar.left == pytest.approx(first - 5)
    clock[0] = 10.0
    bar.learnt(1000, 0.5, ends_epoch=True)
    assert bar.left == pytest.approx(first - 8)
    clock[0] = 11.0  # measuring
    assert bar.left == pytest.approx(first - 9)
    clock[0] = 20.0  # and for longer than was thought
    assert bar.left == pytest.approx(first - 8 - REST_SECONDS)


def test_short_epochs_are_timed_together(clock):
    """A validation at the end of an epoch, or a first slow step of the next, does not make the time left jump."""
    bar = Bar([Due("train", "student", 3000)])
    bar.stage(0)
    bar.learns(3000, 0)
    shown = []
    for epoch in range(20):
        for look in (50, 100):
            clock[0] += 0.25  # 200 images a second while it learns
            bar.learnt(epoch * 100 + look, 0.1)
        clock[0] += 0.5  # a validation: 100 images a second in all
        bar.learnt(epoch * 100 + 100, 0.1, ends_epoch=True)
        shown += [clock[0] + bar.left] * (epoch > 10)
    assert max(shown) - min(shown) < 2 and shown[-1] == pytest.approx(30 + REST_SECONDS + DRAWING_SECONDS)


@pytest.mark.parametrize("columns", [80, 40])
def test_lines_stand_above_the_bar(clock, monkeypatch, columns):
    monkeypatch.setattr(bars, "DRAWING_SECONDS", 30.0)
    monkeypatch.setattr(bars, "REST_SECONDS", 0.0)
    long = "what is longer than the terminal goes on in the next line, " * 3
    with terminal(columns) as shown:
        bar = Bar(STAGES[:1], wanted=True)
        assert not bar.hidden
        bar.went_on(60.0)
        with bar.shown():
            assert not shown.text  # it comes with the first stage
            bar.stage(0)
            bar.learns(1000, 500)
            print("a line\n\n  another")
            clock[0] = 5.0
            bar.learnt(1000, 0.25, ends_epoch=True)
            bar._bar.refresh()
            print(long)
            print("trainer: a warning", file=sys.stderr)
            print("in two ", end="")
            bar._bar.refresh()
            print("parts")
            bar._bar.refresh()
            print("no end", end="")
        print("\nafter it")
    assert "[1/1] train  68%|" in shown.text and "01:05<00:30" in shown.text
    assert ("loss 0.2500" in shown.text) == (columns == 80)
    wrapped = [long[at : at + columns].rstrip() for at in range(0, len(long), columns)]
    before = ["a line", "", "  another", *wrapped, "trainer: a warning", "in two parts", "no end", "after it"]
    assert shown.screen() == before


def test_the_clock_goes_on_while_a_stage_measures(monkeypatch):
    monkeypatch.setattr(bars, "TICK_SECONDS", 0.05)
    with terminal(80) as shown:
        bar = Bar([Due("pack", "student", 0)], wanted=True)
        with bar.shown():
            bar.stage(0)
            deadline = time.monotonic() + 20
            while "00:01<00:0" not in shown.text and time.monotonic() < deadline:
                time.sleep(0.05)
    assert "00:01<00:0" in shown.text and shown.screen() == []


@pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning"
)  # Python 3.12 warns of a fork beside threads
def test_a_forked_process_prints_past_the_bar():
    """Its bar is a copy, whose lock another thread had: nobody there will give it back."""
    with terminal(80) as shown, (bar := Bar(STAGES, wanted=True)).shown():
        bar.stage(0)
        held, over = threading.Event(), threading.Event()
        other = threading.Thread(
            target=lambda: bar._lock.acquire() and (held.set(), over.wait(), bar._lock.release())
        )
        other.start()
        held.wait()
        process = os.fork()
        if process == 0:
            signal.alarm(10)
            print("of a worker", flush=True)
            os._exit(0)
        over.set()
        other.join()
        assert os.waitpid(process, 0)[1] == 0
    assert "of a worker" in shown.text


def test_elsewhere_nothing_is_shown(monkeypatch, capfd):
    for bar in (Bar(STAGES), Bar(STAGES, wanted=True), Bar([], wanted=True)):
        assert bar.hidden
        with bar.shown():
            bar.stage(0)
            print("a line")
            bar.learnt(10, 0.5)
    out, err = capfd.readouterr()
    assert out == "a line\n" * 3 and err == ""


def test_not_where_the_lines_go_to_a_file(tmp_path):
    """Nobody on the terminal would see them, and the file wants a line for each epoch."""
    with terminal(80), open(tmp_path / "log", "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        assert Bar(STAGES, wanted=True).hidden
