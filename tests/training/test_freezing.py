"""Training the head alone, for a whole training or its first epochs: what stays as it is, and in several processes."""

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import nn

from tests import making
from tests.processes import in_two
from trainer.data.batches import epoch_order, seed_of
from trainer.distillation.objective import Objective
from trainer.mistakes import Mistake
from trainer.models.lenet5 import lenet5
from trainer.recipe.keys import TermKeys
from trainer.recipe.training import Training
from trainer.training import fit as fitting
from trainer.training.fit import fit
from trainer.training.freezing import Frozen

HEAD = {"fc2.weight", "fc2.bias"}


class Normed(nn.Module):
    """Two layers with BatchNorm between them."""

    def __init__(self, batch_norm=True):
        super().__init__()
        self.fc1 = nn.Linear(64, 12)
        self.norm = nn.BatchNorm1d(12) if batch_norm else nn.Identity()
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x):
        return self.fc2(torch.relu(self.norm(self.fc1(x.flatten(1)))))


def trained(folder, student=Normed, accelerator=None, watch=None, **settings):
    """The student after a training, with what `watch(student)` gave before each step."""
    run = making.make_run(folder, student=student, accelerator=accelerator, subset=60, validation=40)
    training = Training(**{"epochs": 2, "batch_size": 20, "optimizer": "sgd", "lr": 0.1} | settings)
    objective = Objective(
        run.student, [TermKeys(loss="cross_entropy")], run.data, device=run.accelerator.device
    )
    seen = []
    fit(run, objective, training, lambda step, _: bool(watch and seen.append(watch(run.student))))
    return run.student, seen


def state(student):
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("more", [{}, {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "ema": 0.5}])
def test_the_head_alone_is_trained_and_statistics_stay(tmp_path, more):
    run = making.make_run(tmp_path / "before", student=Normed)
    before = state(run.student)
    student, seen = trained(tmp_path / "after", train_only="head", watch=state, **more)
    assert len(seen) == 6  # three batches in each of two epochs
    assert changed(before, state(student)) == HEAD
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("optimizer", [{"momentum": 0.9, "nesterov": True}, {"optimizer": "adamw"}])
def test_all_but_the_head_is_frozen_for_the_first_epochs_only(tmp_path, optimizer):
    def look(student):
        return state(student), student.fc1.weight.requires_grad, student.norm.training

    student, seen = trained(tmp_path, epochs=3, freeze_epochs=2, watch=look, **optimizer)
    states = [found for found, _, _ in seen] + [state(student)]
    assert [(learns, counts) for _, learns, counts in seen] == [(False, False)] * 6 + [(True, True)] * 3
    assert changed(states[0], states[6]) == HEAD
    # A bias before BatchNorm has no gradient but rounding.
    assert set(states[0]) - changed(states[6], states[7]) <= {"fc1.bias"}


def test_the_head_alone_learns_as_a_linear_layer_on_the_embedding_of_evaluation(tmp_path):
    student, _ = trained(tmp_path / "a", train_only="head")
    run = making.make_run(tmp_path / "b", student=Normed, subset=60, validation=40)
    images, labels, _ = run.data.train.__getitems__(torch.arange(60))
    with torch.no_grad():
        x = ((images.float() / 255 - run.data.mean[0]) / run.data.std[0]).flatten(1)
        embedding = torch.relu(run.student.eval().norm(run.student.fc1(x)))
    naive = run.student.fc2
    optimizer = torch.optim.SGD(naive.parameters(), lr=0.1)
    for epoch in range(2):
        for batch in epoch_order(60, 20, seed_of(3, 0, 0), epoch, 0, 1):
            nn.functional.cross_entropy(naive(embedding[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(student.fc2.state_dict(), naive.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_validation_in_between_does_not_wake_the_statistics(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(fitting, "_look", lambda state: modes.append(state.objective.student.norm.training))
    trained(tmp_path, epochs=3, train_only="head")
    assert modes and not any(modes)


def test_several_classifiers_are_all_the_head():
    network = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32, depth=1)
    frozen = Frozen(network)
    frozen.set(True)
    learns = {name.partition(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert learns == {"head", "head_dist"}


def test_a_network_of_its_head_alone_is_refused():
    with pytest.raises(Mistake, match="no more than its classifier"):
        Frozen(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_only": "head", "freeze_epochs": 1}, "have no effect with train_only"),
        ({"train_only": "head", "layer_decay": 0.75}, "have no effect with train_only"),
        ({"freeze_epochs": 3}, "leaves no epoch of 3"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Training(epochs=3, **settings)


def one_of_two(rank, folder):
    """The weights after a training in two processes, by its settings."""
    found = {}
    for name, settings in SHARED.items():
        accelerator = Accelerator(cpu=True)
        student, _ = trained(folder / name, lambda: Normed(batch_norm=False), accelerator, **settings)
        found[name] = state(student)
    return found


SHARED = {
    "head": {"train_only": "head", "epochs": 3},
    "freeze": {"freeze_epochs": 1, "epochs": 3, "momentum": 0.9, "accumulate": 2, "batch_size": 10},
    "decay": {"layer_decay": 0.5, "freeze_epochs": 2, "epochs": 3, "clip": 0.5},
}


def test_two_processes_train_what_one_does(tmp_path):
    first, second = in_two(one_of_two, tmp_path, tmp_path)
    for name, settings in SHARED.items():
        alone, _ = trained(tmp_path / f"{name}-alone", lambda: Normed(batch_norm=False), **settings)
        for key, tensor in state(alone).items():
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            torch.testing.assert_close(first[name][key], tensor, rtol=1e-5, atol=1e-6)


def test_frozen_and_masked_layers_keep_what_they_are(tmp_path):
    from trainer.compression.masks import set_mask
    from trainer.compression.weights import weights_of

    def masked():
        torch.manual_seed(0)
        student = lenet5((1, 8, 8), 10, width=2, batch_norm=True)
        for place in weights_of(student).values():
            set_mask(place, place.value.abs() > 0.05)
        return student

    before = state(masked())
    after = state(trained(tmp_path, masked, train_only="head")[0])
    head = "fc3.parametrizations.weight.original"
    assert changed(before, after) == {head, "fc3.bias"}
