"""Denormal numbers are zero while networks are trained, on every thread, and are themselves again afterwards."""

import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from tests.training.test_fit import make_run, train
from trainer.runs.threads import threads_of_a_run
from trainer.training.denormals import flushed


def made() -> int:
    """Bits of 1e-30 x 1e-9, a denormal number. Comparisons would count it as zero too."""
    return (torch.full((1,), 1e-30) * 1e-9).view(torch.int32).item()


def needs_the_setting():
    supported = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    if not supported:
        pytest.skip("this processor cannot count denormal numbers as zero")


def test_inside_alone_and_nested():
    needs_the_setting()
    assert made() != 0
    with flushed():
        assert made() == 0
        with flushed():
            assert made() == 0
        assert made() == 0
    assert made() != 0
    with pytest.raises(ValueError), flushed():
        raise ValueError
    assert made() != 0


def test_a_training_flushes(tmp_path):
    needs_the_setting()
    seen = []

    def before_step(step, num_steps):
        seen.append(made())
        return False

    train(make_run(tmp_path), before_step, epochs=1, batch_size=64)
    assert seen and set(seen) == {0} and made() != 0


def test_a_run_flushes_from_its_start(tmp_path):
    needs_the_setting()
    with threads_of_a_run(tmp_path, 1, Accelerator(cpu=True)):
        assert made() == 0
    assert made() != 0


NUMPY = """
import numpy as np
from trainer.training.denormals import flushed

with flushed():
    print(np.finfo(np.float32).tiny, np.finfo(np.float64).eps)
"""


def test_numpy_finds_nothing_to_warn_of():
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", NUMPY], capture_output=True, text=True, check=True
    )
    assert said.stdout == "1.1754944e-38 2.220446049250313e-16\n" and said.stderr == ""


THREADS = """
import numpy as np, torch
from trainer.training.denormals import flushed

with flushed():
    torch.set_num_threads(2)
    tiny = torch.from_numpy(np.full(1_000_000, 1e-39, np.float32))
    print((tiny * 0.5).view(torch.int32).count_nonzero().item())
"""


def test_threads_that_are_started_inside_flush_too():
    needs_the_setting()
    said = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "0"
