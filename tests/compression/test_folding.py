"""Folding BatchNorm, dropping dead units and sorting the others: the same outputs from a network that packs smaller."""

import pytest
import torch
from torch import nn

from trainer.compression import folding, units
from trainer.compression.codebooks import cluster, open_codebook, set_codebook
from trainer.compression.masks import set_mask
from trainer.compression.parametrizations import Codebook
from trainer.compression.states import dense_state, restore
from trainer.compression.weights import weights_of
from trainer.criteria.channels import channels
from trainer.mistakes import Mistake
from trainer.models.lenet5 import lenet5
from trainer.models.lenet5_caffe import lenet5_caffe
from trainer.models.lenet300 import lenet300
from trainer.models.separable import separable
from trainer.networks.build import build
from trainer.networks.norms import randomize_norms
from trainer.packing import network as packed

SHAPE, CLASSES = (1, 16, 16), 4
NORMED = {
    "lenet5": {"model": "lenet5", "width": 3, "batch_norm": True},
    "separable": {"model": "separable", "widths": [4, 6, 5], "strides": [2, 1, 1]},
}
CHAINS = {
    "lenet300": lambda: lenet300(SHAPE, CLASSES, hidden=(20, 12)),
    "lenet5": lambda: lenet5(SHAPE, CLASSES, width=3),
    "lenet5_caffe": lambda: lenet5_caffe(SHAPE, CLASSES),
    "separable": lambda: separable(SHAPE, CLASSES, widths=(4, 6, 5), strides=(2, 1, 1), batch_norm=False),
}


def images(seed=1):
    return torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(seed))


def pruned(model, share=0.3):
    torch.manual_seed(2)
    for place in weights_of(model).values():
        set_mask(place, torch.rand_like(place.value) < share)
    return model.eval()


def with_statistics(spec):
    torch.manual_seed(0)
    model = build(spec, SHAPE, CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)  # some are negative
            nn.init.normal_(module.bias)
    model.train()
    for seed in range(3):
        model(images(seed))
    return model


@pytest.mark.parametrize("name", NORMED)
def test_folding_keeps_outputs_and_masks(name):
    model = pruned(with_statistics(NORMED[name]))
    expected = model(images())
    masks = {n: p.mask.clone() for n, p in weights_of(model).items()}
    same, spec = folding.fold(model, NORMED[name])
    assert same is model
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for n, place in weights_of(model).items():
        assert torch.equal(place.mask, masks[n])
        zeros = place.value[~masks[n]]
        assert not zeros.any() and not torch.signbit(zeros).any()
    # the spec builds the very same network
    twin = build(spec, SHAPE, CLASSES)
    restore(twin, {k: v.clone() for k, v in model.state_dict().items()})
    assert torch.equal(twin.eval()(images()), model(images()))


def test_the_folded_spec_names_only_what_differs_from_the_defaults():
    assert folding.fold(with_statistics(NORMED["lenet5"]), NORMED["lenet5"])[1] == {
        "model": "lenet5",
        "width": 3,
    }
    assert folding.fold(with_statistics(NORMED["separable"]), NORMED["separable"])[1]["batch_norm"] is False


def test_folding_makes_the_file_smaller():
    spec, facts = NORMED["separable"], {"shape": SHAPE, "mean": [0.0], "std": [1.0], "classes": list("abcd")}
    model = with_statistics(spec).eval()
    before = len(packed.encode(model, spec, facts))
    model, folded = folding.fold(model, spec)
    data = packed.encode(model, folded, facts)
    assert len(data) < before
    assert torch.equal(packed.decode(data)[0](images()), model(images()))


def test_what_cannot_be_folded():
    for model in (
        CHAINS["lenet5"](),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2)),
    ):
        with pytest.raises(ValueError, match="no BatchNorm after a layer"):
            folding.fold(model, {"model": "lenet5"})
    model = with_statistics(NORMED["lenet5"])
    place = weights_of(model)["conv2"]
    set_codebook(place, *cluster(place, 4))
    with pytest.raises(ValueError, match="'conv2' shares its weights already: fold before sharing"):
        folding.fold(model, NORMED["lenet5"])


@pytest.mark.parametrize("is_pruned", [False, True])
def test_a_tied_weight_cannot_take_two_scales(is_pruned):
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
    )
    model[3].weight = model[0].weight
    if is_pruned:
        pruned(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for refused in (folding.can_fold, folding.fold_norms):
        with pytest.raises(Mistake, match="layer '0': its weight is held 2 times.* cannot take two scales"):
            refused(model)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    model[1] = nn.Identity()
    with pytest.raises(Mistake, match="layer '3': its weight is that of '0' and is held 2 times"):
        folding.can_fold(model)


# tidy


def shared(model, values=4):
    for place in weights_of(model).values():
        if place.value.any():
            set_codebook(place, *cluster(place, values))
    return model


@pytest.mark.parametrize("order", ["alike", "count"])
@pytest.mark.parametrize("kind", ["plain", "masked", "shared"])
@pytest.mark.parametrize("name", CHAINS)
def test_tidying_keeps_outputs(name, kind, order):
    torch.manual_seed(0)
    model = CHAINS[name]()
    for place in weights_of(model).values():
        with torch.no_grad():
            place.value.mul_(3.0)  # so that the images make a difference
    if kind != "plain":
        pruned(model)
    if kind == "shared":
        shared(model)
    model.eval()
    expected = model(images())
    before = {n: p.value.detach().clone() for n, p in weights_of(model).items()}
    units.tidy(model, order)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    moved = [n for n, p in weights_of(model).items() if not torch.equal(p.value, before[n])]
    assert moved or (kind, order) == ("plain", "count"), (
        "units are moved; where none has a zero, all count the same"
    )
    if kind == "shared":
        assert all(isinstance(p.parametrization, Codebook) for p in weights_of(model).values())


def dead_and_constant():
    torch.manual_seed(0)
    model = CHAINS["lenet300"]()
    with torch.no_grad():
        model.fc2.weight[:, 3] = 0  # nothing of unit 3 of fc1 goes on
        model.fc1.weight[5] = 0  # unit 5 always says 0.7, unit 6 nothing
        model.fc1.weight[6] = 0
        model.fc1.bias[5], model.fc1.bias[6] = 0.7, -0.2
        model.fc3.weight[:, 2] = 0  # and of unit 2 of fc2, so that what feeds only that one is dead too
        model.fc2.weight[:2, 8] = 0
        model.fc2.weight[3:, 8] = 0
    return model.eval()


def test_dead_units_are_dropped_and_constants_move_on():
    model = dead_and_constant()
    expected = model(images())
    assert units.drop_dead(model) == {"fc1": 4, "fc2": 1}
    torch.testing.assert_close(model(images()), expected)
    for unit in (3, 5, 6, 8):
        assert (
            not model.fc1.weight[unit].any()
            and not model.fc1.bias[unit]
            and not model.fc2.weight[:, unit].any()
        )
    assert not model.fc2.weight[2].any() and not model.fc2.bias[2]
    before = dense_state(model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    assert units.drop_dead(model) == {"fc1": 4, "fc2": 1}, "a second time finds the same units"
    assert all(torch.equal(before[name], tensor) for name, tensor in dense_state(model).items())


def test_units_without_consequences_leave_the_outputs_bit_equal():
    model = dead_and_constant()
    with torch.no_grad():
        model.fc1.bias[5] = -1.0  # no constant that would have to move
    expected = model(images())
    units.drop_dead(model)
    assert torch.equal(model(images()), expected)


def test_a_constant_channel_stays_before_a_padded_convolution():
    for model, dropped in ((CHAINS["separable"](), 0), (CHAINS["lenet5_caffe"](), 1)):
        with torch.no_grad():
            model.conv1.weight[1] = 0
            model.conv1.bias[1] = 0.5
        expected = model.eval()(images())
        assert units.drop_dead(model)["conv1"] == dropped
        torch.testing.assert_close(model(images()), expected)


def test_tidying_makes_the_file_smaller():
    model = CHAINS["lenet300"]()
    shared(pruned(model, 0.05))
    facts = {"shape": SHAPE, "mean": [0.0], "std": [1.0], "classes": list("abcd")}
    before = len(packed.encode(model, None, facts))
    units.tidy(model)
    assert len(packed.encode(model, None, facts)) < before


def test_what_cannot_be_tidied():
    residual = separable(SHAPE, CLASSES, widths=(4, 4), strides=(1, 1), batch_norm=False, residual=True)
    for model in (nn.Sequential(nn.Linear(4, 4)), residual):
        with pytest.raises(ValueError, match="no chain of layers"):
            units.tidy(model)
    with pytest.raises(ValueError, match="'norm1' stands between.*stage fold"):
        units.tidy(with_statistics(NORMED["lenet5"]))
    model = CHAINS["lenet300"]()
    place = weights_of(model)["fc1"]
    open_codebook(place, *cluster(place, 4))
    with pytest.raises(ValueError, match="'fc1' is still deciding"):
        units.tidy(model)


def test_attributes_of_these_names_are_the_networks_own():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = nn.Sequential(nn.Linear(4, 3))
            self.norms = nn.ModuleList([nn.BatchNorm1d(3)])

    with pytest.raises(ValueError, match="is no chain of layers"):
        units.can_tidy(Other())
    assert folding.norms(Other()) == [] and folding.can_fold(Other()) == [("chain.0", "norms.0")]


@pytest.mark.parametrize(
    "name", ["timm/resnet10t", "timm/mobilenetv3_small_050", "timm/tf_efficientnet_lite0", "cifar_resnet"]
)
def test_a_network_without_a_setting_for_it_is_folded_too(name):
    spec = {"model": name} | ({"depth": 8} if name == "cifar_resnet" else {})
    shape = (1, 32, 32)
    torch.manual_seed(0)
    model = build(spec, shape, CLASSES)
    randomize_norms(model)
    pruned(model)
    images = torch.randn(4, *shape)
    masks = {n: p.mask.clone() for n, p in weights_of(model).items()}
    with torch.no_grad():
        expected = model(images)
        folding.refuse_unfoldable(model, images)
        assert torch.equal(model(images), expected)
        num_before = sum(p.numel() for p in model.state_dict().values())
        model, folded = folding.fold(model, spec)
        found = model(images)
    assert folded == {**spec, "folded": True}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(p.numel() for p in model.state_dict().values()) < num_before
    for n, place in weights_of(model).items():
        assert torch.equal(place.mask, masks[n])
    facts = {"shape": shape, "mean": [0.5], "std": [0.5], "classes": list("abcd")}
    data = packed.encode(model, folded, facts)
    network, header = packed.decode(data)
    assert header["net"] == folded and torch.equal(network.eval()(images), found)


@pytest.mark.parametrize("first", ["channels", "fold"])
@pytest.mark.parametrize("name", ["timm/resnet10t", "cifar_resnet"])
def test_channels_go_before_or_after_folding(name, first):
    spec = {"model": name} | ({"depth": 8} if name == "cifar_resnet" else {})
    shape = (1, 32, 32)
    torch.manual_seed(0)
    model = build(spec, shape, CLASSES).eval()
    randomize_norms(model)
    images = torch.randn(4, *shape)
    for step in (first, "fold" if first == "channels" else "channels"):
        if step == "fold":
            model, spec = folding.fold(model, spec)
        else:
            spec = {**spec, "resized": channels(model, images, [], sparsity=0.5)}
    assert spec["folded"] and spec["resized"]
    twin = build(spec, shape, CLASSES)
    restore(twin, {key: value.clone() for key, value in model.state_dict().items()})
    assert torch.equal(twin.eval()(images), model.eval()(images))


@pytest.mark.parametrize("name", ["timm/resnetv2_18"])
def test_a_norm_that_comes_before_its_layer_is_not_folded(name):
    model = build({"model": name}, (1, 32, 32), CLASSES)
    with pytest.raises(ValueError, match="fold"):
        folding.refuse_unfoldable(model, torch.randn(2, 1, 32, 32))
