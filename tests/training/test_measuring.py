"""Measuring needs no more memory than training did, and goes on in smaller parts when memory runs out."""

import logging

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests import making
from trainer.data.images import InMemory, Part
from trainer.recipe.recipe import read
from trainer.recipe.stages import largest_batch
from trainer.training import evaluate
from trainer.training.evaluate import logits, measured_order, predict, sparing


class Small:
    """A network on a device with memory for so many images; it keeps the sizes of its batches."""

    def __init__(self, room: int, error: Exception | None = None) -> None:
        self.room, self.sizes = room, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def __call__(self, images):
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise self.error
        return images.flatten(1).sum(1, keepdim=True) * torch.tensor([1.0, -1.0])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_a_batch_is_halved_until_it_fits_and_stays_so(error, caplog):
    small, images = Small(5, error), torch.arange(40.0).reshape(20, 1, 1, 2)
    network = sparing(small)
    expected = images.flatten(1).sum(1, keepdim=True) * torch.tensor([1.0, -1.0])
    assert torch.equal(network(images), expected)
    assert small.sizes == [20, 10, 5, 5, 5, 5]
    assert torch.equal(network(images[:12]), expected[:12]) and small.sizes[6:] == [5, 5, 2]
    assert torch.equal(network(images[:3]), expected[:3]) and small.sizes[9:] == [3]
    assert [record.getMessage() for record in caplog.records] == [
        f"memory ran out: from here on {number} images are measured at a time" for number in (10, 5)
    ]


def test_what_does_not_fit_at_all_and_other_errors_are_raised():
    small = Small(0)
    with pytest.raises(torch.OutOfMemoryError):
        sparing(small)(torch.zeros(8, 1, 1, 2))
    assert small.sizes == [8, 4, 2, 1]
    small = Small(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        sparing(small)(torch.zeros(8, 1, 1, 2))
    assert small.sizes == [8]


def test_the_batches_are_at_most_those_of_the_training():
    part = Part(
        InMemory(torch.zeros(2500, 1, 2, 2, dtype=torch.uint8), torch.zeros(2500)), torch.arange(2500)
    )
    assert [len(positions) for positions in measured_order(part)] == [1000, 1000, 500]
    part.at_once = 600
    assert [len(positions) for positions in measured_order(part)] == [600] * 4 + [100]
    assert [len(positions) for positions in measured_order(part, 700)] == [600, 100]
    assert torch.equal(torch.cat(measured_order(part)), torch.arange(2500))
    small = Small(600)
    predict(small, part, Accelerator(cpu=True))
    assert small.sizes == [600] * 4 + [100]


def test_every_measuring_goes_through_it(tmp_path, monkeypatch, caplog):
    run = making.make_run(tmp_path, {"model": "lenet300", "hidden": [16, 12]}, subset=40, validation=30)
    run.data.measure_at_once(20)
    whole = logits(run)
    sizes: list[int] = []

    plain = type(run.student).forward

    def forward(self, images):
        sizes.append(len(images))
        if len(images) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, images)

    monkeypatch.setattr(type(run.student), "forward", forward)
    with caplog.at_level(logging.ERROR):
        torch.testing.assert_close(logits(run), whole)
        assert sizes == [20, 10, 5, 5, 5, 5, 5, 5]
        answers = predict(evaluate.normalized(run.student, run.data), run.data.validation, run.accelerator)
    assert torch.equal(answers, whole.argmax(1)) and max(sizes) == 20


def test_the_largest_batch_of_a_recipe(tmp_path):
    path = tmp_path / "x.yaml"
    text = "name: x\ndata: {dataset: digits}\nstudent: {model: lenet5}\nstages:\n"
    path.write_text(
        text
        + "  - {stage: train, training: {epochs: 1, batch_size: 16}}\n"
        + "  - {stage: share, bits: 4, training: {epochs: 1, batch_size: 48}}\n  - {stage: pack}\n"
    )
    assert largest_batch(read(path)[0].stages) == 48
    path.write_text(text + "  - {stage: pack}\n")
    assert largest_batch(read(path)[0].stages) is None


def test_nothing_changes_where_memory_does_not_run_out():
    torch.manual_seed(0)
    network, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.randn(33, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(sparing(network)(images), network(images))
