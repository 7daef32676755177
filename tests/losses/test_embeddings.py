"""What single losses on embeddings and weights promise beside the contract."""

import copy

import pytest
import torch
from torch import nn

from tests.losses.feeding import NUM_CLASSES, STUDENT_WIDTH, TEACHER_WIDTH, Case, backward, build, call, feed
from tests.losses.numbers_in_lists import affine, norm
from trainer.networks.features import head
from trainer.recipe import shelves


@pytest.mark.parametrize(
    ("name", "batch"),
    [("relational", 1), ("relational", 2), ("probabilistic", 1), ("correlation", 1)],
)
def test_a_batch_without_pairs_has_nothing_to_say(name, batch):
    value, [gradient] = backward(Case(name), build(name), feed(batch=batch))
    assert value == pytest.approx(0, abs=1e-10) and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("power", [-45, -30, -20, -19, -18, -10])
def test_relational_has_a_gradient_for_the_smallest_embeddings(power):
    x = feed()
    x["student_embedding"] = (10.0**power * torch.randn(6, STUDENT_WIDTH)).requires_grad_()
    call("relational", build("relational"), x).backward()
    assert x["student_embedding"].grad.isfinite().all()


def test_contrastive_bank_changes_at_the_batchs_rows_only_and_is_checkpointed():
    x = feed()
    loss = build("contrastive")
    before = copy.deepcopy(loss.state_dict())
    call("contrastive", loss, x)
    for bank, embed, key in (
        ("student_bank", loss.embed_student, "student_embedding"),
        ("teacher_bank", loss.embed_teacher, "teacher_embedding"),
    ):
        old, new = before[bank], loss.state_dict()[bank]
        changed = (old != new).any(dim=1).nonzero().flatten().tolist()
        assert changed == sorted(x["index"].tolist())
        for row, i in zip(x[key].tolist(), x["index"].tolist(), strict=True):
            unit = affine(embed, row)
            entry = [0.5 * o + 0.5 * u / norm(unit) for o, u in zip(old[i].tolist(), unit, strict=True)]
            assert new[i].tolist() == pytest.approx([v / norm(entry) for v in entry], rel=1e-4, abs=1e-6)

    constants = loss.log_constants.clone()
    other = build("contrastive")
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    y = feed(seed=9)
    assert call("contrastive", other, y) == call("contrastive", loss, y)
    assert all(torch.equal(v, other.state_dict()[key]) for key, v in loss.state_dict().items())
    assert loss.num_updates == 2 and torch.equal(loss.log_constants, constants)
    kept = copy.deepcopy(loss.state_dict())
    loss.eval()
    call("contrastive", loss, y)
    assert all(torch.equal(v, kept[key]) for key, v in loss.state_dict().items())


def test_contrastive_keeps_the_last_of_a_sample_that_comes_twice():
    x = feed() | {"index": torch.tensor([3, 8, 3, 5, 8, 3])}
    loss, single = build("contrastive"), build("contrastive")
    call("contrastive", loss, x)
    per_sample = ("index", "student_embedding", "teacher_embedding")
    call("contrastive", single, x | {key: x[key][3:] for key in per_sample})
    assert torch.allclose(loss.student_bank, single.student_bank, atol=1e-6)
    assert torch.allclose(loss.teacher_bank, single.teacher_bank, atol=1e-6)


def test_contrastive_counts_its_negatives():
    make = shelves.find("loss", "contrastive")
    size = torch.Size((2, 3))
    assert make(size, size, 50).num_negatives == 49
    assert make(size, size, 20000, dim=2).num_negatives == 16384
    with pytest.raises(ValueError, match="num_negatives: got 50; .* at most 49"):
        make(size, size, 50, num_negatives=50)
    with pytest.raises(ValueError, match="at least 2"):
        make(size, size, 1)


class Small(nn.Module):
    def __init__(self, classifier):
        super().__init__()
        self.body = nn.Linear(10, STUDENT_WIDTH)
        self.classifier = classifier

    def forward(self, x):
        return self.classifier(self.body(x).relu())


@pytest.mark.parametrize("bias", [True, False])
def test_reuse_classifier_folds_into_the_students_own(bias):
    student, teacher_head = (
        Small(nn.Linear(STUDENT_WIDTH, NUM_CLASSES)),
        nn.Linear(TEACHER_WIDTH, NUM_CLASSES, bias=bias),
    )
    loss = build("reuse_classifier")
    images = torch.randn(6, 10)
    shapes = {key: v.shape for key, v in student.state_dict().items()}
    loss.finish(student, teacher_head)
    expected = teacher_head(loss.projector(student.body(images).relu()))
    torch.testing.assert_close(student(images), expected, rtol=1e-5, atol=1e-5)
    assert {key: v.shape for key, v in student.state_dict().items()} == shapes
    assert head(student).weight.requires_grad


@pytest.mark.parametrize(
    ("classifier", "teacher_head", "message"),
    [
        (
            nn.Linear(STUDENT_WIDTH, NUM_CLASSES),
            nn.Sequential(nn.Linear(TEACHER_WIDTH, NUM_CLASSES)),
            "is a Sequential",
        ),
        (
            nn.Linear(STUDENT_WIDTH, NUM_CLASSES, bias=False),
            nn.Linear(TEACHER_WIDTH, NUM_CLASSES),
            "with a bias",
        ),
        (
            nn.utils.parametrizations.orthogonal(nn.Linear(STUDENT_WIDTH, NUM_CLASSES)),
            nn.Linear(TEACHER_WIDTH, NUM_CLASSES),
            "plain",
        ),
        (
            nn.Linear(STUDENT_WIDTH, NUM_CLASSES + 1),
            nn.Linear(TEACHER_WIDTH, NUM_CLASSES),
            r"has weights \(6, 7\)",
        ),
    ],
)
def test_reuse_classifier_says_what_does_not_fold(classifier, teacher_head, message):
    with pytest.raises(ValueError, match=f"reuse_classifier: .*{message}"):
        build("reuse_classifier").finish(Small(classifier), teacher_head)


def test_weight_distribution_compares_shapes_only():
    x = feed(dtype=torch.float64)
    value = call("weight_distribution", build("weight_distribution"), x)
    x["student_weight"] = 0.01 * x["student_weight"].flip(0).reshape(-1) + 7
    assert call("weight_distribution", build("weight_distribution"), x).item() == pytest.approx(value.item())
    x["student_weight"].requires_grad_()
    call("weight_distribution", build("weight_distribution", num_quantiles=5), x).backward()
    assert (x["student_weight"].grad != 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 2.0**-70, 1e15, 1e30])
def test_weight_distribution_does_not_depend_on_the_scale(scale):
    """Squares of such numbers leave float32: the gradient of weights near 1e-20 was NaN."""
    student, teacher = torch.randn(6, 5), torch.randn(7, 4)
    expected = build("weight_distribution")(student, teacher)
    scaled = (student * scale).requires_grad_()
    value = build("weight_distribution")(scaled, teacher * scale)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-7)
    value.backward()
    assert torch.isfinite(scaled.grad).all() and scaled.grad.any()


def test_weight_distribution_knows_a_changed_teacher():
    x = feed()
    loss = build("weight_distribution")
    first = call("weight_distribution", loss, x)
    assert call("weight_distribution", loss, x) == first
    x["teacher_weight"][0] = 100
    changed = call("weight_distribution", loss, x)
    assert changed == call("weight_distribution", build("weight_distribution"), x) != first
    x["teacher_weight"] = x["teacher_weight"].clone()
    assert call("weight_distribution", loss, x) == changed


def test_constant_weights_have_a_gradient_of_an_ordinary_size():
    x = feed() | {"student_weight": torch.full((50,), 0.1), "teacher_weight": torch.full((1,), 0.3)}
    value, [gradient] = backward(Case("weight_distribution"), build("weight_distribution"), x)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 1e3
