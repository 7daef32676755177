"""What single models promise beside the contract: the sizes that the literature states, and what they refuse."""

import inspect

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from trainer.models.airbench import airbench
from trainer.models.cifar_resnet import cifar_resnet
from trainer.models.cifar_vgg import cifar_vgg
from trainer.models.gru import gru
from trainer.models.lenet5 import lenet5
from trainer.models.lenet5_caffe import lenet5_caffe
from trainer.models.lenet300 import lenet300
from trainer.models.lstm import lstm
from trainer.models.separable import separable
from trainer.models.wide_resnet import wide_resnet
from trainer.networks.blocks import largest
from trainer.networks.features import look, see

DIGITS, CIFAR = ((1, 28, 28), 10), ((3, 32, 32), 100)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_sizes_of_the_lenets():
    assert count(lenet300(*DIGITS)) == 266_610
    assert count(lenet5(*DIGITS)) == 61_706
    assert count(lenet5_caffe(*DIGITS)) == 431_080
    shapes = [layer.shape for layer in look(lenet300(*DIGITS), torch.zeros(1, 1, 28, 28))]
    assert shapes == [(300, 1, 1), (100, 1, 1)]


# The counts of the networks that the distillation literature compares on CIFAR-100.
PUBLISHED = [
    (cifar_resnet, {"depth": 20}, 278_324),
    (cifar_resnet, {"depth": 56}, 861_620),
    (cifar_resnet, {"depth": 8, "channels": (32, 64, 128, 256)}, 1_233_540),
    (cifar_resnet, {"depth": 32, "channels": (32, 64, 128, 256)}, 7_433_860),
    (wide_resnet, {"depth": 16, "widen": 2}, 703_284),
    (wide_resnet, {"depth": 40, "widen": 2}, 2_255_156),
    (cifar_vgg, {"depth": 8}, 3_965_028),
    (cifar_vgg, {"depth": 13}, 9_462_180),
]


@pytest.mark.parametrize("function, settings, expected", PUBLISHED)
def test_sizes_of_the_cifar_networks(function, settings, expected):
    with torch.device("meta"):
        model = function(*CIFAR, **settings)
    assert count(model) == expected


def test_cifar_networks_shrink_twice_or_more():
    images = torch.zeros(1, 3, 32, 32)
    assert [layer.shape[1] for layer in look(cifar_resnet(*CIFAR, depth=8), images)] == [32, 32, 16, 8]
    assert [layer.shape[1] for layer in look(wide_resnet(*CIFAR, depth=10), images)] == [32, 32, 16, 8]
    assert [layer.shape[1] for layer in look(cifar_vgg(*CIFAR), images)] == [32, 16, 8, 4, 4]


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (15, 16), (16, 40), (64, 64)])
def test_lenet5_takes_any_size_from_eight(size):
    model = lenet5((2, *size), 4, width=2).eval()
    assert model(torch.zeros(3, 2, *size)).shape == (3, 4)


def test_lenet5_width_scales_every_layer():
    widths = [layer.shape[0] for layer in look(lenet5(*DIGITS, width=24), torch.zeros(1, 1, 28, 28))]
    assert widths == [24, 64, 480, 336]


@pytest.mark.parametrize("function", [lenet5, separable])
def test_folded_normalization_leaves_the_network_without_it(function):
    """Less the normalization, the state is that of the net without, less the biases that folding makes."""
    folded = set(function(*DIGITS, batch_norm=False).state_dict())
    normalised = {key for key in function(*DIGITS, batch_norm=True).state_dict() if ".norm" not in f".{key}"}
    assert normalised < folded
    assert all(key.endswith(".bias") for key in folded - normalised)


def test_dropout_acts_in_training_only():
    model = lenet5(*DIGITS, dropout=0.5)
    images = torch.randn(2, *DIGITS[0])
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_sizes_of_the_separable_students():
    assert count(separable(*DIGITS, batch_norm=False)) == 1_706
    widths, strides = (16, 24, 24, 32, 32, 40), (2, 1, 1, 2, 1, 1)
    assert count(separable(*DIGITS, widths=widths, strides=strides, batch_norm=False)) == 6_162


def naive_airbench(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits by the paper's list of layers; BatchNorm in evaluation by its equation."""

    def normalized(norm, x):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]

    gelu, conv2d = nn.functional.gelu, nn.functional.conv2d
    x = gelu(conv2d(x, model.first.weight, model.first.bias))
    for group in (model.group1, model.group2, model.group3):
        x = nn.functional.max_pool2d(conv2d(x, group.conv1.weight, padding=1), 2)
        x = gelu(normalized(group.norm1, x))
        x = gelu(normalized(group.norm2, conv2d(x, group.conv2.weight, padding=1)))
    return x.flatten(2).max(2).values @ model.fc.weight.T / 9


def test_airbench_is_the_papers_layers():
    assert count(airbench(*DIGITS)) == 387_192
    model = airbench(*DIGITS, first=4, widths=(6, 8, 12))
    # A convolution begins as the identity on the channels that it takes.
    images = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(model.group1.conv1(images)[:, :4], images)
    assert model.group1.conv1.weight[4:].std() > 0
    model(torch.randn(64, 1, 28, 28))  # statistics other than 0 and 1
    images = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(model.eval()(images), naive_airbench(model, images), rtol=1e-4, atol=1e-5)
    assert [layer.shape[1:] for layer in look(model, images)] == [(27, 27), (13, 13), (6, 6), (3, 3)]


@pytest.mark.parametrize("residual", [False, True])
def test_separable_repeats_a_block_with_the_same_weights(residual):
    settings = {"widths": (4, 6, 6), "strides": (2, 1, 1), "residual": residual}
    torch.manual_seed(0)
    model = separable(*DIGITS, **settings, repeat=3)
    assert count(model) == count(separable(*DIGITS, **settings)) - 6  # bias for gain and shift
    assert model.norms() == [("conv1", "norm1"), ("block2.pointwise", "block2.norm")] and not model.chain()
    maps = model.forward_intermediates(torch.rand(2, *DIGITS[0]))[1]
    block, x = model.block3, maps[1]
    for _ in range(3):
        inner = torch.relu(block.pointwise(block.depthwise(x)))
        x = x + inner if residual else inner
    torch.testing.assert_close(maps[2], x)


def test_separable_residual_adds_the_input():
    model = separable(*DIGITS, widths=(4, 4), strides=(1, 1), residual=True).eval()
    nn.init.zeros_(model.block2.norm.weight)
    maps = see(model, torch.randn(2, *DIGITS[0]), ["conv1", "block2"]).maps
    assert torch.equal(maps["conv1"], maps["block2"])


def naive_lstm(layer: nn.LSTM, sequence: torch.Tensor) -> torch.Tensor:
    """Last output [hidden] of one layer, for one sequence [T, inputs], by the equations of the paper."""
    state = output = torch.zeros(layer.hidden_size)
    for step in sequence:
        gates = layer.weight_ih_l0 @ step + layer.bias_ih_l0 + layer.weight_hh_l0 @ output + layer.bias_hh_l0
        enter, forget, candidate, leave = gates.chunk(4)
        state = forget.sigmoid() * state + enter.sigmoid() * candidate.tanh()
        output = leave.sigmoid() * state.tanh()
    return output


def test_lstm_reads_rows_downwards():
    model = lstm((2, 5, 3), 4, hidden=6).eval()
    images = torch.randn(2, 2, 5, 3)
    rows = torch.stack([torch.cat([images[1, 0, y], images[1, 1, y]]) for y in range(5)])
    embedding = see(model, images, embedding=True).embedding
    torch.testing.assert_close(embedding[1], naive_lstm(model.lstm, rows))


@pytest.mark.parametrize("function", [lstm, gru])
def test_both_directions_have_read_the_whole_image(function):
    model = function((1, 6, 4), 3, hidden=5, bidirectional=True).eval()
    images = torch.randn(1, 1, 6, 4, requires_grad=True)
    embedding = see(model, images, embedding=True).embedding
    for half in (embedding[:, :5], embedding[:, 5:]):
        (gradient,) = torch.autograd.grad(half.sum(), images, retain_graph=True)
        assert (gradient.abs().sum(dim=(0, 1, 3)) > 0).all()


@pytest.mark.parametrize(
    "function, shape, settings, message",
    [
        (lenet300, (1, 28, 28), {"hidden": ()}, "hidden is empty"),
        (lenet5, (1, 7, 28), {}, "7 x 28 are too small; 8 x 8"),
        (lenet5_caffe, (1, 28, 15), {}, "28 x 15 are too small; 16 x 16"),
        (airbench, (1, 8, 28), {}, "8 x 28 are too small; 9 x 9"),
        (cifar_resnet, (3, 32, 32), {"depth": 18}, "depth is 18; it must be 6 n"),
        (cifar_resnet, (3, 32, 32), {"depth": 2}, "depth is 2; it must be 6 n"),
        (wide_resnet, (3, 32, 32), {"depth": 20}, "depth is 20; it must be 6 n"),
        (cifar_vgg, (3, 6, 6), {}, "6 x 6 are too small; 8 x 8"),
        (separable, (1, 28, 28), {"widths": (4, 4), "strides": (1,)}, "2 widths and 1 strides"),
        (separable, (1, 28, 28), {"widths": (), "strides": ()}, "0 widths"),
        (separable, (1, 28, 28), {"kernel": 4}, "kernel is 4; it must be odd"),
        (
            separable,
            (1, 28, 28),
            {"widths": (4, 6), "strides": (2, 1), "repeat": 2},
            "repeat 2 has no effect",
        ),
        (separable, (1, 28, 28), {"first_kernel": 2}, "first_kernel is 2; it must be odd"),
    ],
)
def test_a_users_mistake_is_a_clear_error(function, shape, settings, message):
    with pytest.raises(ValueError, match=message):
        function(shape, 10, **settings)


@pytest.mark.parametrize(
    "function, setting, value",
    [
        (lenet300, "hidden", [300, 0]),
        (lenet5, "width", 0),
        (lenet5, "dropout", 1.0),
        (lstm, "hidden", -1),
        (cifar_resnet, "channels", [16, 32, 64]),
        (cifar_vgg, "depth", 12),
        (separable, "strides", [1, 0]),
    ],
)
def test_hints_refuse_impossible_settings(function, setting, value):
    hint = inspect.signature(function).parameters[setting].annotation
    with pytest.raises(ValidationError):
        TypeAdapter(hint).validate_python(value)


def test_the_gradient_of_the_maximum_over_positions_goes_where_amax_sends_it():
    images = torch.randn(4, 3, 5, 6, requires_grad=True)
    found = largest(images)
    torch.testing.assert_close(found, largest(images.detach()), rtol=0, atol=0)
    weights = torch.randn(4, 3)
    (gradient,) = torch.autograd.grad((found * weights).sum(), images)
    (expected,) = torch.autograd.grad((images.amax((2, 3)) * weights).sum(), images)
    assert torch.equal(gradient, expected)
    alike = torch.ones(1, 1, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(largest(alike).sum(), alike)
    assert gradient.flatten().tolist() == [
        1,
        0,
        0,
        0,
    ]  # to one position, by its number and not by equal values
