"""Pairs of maps of one position are left out where a loss is constant on them."""

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from trainer.data.images import Data, InMemory, Part
from trainer.distillation.objective import Objective
from trainer.distillation.teacher import Teacher
from trainer.losses import hint as hints
from trainer.models.lenet5 import lenet5
from trainer.recipe.keys import Augment, TeacherKeys, Term, TermKeys

DATA = Data(
    *(
        "some",
        *[Part(InMemory(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.arange(4) % 3), torch.arange(4))]
        * 3,
    ),
    *(["0", "1", "2"], (0.3,), (0.2,), (1, 28, 28), 4, Augment()),
)


def term(**keys) -> TermKeys:
    return TypeAdapter(Term).validate_python(keys)


def objective(*terms: TermKeys) -> Objective:
    """LeNet-5 has two maps of several positions, and then fc1 and fc2; by itself fc2, the last of its size, is paired."""
    torch.manual_seed(0)
    student, teacher = (lenet5((1, 28, 28), 3, width=width) for width in (2, 3))
    keys = [TeacherKeys(model="lenet5")]
    return Objective(student, list(terms), DATA, Teacher([teacher], keys, DATA.mean, DATA.std))


def layers(found: Objective) -> list[str]:
    return [bound.name for bound in found.bound]


@pytest.mark.parametrize("loss", ["attention", "channel_wise", "neuron_selectivity"])
def test_auto_leaves_them_out(loss):
    found = objective(term(loss=loss))
    assert layers(found) == [f"{loss}/conv1", f"{loss}/conv2"]
    left_out = f"{loss}: fc2 and fc2 are left out: on maps of one position the loss is constant"
    assert found.left_out == [left_out]


@pytest.mark.parametrize(
    "loss", ["hint", "similarity", "factor", "variational", "masked_generative", "margin_relu"]
)
def test_losses_that_learn_there_keep_them(loss):
    found = objective(term(loss=loss))
    assert not found.left_out and layers(found)[-1] == f"{loss}/fc2"


@pytest.mark.parametrize("at", ["last", ["fc1"], {"conv1": "conv1", "fc1": "fc2"}])
def test_naming_one_is_a_mistake(at):
    with pytest.raises(
        ValueError, match="at: loss 'attention' is constant on maps of one position, such as 'fc"
    ):
        objective(term(loss="attention", at=at))


def test_a_loss_that_starts_at_zero_is_not_constant(monkeypatch):
    class zero_at_first(nn.Module):
        def __init__(self, student_map: torch.Size, teacher_map: torch.Size) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
            return (student_map.mean() * self.scale - teacher_map.mean()).square()

    monkeypatch.setattr(hints, "hint", zero_at_first)
    assert not objective(term(loss="hint")).left_out
