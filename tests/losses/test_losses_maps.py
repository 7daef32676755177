"""Losses on feature maps, and the projectors: against naive references, at the edges, in half precision."""

import copy
import importlib
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from trainer.losses.margin_relu import margin_relu
from trainer.losses.similarity import similarity
from trainer.projectors import ConvNorm, EmbeddingProjector, MapProjector
from trainer.tensors import same_size, unit_length

NUM_CLASSES = 4
STUDENT, TEACHER = (3, 6, 5), (5, 4, 7)
STUDENTS, TEACHERS = [(3, 9, 8), (4, 6, 6), (6, 2, 3)], [(5, 7, 8), (4, 6, 3), (7, 3, 2)]
# What each loss is fed, and the settings it is tried with.
CASES = {
    "hint": ("projected", {}),
    "attention": ("map", {}),
    "attention-power3": ("map", {"power": 3.0}),
    "neuron_selectivity": ("map", {}),
    "neuron_selectivity-wide": ("wide", {}),
    "similarity": ("map", {}),
    "fsp": ("maps", {}),
    "margin_relu": ("map", {}),
    "activation_boundary": ("map", {"margin": 0.8}),
    "factor": ("map", {}),
    "review": ("maps", {}),
    "masked_generative": ("map", {}),
    "masked_generative-positions": ("map", {"masked": "positions", "ratio": 0.65}),
    "channel_wise": ("projected", {}),
    "variational": ("map", {}),
    "one_for_all": ("logits", {"temperature": 2.0}),
}
PLAIN = ["hint", "attention", "neuron_selectivity", "neuron_selectivity-wide", "similarity", "channel_wise"]
LEARNED = [case for case in CASES if case not in PLAIN and case != "attention-power3"]
every_case = pytest.mark.parametrize("case", CASES)


class Fed:
    """A loss with its inputs: `student` and `teacher` are lists of tensors, `value()` calls it."""

    def __init__(self, case: str, batch: int = 3, dtype: torch.dtype = torch.float32, same: bool = False):
        torch.manual_seed(7)
        self.kind, settings = CASES[case]
        name = case.split("-")[0]
        student, teacher = {
            "projected": ([TEACHER], [TEACHER]),
            "map": ([STUDENT], [TEACHER]),
            "wide": ([(9, 2, 3)], [(12, 3, 2)]),
            "maps": (STUDENTS, TEACHERS),
            "logits": ([STUDENT], [(NUM_CLASSES,)]),
        }[self.kind]
        if same:
            student = teacher
        self.student = [torch.randn(batch, *shape, dtype=dtype) for shape in student]
        self.teacher = [torch.randn(batch, *shape, dtype=dtype) for shape in teacher]
        self.labels = torch.arange(batch) % NUM_CLASSES
        method = getattr(importlib.import_module(f"trainer.losses.{name}"), name)
        self.learned = isinstance(method, type)
        if self.learned:
            shapes = {
                "maps": [[map_.shape for map_ in self.student], [map_.shape for map_ in self.teacher]],
                "logits": [self.student[0].shape, NUM_CLASSES],
            }.get(self.kind, [self.student[0].shape, self.teacher[0].shape])
            self.loss = method(*shapes, **settings).to(dtype)
            with torch.no_grad():
                for parameter in self.loss.parameters():  # away from ones, zeros and equal channels
                    parameter += 0.1 * torch.randn_like(parameter)
        else:
            self.loss = lambda *inputs: method(*inputs, **settings)
        self.settings = settings

    def value(self, student: list | None = None, teacher: list | None = None) -> torch.Tensor:
        student, teacher = student or self.student, teacher or self.teacher
        torch.manual_seed(3)
        if self.kind == "maps":
            return self.loss(student, teacher)
        if self.kind == "logits":
            return self.loss(student[0], teacher[0], self.labels)
        return self.loss(student[0], teacher[0])

    def backward(
        self, student: list | None = None, teacher: list | None = None, autocast: torch.dtype | None = None
    ) -> tuple[torch.Tensor, list]:
        """The value, and the gradients of the student's maps and then of the loss's own parameters."""
        student = [map_.detach().requires_grad_() for map_ in student or self.student]
        parameters = list(self.loss.parameters()) if self.learned else []
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            value = self.value(student, teacher)
        return value.detach(), list(torch.autograd.grad(value, student + parameters))


# Naive references: float64, elementary operations, one sample and one channel at a time.


def pooled(x, size):
    rows, columns = x.shape[2:]
    out = torch.empty(*x.shape[:2], *size, dtype=x.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            top, bottom = i * rows // size[0], -(-(i + 1) * rows // size[0])
            left, right = j * columns // size[1], -(-(j + 1) * columns // size[1])
            patch = x[:, :, top:bottom, left:right]
            out[:, :, i, j] = patch.sum((2, 3)) / ((bottom - top) * (right - left))
    return out


def one_size(a, b):
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return pooled(a, size), pooled(b, size)


def convolved(x, conv):
    kernel = conv.weight.shape[2]
    edge = kernel // 2
    rows, columns = x.shape[2:]
    padded = torch.zeros(*x.shape[:2], rows + 2 * edge, columns + 2 * edge, dtype=x.dtype)
    padded[:, :, edge : edge + rows, edge : edge + columns] = x
    out = torch.zeros(len(x), len(conv.weight), rows, columns, dtype=x.dtype)
    for o in range(len(conv.weight)):
        for i in range(x.shape[1]):
            for dy in range(kernel):
                for dx in range(kernel):
                    out[:, o] += conv.weight[o, i, dy, dx] * padded[:, i, dy : dy + rows, dx : dx + columns]
        if conv.bias is not None:
            out[:, o] += conv.bias[o]
    return out


def run(layers, x):
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = convolved(x, layer)
        elif isinstance(layer, nn.LeakyReLU):
            x = torch.where(x > 0, x, 0.1 * x)
        elif isinstance(layer, nn.ReLU):
            x = torch.where(x > 0, x, 0.0)
        elif isinstance(layer, nn.BatchNorm2d):
            x = x.clone()
            for c in range(x.shape[1]):
                centred = x[:, c] - x[:, c].mean()
                deviation = (centred.square().mean() + 1e-5).sqrt()
                x[:, c] = centred / deviation * layer.weight[c] + layer.bias[c]
        elif isinstance(layer, ConvNorm):
            x = run([layer.conv, layer.norm], x)
        elif isinstance(layer, MapProjector):
            x = run([layer.conv], x)
        else:
            assert isinstance(layer, nn.Identity)
    return x


def mean_square(a, b):
    assert a.shape == b.shape
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    return sum((x - y) ** 2 for x, y in pairs) / a.numel()


def softmax(row, temperature):
    powers = [math.exp(x / temperature) for x in row.tolist()]
    return [power / sum(powers) for power in powers]


def naive_hint(fed, s, t):
    return mean_square(s[0], t[0])


def naive_attention(fed, s, t):
    power = fed.settings.get("power", 2.0)
    total = 0.0
    a, b = one_size(s[0], t[0])
    for x, y in zip(a, b, strict=True):
        looks = []
        for map_ in (x, y):
            look = sum(channel.abs() ** power for channel in map_) / len(map_)
            looks.append(look / (look**2).sum().sqrt())
        total += mean_square(*looks)
    return total / len(a)


def naive_neuron_selectivity(fed, s, t):
    a, b = one_size(s[0], t[0])
    total = 0.0
    for x, y in zip(a, b, strict=True):
        x = [c.flatten() / (c**2).sum().sqrt() for c in x]
        y = [c.flatten() / (c**2).sum().sqrt() for c in y]
        for first, second, sign in ((x, x, 1), (y, y, 1), (x, y, -2)):
            kernels = [((p * q).sum() ** 2).item() for p in first for q in second]
            total += sign * sum(kernels) / len(kernels)
    return total / len(a)


def naive_similarity(fed, s, t):
    rows = []
    for map_ in (s[0], t[0]):
        likeness = torch.tensor([[(x * y).sum() for y in map_] for x in map_], dtype=torch.float64)
        rows.append(torch.stack([row / (row**2).sum().sqrt() for row in likeness]))
    return ((rows[0] - rows[1]) ** 2).sum().item() / len(s[0]) ** 2


def naive_fsp(fed, s, t):
    s = [run([project], x) for project, x in zip(fed.loss.projectors, s, strict=True)]
    flows = []
    for maps in (s, t):
        flows.append([])
        for a, b in pairwise(maps):
            a, b = one_size(a, b)
            flows[-1].append(
                torch.tensor(
                    [[[(x * y).mean() for y in two] for x in one] for one, two in zip(a, b, strict=True)]
                )
            )
    return sum(mean_square(a, b) for a, b in zip(*flows, strict=True))


def naive_margin_relu(fed, s, t):
    x = run([fed.loss.connector], s[0])
    margins = [[v for v in t[0][:, c].flatten().tolist() if v < 0] for c in range(t[0].shape[1])]
    x, y = one_size(x, t[0])
    total = 0.0
    for c, negative in enumerate(margins):
        margin = sum(negative) / len(negative)
        for a, b in zip(x[:, c].flatten().tolist(), y[:, c].flatten().tolist(), strict=True):
            target = max(b, margin)
            total += 0.0 if target <= 0 and a <= target else (a - target) ** 2
    return total / x.numel()


def naive_activation_boundary(fed, s, t):
    x, y = one_size(run([fed.loss.connector], s[0]), t[0])
    margin, total = fed.settings["margin"], 0.0
    for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        total += (a + margin) ** 2 * (a > -margin and b <= 0) + (a - margin) ** 2 * (a <= margin and b > 0)
    return total / x.numel()


def naive_factor(fed, s, t):
    x, y = one_size(s[0], t[0])
    code, ours = run(fed.loss.encoder, y), run(fed.loss.translator, x)
    assert code.shape[1] == 2  # half of 5 channels, to the even number
    total = 0.0
    for a, b in zip(ours, code, strict=True):
        total += (a / (a**2).sum().sqrt() - b / (b**2).sum().sqrt()).abs().mean().item()
    return total / len(x) + 0.002 * mean_square(run(fed.loss.decoder, code), y)


def naive_review(fed, s, t):
    loss, below, total = fed.loss, None, 0.0
    for level in (2, 1, 0):
        x = run([loss.narrow[level]], s[level])
        if below is not None:
            rows, columns = x.shape[2:]
            at_row = [i * below.shape[2] // rows for i in range(rows)]
            at_column = [j * below.shape[3] // columns for j in range(columns)]
            below = below[:, :, at_row][:, :, :, at_column]
            shares = 1 / (1 + torch.exp(-run([loss.attend[level]], torch.cat([x, below], 1))))
            x = torch.stack(
                [x[:, c] * shares[:, 0] + below[:, c] * shares[:, 1] for c in range(x.shape[1])], 1
            )
        below = x
        x, y = one_size(x, t[level])
        x = run([loss.widen[level]], x)
        terms = [(1.0, mean_square(x, y))]
        for size in (4, 2, 1):
            if size < max(x.shape[2:]):
                both = (min(size, x.shape[2]), min(size, x.shape[3]))
                terms.append((terms[-1][0] / 2, mean_square(pooled(x, both), pooled(y, both))))
        total += sum(weight * term for weight, term in terms) / sum(weight for weight, _ in terms)
    return total


def naive_masked_generative(fed, s, t):
    x, y = one_size(run([fed.loss.project], s[0]), t[0])
    torch.manual_seed(3)
    channels = fed.settings.get("masked", "channels") == "channels"
    hidden = torch.rand((*x.shape[:2], 1, 1) if channels else (len(x), 1, *x.shape[2:])) < fed.loss.ratio
    assert 0 < hidden.sum() < hidden.numel()
    return mean_square(run(fed.loss.generate, torch.where(hidden, 0.0, x)), y)


def naive_channel_wise(fed, s, t):
    total = 0.0
    for x, y in zip(s[0].flatten(0, 1), t[0].flatten(0, 1), strict=True):
        q, p = softmax(x.flatten(), 4.0), softmax(y.flatten(), 4.0)
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return total / (s[0].shape[0] * s[0].shape[1]) * 16


def naive_variational(fed, s, t):
    x, y = one_size(s[0], t[0])
    x, total = run(fed.loss.regressor, x), 0.0
    for c, raw in enumerate(fed.loss.raw_variance.tolist()):
        variance = math.log(1 + math.exp(raw)) + 1e-5
        total += (((x[:, c] - y[:, c]) ** 2 / variance + math.log(variance)) / 2).sum().item()
    return total / y.numel()


def naive_one_for_all(fed, s, t):
    hidden = run([fed.loss.conv, nn.ReLU()], s[0]).mean((2, 3))
    total = 0.0
    for x, teacher, label in zip(hidden, t[0], fed.labels.tolist(), strict=True):
        logits = (fed.loss.linear.weight * x).sum(1) + fed.loss.linear.bias
        q, p = softmax(logits, 2.0), softmax(teacher, 2.0)
        for k in range(NUM_CLASSES):
            true = float(k == label)
            total -= ((p[k] + true) ** 1.5 - true) * math.log(q[k])
    return total / len(hidden)


@every_case
@torch.no_grad()
def test_value_is_the_naive_reference(case):
    fed = Fed(case)
    value = fed.value().item()
    if fed.learned:
        fed.loss.double()
    student, teacher = [x.double() for x in fed.student], [x.double() for x in fed.teacher]
    reference = float(globals()["naive_" + case.split("-")[0]](fed, student, teacher))
    assert value == pytest.approx(reference, rel=1e-5)


@every_case
def test_gradcheck(case):
    fed = Fed(case, batch=2, dtype=torch.float64)
    fixed = fed.loss
    parameters = dict(fixed.named_parameters()) if fed.learned else {}
    # The teacher's factor is a constant by design, so the encoder's gradient is not the loss's slope.
    names = [name for name in parameters if not (case == "factor" and name.startswith("encoder"))]

    def value(*inputs):
        student, changed = list(inputs[: len(fed.student)]), dict(zip(names, inputs[len(fed.student) :]))
        if fed.learned:  # a copy: running statistics must not move between the evaluations
            loss = copy.deepcopy(fixed)
            fed.loss = lambda *maps: torch.func.functional_call(loss, changed, maps)
        return fed.value(student)

    inputs = [map_.requires_grad_() for map_ in fed.student] + [parameters[name] for name in names]
    assert torch.autograd.gradcheck(value, tuple(inputs), fast_mode=True)


def fills(x: torch.Tensor) -> dict[str, torch.Tensor]:
    first_zero, dead_channel = x.clone(), x.clone()
    first_zero[0] = 0
    dead_channel[:, 0] = 0
    return {
        "random": x,
        "zero": torch.zeros_like(x),
        "constant": torch.full_like(x, 0.7),
        "first zero": first_zero,
        "dead channel": dead_channel,
        "large": 200 * x.sign(),
        "large constant": torch.full_like(x, 200.0),
        "tiny": 1e-20 * x,
    }


@pytest.mark.parametrize("batch", [1, 3])
@every_case
def test_finite_at_the_edges(case, batch):
    for student_fill in fills(torch.ones(1, 1)):
        for teacher_fill in {"random", "zero", student_fill}:
            fed = Fed(case, batch)
            student = [fills(x)[student_fill] for x in fed.student]
            teacher = [fills(x)[teacher_fill] for x in fed.teacher]
            value, gradients = fed.backward(student, teacher)
            assert value.isfinite() and value.dtype == torch.float32, (student_fill, teacher_fill)
            for gradient in gradients:
                # Bounded, not merely finite: a normalisation by 1e-12 would pass 1e12 on.
                assert gradient.abs().max() < 1e10, (student_fill, teacher_fill)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] != "maps"])
def test_one_sample_of_one_position(case):
    fed = Fed(case, batch=1)
    corner = [[x[:, :, :1, :1] if x.dim() == 4 else x for x in maps] for maps in (fed.student, fed.teacher)]
    value, gradients = fed.backward(*corner)
    assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("autocast", [False, True], ids=["direct", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@every_case
def test_half_precision(case, dtype, autocast):
    fed = Fed(case, batch=8)
    if fed.kind == "map":  # similar, so that what is compared is small next to what is subtracted
        fed.student[0] = fed.student[0] + 1
        fed.teacher[0] = fed.teacher[0] + 1
    before = copy.deepcopy(fed.loss)
    value, gradients = fed.backward()
    fed.loss = before
    inputs = [[x.to(dtype) for x in maps] for maps in (fed.student, fed.teacher)]
    half, half_gradients = fed.backward(*inputs, autocast=dtype if autocast else None)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(value.item(), rel=0.02)
    allowed = 0.1 if case == "factor" else 0.03  # the gradient of an absolute value jumps with its sign
    for gradient, half_gradient in zip(gradients, half_gradients, strict=True):
        assert (gradient - half_gradient.float()).norm() <= allowed * gradient.norm()
    large = fed.value(*([200 * x for x in maps] for maps in inputs))
    assert large.isfinite()


@every_case
def test_nothing_flows_to_the_teacher(case):
    fed = Fed(case)
    for map_ in fed.student + fed.teacher:
        map_.requires_grad_()
    fed.value().backward()
    assert all(map_.grad is not None and map_.grad.any() for map_ in fed.student)
    assert all(map_.grad is None for map_ in fed.teacher)


@pytest.mark.parametrize("case", [case for case in CASES if case != "similarity"])
@torch.no_grad()
def test_doubling_the_batch_changes_nothing(case):
    fed = Fed(case)
    if case.startswith("masked_generative"):
        fed.loss.ratio = 0.0  # the mask is drawn anew for every sample
    once = fed.value()
    fed.labels = torch.cat([fed.labels, fed.labels])
    twice = fed.value([torch.cat([x, x]) for x in fed.student], [torch.cat([x, x]) for x in fed.teacher])
    assert twice.item() == pytest.approx(once.item(), rel=1e-5)


@pytest.mark.parametrize("case", [*PLAIN, "fsp"])
@torch.no_grad()
def test_least_where_student_equals_teacher(case):
    fed = Fed(case, same=True)
    assert fed.value(fed.teacher).item() == pytest.approx(0, abs=1e-6)
    assert fed.value().item() > 1e-3


@pytest.mark.parametrize("case", LEARNED)
def test_every_parameter_learns(case):
    fed = Fed(case)
    assert list(fed.loss.parameters())
    _, gradients = fed.backward()
    assert all(gradient.any() for gradient in gradients)


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


def test_margin_relu_after_a_relu_lets_the_student_be_negative_where_the_teacher_is_silent():
    fed = Fed("margin_relu", same=True)
    fed.loss.connector = nn.Identity()
    active = fed.teacher[0].relu()
    assert fed.value([fed.teacher[0]], [active]) == 0 and not fed.loss.margin.any()
    assert fed.value([-active], [active]).item() == pytest.approx(4 * active.square().mean().item())
    silent = torch.zeros_like(active)
    assert fed.value([active], [silent]).item() == pytest.approx(active.square().mean().item())


def test_activation_boundary_costs_nothing_beyond_the_margin():
    fed = Fed("activation_boundary", same=True)
    fed.loss.connector = nn.Identity()
    signs = fed.teacher[0].sign()
    assert fed.value([0.9 * signs]) == 0
    assert fed.value([0.5 * signs]).item() == pytest.approx(0.3**2)
    assert fed.value([-signs]).item() == pytest.approx(1.8**2)


def test_factor_trains_the_paraphraser_by_reconstruction_alone():
    fed = Fed("factor")
    encoder = list(fed.loss.encoder.parameters())
    fed.loss.reconstruction_weight = 0.0
    gradients = torch.autograd.grad(fed.value(), encoder + list(fed.loss.translator.parameters()))
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
    fed = Fed("variational")
    fed.loss.raw_variance.fill_(-100)
    value = fed.value().item()
    fed.loss.double()
    reference = naive_variational(fed, [fed.student[0].double()], [fed.teacher[0].double()])
    assert value == pytest.approx(reference, rel=1e-5)


def test_one_for_all_labels():
    fed = Fed("one_for_all")
    ids = fed.value()
    labels = fed.labels
    fed.labels = 0.9 * nn.functional.one_hot(labels, NUM_CLASSES) + 0.025
    assert fed.value().item() == ids.item()
    fed.labels = torch.full_like(labels, -1)
    assert fed.value().isfinite() and fed.value() != ids
    fed.loss.gamma = 1.0
    unlabelled = fed.value()
    fed.labels = labels
    assert fed.value().item() == pytest.approx(unlabelled.item())  # soft cross entropy, whatever the label


def test_same_size():
    a, b = torch.randn(2, 3, 7, 4), torch.randn(2, 5, 4, 6)
    ours, theirs = same_size(a, b)
    expected = one_size(a.double(), b.double())
    assert ours.shape == (2, 3, 4, 4) and theirs.shape == (2, 5, 4, 4)
    torch.testing.assert_close((ours, theirs), tuple(x.float() for x in expected))
    assert same_size(a, a)[0] is a


def test_unit_length():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], requires_grad=True)
    y = unit_length(x)
    y.sum().backward()
    assert y[0].tolist() == pytest.approx([0.6, 0.8]) and not y[1].any()
    assert x.grad.abs().max() <= 1


def test_projectors():
    assert MapProjector(3, 5)(torch.randn(2, 3, 4, 6)).shape == (2, 5, 4, 6)
    assert EmbeddingProjector(3, 5)(torch.randn(2, 3)).shape == (2, 5)


def test_conv_norm_of_a_single_value_uses_the_running_statistics():
    layer = ConvNorm(3, 2)
    layer(torch.randn(4, 3, 5, 5))
    mean = layer.norm.running_mean.clone()
    x = torch.randn(1, 3, 1, 1)
    in_training = layer(x)
    assert torch.equal(layer.norm.running_mean, mean)
    torch.testing.assert_close(in_training, layer.eval()(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()


def gathered_inputs():
    torch.manual_seed(5)
    return Net(), torch.randn(8, 2, 6, 6), torch.randn(8, 4, 3, 3)


def gathered_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net, images, teacher = gathered_inputs()
    mine = slice(0, 3) if rank == 0 else slice(3, 8)
    similarity(net(images[mine]), teacher[mine], gather=True).backward()
    for parameter in net.parameters():  # the mean over processes, which is what DDP gives
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= 2
    overhaul = margin_relu(torch.Size((1, 4, 3, 3)), torch.Size((1, 4, 3, 3)))
    overhaul(teacher[mine], teacher[mine])
    torch.save((net.conv.weight.grad, net.conv.bias.grad, overhaul.margin), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_see_the_pairs_of_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(gathered_process, (str(tmp_path),), nprocs=2)
    net, images, teacher = gathered_inputs()
    similarity(net(images), teacher).backward()
    margin = [teacher[:, c][teacher[:, c] < 0].mean().item() for c in range(4)]
    for rank in range(2):
        weight, bias, found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(weight, net.conv.weight.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(bias, net.conv.bias.grad, rtol=1e-5, atol=1e-7)
        assert found.tolist() == pytest.approx(margin, rel=1e-5)
