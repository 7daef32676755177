"""tf32 and cudnn_benchmark set what CUDA takes, and say where there is no such GPU."""

import pytest
import torch

from trainer.recipe.recipe import read
from trainer.runs.opening import make_accelerator

RECIPE = """
name: k
data: {dataset: digits}
student: {model: lenet300}
stages: [{stage: train, training: {epochs: 1}}]
"""


@pytest.fixture(autouse=True)
def as_before():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@pytest.mark.parametrize("keys, expected", [
    ("", (False, True, False)), ("tf32: true", (True, True, False)), ("tf32: false", (False, False, False)),
    ("cudnn_benchmark: true", (False, True, True)),
])  # fmt: skip
def test_kernels_are_those_of_the_recipe(tmp_path, capsys, keys, expected):
    (tmp_path / "r.yaml").write_text(RECIPE + keys)
    make_accelerator(read(tmp_path / "r.yaml")[0])
    assert (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    ) == expected
    said = keys.endswith("true") and not torch.cuda.is_available()
    assert capsys.readouterr().out.count(f"{keys} has no effect here") == said
