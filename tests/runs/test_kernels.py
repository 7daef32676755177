"""tf32 and cudnn_benchmark set what CUDA takes, and say where there is no such GPU."""

import pytest
import torch
from accelerate import Accelerator

from trainer.data.images import InMemory, Part
from trainer.recipe.recipe import read
from trainer.runs.evaluate_file import evaluate_file
from trainer.runs.opening import make_accelerator
from trainer.runs.runner import run
from trainer.training.evaluate import predict

RECIPE = """
name: k
data: {dataset: digits}
student: {model: lenet300}
stages: [{stage: train, training: {epochs: 1}}]
"""


@pytest.fixture(autouse=True)
def as_before():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    matmul.allow_tf32, cudnn.allow_tf32 = False, True  # torch's own
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before


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
    assert (
        torch.backends.cudnn.deterministic is not torch.backends.cudnn.benchmark
    )  # a seed gives the same bits
    said = keys.endswith("true") and not torch.cuda.is_available()
    assert capsys.readouterr().out.count(f"{keys} has no effect here") == said


def test_a_packed_file_is_measured_with_the_kernels_of_its_run(tmp_path):
    (tmp_path / "r.yaml").write_text(
        RECIPE.replace("epochs: 1}}", "epochs: 1}}, {stage: pack}") + "tf32: false"
    )
    run(tmp_path / "r.yaml", folder=tmp_path)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = True, False  # as in a new process
    evaluate_file(tmp_path / "k" / "student.tiny", tmp_path / "r.yaml")
    assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic


def test_what_is_measured_is_not_benchmarked():
    found = []

    def network(images):
        found.append(torch.backends.cudnn.benchmark)
        return images.flatten(1)[:, :3]

    part = Part(InMemory(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4)), torch.arange(4))
    torch.backends.cudnn.benchmark = True
    predict(network, part, Accelerator(cpu=True))
    assert found == [False] and torch.backends.cudnn.benchmark
