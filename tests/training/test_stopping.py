"""SIGTERM and SIGHUP: what was done is kept, and the same command ends in the same weights."""

import os
import signal

import pytest
import torch

from tests.making import make_run
from trainer.cli import main
from trainer.distillation.objective import Objective
from trainer.recipe.keys import TermKeys
from trainer.recipe.training import Training
from trainer.storage.weights_file import read_file
from trainer.training.fit import fit
from trainer.training.stopping import Stopped, stopping

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs the signals of POSIX")

SPEC = {"model": "lenet300", "hidden": [6, 5]}
SETTINGS = Training(epochs=2, batch_size=20, optimizer="sgd", lr=0.1, momentum=0.9, ema=0.5)
RECIPE = """
name: stopped
data: {dataset: digits, subset: 200}
student: {model: lenet300, hidden: [6, 5]}
stages:
  - {stage: train, training: {epochs: 2, batch_size: 20}}
  - {stage: pack}
"""


def trained(folder, stop=None, at=None, number=signal.SIGTERM):
    """Trains to the end, or to the signal that is sent before step `at`; returns the weights and the steps made."""
    run, steps = make_run(folder, SPEC, subset=200), []
    if stop is not None:
        run.stop = stop

    def before_step(step, _):
        steps.append(step)
        if step == at:
            os.kill(os.getpid(), number)
        return False

    objective = Objective(run.student, [TermKeys(loss="cross_entropy")], run.data, num_epochs=2)
    try:
        fit(run, objective, SETTINGS, before_step)
    except Stopped as stopped:
        assert stopped.signal == number
        return None, steps
    return {key: value.clone() for key, value in run.student.state_dict().items()}, steps


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """SIGHUP has its usual effect, also where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at", [0, 3, 9])  # 9: the last step of the first epoch
def test_the_step_is_finished_and_kept(tmp_path, at, number):
    whole, steps = trained(tmp_path / "whole")
    assert steps == list(range(20))
    with stopping() as stop:
        nothing, steps = trained(tmp_path / "stopped", stop, at, number)
        assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the program at once
    assert nothing is None and steps == list(range(at + 1))
    resumed, steps = trained(tmp_path / "stopped")
    assert steps == list(range(at + 1, 20))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_last_epoch_ends(tmp_path):
    with stopping() as stop:
        weights, _ = trained(tmp_path, stop, at=19)
        assert weights is not None
        with pytest.raises(Stopped, match="stopped by SIGTERM"):  # by whoever keeps the stage
            stop.raise_if_requested()


def test_outside_a_training_it_ends_at_once():
    with stopping(), pytest.raises(Stopped, match="stopped by SIGHUP"):
        os.kill(os.getpid(), signal.SIGHUP)
        signal.pause()


def test_what_the_caller_ignores_or_handles_stays_the_callers():
    got = []
    before = (
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
        signal.signal(signal.SIGTERM, lambda *_: got.append(1)),
    )
    try:
        with stopping() as stop:
            os.kill(os.getpid(), signal.SIGHUP)  # as nohup has it
            os.kill(os.getpid(), signal.SIGTERM)
        assert got == [1] and stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_command_says_how_to_go_on_and_its_status_is_the_signals(tmp_path, monkeypatch, capsys):
    def command(folder):
        (tmp_path / "r.yaml").write_text(RECIPE)
        return main(["run", str(tmp_path / "r.yaml"), "--folder", str(tmp_path / folder)])

    assert command("whole") == 0
    calls = []

    def told(state, *given, original=fit.__globals__["_take_step"]):
        original(state, *given)
        calls.append(state.step)
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setitem(fit.__globals__, "_take_step", told)
        assert command("stopped") == 143
    assert calls == [1, 2, 3, 4]
    assert (
        "trainer: stopped by SIGTERM; the same command goes on where this stopped" in capsys.readouterr().err
    )
    assert command("stopped") == 0
    files = [(tmp_path / folder / "stopped" / "student.tiny").read_bytes() for folder in ("whole", "stopped")]
    assert files[0] == files[1]
    states = [
        read_file(
            next((tmp_path / folder / "stopped" / "checkpoints" / "00-train").glob("*/student.safetensors"))
        )[0]
        for folder in ("whole", "stopped")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
