"""The student in a page: how large a drawing on its board is, as in the test images, and students of many bytes."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from trainer.data.images import InMemory
from trainer.exporting.export import subject_of
from trainer.exporting.player import _ink
from trainer.exports.page import page


def images(shape, light, background=0, boxes=((4, 24, 9, 19),), num=9):
    """Images with a light box (top, bottom, left, right) of these in turn."""
    made = torch.full((num, *shape), background, dtype=torch.uint8)
    for number, image in enumerate(made):
        top, bottom, left, right = boxes[number % len(boxes)]
        image[:, top:bottom, left:right] = light
    return SimpleNamespace(
        shape=shape, data=SimpleNamespace(test=InMemory(made, torch.zeros(num, dtype=torch.int64)))
    )


@pytest.mark.parametrize(
    "subject, ink",
    [
        (SimpleNamespace(shape=(1, 28, 28), data=None), 20 / 28),  # MNIST's, as far as anybody knows
        (SimpleNamespace(shape=(1, 24, 24), data=None), None),
        (images((1, 28, 28), 255), 20 / 28),
        (images((1, 32, 32), 90, boxes=[(2, 30, 9, 19), (9, 19, 2, 30), (1, 2, 1, 2)]), 28 / 32),
        (images((1, 28, 28), 10), None),  # nothing is to be seen in them
        (images((1, 28, 28), 0, background=255), None),  # dark on white
        (images((1, 28, 28), 255, boxes=[(0, 28, 0, 28)]), None),  # grey photographs
        (images((3, 28, 28), 255), None),
        (images((1, 28, 20), 255), None),
        (images((1, 96, 96), 255), None),  # more pixels than a hand draws
    ],
)  # fmt: skip
def test_which_part_of_an_image_a_drawing_fills(subject, ink):
    assert _ink(subject) == ink


@pytest.mark.device
@pytest.mark.skipif(shutil.which("node") is None, reason="needs node: scripts/install --devices")
def test_a_student_of_many_bytes_is_run_by_node(tmp_path):
    """Linux gives a program no argument of more than 128 KiB."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10)).eval()
    subject = subject_of(net, (1, 28, 28), mean=[0.1], std=[0.3], classes=list("0123456789"))
    exported = page(subject, tmp_path)
    assert exported.num_bytes > 2**17
    # Without a recipe there are no test images, and nothing is said of any.
    assert exported.notes[0].endswith("are the student and its script") and not exported.shows_images
    pixels = np.random.default_rng(0).integers(0, 256, (5, 1, 28, 28), np.uint8)
    expected = subject.logits(subject.normalized(pixels))
    np.testing.assert_allclose(exported.run(pixels), expected, atol=1e-4)
