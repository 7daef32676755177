"""A training step waits for nothing that a GPU would still have to compute: counted on a stand-in device, in a child process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.compression.parametrizations import _sum_by_code
from trainer.recipe import shelves

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def waits():
    """{case: {what is waited for: how often}} of one step each; before, these were 3 to 8 copies, and bincount."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch makes no devices out of Python")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.waiting"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_waits_for_nothing(waits):
    assert {case: found for case, found in waits.items() if found and case != "a step that waits"} == {}
    assert set(shelves.names("loss")) < set(waits) and {
        "masks",
        "codebooks",
        "open codebooks",
        "from disk",
    } < set(waits)


def test_what_would_be_waited_for_is_counted(waits):
    assert waits["a step that waits"] == {
        "copy to the device": 2, "copy to the host": 1, "_local_scalar_dense": 1, "bincount": 1, "nonzero": 1, "index by bool": 1,
    }  # fmt: skip


@pytest.mark.parametrize("num_weights, length", [(1, 2), (1000, 9), (70_001, 300)])
def test_sums_by_code_of_a_gpu_are_those_of_the_cpu(num_weights, length, monkeypatch):
    draw = torch.Generator().manual_seed(num_weights)
    weights = torch.randn(num_weights, generator=draw)
    codes = torch.randint(0, length, (num_weights,), generator=draw, dtype=torch.int32)
    expected = _sum_by_code(weights, codes, length)
    monkeypatch.setattr("trainer.compression.parametrizations._BINCOUNT_ON", ())
    found = _sum_by_code(weights, codes, length)
    assert found.dtype == torch.float64 and found.shape == (length,)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
