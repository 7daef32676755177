"""Every criterion against a plain loop, and the contract over the whole shelf."""

import math

import numpy as np
import pytest
import torch

from trainer.compression.masks import VALUE_BITS, position_bits
from trainer.criteria.lamp import lamp
from trainer.criteria.magnitude import magnitude
from trainer.criteria.movement import movement
from trainer.criteria.n_m import n_m
from trainer.criteria.rate import rate


def some_weights(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def n_m_mask(weight, n, m, axis=1):
    return n_m(weight, torch.ones_like(weight).bool(), axis, pattern=f"{n}:{m}")[0]


def test_magnitude_is_the_size_of_a_weight():
    assert magnitude(torch.tensor([[-2.0, 0.5]])).tolist() == [[2.0, 0.5]]


def test_lamp_by_hand():
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.5]])
    expected = [[9 / 9, 1 / 14], [4 / 13, 0.25 / 14.25]]
    np.testing.assert_allclose(lamp(weight, 1), expected, rtol=1e-12)


def test_lamp_against_a_loop():
    weight = some_weights(7, 5, 3)
    flat = weight.reshape(-1).tolist()
    expected = [w * w / sum(v * v for v in flat if v * v >= w * w) for w in flat]
    np.testing.assert_allclose(lamp(weight, 1).reshape(-1), expected, rtol=1e-9)


def test_lamp_of_stacked_parts_is_each_ones_own():
    weight = some_weights(12, 5)
    weight[:4] *= 100
    parts = [lamp(part, 1) for part in weight.chunk(3)]
    assert torch.equal(lamp(weight, 3), torch.cat(parts))
    assert [part.max().item() for part in parts] == [1.0, 1.0, 1.0]


def test_lamp_of_zeros_and_of_equal_weights_is_finite_and_parts_them():
    assert torch.equal(lamp(torch.zeros(2, 3), 1), torch.zeros(2, 3, dtype=torch.float64))
    equal = lamp(torch.full((2, 3), -0.5), 1).reshape(-1)
    np.testing.assert_allclose(equal, [1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1], rtol=1e-12)


def test_movement_is_high_where_a_step_leads_away_from_zero():
    weight = torch.tensor([2.0, 2.0, -2.0, -2.0])
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0])  # a step goes against it
    assert movement(weight, gradient).tolist() == [-2.0, 2.0, 2.0, -2.0]


def naive_bits(mask):
    rows, columns = mask.shape
    density = (mask.sum() + 1) / (mask.size + 2)
    found = np.zeros(mask.shape)
    for r in range(rows):
        for c in range(columns):
            in_column = sum(mask[i, c] for i in range(rows) if i != r)
            in_row = sum(mask[r, j] for j in range(columns) if j != c)
            odds = math.log2(density / (1 - density))
            odds += 0.7 * math.log2((in_column + 1) / ((rows - 1) * density + 1))
            odds += 0.6 * math.log2((in_row + 1) / ((columns - 1) * density + 1))
            found[r, c] = max(1.0, VALUE_BITS - odds)
    return found


def test_position_bits_against_a_loop():
    mask = some_weights(6, 9) > 0.8
    np.testing.assert_allclose(position_bits(mask), naive_bits(mask.numpy().astype(int)), rtol=1e-12)
    folded = position_bits(mask.reshape(6, 3, 3))
    assert torch.equal(folded.reshape(6, 9), position_bits(mask))


def test_a_position_in_an_empty_row_and_column_costs_more():
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3] = mask[:, 4] = True
    mask[10, 11] = True
    bits = position_bits(mask)
    assert bits[10, 11] > bits[10, 4] + 1.5
    assert bits[10, 11] > bits[3, 11] + 1.5
    assert bits[3, 4] == bits.min()


@pytest.mark.parametrize("mask", [torch.zeros(4, 6), torch.ones(4, 6), torch.ones(1, 1)])
def test_position_bits_are_finite_and_at_least_one(mask):
    bits = position_bits(mask.bool())
    assert torch.isfinite(bits).all()
    assert (bits >= 1).all()


def test_rate_is_lamps_score_for_the_root_of_the_bits():
    weight = some_weights(8, 8)
    cost = position_bits(weight > 0.5)
    np.testing.assert_allclose(rate(weight, 1, cost), lamp(weight, 1) / cost**0.5, rtol=1e-12)
    whole = rate(weight, 1, position_bits(torch.ones(8, 8).bool()))
    assert torch.equal(whole.reshape(-1).argsort(), lamp(weight, 1).reshape(-1).argsort())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (1, 2)])
def test_n_m_keeps_the_largest_of_every_group(n, m):
    weight = some_weights(5, 16, 3, 3)
    mask = n_m_mask(weight, n, m)
    assert mask.shape == weight.shape
    for out in range(5):
        for y in range(3):
            for x in range(3):
                for start in range(0, 16, m):
                    group = weight[out, start : start + m, y, x].abs()
                    kept = mask[out, start : start + m, y, x]
                    assert kept.sum() == n
                    assert group[kept].min() >= group[~kept].max()


def test_n_m_along_another_axis():
    weight = some_weights(8, 3, 2)
    assert torch.equal(n_m_mask(weight, 1, 4, axis=0), n_m_mask(weight.movedim(0, 1), 1, 4).movedim(1, 0))


def test_n_m_of_equal_weights_keeps_the_first():
    assert n_m_mask(torch.ones(1, 4), 2, 4).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("n", "m"), [(4, 2), (4, 4), (0, 4)])
def test_n_of_m_makes_sense(n, m):
    with pytest.raises(ValueError, match=f"got '{n}:{m}'; .*at least 1 and less than M"):
        n_m_mask(torch.ones(4, 8), n, m)


def test_n_m_needs_whole_groups():
    with pytest.raises(ValueError, match="10 inputs do not split into groups of 4"):
        n_m_mask(torch.ones(4, 10), 2, 4)
