"""Predictions of a network on a part of the data, without a run."""

import math

import pytest
import torch
from accelerate import Accelerator

from trainer.data.images import InMemory, Part
from trainer.training.evaluate import answered, balanced_accuracy, percent_right, predict
from trainer.training.rows import by_class


def brightness(images):
    """Ten logits; the highest says how bright an image is, in tenths."""
    tenths = (images.mean((1, 2, 3)) * 10).floor().clamp(max=9)
    return -(torch.arange(10) - tenths[:, None]).abs()


def flat_images(num_images, size=4):
    tenths = torch.randint(0, 10, (num_images,), generator=torch.Generator().manual_seed(0))
    images = (tenths * 25 + 20).to(torch.uint8)[:, None, None, None].expand(-1, 1, size, size)
    return InMemory(images.contiguous(), tenths)


class OnDisk:
    """Images that a loader's processes fetch."""

    def __init__(self, images):
        self.images, self.labels = images, images.labels

    def __len__(self):
        return len(self.images)

    def __getitems__(self, positions):
        return self.images.__getitems__(positions)


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_each_image_of_a_part_is_predicted_at_its_position(workers):
    images = flat_images(300)
    ids = torch.arange(299, -1, -2)
    part = Part(images, ids) if workers is None else Part(OnDisk(images), ids, workers)
    answers = predict(brightness, part, Accelerator(cpu=True))
    assert answers.dtype == torch.int64 and torch.equal(answers, images.labels[ids])
    assert percent_right(answers, part.labels) == 100


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [(InMemory, 64, [1000, 100]), (InMemory, 65, [128] * 8 + [76]), (OnDisk, 4, [128] * 8 + [76])],
)
def test_small_images_in_memory_are_taken_in_large_batches(kind, size, expected):
    images = flat_images(1100, size)
    seen = []

    def network(batch):
        seen.append(len(batch))
        return brightness(batch)

    part = Part(images if kind is InMemory else OnDisk(images), torch.arange(1100))
    predict(network, part, Accelerator(cpu=True))
    assert seen == expected


def test_the_processes_take_turns_and_the_rest_is_left_to_the_others():
    """What a process has not looked at stays 0, so that the sum over all is everybody's answers."""

    class Rank:
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, process_index):
            self.process_index = process_index

    images = flat_images(300)
    part = Part(OnDisk(images), torch.arange(300))
    answers = [predict(brightness, part, Rank(rank)) for rank in range(2)]
    assert answers[0].any() and answers[1].any()
    assert torch.equal(answers[0] + answers[1], images.labels)


def test_images_without_a_label_do_not_count():
    assert percent_right(torch.tensor([1, 2, 3]), torch.tensor([1, 0, -1])) == 50
    assert math.isnan(percent_right(torch.tensor([1]), torch.tensor([-1])))


def test_the_place_of_the_true_class_is_how_many_have_a_higher_logit():
    images = flat_images(50)
    labels = (images.labels + 2).clamp(max=9)
    labels[7] = -1
    part = Part(InMemory(images.images, labels), torch.arange(50))
    answers, places = answered(brightness, part, Accelerator(cpu=True))
    assert torch.equal(answers, images.labels)
    for position, (tenth, label) in enumerate(zip(images.labels.tolist(), labels.tolist())):
        near = sum(abs(k - tenth) < abs(label - tenth) for k in range(10))
        assert places[position] == (10 if label < 0 else near)


def test_each_class_counts_alike_in_balanced_accuracy():
    labels = torch.tensor([0] * 8 + [1] * 2 + [-1])
    assert balanced_accuracy(torch.zeros(11, dtype=torch.long), labels) == 50
    assert balanced_accuracy(torch.tensor([0] * 6 + [2] * 2 + [1, 0, 0]), labels) == pytest.approx(
        (75 + 50) / 2
    )
    assert math.isnan(balanced_accuracy(torch.tensor([0]), torch.tensor([-1])))


def test_what_a_row_says_of_the_classes():
    labels, names = torch.tensor([0] * 120 + [1] * 8 + [-1]), ["common", "rare", "other"]
    answers = torch.zeros(129, dtype=torch.long)
    assert by_class(answers, answers, labels, names) == {"balanced": 50.0, "never_answered": ["rare"]}
    even = torch.tensor([0, 1, 2])
    assert by_class(even, even, even, names) == {}
    many = torch.arange(60)
    found = by_class(many, many % 10, many, [str(k) for k in range(60)])
    assert found == {"top5": 50.0}
    assert by_class(answers, answers, torch.full((129,), -1), names) == {}
