"""Other people's checkpoints: the network that they hold, to the bit, or a refusal that says what to do."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from trainer.compression.masks import set_mask
from trainer.compression.weights import weights_of
from trainer.mistakes import Mistake
from trainer.models.cifar_resnet import cifar_resnet
from trainer.networks.build import build
from trainer.packing import network as packed
from trainer.recipe.keys import Recipe
from trainer.storage.weights_file import save_file
from trainer.training.weights import create, head_keys, load_weights

SHAPE, SPEC = (3, 8, 8), {"model": "cifar_resnet", "depth": 8, "channels": [4, 4, 8, 16]}
FACTS = {"shape": [3, 8, 8], "mean": [0.4] * 3, "std": [0.2] * 3, "classes": ["a", "b", "c"], "reading": {}}


def network(seed=0, num_classes=3):
    torch.manual_seed(seed)
    return cifar_resnet(SHAPE, num_classes, depth=8, channels=(4, 4, 8, 16))


GOOD = network(1).state_dict()
EMA = network(2).state_dict()


def prefixed(prefix, state=GOOD):
    return {prefix + key: value for key, value in state.items()}


def loaded(path, **settings):
    return load_weights(network(), SPEC, SHAPE, 3, path, **settings)


def same(model, state) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[key], state[key]) for key in own)


OTHERS = {
    "plain": GOOD,
    "DataParallel": prefixed("module."),
    "compiled and parallel": prefixed("_orig_mod.module."),
    "timm's train.py": {
        "epoch": 5,
        "arch": "resnet10t",
        "state_dict": GOOD,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}},
            "param_groups": [{"lr": 1}],
        },
        "args": argparse.Namespace(model="resnet10t", lr=3e-3),
        "state_dict_ema": EMA,
        "metric": np.float64(99.0),
    },
    "torchvision's reference": {
        "model": GOOD,
        "model_ema": {"n_averaged": torch.tensor(5), **prefixed("module.", EMA)},
        "args": argparse.Namespace(model="x", array=np.arange(3)),
        "lr_scheduler": {},
    },
    "Lightning": {
        "state_dict": prefixed("model."),
        "hyper_parameters": {"lr": 1e-3},
        "callbacks": {},
        "loops": {},
    },
    "beside a loss's weights": {"state_dict": {**prefixed("net."), "criterion.weight": torch.ones(3)}},
    "a backbone and a head": {
        "state_dict": {
            ("head." if key.startswith("fc") else "backbone.") + key: value for key, value in GOOD.items()
        }
    },
    "under student": {"student": GOOD, "epoch": 3},
    "under weights": {"weights": GOOD},
    "thop's counters": {**GOOD, "total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)},
    "old, no counters": {key: value for key, value in GOOD.items() if "num_batches_tracked" not in key},
    "keys that begin with state_dict": prefixed("state_dict."),
    "in a list of hooks": {"model": {"state_dict": GOOD}, "epoch": 3},
}


def test_the_head_of_this_network():
    assert head_keys(network()) == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("ending", [".pth", ".pth.tar", ".ckpt", ".pt"])
def test_every_trainer_s_file_gives_its_network(tmp_path, name, ending):
    path = tmp_path / f"x{ending}"
    torch.save(OTHERS[name], path)
    counters = {
        key: value for key, value in network().state_dict().items() if key.endswith("num_batches_tracked")
    }
    made = loaded(path)
    assert same(made.network, {**counters, **GOOD})
    assert made.spec == SPEC and made.notes == []


@pytest.mark.parametrize("half", [False, True])
def test_safetensors_of_others(tmp_path, half):
    state = {key: v.half() if half and v.is_floating_point() else v for key, v in prefixed("model.").items()}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    own = loaded(tmp_path / "x.safetensors").network.state_dict()
    assert all(own[key].dtype == GOOD[key].dtype for key in own)
    assert all(torch.equal(own[key], state["model." + key].to(own[key].dtype)) for key in own)


def test_averaged_weights_are_taken_only_when_asked_for(tmp_path):
    for name in ("timm's train.py", "torchvision's reference"):
        torch.save(OTHERS[name], tmp_path / "x.pth")
        assert same(loaded(tmp_path / "x.pth", use_ema=True).network, EMA)
    torch.save({"state_dict_ema": EMA}, tmp_path / "only.pth")
    with pytest.raises(Mistake, match="has only averaged weights"):
        loaded(tmp_path / "only.pth")
    torch.save(GOOD, tmp_path / "none.pth")
    with pytest.raises(Mistake, match="has no averaged weights"):
        loaded(tmp_path / "none.pth", use_ema=True)


def test_of_two_networks_the_recipe_chooses(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(prefixed("student.") | prefixed("teacher.", EMA), path)
    with pytest.raises(
        Mistake, match=r"x.pth: holds several networks that fit: 'student.' and 'teacher.'; choose"
    ):
        loaded(path)
    assert same(loaded(path, prefix="student").network, GOOD)
    assert same(loaded(path, prefix="teacher.").network, EMA)
    torch.save({"model": GOOD, "best": EMA}, path)
    assert same(loaded(path, prefix="best").network, EMA)
    with pytest.raises(Mistake, match="does not fit"):
        loaded(path, prefix="worst")


def test_a_part_of_a_larger_network_is_not_taken_for_it(tmp_path):
    for extra in ("layer9.conv.weight", "fc2.weight"):
        torch.save({"state_dict": prefixed("model.") | {f"model.{extra}": torch.ones(3)}}, tmp_path / "x.pth")
        with pytest.raises(Mistake, match=f"only in the file: {extra}. Likely cause: another variant"):
            loaded(tmp_path / "x.pth")


def test_a_misfit_says_the_odd_keys_of_each_side_and_the_cause(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a message has room for a path that is not too long
    path = Path("x.pth")
    torch.save(network(0, 7).state_dict(), path)
    with pytest.raises(Mistake) as caught:
        loaded(path)
    told = "other shapes in the file: fc.weight 7x16 for 3x16, fc.bias 7 for 3. Likely cause: it was taught other classes"
    assert told in str(caught.value)
    torch.save(nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))).state_dict(), path)
    with pytest.raises(
        Mistake,
        match=r"not in the file: (\S+, ){4}\S+ and \d+ more.*only in the file.*another network's file",
    ):
        loaded(path)
    torch.save(build({**SPEC, "channels": [8, 8, 16, 32]}, SHAPE, 3).state_dict(), path)
    with pytest.raises(Mistake, match="another width") as caught:
        loaded(path)
    assert len(str(caught.value)) < 400
    torch.save(GOOD | {"fc.weight": GOOD["fc.weight"].numpy()}, path)
    with pytest.raises(Mistake, match=r"not in the file: fc.weight"):
        loaded(path)


def test_a_new_head_starts_at_zero_where_it_will_be_taught(tmp_path):
    path = tmp_path / "x.pth"
    pretrained = network(3, 7).state_dict()
    torch.save({"state_dict": prefixed("model.", pretrained)}, path)
    made = loaded(path, new_head=True)
    own = made.network.state_dict()
    assert made.notes == [f"{path}: has another classifier; new, from zero: fc.bias, fc.weight"]
    assert own["fc.weight"].shape == (3, 16) and not own["fc.weight"].any() and not own["fc.bias"].any()
    assert all(torch.equal(own[key], pretrained[key]) for key in own if not key.startswith("fc"))
    torch.save(GOOD, path)
    assert same(loaded(path, new_head=True).network, GOOD)  # of the same classes: the head is the file's
    torch.save(build({**SPEC, "channels": [8, 8, 16, 32]}, SHAPE, 7).state_dict(), path)
    with pytest.raises(Mistake, match="does not fit"):
        loaded(path, new_head=True)


def test_files_without_weights(tmp_path):
    itself = {"epoch": 1}
    itself["me"] = itself
    for content in ({"epoch": 3}, [torch.ones(1)], {}, {0: torch.ones(1)}, itself):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(Mistake, match=r"a\.pth: no weights found"):
            loaded(tmp_path / "a.pth")
    with pytest.raises(Mistake, match=r"a\.onnx.*allowed: \.safetensors, \.tiny"):
        loaded(tmp_path / "a.onnx")


def test_our_own_files(tmp_path):
    student = network(1)
    layer = weights_of(student)["layer1.0.conv1"]
    mask = torch.rand(layer.value.shape) > 0.5
    set_mask(layer, mask)
    save_file(tmp_path / "student.safetensors", student.state_dict(), {"facts": json.dumps(FACTS)})
    made = loaded(tmp_path / "student.safetensors")
    assert same(made.network, student.state_dict()) and made.facts == FACTS
    assert torch.equal(weights_of(made.network)["layer1.0.conv1"].value != 0, mask)  # pruned weights stay so

    (tmp_path / "x.tiny").write_bytes(packed.encode(network(1), SPEC, FACTS))
    made = loaded(tmp_path / "x.tiny")
    assert same(made.network, GOOD) and made.facts["mean"] == FACTS["mean"]


def test_removed_channels_are_rebuilt(tmp_path):
    spec = {**SPEC, "resized": {"layer1.0.conv1": [2, 4], "layer1.0.bn1": [2], "layer1.0.conv2": [4, 2]}}
    small = build(spec, SHAPE, 3)
    save_file(tmp_path / "x.safetensors", small.state_dict(), {"facts": json.dumps({**FACTS, "net": spec})})
    made = loaded(tmp_path / "x.safetensors")
    assert made.spec == spec and same(made.network, small.state_dict())
    with pytest.raises(Mistake, match="does not fit"):  # of another depth: nothing is rebuilt
        load_weights(
            build({**SPEC, "depth": 14}, SHAPE, 3),
            {**SPEC, "depth": 14},
            SHAPE,
            3,
            tmp_path / "x.safetensors",
        )


def test_keys_without_a_checkpoint_are_refused():
    for key in ({"prefix": "model"}, {"use_ema": True}):
        with pytest.raises(ValueError, match="no effect without checkpoint"):
            Recipe.model_validate(
                {
                    "name": "a",
                    "data": {"dataset": "digits"},
                    "student": {"model": "lenet5", **key},
                    "stages": [{"stage": "pack"}],
                }
            )


def test_an_entry_of_a_recipe_says_what_stayed_new(tmp_path):
    torch.save(network(0, 7).state_dict(), tmp_path / "x.pth")
    recipe = {
        "name": "a",
        "data": {"dataset": "digits"},
        "student": {
            "model": "cifar_resnet",
            "depth": 8,
            "channels": [4, 4, 8, 16],
            "checkpoint": str(tmp_path / "x.pth"),
        },
        "stages": [{"stage": "pack"}],
    }
    keys = Recipe.model_validate(recipe).student
    made = create(keys, SHAPE, 3, new_head=True, where="student")
    assert made.notes[0].startswith("student: ") and "new, from zero" in made.notes[0]
