"""What single losses on feature maps promise beside the contract."""

import pytest
import torch
from torch import nn

from tests.losses.feeding import NUM_CLASSES, Case, build, call, feed, naive
from trainer.losses.margin_relu import margin_relu
from trainer.losses.vit_features import vit_features


def test_fsp_of_one_pair_is_refused_and_of_equal_widths_has_no_parameters():
    from trainer.losses.fsp import fsp

    shapes = [torch.Size((2, 3, 4, 4)), torch.Size((2, 5, 2, 2))]
    assert not list(fsp(shapes, shapes).parameters())
    with pytest.raises(ValueError, match="1 pair of layers"):
        fsp(shapes[:1], shapes[:1])


def test_fsp_of_wide_maps_that_are_nearly_equal_keeps_its_digits():
    from trainer.losses.fsp import fsp

    torch.manual_seed(0)
    teacher = [torch.rand(4, 256, 2, 2) + 5 for _ in range(2)]
    student = [(t + 1e-3 * torch.randn_like(t)).requires_grad_() for t in teacher]
    shapes = [t.shape for t in teacher]
    loss = fsp(shapes, shapes)(student, teacher)
    gradients = torch.autograd.grad(loss, student)
    exact = [s.detach().double().requires_grad_() for s in student]
    flows = [
        (a.flatten(2) / 4) @ b.flatten(2).transpose(1, 2) for a, b in (exact, [t.double() for t in teacher])
    ]
    expected = (flows[0] - flows[1]).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_fsp_of_wide_maps_with_few_positions_is_the_same_number():
    """There the flows are not made; near the teacher, where what is subtracted nearly cancels, it still holds."""
    from trainer.losses.fsp import fsp

    torch.manual_seed(0)
    teacher = [torch.randn(3, 40, 4, 4), torch.randn(3, 50, 2, 2), torch.randn(3, 64, 1, 1)]
    loss = fsp([x.shape for x in teacher], [x.shape for x in teacher])
    for apart, within in ((1.0, 1e-5), (0.03, 1e-3)):
        student = [(x + apart * torch.randn_like(x)).requires_grad_() for x in teacher]
        double = [x.detach().double().requires_grad_() for x in student]
        flows = [
            [
                shallow.flatten(2) @ deep.flatten(2).transpose(1, 2) / deep[0, 0].numel()
                for shallow, deep in (
                    (nn.functional.adaptive_avg_pool2d(a, b.shape[2:]), b) for a, b in zip(maps, maps[1:])
                )
            ]
            for maps in (double, [x.double() for x in teacher])
        ]
        expected = sum((ours - theirs).square().mean() for ours, theirs in zip(*flows))
        value = loss(student, teacher)
        assert value.item() == pytest.approx(expected.item(), rel=within)
        gradients, wanted = torch.autograd.grad(value, student), torch.autograd.grad(expected, double)
        for gradient, want in zip(gradients, wanted):
            assert (gradient - want).norm() <= within * want.norm()


def test_margin_is_the_mean_of_all_negative_responses_so_far():
    torch.manual_seed(0)
    loss = margin_relu(torch.Size((2, 3, 4, 4)), torch.Size((2, 2, 4, 4)))
    batches = [torch.randn(size, 2, 4, 4) for size in (2, 5, 3)]
    for teacher in batches:
        loss(torch.randn(len(teacher), 3, 4, 4), teacher)
    seen = torch.cat(batches).double()
    expected = [seen[:, c][seen[:, c] < 0].mean().item() for c in range(2)]
    assert loss.margin.tolist() == pytest.approx(expected, rel=1e-5)
    kept = margin_relu(torch.Size((2, 3, 4, 4)), torch.Size((2, 2, 4, 4)))
    kept.load_state_dict(loss.state_dict())
    kept.eval()(torch.randn(2, 3, 4, 4), -5 * torch.ones(2, 2, 4, 4))
    assert kept.margin.tolist() == loss.margin.tolist()  # evaluation does not move it


def unconnected(name, **settings):
    """A loss on two maps of one size whose connector changes nothing, and the teacher's map."""
    teacher = feed()["teacher_map"]
    loss = build(name, x={"student_map": teacher, "teacher_map": teacher}, **settings)
    loss.connector = nn.Identity()
    return loss, teacher


def test_margin_relu_after_a_relu_lets_the_student_be_negative_where_the_teacher_is_silent():
    loss, teacher = unconnected("margin_relu")
    active = teacher.relu()
    assert loss(teacher, active) == 0 and not loss.margin.any()
    assert loss(-active, active).item() == pytest.approx(4 * active.square().mean().item())
    silent = torch.zeros_like(active)
    assert loss(active, silent).item() == pytest.approx(active.square().mean().item())


def test_activation_boundary_costs_nothing_beyond_the_margin():
    loss, teacher = unconnected("activation_boundary", margin=0.8)
    signs = teacher.sign()
    assert loss(0.9 * signs, teacher) == 0
    assert loss(0.5 * signs, teacher).item() == pytest.approx(0.3**2)
    assert loss(-signs, teacher).item() == pytest.approx(1.8**2)


def test_factor_trains_the_paraphraser_by_reconstruction_alone():
    loss = build("factor")
    encoder = list(loss.encoder.parameters())
    loss.reconstruction_weight = 0.0
    value = call("factor", loss, feed())
    gradients = torch.autograd.grad(value, encoder + list(loss.translator.parameters()))
    assert not any(gradient.any() for gradient in gradients[: len(encoder)])
    assert all(gradient.any() for gradient in gradients[len(encoder) :])


def test_variational_starts_at_its_variance():
    from trainer.losses.variational import variational

    shape = torch.Size((2, 3, 4, 4))
    for variance in (0.01, 5.0, 300.0):
        start = variational(shape, shape, init_variance=variance).raw_variance
        assert (nn.functional.softplus(start) + 1e-5).tolist() == pytest.approx([variance] * 3, rel=1e-4)
    with pytest.raises(ValueError, match="init_variance: got 1e-06"):
        variational(shape, shape, init_variance=1e-6)


@torch.no_grad()
def test_variational_has_a_least_variance():
    loss, x = build("variational"), feed()
    loss.raw_variance.fill_(-100)
    value = call("variational", loss, x).item()
    assert value == pytest.approx(naive(Case("variational"), loss, x), rel=1e-5)


def test_one_for_all_labels():
    loss, x = build("one_for_all", temperature=2.0), feed()

    def value(labels):
        return call("one_for_all", loss, x | {"labels": labels})

    ids = value(x["labels"])
    assert value(0.9 * nn.functional.one_hot(x["labels"], NUM_CLASSES) + 0.02).item() == ids.item()
    unlabelled = torch.full_like(x["labels"], -1)
    assert value(unlabelled).isfinite() and value(unlabelled) != ids
    loss.gamma = 1.0  # soft cross entropy, whatever the label
    assert value(x["labels"]).item() == pytest.approx(value(unlabelled).item())


def test_vit_features_replaces_the_same_number_of_positions_in_each_sample():
    loss = build("vit_features")
    maps = torch.zeros(50, 3, 4, 5)
    hidden = loss._hidden(maps)
    assert hidden.flatten(1).sum(1).tolist() == [10] * 50
    assert hidden.float().mean(0).min() > 0.2 and hidden.float().mean(0).max() < 0.8
    assert loss._hidden(torch.zeros(2, 3, 1, 1)).all()  # at least one


def test_vit_features_of_one_pair_is_refused():
    shapes = [torch.Size((2, 3, 4, 4))]
    with pytest.raises(ValueError, match="1 pair of layers"):
        vit_features(shapes, shapes)
