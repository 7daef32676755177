"""Which parameters weight decay is put on, and that they carry their mark wherever they go."""

import copy
import shutil
import sys

import pytest
import torch
from torch import nn

from trainer.compression.codebooks import cluster, open_codebook, set_codebook
from trainer.compression.masks import set_mask
from trainer.compression.states import bake, restore
from trainer.compression.weights import weights_of
from trainer.data.images import Data, InMemory, Part
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.models.lenet5 import lenet5
from trainer.recipe import shelves
from trainer.recipe.keys import Augment, TeacherKeys, TermKeys
from trainer.recipe.training import Training
from trainer.training.optimizer import make_optimizer
from trainer.training.state import _expect_compiler


@pytest.fixture
def data():
    images = InMemory(torch.zeros(12, 1, 8, 8, dtype=torch.uint8), torch.arange(12) % 10)
    part = Part(images, torch.arange(12))
    classes = [str(i) for i in range(10)]
    looks = {"mean": (0.5,), "std": (0.5,), "shape": (1, 8, 8)}
    return Data("x", part, part, part, classes, **looks, num_samples=12, augment=Augment())


def student_of(assign=set_codebook):
    """A LeNet-5 with batch norm, of which conv2 is pruned and fc1 shares its values."""
    torch.manual_seed(0)
    student = lenet5((1, 8, 8), 10, width=2, batch_norm=True)
    places = weights_of(student)
    set_mask(places["conv2"], places["conv2"].value.abs() > 0.05)
    assign(places["fc1"], *cluster(places["fc1"], 4, groups=2))
    return student


def objective_of(student, data):
    teacher = Teacher([lenet5(data.shape, 10, width=4)], [TeacherKeys(model="lenet5")], data.mean, data.std)
    losses = ["cross_entropy", "curriculum_temperature", "contrastive"]
    terms = [shelves.checker(shelves.find("loss", name), TermKeys)(loss=name) for name in losses]
    return Objective(student, [*terms, TermKeys(loss="hint", at=["conv1"])], data, teacher)


def decayed(objective, **training):
    """Names of the parameters that weight decay is put on; all others are trained without."""
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    optimizer = make_optimizer(objective, Training(epochs=1, weight_decay=0.1, **training))
    found = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(names.values()) and set(found.values()) <= {0.0, 0.1}
    return {name for name, decay in found.items() if decay}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("assign", [set_codebook, open_codebook])
def test_weights_decay_and_norms_biases_centroids_projectors_and_parameters_of_losses_do_not(
    data, optimizer, assign
):
    objective = objective_of(student_of(assign), data)
    beside = [name for name, _ in objective.named_parameters() if not name.startswith("student.")]
    assert any("projector" in name for name in beside) and any("raw_temperature" in name for name in beside)
    assert decayed(objective, optimizer=optimizer) == {
        "student.conv1.weight",
        "student.conv2.parametrizations.weight.original",
        "student.fc2.weight",
        "student.fc3.weight",
    }


def test_decay_all_spares_the_shared_values_alone(data):
    objective = objective_of(student_of(open_codebook), data)
    shared = {f"student.fc1.parametrizations.weight.{name}" for name in ("original", "0.centroids")}
    assert decayed(objective, decay_all=True) == {n for n, _ in objective.named_parameters()} - shared


def test_without_decay_the_groups_are_those_of_decay_all(data):
    objective = objective_of(student_of(), data)
    groups = [
        [[id(p) for p in group["params"]] for group in make_optimizer(objective, training).param_groups]
        for training in (Training(epochs=1), Training(epochs=1, weight_decay=0.1, decay_all=True))
    ]
    assert groups[0] == groups[1] and len(groups[0]) == 2


def marked(student):
    return {name for name, parameter in student.named_parameters() if getattr(parameter, "no_decay", False)}


@pytest.mark.parametrize("assign", [set_codebook, open_codebook])
def test_the_mark_goes_where_a_codebook_goes(assign):
    student = student_of(assign)
    expected = {"fc1.parametrizations.weight.original"}
    if assign is open_codebook:
        expected |= {"fc1.parametrizations.weight.0.centroids"}
    assert marked(student) == expected
    copied = copy.deepcopy(student)
    assert marked(copied) == marked(copied.to(torch.float64)) == expected
    copied.load_state_dict(student.state_dict())
    assert marked(copied) == expected
    assert marked(student.requires_grad_(False).requires_grad_(True)) == expected
    assert marked(bake(student)) == set()


def test_the_mark_is_made_anew_from_a_checkpoint():
    student, fresh = student_of(), lenet5((1, 8, 8), 10, width=2, batch_norm=True)
    restore(fresh, student.state_dict())
    assert marked(fresh) == marked(student)


def test_a_tied_weight_that_shares_its_values_is_marked_once():
    embed, out = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    out.weight = embed.weight
    model = nn.Sequential(embed, out)
    (place,) = weights_of(model).values()
    set_codebook(place, *cluster(place, 4))
    assert [getattr(parameter, "no_decay", False) for parameter in model.parameters()] == [True]


def test_compiling_for_a_gpu_needs_a_c_compiler(monkeypatch):
    """Triton builds what starts its kernels when the first of them is needed."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(Mistake, match="needs a C compiler.*CC can name another"):
        _expect_compiler(torch.device("cuda"))
    monkeypatch.setenv("CC", "/opt/cc")
    _expect_compiler(torch.device("cuda"))
