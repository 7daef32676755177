"""What every loss promises, over every file of the shelf: one finite number, its gradients, half precision, a naive reference."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.dropped import in_git, lacks
from tests.losses.feeding import (
    OF_STUDENT,
    OF_TEACHER,
    PER_SAMPLE,
    WEIGHT_SHAPES,
    backward,
    build,
    call,
    cases,
    changed,
    fed_maps,
    feed,
    mapped,
    naive,
    parameters,
    reference,
    students,
    tensors,
    words,
)
from trainer.recipe import shelves
from trainer.recipe.terms import VOCABULARY

NAMES = shelves.names("loss")
CASES = cases()
every_loss = pytest.mark.parametrize("name", NAMES)
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case.name}-{sum(other.name == case.name for other in CASES[:number])}")
        for number, case in enumerate(CASES)
    ],
)

# ---- What a loss need not promise, and why.

# More than 0 where student equals teacher.
NOT_ZERO = {
    "hard_label": "a cross entropy, against the teacher's choice",
    "teacher_temperature": "the teacher alone has a temperature",
    "normalized": "a cross entropy",
    "refined": "the labels mend the teacher's mistakes",
    "contrastive": "an estimate with drawn negatives, between two learned embeddings",
    "margin_relu": "the target is the teacher's map with its negative half cut off",
    "activation_boundary": "a margin around the boundary",
    "factor": "a reconstruction of the teacher's map",
    "review": "maps go through a learned fusion",
    "masked_generative": "what is hidden is made by learned convolutions",
    "vit_features": "what is hidden is made by learned convolutions",
    "variational": "a likelihood, with learned variances",
}
# Another value for a batch that is there twice: so many times as large, None where it is another number altogether.
DOUBLED = {
    "similarity": 1 / 2,  # sums over pairs of rows of length 1, which twice as many share
    "probabilistic": 1 / 2,  # the mean of twice as many, half as probable neighbours
    "multi_level": None,  # a sum over pairs; test_logits.py has its scale
    "contrastive": None,  # draws other negatives
}
# Settings without which a loss draws anew for each sample.
NOTHING_DRAWN = {"masked_generative": {"ratio": 0.0}, "vit_features": {"ratio": 0.999}}
# Parameters whose gradient is by design not the slope of the loss.
NOT_THE_SLOPE = {
    "factor": "encoder",  # the teacher's factor is a constant: reconstruction alone teaches it
    "curriculum_temperature": "raw_temperature",  # climbs, with a growing strength
}
# The gradient of an absolute value jumps with its sign.
HALF_GRADIENT = {"factor": 0.1}
# The first batch sets constants, outside of the gradient.
SETTLED = {"contrastive"}
# A module that learns nothing, and remembers what need not be kept.
REMEMBERS = {"weight_distribution"}


@pytest.mark.skipif(in_git("losses") is None, reason="this is a copy, not a checkout")
def test_the_shelf_is_in_git():
    assert {"kl", "hint", "cross_entropy"} <= in_git("losses"), "else no loss would need a naive reference"


def test_something_is_made_up_for_every_word():
    assert set(feed()) == VOCABULARY, "tests/losses/feeding.py makes up something for each word of terms.py"


@every_loss
def test_a_loss_is_documented_and_asks_for_known_words(name):
    function = shelves.find("loss", name)
    first = inspect.cleandoc(function.__doc__).splitlines()[0]
    assert first.endswith((".", ",")) or len(first) > 60
    assert set(words(name)) <= VOCABULARY and students(name), "nothing of the student's is asked for"
    assert not inspect.isclass(function) or build(name).state_dict() or name in REMEMBERS


@every_case
def test_equals_the_naive_reference(case):
    if reference(case.name) is None:
        lacks(
            "losses",
            case.name,
            f"write naive_{case.name}(x, loss, **settings) into a file tests/losses/references_*.py",
        )
    x = feed(case, batch=6)
    loss = build(case, x=x)
    before = copy.deepcopy(loss)
    assert call(case, loss, x).item() == pytest.approx(naive(case, before, x), rel=1e-5)


@every_case
def test_gradient_is_the_derivative(case):
    batch = 2 if fed_maps(case.name) else 6
    x = feed(case, batch, torch.float64)
    fixed = build(case, torch.float64, x)
    if case.name in SETTLED:
        call(case, fixed, x)
        fixed.eval()
    learned = dict(fixed.named_parameters()) if isinstance(fixed, nn.Module) else {}
    not_the_slope = NOT_THE_SLOPE.get(case.name)
    keys = [key for key in learned if not_the_slope is None or not key.startswith(not_the_slope)]
    inputs = tensors(case.name, x)

    def value(*given):
        taken = iter(given)
        moved = {
            word: mapped(lambda _: next(taken), x[word]) for word in words(case.name) if word in OF_STUDENT
        }
        loss = fixed
        if learned:  # a copy: running statistics must not move between the evaluations
            copied, values = copy.deepcopy(fixed), dict(zip(keys, taken))
            loss = lambda *fed: torch.func.functional_call(copied, values, fed)
        return call(case, loss, x | moved)

    given = [tensor.requires_grad_() for tensor in inputs]
    # What computes in float32 whatever it is given is checked with the digits that it has.
    coarse = {} if value(*given).dtype == torch.float64 else {"eps": 1e-2, "atol": 1e-2, "rtol": 1e-2}
    if not fed_maps(case.name):
        assert torch.autograd.gradcheck(value, tuple(given), **coarse)
    assert torch.autograd.gradcheck(
        value, (*given, *(learned[key] for key in keys)), fast_mode=True, **coarse
    )


@every_case
def test_gradient_reaches_the_student_and_what_is_learned_and_not_the_teacher(case):
    x = changed(feed(case), lambda tensor: tensor.requires_grad_())
    loss = build(case, x=x)
    call(case, loss, x).backward()
    assert all(t.grad is not None and t.grad.any() for t in tensors(case.name, x, OF_STUDENT))
    assert all(t.grad is None for t in tensors(case.name, x, OF_TEACHER))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters(loss))


# ---- at the edges


def random(v):
    return v


def constant(v):
    return torch.full_like(v, 0.7)


def dead_column(v):
    return v.clone().index_fill_(1, torch.tensor([0]), 0)


def sign(v):
    return 200 * v.sign()


def large_constant(v):
    return torch.full_like(v, 200.0)


def tiny(v):
    return 1e-20 * v


def one_hot(v):
    codes = 200 * (2 * F.one_hot(torch.arange(len(v)) % v.shape[1], v.shape[1]).float() - 1)
    return codes.view(*codes.shape, *[1] * (v.dim() - 2)).expand(v.shape).clone()


def zero_row(v):
    return v.clone().index_fill_(0, torch.tensor([0]), 0)


def opposite(v):
    return v[:1] * torch.tensor([1.0, -1.0]).repeat(len(v))[: len(v)].view(-1, *[1] * (v.dim() - 1))


def same_columns(v):
    return v[:, :1].expand(v.shape).clone()


def same_rows(v):
    return v[:1].expand(v.shape).clone()


FILLS = (random, torch.zeros_like, constant, zero_row, dead_column, sign, large_constant, one_hot, opposite, same_columns, same_rows)  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3, 6])
@every_case
def test_finite_at_the_edges(case, batch):
    maps = fed_maps(case.name)
    batch = 2 if batch == 3 and not maps else batch
    x = feed(case, batch)
    fresh = build(case, x=x)
    flat = changed(x, lambda tensor: tensor.flatten(1), set(WEIGHT_SHAPES))
    for of_student in (*FILLS, tiny) if maps else FILLS:
        # All pairs of extremes where that is quick; else the teacher's are usual, nothing, or the same as the student's.
        some = {random, torch.zeros_like, of_student}
        for of_teacher in FILLS if batch == 6 and not maps else some:
            given = changed(changed(flat, of_student, OF_STUDENT), of_teacher, OF_TEACHER)
            value, gradients = backward(case, copy.deepcopy(fresh), given)
            title = (of_student.__name__, of_teacher.__name__)
            assert value.isfinite() and value.dtype == torch.float32, title
            for gradient in gradients:
                # Bounded, not merely finite: a normalisation by 1e-12 would pass 1e12 on.
                assert gradient.isfinite().all() and gradient.abs().max() < 1e10, title


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if {"student_map", "projected_map"} & set(words(case.name))],
    ids=lambda c: c.name,
)
def test_one_sample_of_one_position(case):
    x = feed(case, batch=1)
    corner = changed(x, lambda map_: map_[:, :, :1, :1], {"student_map", "teacher_map", "projected_map"})
    value, gradients = backward(case, build(case, x=x), corner)
    assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


# ---- half precision


def close(a, b, fraction):
    return (a.double() - b.double()).norm() <= fraction * b.double().norm()


each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def rounded(x, dtype):
    """Tensors of the student and the teacher in a half precision; the teacher's head stays as it is."""
    return changed(x, lambda tensor: tensor.to(dtype))


@each_half
@every_case
def test_half_precision_is_within_two_percent_of_the_same_numbers_in_double(case, dtype):
    x = feed(case, batch=8)
    half = rounded(x, dtype)
    exact = changed(half, torch.Tensor.double) | {"teacher_head": copy.deepcopy(x["teacher_head"]).double()}
    value, gradients = backward(case, build(case, torch.float64, x), exact)
    half_value, half_gradients = backward(case, build(case, x=x), half)
    assert half_value.dtype == torch.float32 and close(half_value, value, 0.02)
    assert all(close(a, b, 0.02) for a, b in zip(half_gradients, gradients, strict=True))


@each_half
@pytest.mark.parametrize(
    "case", [case for case in CASES if not fed_maps(case.name)], ids=lambda case: case.name
)
def test_autocast_is_within_two_percent(case, dtype):
    x = feed(case, batch=8)
    value, gradients = backward(case, build(case, x=x), x)
    auto, auto_gradients = backward(case, build(case, x=x), x, autocast=dtype)
    assert auto.dtype == torch.float32 and close(auto, value, 0.02)
    assert all(close(a, b, 0.02) for a, b in zip(auto_gradients, gradients, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["direct", "autocast"])
@each_half
@pytest.mark.parametrize("case", [case for case in CASES if fed_maps(case.name)], ids=lambda case: case.name)
def test_maps_in_half_precision_and_large(case, dtype, autocast):
    allowed = HALF_GRADIENT.get(case.name, 0.03)
    for seed in range(12):
        x = feed(case, batch=8, seed=seed)
        if "teacher_map" in words(
            case.name
        ):  # similar, so that what is compared is small next to what is subtracted
            x = changed(x, lambda map_: map_ + 1, {"student_map", "teacher_map"})
        half = rounded(x, dtype)
        value, gradients = backward(case, build(case, x=x), x)
        found, half_gradients = backward(case, build(case, x=x), half, autocast=dtype if autocast else None)
        assert found.dtype == torch.float32 and found.item() == pytest.approx(value.item(), rel=0.02)
        assert call(case, build(case, x=x), changed(half, lambda tensor: 200 * tensor)).isfinite()
        # A response that rounding brings over an edge of the loss makes a gradient jump: not at every draw.
        if all(close(a, b, allowed) for a, b in zip(half_gradients, gradients, strict=True)):
            break
    else:
        pytest.fail("the gradients are apart at every draw")


# ---- batches, and the least value


@every_case
@torch.no_grad()
def test_doubling_the_batch_changes_nothing(case):
    factor = DOUBLED.get(case.name, 1)
    if factor is None:
        pytest.skip("it is another number by design: see DOUBLED")
    x = feed(case)
    loss = build(case, x=x, **NOTHING_DRAWN.get(case.name, {}))
    twice = changed(x, lambda tensor: torch.cat([tensor, tensor]), PER_SAMPLE)
    once = call(case, copy.deepcopy(loss), x).item()
    assert call(case, loss, twice).item() == pytest.approx(factor * once, rel=1e-5 if factor == 1 else 1e-4)


def counterpart(word):
    return "teacher_" + word.partition("_")[2]


EQUAL = [
    case
    for case in CASES
    if all(counterpart(word) in words(case.name) for word in students(case.name))
    and case.name not in NOT_ZERO
    and not case.settings
]


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
@torch.no_grad()
def test_zero_where_student_equals_teacher_and_more_elsewhere(case):
    x = feed(case, dtype=torch.float64)
    equal = x | {"teacher_logits": x["teacher_head"](x["teacher_embedding"])}
    equal |= {word: equal[counterpart(word)] for word in OF_STUDENT}
    loss = build(case, torch.float64, equal)
    for layer in loss.modules() if isinstance(loss, nn.Module) else ():
        if isinstance(layer, nn.Linear):  # a projector of equal widths that changes nothing
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
    assert call(case, loss, equal).item() == pytest.approx(0, abs=1e-6)
    noise = torch.Generator().manual_seed(5)
    for _ in range(5):
        moved = changed(
            equal, lambda t: t + 0.3 * torch.randn(t.shape, generator=noise, dtype=torch.float64), OF_STUDENT
        )
        assert call(case, loss, moved).item() > 1e-5
    if fed_maps(case.name):
        apart = feed(case, dtype=torch.float64, seed=1)
        student = {word: apart[counterpart(word)] for word in OF_STUDENT}
        assert call(case, loss, equal | student).item() > 1e-3


def test_an_exception_is_one_of_the_shelf():
    tables = (NOT_ZERO, DOUBLED, NOTHING_DRAWN, NOT_THE_SLOPE, HALF_GRADIENT, SETTLED, REMEMBERS)
    assert {name for table in tables for name in table} <= set(NAMES)
