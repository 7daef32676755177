"""The depth of each parameter, against timm's own learning rates and, elsewhere, written out."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from trainer.models.cifar_resnet import cifar_resnet
from trainer.models.separable import separable
from trainer.networks.depths import depths
from trainer.recipe.training import Training
from trainer.training.optimizer import lr_scales, make_optimizer


@pytest.mark.parametrize(
    "name, settings",
    [
        ("resnet10t", {}),
        ("tf_efficientnet_lite0", {}),
        ("vit_tiny_patch16_224", {"img_size": 32}),
        ("convnext_atto", {}),
        ("swin_tiny_patch4_window7_224", {"img_size": 56}),
        ("mobilenetv3_small_050", {}),
    ],
)
@pytest.mark.parametrize("decay", [0.75, 0.5])
def test_the_rates_are_timms(name, settings, decay):
    network = timm.create_model(name, num_classes=3, **settings)
    expected = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(network, layer_decay=decay)
        for parameter in group["params"]
    }
    got = lr_scales(network, decay)
    for parameter_name, parameter in network.named_parameters():
        assert got[id(parameter)] == expected[id(parameter)], parameter_name


def layers(network):
    """{depth: the modules whose parameters lie there}."""
    found: dict[int, list[str]] = {}
    for name, depth in depths(network).items():
        module = name.rpartition(".")[0]
        if module not in found.setdefault(depth, []):
            found[depth].append(module)
    return found


def test_blocks_are_layers_and_a_norm_is_of_the_layer_before_it():
    assert layers(separable((1, 8, 8), 3, widths=(4, 5, 6), strides=(1, 1, 1))) == {
        0: ["conv1", "norm1"],
        1: ["block2.depthwise", "block2.pointwise", "block2.norm"],
        2: ["block3.depthwise", "block3.pointwise", "block3.norm"],
        3: ["fc"],
    }
    found = layers(cifar_resnet((3, 32, 32), 10, depth=8))
    assert [names[0] for names in found.values()] == [
        "conv1",
        "layer1.0.conv1",
        "layer2.0.conv1",
        "layer3.0.conv1",
        "fc",
    ]


class Wrapped(nn.Module):
    """Anybody's network: a token of its own, and a backbone with a head beside it."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.backbone = nn.Sequential(
            nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4))
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.backbone(x + self.token))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Wrapped()

    def forward(self, x):
        return self.inner(x)


def test_wrappers_and_lists_are_opened():
    assert layers(Wrapped()) == {0: ["", "backbone.0", "backbone.1"], 1: ["backbone.3.0"], 2: ["head"]}
    assert list(layers(Twice()).values())[-1] == ["inner.head"]
    assert len(layers(Twice())) == 3


class Alone(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student
        self.projector = nn.Linear(2, 2)


def test_the_optimizer_has_the_rate_of_each_depth_and_projectors_have_the_whole():
    objective = Alone(separable((1, 8, 8), 3, widths=(4, 5), strides=(1, 1)))
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    optimizer = make_optimizer(objective, Training(epochs=1, layer_decay=0.5, weight_decay=0.1))
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        "student.conv1.weight": (0.25, 0.1),
        "student.norm1.weight": (0.25, 0.0),
        "student.norm1.bias": (0.25, 0.0),
        "student.block2.depthwise.weight": (0.5, 0.1),
        "student.block2.pointwise.weight": (0.5, 0.1),
        "student.block2.norm.weight": (0.5, 0.0),
        "student.block2.norm.bias": (0.5, 0.0),
        "student.fc.weight": (1.0, 0.1),
        "student.fc.bias": (1.0, 0.0),
        "projector.weight": (1.0, 0.0),
        "projector.bias": (1.0, 0.0),
    }
