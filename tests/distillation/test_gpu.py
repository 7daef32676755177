"""What a GPU runs in a teacher's place: the same function, with weights in the type that autocast computes in."""

import pytest
import torch
from torch import nn

from trainer.compression.masks import set_mask
from trainer.compression.weights import weights_of
from trainer.distillation.gpu import make_ready
from trainer.models.lenet5 import lenet5


def plain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LayerNorm(8 * 36), nn.Linear(8 * 36, 10)
    ).eval()  # fmt: skip


def with_norms():
    torch.manual_seed(0)
    network = lenet5((3, 16, 16), 10, width=4, batch_norm=True)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 3, 16, 16) * 2 + 1)
    return network.eval()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_weights_are_what_autocast_would_make_of_them(half):
    network, images = plain(), torch.randn(4, 3, 8, 8)
    ready = make_ready(network, half)
    assert ready[0].weight.dtype == ready[5].weight.dtype == half  # and norms stay as they are
    assert ready[1].weight.dtype == ready[4].weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=half):
        expected, found = network(images), ready(images)
    assert expected.dtype == found.dtype == half
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in network.parameters())


@torch.no_grad()
def test_norms_are_folded_and_convolutions_have_the_channels_last():
    network, images = with_norms(), torch.randn(4, 3, 16, 16)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    ready = make_ready(network, None)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
    convs = [module for module in ready.modules() if isinstance(module, nn.Conv2d)]
    assert convs and all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)
    torch.testing.assert_close(ready(images), network(images), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_parametrized_network_is_run_itself():
    network = plain()
    for layer in weights_of(network).values():
        set_mask(layer, torch.ones_like(layer.value, dtype=torch.bool))
    assert make_ready(network, torch.bfloat16) is network
