"""Tensors made comparable."""

import pytest
import torch

from tests.losses.references_maps import one_size
from trainer.tensors import same_size, unit_length


def test_same_size():
    a, b = torch.randn(2, 3, 7, 4), torch.randn(2, 5, 4, 6)
    ours, theirs = same_size(a, b)
    expected = one_size(a.double(), b.double())
    assert ours.shape == (2, 3, 4, 4) and theirs.shape == (2, 5, 4, 4)
    torch.testing.assert_close((ours, theirs), tuple(x.float() for x in expected))
    assert same_size(a, a)[0] is a


def test_unit_length():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], requires_grad=True)
    y = unit_length(x)
    y.sum().backward()
    assert y[0].tolist() == pytest.approx([0.6, 0.8]) and not y[1].any()
    assert x.grad.abs().max() <= 1
