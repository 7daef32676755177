"""A network made ready to answer on a CPU gives the same answers, and stays what it was to everything else."""

import pytest
import torch
from torch import nn

from trainer.compression.masks import set_mask
from trainer.compression.weights import weights_of
from trainer.distillation.cpu import make_ready
from trainer.distillation.teacher import Teacher
from trainer.models.lenet5 import lenet5
from trainer.models.lenet300 import lenet300
from trainer.models.separable import separable
from trainer.models.timm import timm
from trainer.networks import features
from trainer.recipe.keys import TeacherKeys
from trainer.storage.weights_file import digest

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
    return features.see(network, images, features.block_names(network), embedding=True)


@pytest.mark.parametrize("name", BUILD)
def test_answers_are_the_same_and_the_network_keeps_its_weights(name):
    network, images = some(name)
    wanted, before = seen(network, images), digest(network.state_dict())
    ready = make_ready(network)
    answers = seen(ready, images)
    torch.testing.assert_close(answers.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers.embedding, wanted.embedding, rtol=1e-4, atol=1e-5)
    assert answers.maps.keys() == wanted.maps.keys() and answers.maps
    torch.testing.assert_close(answers.maps, wanted.maps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen(network, images).logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert digest(network.state_dict()) == before
    assert (ready is network) == (name not in ("lenet5", "separable"))
    if ready is not network:
        assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())


def test_pruned_and_shared_networks_are_not_folded():
    network, images = some("lenet5")
    place = weights_of(network)["conv2"]
    set_mask(place, place.value.abs() > place.value.abs().median())
    with torch.no_grad():
        wanted = network(images)
        ready = make_ready(network)
        assert ready is network
        torch.testing.assert_close(ready(images), wanted, rtol=1e-5, atol=1e-6)


def test_another_networks_norms_are_its_own():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm1d(4)])
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.norms[0](x))

    network = Normed().eval().requires_grad_(False)
    assert make_ready(network) is network


def test_a_network_elsewhere_is_left_as_it_is():
    network = lenet5(SHAPE, 5, width=3, batch_norm=True).to("meta")
    assert make_ready(network) is network and "forward" not in vars(network.fc1)


# ---- the teacher that asks


def guide(network):
    return Teacher([network], [TeacherKeys(model="lenet5")], [0.0], [1.0])


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
    keys = [TeacherKeys(model="lenet5"), TeacherKeys(model="separable")]
    both = Teacher([first, second], keys, [0.0], [1.0])
    with torch.no_grad():
        wanted = (first(images) + second(images)) / 2
    torch.testing.assert_close(both.see(images).logits, wanted, rtol=1e-4, atol=1e-5)
    assert all(ready is not network for ready, network in zip(both._ready, both.networks, strict=True))
