"""A network whose outputs stand in another order than the data's classes: put in order, or found out."""

import pytest
import timm
import torch
from torch import nn

from trainer.compression.masks import set_mask
from trainer.compression.weights import weights_of
from trainer.mistakes import Mistake
from trainer.models.lenet5 import lenet5
from trainer.training.class_order import another_order, in_order, outputs_of, reorder
from trainer.training.weights import Made

CLASSES = ["a", "b", "c", "d"]


def test_outputs_are_found_by_name_or_by_index():
    # The network's first output is "c", then "a", "d", "b".
    assert outputs_of(["c", "a", "d", "b"], CLASSES, "x") == [1, 3, 0, 2]
    assert outputs_of([2, 0, 3, 1], CLASSES, "x") == [1, 3, 0, 2]
    assert outputs_of([2, "a", "d", 1], CLASSES, "x") == [1, 3, 0, 2]


@pytest.mark.parametrize(
    "given, message",
    [
        (["c", "a", "e", "b"], "'e' is none of the data's classes"),
        ([4, 0, 1, 2], "4 is none of the data's classes"),
        (["c", "a", "c", "b"], "'c' is there twice"),
        (["c", "a"], "there are 2"),
    ],
)
def test_an_order_that_is_not_of_the_data_is_refused(given, message):
    with pytest.raises(Mistake, match=f"x: classes: {message}; each of the data's 4 classes is needed once"):
        outputs_of(given, CLASSES, "x")


NETWORKS = {
    "lenet5": lambda: (lenet5((3, 32, 32), 4, width=2), 32),
    "a convolution as classifier": lambda: (timm.create_model("resnetv2_18", num_classes=4), 32),
    "two classifiers": lambda: (
        timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, img_size=32, depth=1),
        32,
    ),
    "anybody's": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4), nn.ReLU(), nn.Linear(4, 4)), 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_itself_answers_in_the_data_s_order(name):
    network, size = NETWORKS[name]()
    images = torch.rand(5, 3, size, size)
    with torch.no_grad():
        before = network.eval()(images)
        made = in_order(Made(network, {}, {}, []), ["c", "a", "d", "b"], CLASSES, (3, size, size), "x")
        after = made.network(images)
    torch.testing.assert_close(after, before[:, [1, 3, 0, 2]], rtol=1e-4, atol=1e-5)
    assert made.notes == []


def test_what_a_checkpoint_recorded_is_known():
    network, size = NETWORKS["lenet5"]()
    images = torch.rand(5, 3, size, size)
    with torch.no_grad():
        before = network.eval()(images)
        made = in_order(
            Made(network, {}, {"classes": ["d", "c", "b", "a"]}, []), None, CLASSES, (3, 32, 32), "x"
        )
        torch.testing.assert_close(made.network(images), before.flip(1), rtol=1e-4, atol=1e-5)
    assert made.notes == [
        "x: its checkpoint has the classes in another order (d, c, b, a); its outputs are put in the data's"
    ]
    with torch.no_grad():
        same = in_order(Made(network, {}, {"classes": CLASSES}, []), None, CLASSES, (3, 32, 32), "x")
        torch.testing.assert_close(same.network(images), before.flip(1), rtol=1e-4, atol=1e-5)
    assert same.notes == []
    other = in_order(
        Made(network, {}, {"classes": ["a", "b", "c", "e"]}, []), None, CLASSES, (3, 32, 32), "x"
    )
    assert other.notes == ["x: its checkpoint was taught other classes than the data's: a, b, c, e"]
    numbered = in_order(Made(network, {}, {"classes": 4}, []), None, ["0", "1", "2", "3"], (3, 32, 32), "x")
    assert numbered.notes == []


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x):
        return self.fc(x.flatten(1)) * self.scale


def test_outputs_that_are_not_of_a_linear_layer_are_refused_and_nothing_is_changed():
    network = Scaled()
    before = network.fc.weight.detach().clone()
    with pytest.raises(Mistake, match="x: its outputs are not those of a linear layer"):
        reorder(network, [1, 0, 2, 3], (3, 2, 2), "x")
    assert torch.equal(network.fc.weight, before)
    pruned = lenet5((3, 32, 32), 4, width=2)
    for place in weights_of(pruned).values():
        set_mask(place, place.value.abs() > 0.01)
    with pytest.raises(Mistake, match="not those of a linear layer"):
        reorder(pruned, [1, 0, 2, 3], (3, 32, 32), "x")


def answers_of(labels, right, order=None, seed=0):
    """Answers of a network that is right in a fraction of the images, with its outputs in an order."""
    generator = torch.Generator().manual_seed(seed)
    guesses = torch.randint(0, int(labels.max()) + 1, labels.shape, generator=generator)
    meant = torch.where(torch.rand(labels.shape, generator=generator) < right, labels, guesses)
    # order[output] is the class that the output means.
    return meant if order is None else torch.tensor(order).argsort()[meant]


@pytest.mark.parametrize("num_classes, count", [(2, 100), (10, 400), (100, 2000)])
@pytest.mark.parametrize("right", [0.6, 0.99])
def test_another_order_is_found(num_classes, count, right):
    labels = torch.arange(count) % num_classes
    order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(5)).tolist()
    if num_classes == 2:
        order = [1, 0]
    assert another_order(answers_of(labels, right, order), labels, num_classes) == order
    swapped = [1, 0, *range(2, num_classes)]
    assert another_order(answers_of(labels, right, swapped), labels, num_classes) == swapped


@pytest.mark.parametrize("num_classes, count", [(2, 100), (3, 60), (10, 400), (100, 500)])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.9])
def test_a_network_in_the_data_s_order_or_that_guesses_is_not_suspected(num_classes, count, right):
    labels = torch.arange(count) % num_classes
    for seed in range(20):
        assert another_order(answers_of(labels, right, seed=seed), labels, num_classes) is None
    assert another_order(torch.zeros_like(labels), labels, num_classes) is None


def test_images_without_labels_do_not_count():
    labels = torch.arange(200) % 4
    answers = answers_of(labels, 1.0, [1, 0, 3, 2])
    labels[::3] = -1
    assert another_order(answers, labels, 4) == [1, 0, 3, 2]
    assert another_order(answers, torch.full_like(labels, -1), 4) is None
