from collections import Counter

import numpy as np
import pytest
import torch

from trainer.data.splitting import most_held_out, split_off

LABELS = torch.tensor([0] * 40 + [1] * 8 + [2] * 2 + [3])


def counts(labels, held_out):
    return Counter(labels[held_out].tolist())


def test_of_each_class_the_fraction_is_held_out_and_one_image_at_least():
    held_out = split_off(LABELS, 0.25, [3, 7])
    assert held_out.dtype == torch.bool and counts(LABELS, held_out) == {0: 10, 1: 2, 2: 1}


def test_it_is_the_start_of_each_class_in_one_random_order():
    order = np.random.default_rng([5, 6]).permutation(len(LABELS))
    expected = torch.zeros(len(LABELS), dtype=torch.bool)
    for label, most in ((0, 10), (1, 2), (2, 1)):
        of_class = [i for i in order if LABELS[i] == label]
        expected[of_class[:most]] = True
    assert torch.equal(split_off(LABELS, 0.25, [5, 6]), expected)


@pytest.mark.parametrize("amount", [1, 2, 3, 4, 9, 17, 30])
def test_a_number_of_images_is_shared_by_the_classes_sizes(amount):
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    got = counts(labels, split_off(labels, amount, [0]))
    assert got.total() == amount
    for label, share in ((0, 0.6), (1, 0.3), (2, 0.1)):
        assert abs(got[label] - amount * share) <= 1
        assert got[label] >= (amount >= 3)


@pytest.mark.parametrize(("amount", "each"), [(4, [1, 1, 1, 1]), (5, [2, 1, 1, 1]), (20, [17, 1, 1, 1])])
def test_small_classes_beside_a_large_one_get_one_image_each(amount, each):
    labels = torch.tensor([0] * 100 + [1] * 2 + [2] * 2 + [3] * 2)
    assert [counts(labels, split_off(labels, amount, [0]))[label] for label in range(4)] == each


def test_a_number_below_the_classes_favours_no_class():
    labels = torch.arange(100).repeat_interleave(4)
    chosen = [set(counts(labels, split_off(labels, 30, [seed]))) for seed in range(20)]
    assert all(len(one) == 30 for one in chosen) and len(set.union(*chosen)) > 95


@pytest.mark.parametrize("amount", [0.3, 20])
def test_groups_stay_together(amount):
    draw = np.random.default_rng(0)
    groups = torch.from_numpy(draw.integers(0, 25, 100))
    labels = groups % 3
    held_out = split_off(labels, amount, [1], groups)
    assert not set(groups[held_out].tolist()) & set(groups[~held_out].tolist())
    wanted = amount if amount > 1 else amount * 100
    assert abs(int(held_out.sum()) - wanted) <= 10 and set(labels[~held_out].tolist()) == {0, 1, 2}


def test_a_class_of_one_group_stays():
    held_out = split_off(torch.tensor([0, 0, 0, 1, 1]), 0.5, [0], torch.tensor([0, 1, 2, 9, 9]))
    assert held_out[3:].tolist() == [False, False] and held_out[:3].sum() == 2


def test_what_can_be_held_out_is_all_but_the_smallest_group_of_each_class():
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    assert most_held_out(LABELS) == 39 + 7 + 1
    assert most_held_out(torch.tensor([0, 0, 0, 0, 0, 1, -1]), groups) == 3
    assert most_held_out(torch.full((7,), -1), groups) == 6


def test_images_without_a_label_stay_unless_there_are_no_others():
    labels = torch.tensor([-1, 0, 0, 1, 1, -1, -1])
    assert not split_off(labels, 0.5, [0])[labels < 0].any()
    assert split_off(torch.full((10,), -1), 0.3, [0]).sum() == 3


def test_two_seeds_hold_out_different_images_and_one_the_same():
    one, other = (split_off(LABELS, 0.25, [seed]) for seed in (0, 1))
    assert not torch.equal(one, other) and torch.equal(one, split_off(LABELS, 0.25, [0]))
