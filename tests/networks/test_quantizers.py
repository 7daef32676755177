"""Quantizers round to steps that are powers of two, exactly in float32, and refuse what makes none."""

import copy

import pytest
import torch
from torch import nn

from trainer.compression.integers import TrainedQuantizer, best_exponent
from trainer.compression.rounding import grid_exponent
from trainer.mistakes import Mistake
from trainer.networks.quantizers import Quantizer, attach, quantizers, rounded


def test_a_half_is_rounded_up_exactly():
    x = torch.tensor([0.5, 1.5, 2.4999, -0.5, -1.5, 254.5, 0.499, 49 / 98])
    assert rounded(x).tolist() == [1, 2, 2, 0, -1, 255, 0, 1]
    numbers = torch.arange(-3000, 3000) / 49  # a mean of 49 positions
    assert rounded(numbers).tolist() == [(2 * n + 49) // 98 for n in range(-3000, 3000)]


def test_a_map_is_clamped_to_bytes():
    x = torch.tensor([[-100.0, -1.0, -0.25, 0.0, 0.2, 0.3, 100.0]])
    assert Quantizer(-2, 0)(x).tolist() == [[0, 0, 0, 0, 0.25, 0.25, 255 / 4]]
    assert Quantizer(-2, 128)(x).tolist() == [[-32, -1, -0.25, 0, 0.25, 0.25, 127 / 4]]


def test_an_image_becomes_its_pixels():
    pixels = torch.arange(2 * 3 * 256).reshape(2, 3, 16, 16) % 256
    mean, std = torch.tensor([0.1, 0.5, 0.4]), torch.tensor([0.3, 0.2, 0.25])
    images = (pixels / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    quantizer = Quantizer(-6, 33, mean.tolist(), std.tolist())
    assert torch.equal(quantizer(images) * 64, pixels - 33.0)
    assert torch.equal(quantizer(images.flatten(1)), quantizer(images).flatten(1))


def test_a_step_learns_by_the_rounding_error_and_by_the_ends():
    quantizer = TrainedQuantizer(-1, 128)
    x = torch.tensor([0.6, -1.2, 500.0], requires_grad=True)
    out = quantizer(x)
    assert out.tolist() == [0.5, -1.0, 63.5]
    out.sum().backward()
    assert x.grad.tolist() == [1, 1, 0]
    # d out / d log2(step) = step ln 2 x (rounded - x / step) inside, x the end of the range outside
    expected = 0.5 * torch.log(torch.tensor(2.0)) * ((1 - 1.2) + (-2 + 2.4) + 127)
    torch.testing.assert_close(quantizer.log_step.grad, expected.reshape(1))
    with torch.no_grad():
        quantizer.log_step.copy_(torch.tensor([-2.6]))
    assert quantizer(x).tolist() == [0.625, -1.25, 127 / 8]


def test_the_first_step_has_the_least_error():
    torch.manual_seed(0)
    values = torch.randn(5000).abs()
    errors = {e: (Quantizer(e, 0)(values) - values).square().mean() for e in range(-12, 3)}
    assert best_exponent(values, 0) == min(errors, key=errors.get)
    assert best_exponent(torch.zeros(3), 0) == 0


@pytest.mark.parametrize(
    ("values", "exponent"), [([0.75, -2], -2), ([96.0], 5), ([0.0], 0), ([1 / 1024], -10)]
)
def test_the_grid_of_values(values, exponent):
    assert grid_exponent(torch.tensor(values)) == exponent


def test_a_copy_has_quantizers_of_its_own():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    attach(net, {"1": [-3, 0]})
    other = copy.deepcopy(net)
    quantizers(net)["1"].exponent = 5
    x = torch.rand(3, 2)
    assert not torch.equal(other(x), net(x)) and quantizers(other)["1"].settings() == [-3, 0]
    assert list(other.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(
    "maps",
    [
        *[{"2": [0, 0]}, {"": [0, 0]}, {"0": [0]}, {"0": [0.5, 0]}, {"0": [0, 256]}, {"0": [99, 0]}, [1]],
        *[{"0": [0, 0, [], []]}, {"0": [0, 0, ["a"], [1]]}, {"0": None}, {"0": [True, 0]}],
    ],
)
def test_settings_that_make_none_are_refused(maps):
    with pytest.raises(Mistake, match="maps"):
        attach(nn.Sequential(nn.Linear(2, 2)), maps)
