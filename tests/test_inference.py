"""A network made ready to answer on a CPU gives the same answers, and stays what it was to everything else."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainer import compress, features, inference, teacher
from trainer.models.lenet5 import lenet5
from trainer.models.lenet300 import lenet300
from trainer.models.separable import separable
from trainer.models.timm import timm

SHAPE = (1, 20, 20)
BUILD = {
    "lenet5": lambda: lenet5(SHAPE, 5, width=3, batch_norm=True),
    "separable": lambda: separable(SHAPE, 5, widths=(4, 6, 5), strides=(2, 1, 1)),
    "lenet300": lambda: lenet300(SHAPE, 5, hidden=(20, 12)),
    "resnet": lambda: timm(SHAPE, 5, "test_resnet"),
    "vit": lambda: timm((1, 32, 32), 5, "test_vit", options={"img_size": 32}),
}


def some(name):
    torch.manual_seed(0)
    network = BUILD[name]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    size = (1, 32, 32) if name == "vit" else SHAPE
    return network.eval().requires_grad_(False), torch.randn(7, *size)


@torch.no_grad()
def seen(network, images):
    return features.see(network, images, features.stage_names(network), embedding=True)


@pytest.mark.parametrize("name", BUILD)
def test_answers_are_the_same_and_the_network_keeps_its_weights(name):
    network, images = some(name)
    wanted, before = seen(network, images), teacher.fingerprint(network)
    ready = inference.make_ready(network)
    answers = seen(ready, images)
    torch.testing.assert_close(answers.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers.embedding, wanted.embedding, rtol=1e-4, atol=1e-5)
    assert answers.maps.keys() == wanted.maps.keys() and answers.maps
    torch.testing.assert_close(answers.maps, wanted.maps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen(network, images).logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert teacher.fingerprint(network) == before
    assert (ready is network) == (name not in ("lenet5", "separable"))
    if ready is not network:
        assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())


def plain_linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (1, 8), (0, 8), (2, 3, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_fully_connected_layers_take_any_shape(shape, bias):
    torch.manual_seed(0)
    layer = inference.make_ready(nn.Sequential(nn.Linear(8, 6, bias=bias)))
    x = torch.randn(shape)
    with torch.no_grad():
        for images in (x, x.transpose(0, -2).contiguous().transpose(0, -2) if len(shape) > 2 else x):
            torch.testing.assert_close(layer(images), plain_linear(layer[0], images), rtol=1e-5, atol=1e-6)


def test_where_gradients_are_wanted_or_precision_is_another_torch_multiplies():
    torch.manual_seed(0)
    layer = inference.make_ready(nn.Sequential(nn.Linear(300, 60)))
    x = torch.randn(50, 300, requires_grad=True)
    assert torch.equal(layer(x), plain_linear(layer[0], x))
    layer(x).sum().backward()
    assert x.grad is not None and layer[0].weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer.double()(x.double()).dtype == torch.float64
        with pytest.raises(RuntimeError):
            layer(x)


def test_copies_and_pickles_have_layers_of_their_own():
    network, images = some("lenet300")
    inference.make_ready(network)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        with torch.no_grad():
            assert torch.equal(other(images), network(images))
            other.fc1.weight.zero_()
            other.fc1.bias.fill_(1.0)
            changed = other(images)
            assert not torch.equal(changed, network(images)) and torch.equal(changed[0], changed[1])


def test_a_forward_of_someones_own_and_subclasses_stay():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    network = nn.Sequential(nn.Linear(3, 3), Doubled(3, 3))
    network[0].forward = lambda x: x
    inference.make_ready(network)
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert torch.equal(network(x), 2 * plain_linear(network[1], x))


def test_pruned_and_shared_networks_are_not_folded():
    network, images = some("lenet5")
    place = compress.weights(network)["conv2"]
    compress.set_mask(place, place.value.abs() > place.value.abs().median())
    with torch.no_grad():
        wanted = network(images)
        ready = inference.make_ready(network)
        assert ready is network
        torch.testing.assert_close(ready(images), wanted, rtol=1e-5, atol=1e-6)


def test_a_network_elsewhere_is_left_as_it_is():
    network = lenet5(SHAPE, 5, width=3, batch_norm=True).to("meta")
    assert inference.make_ready(network) is network and "forward" not in vars(network.fc1)


# ---- the teacher that asks


def guide(network):
    return teacher.Teacher([network], [teacher.TeacherKeys(model="lenet5")], [0.0], [1.0])


def test_a_changed_network_is_made_ready_anew():
    network, images = some("lenet5")
    asked = guide(network)
    before = asked.see(images).logits
    network.norm1.running_mean.add_(1.0)
    with torch.no_grad():
        wanted = network(images)
    torch.testing.assert_close(asked.see(images).logits, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - before).abs().max() > 0.01
    other, _ = some("lenet5")
    network.load_state_dict(other.state_dict())
    torch.testing.assert_close(asked.see(images).logits, before, rtol=1e-4, atol=1e-5)
    network.fc3.weight = nn.Parameter(torch.zeros_like(network.fc3.weight), requires_grad=False)
    torch.testing.assert_close(asked.see(images).logits, network.fc3.bias.expand(7, -1), rtol=1e-4, atol=1e-5)


def test_it_is_made_ready_once():
    network, images = some("lenet5")
    asked = guide(network)
    asked.see(images)
    first = asked._ready[0]
    asked.see(images, ["conv1"])
    assert asked._ready[0] is first
    asked.to(torch.device("cpu")).see(images)
    assert asked._ready[0] is not first


def test_layers_that_folding_takes_away_can_still_be_seen():
    network, images = some("lenet5")
    with torch.no_grad():
        wanted = features.see(network, images, ["norm1"]).maps["norm1"]
    found = guide(network).see(images, ["norm1", "conv2"])
    torch.testing.assert_close(found.maps["norm1"], wanted, rtol=1e-5, atol=1e-5)


def test_several_teachers_are_all_made_ready():
    first, images = some("lenet5")
    second, _ = some("separable")
    keys = [teacher.TeacherKeys(model="lenet5"), teacher.TeacherKeys(model="separable")]
    both = teacher.Teacher([first, second], keys, [0.0], [1.0])
    with torch.no_grad():
        wanted = (first(images) + second(images)) / 2
    torch.testing.assert_close(both.see(images).logits, wanted, rtol=1e-4, atol=1e-5)
    assert all(ready is not network for ready, network in zip(both._ready, both.networks, strict=True))
