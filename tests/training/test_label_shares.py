"""A step on some labels is the same step however its batch is divided: into batches that are added up, and over processes."""

import pytest
import torch
from accelerate import Accelerator

from tests import making
from tests.processes import in_two
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.mistakes import Mistake
from trainer.models.lenet5 import lenet5
from trainer.recipe import shelves
from trainer.recipe.keys import TeacherKeys, TermKeys
from trainer.recipe.training import Training
from trainer.training.fit import fit
from trainer.training.label_shares import label_shares


def term(loss, **keys):
    return shelves.checker(shelves.find("loss", loss), TermKeys).model_validate({"loss": loss, **keys})


BOTH = [term("cross_entropy"), term("kl", weight=0.1)]
OWN = [term("one_for_all", at=["conv1", "conv2"]), term("kl", weight=0.1)]  # has parameters, and is on labels


def trained(folder, terms=BOTH, data=None, **settings):
    """The student's weights and what the losses learnt, after a training of LeNet-5 on 64 digits."""
    making_data = {"subset": 64, "validation": 60} | (data or {})
    run = making.make_run(
        folder, {"model": "lenet5", "width": 2}, accelerator=Accelerator(cpu=True), **making_data
    )
    torch.manual_seed(1)
    teacher = [lenet5((1, 8, 8), 10, width=3)]
    run.teacher = Teacher(teacher, [TeacherKeys(model="lenet5")], run.data.mean, run.data.std)
    training = Training(**{"epochs": 1, "batch_size": 64, "optimizer": "sgd", "lr": 0.1} | settings)
    torch.manual_seed(2)
    objective = Objective(run.student, terms, run.data, run.teacher, device=run.accelerator.device)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    fit(run, objective, training)
    return {
        name: tensor - before[name]
        for name, tensor in objective.state_dict().items()
        if tensor.is_floating_point()
    }


STEPS = {
    "some labels": {"data": {"labelled": 0.2}},
    "few labels": {"data": {"labelled": 10}},
    "by class": {"class_weights": "balanced"},
    "some, by class": {"data": {"labelled": 0.5}, "class_weights": "balanced"},
    "mixed": {"data": {"labelled": 0.5, "mixup": 0.4}},
}


def one_of_two(rank, folder):
    found = {name: trained(folder / name, **settings) for name, settings in STEPS.items() if name != "mixed"}
    return found | {"own": trained(folder / "own", OWN, {"labelled": 12}, batch_size=16, epochs=2)}


def assert_same_step(one, other):
    assert one.keys() == other.keys()
    size = torch.cat([tensor.flatten() for tensor in other.values()]).norm()
    apart = torch.cat([(one[name] - other[name]).flatten() for name in one]).norm()
    assert apart < 1e-5 * size, apart / size


@pytest.mark.parametrize("name", [name for name in STEPS if name != "mixed"])
def test_batches_that_are_added_up_make_the_step_of_one(tmp_path, name):
    whole = trained(tmp_path / "whole", **STEPS[name])
    for accumulate in (2, 4):
        parts = {"accumulate": accumulate, "batch_size": 64 // accumulate}
        assert_same_step(trained(tmp_path / f"{accumulate}", **STEPS[name], **parts), whole)


def test_two_processes_make_the_step_of_one(tmp_path):
    first, second = in_two(one_of_two, tmp_path, tmp_path)
    for name, settings in STEPS.items():
        if name != "mixed":  # each process mixes its own images
            assert_same_step(first[name], trained(tmp_path / f"{name}-alone", **settings))
            assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])
    # Batches of eight on each process, most without a label, train a loss's own parameters.
    own = first["own"]
    assert all(torch.equal(own[key], second["own"][key]) for key in own)
    assert all(
        tensor.abs().max() > 0 for key, tensor in own.items() if key.startswith("bound") and "weight" in key
    )


def test_shares_of_batches_in_their_step():
    labels = torch.tensor([0, -1, 1, 1, -1, -1, 2, 0])
    order = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5]), torch.tensor([6])]
    # Steps of two batches: 1 and 2 of three labels in 2 of 4 images; none and 1 of one in 2 and 1 of three images.
    assert label_shares(labels, [order], 2, 0) == [
        (pytest.approx(2 / 3),) * 2, (pytest.approx(4 / 3),) * 2, (0, 0), (3, 3)
    ]  # fmt: skip
    weights = torch.tensor([4.0, 1, 1])
    by_class = [weighted for _, weighted in label_shares(labels, [order], 2, 0, weights)]
    assert by_class == [pytest.approx(4 / 6 * 2), pytest.approx(2 / 6 * 2), 0, 3]
    both = [[torch.tensor([0, 1])], [torch.tensor([2, 3])]]
    assert [label_shares(labels, both, 1, rank)[0][0] for rank in (0, 1)] == [
        pytest.approx(2 / 3), pytest.approx(4 / 3)
    ]  # fmt: skip
    mixed = label_shares(labels, [[torch.tensor([0, 1, 2]), torch.tensor([3, 7])]], 2, 0, mixed=True)
    assert mixed == [(pytest.approx(2 / 4 * 5 / 3),) * 2, (pytest.approx(2 / 4 * 5 / 2),) * 2]
    assert label_shares(torch.tensor([-1, -1, 3]), [[torch.tensor([0, 1])]], 1, 0) == [(1, 1)]


def test_a_weight_is_found_at_the_first_step_with_a_label(tmp_path):
    run = making.make_run(tmp_path, {"model": "lenet5", "width": 2}, subset=64, validation=60, labelled=10)
    torch.manual_seed(1)
    run.teacher = Teacher(
        [lenet5((1, 8, 8), 10, width=3)], [TeacherKeys(model="lenet5")], run.data.mean, run.data.std
    )
    terms = [term("kl"), term("normalized", weight={"ratio": 0.5})]
    objective = Objective(run.student, terms, run.data, run.teacher, device=run.accelerator.device)
    found = fit(run, objective, Training(epochs=3, batch_size=4, lr=1e-3))["ratios"]["normalized"]
    assert found["weight"] not in (0.0, 0.5) and found["first"] == pytest.approx(0.5, rel=1e-4)


def test_a_weight_is_found_while_the_body_is_frozen_for_when_it_no_longer_is(tmp_path):
    terms = [term("cross_entropy"), term("hint", at=["conv2"], weight="auto")]
    moved = trained(tmp_path / "some", terms, freeze_epochs=1, epochs=3, batch_size=16)
    assert moved["student.conv2.weight"].abs().max() > 0
    with pytest.raises(Mistake, match="hint.*no gradient to the student"):
        trained(tmp_path / "none", terms, train_only="head", epochs=1, batch_size=16)
