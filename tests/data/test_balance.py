from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from trainer.data.balance import balanced_order, balanced_weights
from trainer.data.batches import epoch_order

LABELS = torch.tensor([0] * 40 + [1] * 6 + [2] * 3 + [-1] * 5)


def test_weights_are_scikit_learns():
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS[LABELS >= 0].numpy())
    assert balanced_weights(LABELS, 3).tolist() == pytest.approx(expected.tolist())
    of_images = balanced_weights(LABELS, 3)[LABELS[LABELS >= 0]]
    assert of_images.mean().item() == pytest.approx(1)


def test_a_class_without_images_weighs_nothing():
    assert balanced_weights(torch.tensor([0, 0, 2, 2]), 4).tolist() == [1, 0, 1, 0]


def test_each_class_is_drawn_alike_and_unlabelled_images_once():
    order = balanced_order(LABELS, np.random.default_rng(0))
    drawn = Counter(LABELS[order].tolist())
    assert len(order) == len(LABELS) and drawn[-1] == 5
    assert sorted(drawn[label] for label in range(3)) == [16, 16, 17]
    times = Counter(order.tolist())
    assert {times[i] for i in range(40)} == {0, 1}  # of a frequent class each at most once
    assert {times[i] for i in range(40, 46)} <= {2, 3} and {times[i] for i in range(46, 49)} <= {5, 6}


def test_it_is_in_random_order_and_other_in_each_epoch():
    one, other = (epoch_order(len(LABELS), 18, 3, epoch, 0, 1, LABELS) for epoch in (0, 1))
    assert [len(batch) for batch in one] == [18, 18, 18]
    assert all(len(set(LABELS[batch].tolist())) >= 3 for batch in one)
    assert not torch.equal(torch.cat(one), torch.cat(other))
    again = epoch_order(len(LABELS), 18, 3, 0, 0, 1, LABELS)
    assert all(map(torch.equal, one, again))
    halves = [torch.cat(epoch_order(len(LABELS), 18, 3, 0, rank, 2, LABELS)) for rank in (0, 1)]
    assert Counter(torch.cat(halves).tolist()) == Counter(torch.cat(one).tolist())
