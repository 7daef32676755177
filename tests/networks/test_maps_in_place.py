"""A map that is seen is the layer's own output, also where the network changes that tensor in place afterwards."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from trainer.networks.blocks import Blocks
from trainer.networks.features import look, see


class Inplace(nn.Module):
    """As torchvision's blocks: a sum and a ReLU change the BatchNorm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
        )
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        y = self.norm2(self.conv2(x))
        y += x
        y.relu_()
        pooled = y.mean((2, 3))
        logits = self.fc(pooled)
        pooled.zero_()
        return logits


def naive(net: Inplace, x: Tensor) -> dict[str, Tensor]:
    """The layers' own outputs, with no operation in place."""
    norm = net.norm(net.conv(x))
    act = torch.relu(norm)
    norm2 = net.norm2(net.conv2(act))
    last = torch.relu(norm2 + act)
    return {"norm": norm, "act": act, "norm2": norm2, "act:input": norm, "embedding": last.mean((2, 3))}


@pytest.mark.parametrize("training", [True, False])
def test_maps_and_embedding_are_the_layers_own(training):
    torch.manual_seed(0)
    net = Inplace().train(training)
    images = torch.randn(2, 3, 6, 6)
    expected = naive(copy.deepcopy(net), images)
    with torch.set_grad_enabled(False):  # zeroing the classifier's input would stop its gradient
        seen = see(net, images, ["norm", "act", "norm2", "act:input"], embedding=True)
    assert seen.maps["norm"].min() < 0 and seen.maps["norm2"].min() < 0
    assert list(seen.maps) == ["norm", "act", "norm2", "act:input"]
    for name, map_ in seen.maps.items():
        assert torch.equal(map_, expected[name]), name
    assert torch.equal(seen.embedding, expected["embedding"])


def test_the_gradient_is_that_of_the_layers_own_output():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5)
    )
    images = torch.randn(2, 3, 6, 6)
    outside = copy.deepcopy(net)
    seen = see(net, images, ["1"])
    (seen.maps["1"].pow(3).sum() + seen.logits.square().sum()).backward()
    map_ = outside[1](outside[0](images))
    (map_.pow(3).sum() + outside[4](torch.relu(map_).flatten(1)).square().sum()).backward()
    for parameter, other in zip(net.parameters(), outside.parameters()):
        torch.testing.assert_close(parameter.grad, other.grad)


def test_no_copy_where_nothing_is_changed_in_place():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    outputs = []
    net[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        map_ = see(net, torch.randn(2, 3, 6, 6), ["0"]).maps["0"]
    # Both still share one memory: the first write to either would part them.
    assert torch._C._is_cow_tensor(map_) and torch._C._is_cow_tensor(outputs[0])
    outputs[0].zero_()
    assert map_.abs().sum() > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("resnet18"),
        torchvision.models.resnet18,
        lambda: torchvision.models.vgg11_bn(init_weights=False).features,
        pytest.param(lambda: timm.create_model("vgg11_bn"), marks=pytest.mark.slow),
    ],
    ids=["timm resnet18", "torchvision resnet18", "torchvision vgg11_bn", "timm vgg11_bn"],
)
def test_known_networks(make):
    net = make().eval()
    images = torch.randn(1, 3, 32, 32)
    norms = [name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    own: dict[str, Tensor] = {}
    with torch.no_grad():
        maps = see(net, images, norms).maps
        for name in norms:  # a clone in the moment it is returned
            net.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: own.update({name: output.clone()})
            )
        net(images)
    assert norms and all(torch.equal(maps[name], own[name]) for name in norms)
    assert any(map_.min() < 0 for map_ in maps.values())  # timm's last norms of the blocks start from zero


def test_blocks_that_work_in_place():
    class Two(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def blocks(self):
            return [("conv", self.conv), ("act", torch.relu_)]

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return x.mean((2, 3)) if pre_logits else self.fc(x.mean((2, 3)))

    net, images = Two().eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        maps = see(net, images, ["conv", "act"]).maps
        assert torch.equal(maps["conv"], net.conv(images)) and maps["conv"].min() < 0
        assert torch.equal(maps["act"], torch.relu(net.conv(images)))


@pytest.mark.slow
def test_compiled():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5)
    ).eval()
    images = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(lambda x: see(net, x, ["1", "2:input"]).maps, backend="aot_eager")
    with torch.no_grad():
        expected = net[1](net[0](images))
        for map_ in compiled(images).values():
            torch.testing.assert_close(map_, expected)


def test_inputs_have_names():
    net = Inplace()
    [layer] = look(net, torch.randn(2, 3, 6, 6), ["act:input"])
    assert layer.name == "act:input" and layer.shape == (4, 6, 6)
    with pytest.raises(ValueError, match="there is no layer 'actt:input'"):
        see(net, torch.randn(2, 3, 6, 6), ["actt:input"])
    with pytest.raises(ValueError, match="there is no layer ':input'"):
        see(net, torch.randn(2, 3, 6, 6), [":input"])
