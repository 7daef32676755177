"""The scaler of losses in float16, here on a CPU: each training finds its own scale, also after an interruption."""

import pytest
import torch
from accelerate import Accelerator

from tests.training.test_fit import assert_same, make_run, train, weights
from trainer.training import fit as fitting
from trainer.training.state import FIRST_SCALE


def scaled() -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=1)
    return accelerator


def test_a_training_does_not_depend_on_the_scale_that_the_one_before_it_ended_with(tmp_path):
    accelerator, scales = scaled(), []
    run = make_run(tmp_path, accelerator=accelerator)
    for _ in range(2):
        train(run, lambda step, _: bool(scales.append((step, accelerator.scaler.get_scale()))))
    assert scales == [(step, FIRST_SCALE * 2**step) for step in range(6)] * 2


@pytest.mark.parametrize("before, after", [(True, True), (False, True)])
def test_an_interrupted_training_goes_on_with_its_scale_if_it_had_one(tmp_path, monkeypatch, before, after):
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(fitting, "SAVE_SECONDS", 1e9)

    def stop(step: int, _: int) -> bool:
        if step == 4:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train(make_run(tmp_path / "a", accelerator=scaled() if before else None), stop)
    scales = []
    accelerator = scaled()
    run = make_run(tmp_path / "a", accelerator=accelerator)
    train(run, lambda step, _: bool(scales.append((step, accelerator.scaler.get_scale()))))
    first = 3 if before else 0
    assert scales == [(step, FIRST_SCALE * 2 ** (step - 3 + first)) for step in range(3, 6)]
    whole = make_run(tmp_path / "b", accelerator=scaled())
    train(whole)
    assert_same(weights(run), weights(whole))
