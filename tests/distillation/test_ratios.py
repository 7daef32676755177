"""What each term of an objective weighs: against gradients computed here, and what measuring must not change."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.distillation.test_objective import Small, normal, some_data, teacher_of, term
from tests.processes import in_two
from trainer.distillation.objective import Objective
from trainer.distillation.ratios import Ratio, faults, ratios, refuse_without_gradient
from trainer.losses.kl import kl
from trainer.mistakes import Mistake


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    torch.manual_seed(5)
    return torch.rand(6, 1, 16, 16), torch.randint(4, (6,)), torch.randperm(20)[:6]


def length(value, network):
    gradients = torch.autograd.grad(value, list(network.parameters()), allow_unused=True, retain_graph=True)
    return sum((g**2).sum() for g in gradients if g is not None).sqrt().item()


def test_a_ratio_is_that_of_two_gradients(batch):
    student, guide = Small(), teacher_of(Small(5))
    terms = [term(loss="cross_entropy", weight=0.1), term(loss="kl", weight=2, temperature=3)]
    found = ratios(Objective(student, terms, some_data(), guide), *batch)
    images, labels, _ = batch
    logits, taught = student(normal(images)), guide.network(normal(images)).detach()
    of_labels = length(F.cross_entropy(logits, labels), student)
    of_kl = length(kl(logits, taught, temperature=3), student)
    assert found["cross_entropy"].ratio == pytest.approx(0.1)
    assert found["kl"].ratio == pytest.approx(2 * of_kl / of_labels)
    assert found["kl"].balanced == pytest.approx(of_labels / of_kl)


def test_all_pairs_of_layers_count_together_and_get_one_weight(batch):
    student, guide = Small(), teacher_of(Small(3))
    objective = Objective(student, [term(loss="attention", weight="auto", at="auto")], some_data(), guide)
    assert len(objective.bound) == 2
    found = ratios(objective, *batch, find=True)
    assert found.keys() == {"attention"} and found["attention"].ratio == pytest.approx(1)
    weights = {float(bound.weight_at(0, 1)) for bound in objective.bound}
    assert len(weights) == 1
    values = objective(*batch)
    together = sum(value for name, value in values.items() if name != "loss")
    of_labels = length(F.cross_entropy(student(normal(batch[0])), batch[1]), student)
    assert length(together, student) * weights.pop() == pytest.approx(of_labels, rel=1e-4)


def test_a_ratio_may_be_asked_for_and_change(batch):
    weight = {"ratio": 0.5, "schedule": "warm_up"}
    objective = Objective(
        Small(), [term(loss="kl", weight=weight)], some_data(), teacher_of(Small(5)), num_epochs=4
    )
    assert ratios(objective, *batch, epoch=4, find=True)["kl"].ratio == pytest.approx(0.5)
    half_way = ratios(objective, *batch, epoch=2)["kl"]
    assert half_way.ratio == pytest.approx(0.25) and not half_way.settled
    state = objective.state_dict()
    assert [float(state[key]) for key in state if key.endswith("balanced")] == [
        float(objective.bound[0].balanced)
    ]


class Moving(Small):
    """With statistics and random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def blocks(self):
        (first, one), (second, two) = super().blocks()
        return [(first, one), (second, lambda x: F.dropout(self.norm(two(x)), 0.5, self.training))]


@pytest.mark.parametrize("loss", ["contrastive", "masked_generative", "margin_relu"])
def test_measuring_changes_nothing(batch, loss):
    objective = Objective(
        Moving(), [term(loss="cross_entropy"), term(loss=loss)], some_data(), teacher_of(Small(5))
    )
    objective.train()
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    random = torch.get_rng_state()
    first = ratios(objective, *batch)
    assert ratios(objective, *batch) == first
    assert torch.equal(torch.get_rng_state(), random)
    after = objective.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_without_labels_the_teachers_classes_stand_for_them(batch):
    student, guide = Small(), teacher_of(Small(5))
    images, labels, index = batch
    objective = Objective(student, [term(loss="kl")], some_data(labelled=False), guide)
    taught = guide.network(normal(images)).argmax(1)
    expected = ratios(objective, images, taught, index)
    assert ratios(objective, images, torch.full_like(labels, -1), index) == expected
    partly = labels.clone()
    partly[:3] = -1
    known = ratios(objective, images, partly, index)["kl"].gradient
    of_known = length(F.cross_entropy(student(normal(images))[3:], labels[3:]), student)
    of_all = length(F.cross_entropy(student(normal(images)), taught), student)
    assert known == pytest.approx(expected["kl"].gradient * of_all / of_known, rel=1e-4)


def test_terms_out_of_bounds_are_named_with_the_weight_that_balances_them():
    found = {
        "cross_entropy": Ratio(1, 1, on_labels=True),
        "hint": Ratio(100, 6.32),
        "review": Ratio(1, 0.05),
        "kl": Ratio(0.9, 3),
        "off": Ratio(0, 50),
        "rising": Ratio(0.01, 1, settled=False),
        "dead": Ratio(1, 0.0),
    }
    said = dict(faults(found))
    assert said.keys() == {"hint", "review", "dead"}
    assert "632 times" in said["hint"] and "weight 0.158" in said["hint"] and "drowns" in said["hint"]
    assert "0.05 times" in said["review"] and "weight 20 " in said["review"]
    assert "no gradient" in said["dead"]


def test_terms_without_labels_are_judged_beside_the_first(batch):
    assert not dict(faults({"kl": Ratio(1, 204)}))  # alone, its scale says nothing
    said = dict(
        faults({"kl": Ratio(1, 204), "hint": Ratio(10, 300), "attention": Ratio(1, 4), "dist": Ratio(2, 90)})
    )
    assert said.keys() == {"hint", "attention"}
    assert "14.7 times kl': it drowns kl; weight 0.68 " in said["hint"]
    assert "0.0196 times kl': it hardly counts; weight 51 " in said["attention"]
    assert dict(faults({"kl": Ratio(1, 0.0), "hint": Ratio(1, 1)})).keys() == {"kl"}  # no gradient
    data, guide = some_data(), teacher_of(Small(5))
    terms = [term(loss="kl"), term(loss="cross_entropy")]
    images, labels, index = batch
    found = ratios(Objective(Small(), terms, data, guide), images, labels, index)
    assert {name: ratio.on_labels for name, ratio in found.items()} == {"kl": False, "cross_entropy": True}


def test_a_term_without_a_gradient_is_refused(batch, monkeypatch):
    def kl(student_logits, teacher_logits):
        return (student_logits.detach() - teacher_logits).square().mean()

    monkeypatch.setattr("trainer.losses.kl.kl", kl)
    data, guide = some_data(), teacher_of(Small(5))
    with pytest.raises(Mistake, match="'kl' gives the student no gradient"):
        refuse_without_gradient(Objective(Small(), [term(loss="kl")], data, guide), data)
    refuse_without_gradient(Objective(Small(), [term(loss="kl", weight=0)], data, guide), data)
    refuse_without_gradient(Objective(Small(), [term(loss="hint")], some_data(mixup=0.2), guide), data)
    with pytest.raises(Mistake, match="no weight gives it a ratio"):
        ratios(Objective(Small(), [term(loss="kl", weight="auto")], data, guide), *batch, find=True)


def weigh(rank):
    torch.manual_seed(5)
    images, labels, index = torch.rand(8, 1, 16, 16), torch.randint(4, (8,)), torch.arange(8)
    own = slice(4 * rank, 4 * rank + 4)
    torch.manual_seed(0)
    objective = Objective(
        Small(), [term(loss="relational", gather=True, weight="auto")], some_data(), teacher_of(Small(5))
    )
    found = ratios(objective, images[own], labels[own], index[own], find=True)
    return {"gradient": found["relational"].gradient, "weight": objective.bound[0].balanced}


def test_processes_find_the_weight_of_their_batch_together(tmp_path, batch):
    one, other = in_two(weigh, tmp_path)
    torch.manual_seed(5)
    images, labels, index = torch.rand(8, 1, 16, 16), torch.randint(4, (8,)), torch.arange(8)
    torch.manual_seed(0)
    objective = Objective(
        Small(), [term(loss="relational", gather=True, weight="auto")], some_data(), teacher_of(Small(5))
    )
    ratios(objective, images, labels, index, find=True)
    assert torch.equal(one["weight"], other["weight"]) and one["gradient"] == other["gradient"]
    torch.testing.assert_close(one["weight"], objective.bound[0].balanced, rtol=1e-4, atol=0)
