"""The losses on logits, embeddings and weights, each against a naive reference: loops over Python floats."""

import copy
import inspect
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from trainer.distributed import gather_batch
from trainer.networks.features import head
from trainer.recipe import shelves

N, K, STUDENT_WIDTH, TEACHER_WIDTH, NUM_SAMPLES = 6, 5, 7, 11, 23


# ---- naive references: x holds nested lists of floats, loss the module where there is one


def softmax(row, temperature=1.0):
    top = max(row)
    powers = [math.exp((v - top) / temperature) for v in row]
    return [p / sum(powers) for p in powers]


def divergence(teacher, student):
    return sum(t * (math.log(t) - math.log(s)) for t, s in zip(teacher, student, strict=True) if t > 0)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def norm(row):
    return math.sqrt(dot(row, row))


def smooth_l1(a, b):
    gap = abs(a - b)
    return gap * gap / 2 if gap < 1 else gap - 0.5


def targets(x, smoothing):
    labels = x["labels"]
    one_hot = [[float(k == label) for k in range(K)] for label in labels]
    rows = labels if isinstance(labels[0], list) else one_hot
    return [[(1 - smoothing) * v + smoothing / K for v in row] for row in rows]


def naive_cross_entropy(x, loss, label_smoothing=0.0):
    wanted = targets(x, label_smoothing)
    logs = [[math.log(p) for p in softmax(row)] for row in x["student_logits"]]
    return mean(-dot(t, row) for t, row in zip(wanted, logs, strict=True))


def naive_binary_cross_entropy(x, loss, label_smoothing=0.0, sum_classes=False):
    total = 0.0
    for row, wanted in zip(x["student_logits"], targets(x, label_smoothing), strict=True):
        for logit, t in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-logit))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    return total / N / (1 if sum_classes else K)


def naive_kl(x, loss, temperature=4.0):
    teacher = [softmax(row, temperature) for row in x["teacher_logits"]]
    student = [softmax(row, temperature) for row in x["student_logits"]]
    return mean(divergence(t, s) for t, s in zip(teacher, student, strict=True)) * temperature**2


def naive_hard_label(x, loss):
    pairs = zip(x["teacher_logits"], x["student_logits"], strict=True)
    return mean(-math.log(softmax(s)[t.index(max(t))]) for t, s in pairs)


def naive_decoupled(x, loss, alpha=1.0, beta=8.0, temperature=4.0):
    total = 0.0
    for s, t, label in zip(x["student_logits"], x["teacher_logits"], x["labels"], strict=True):
        p, q = softmax(t, temperature), softmax(s, temperature)
        total += alpha * divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = [k for k in range(K) if k != label]
        rest = [[v[k] / (1 - v[label]) for k in others] for v in (p, q)]
        total += beta * divergence(*rest)
    return total / N * temperature**2


def naive_logit_standardized(x, loss, temperature=2.0):
    def standardize(row):
        centre = mean(row)
        deviation = math.sqrt(sum((v - centre) ** 2 for v in row) / (K - 1))
        return [(v - centre) / (deviation + 1e-7) for v in row]

    y = {key: [standardize(row) for row in x[key]] for key in ("student_logits", "teacher_logits")}
    return naive_kl(y, None, temperature)


def naive_dist(x, loss, beta=1.0, gamma=1.0, temperature=1.0):
    def distance(a, b):
        a, b = [v - mean(a) for v in a], [v - mean(b) for v in b]
        return 1 - dot(a, b) / (norm(a) * norm(b) + 1e-8)

    s = [softmax(row, temperature) for row in x["student_logits"]]
    t = [softmax(row, temperature) for row in x["teacher_logits"]]
    between = mean(distance(a, b) for a, b in zip(s, t, strict=True))
    within = mean(distance(a, b) for a, b in zip(columns(s), columns(t), strict=True))
    return temperature**2 * (beta * between + gamma * within)


def naive_multi_level(x, loss, temperatures=(2.0, 3.0, 4.0, 5.0, 6.0)):
    def gap(a, b):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(a))]
        return sum((dot(a[i], a[j]) - dot(b[i], b[j])) ** 2 for i, j in pairs) / len(a)

    total = 0.0
    for temperature in temperatures:
        s = [softmax(row, temperature) for row in x["student_logits"]]
        t = [softmax(row, temperature) for row in x["teacher_logits"]]
        total += naive_kl(x, None, temperature) + gap(s, t) + gap(columns(s), columns(t))
    return total


def naive_curriculum_temperature(x, loss, start=1.0, span=20.0, warm_up_epochs=10.0):
    return naive_kl(x, None, start + span / (1 + math.exp(-loss.raw_temperature.item())))


def naive_relational(x, loss, distance=25.0, angle=50.0):
    def distances(rows):
        table = [[norm([u - v for u, v in zip(a, b, strict=True)]) for b in rows] for a in rows]
        centre = mean(v for row in table for v in row if v > 0)
        return [v / centre for row in table for v in row]

    def cosines(rows):
        found = []
        for i in rows:
            arms = [[u - v for u, v in zip(j, i, strict=True)] for j in rows]
            arms = [[v / norm(arm) for v in arm] if norm(arm) > 0 else arm for arm in arms]
            found += [dot(j, k) for j in arms for k in arms]
        return found

    def gap(measure):
        pairs = zip(measure(x["student_embedding"]), measure(x["teacher_embedding"]), strict=True)
        return mean(smooth_l1(a, b) for a, b in pairs)

    return distance * gap(distances) + angle * gap(cosines)


def naive_probabilistic(x, loss):
    def neighbours(rows):
        table = [[(dot(a, b) / (norm(a) * norm(b)) + 1) / 2 for b in rows] for a in rows]
        return [v / sum(row) for row in table for v in row]

    pairs = zip(neighbours(x["teacher_embedding"]), neighbours(x["student_embedding"]), strict=True)
    return mean(t * math.log((t + 1e-7) / (s + 1e-7)) for t, s in pairs)


def naive_correlation(x, loss, gamma=0.4, order=2):
    def kernel(rows):
        cosines = [dot(a, b) / (norm(a) * norm(b)) for a in rows for b in rows]
        terms = [[(2 * gamma * c) ** p / math.factorial(p) for p in range(order + 1)] for c in cosines]
        return [math.exp(-2 * gamma) * sum(term) for term in terms]

    pairs = zip(kernel(x["student_embedding"]), kernel(x["teacher_embedding"]), strict=True)
    return mean((a - b) ** 2 for a, b in pairs)


def affine(linear, row):
    return [dot(w, row) + b for w, b in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)]


def naive_contrastive(x, loss, dim=128, num_negatives=NUM_SAMPLES - 1, temperature=0.07, momentum=0.5):
    """The first batch, with the reference code's ratios of probabilities instead of log odds."""
    drawn = torch.randint(NUM_SAMPLES - 1, (N, num_negatives)).tolist()
    total = 0.0
    for linear, key, bank in (
        (loss.embed_student, "student_embedding", loss.teacher_bank.tolist()),
        (loss.embed_teacher, "teacher_embedding", loss.student_bank.tolist()),
    ):
        scores = []
        for row, own, others in zip(x[key], x["index"], drawn, strict=True):
            embedding = affine(linear, row)
            embedding = [v / norm(embedding) for v in embedding]
            seen = [own] + [o if o < own else o + 1 for o in others]
            assert own not in seen[1:]
            scores.append([math.exp(dot(embedding, bank[i]) / temperature) for i in seen])
        constant = mean(v for row in scores for v in row) * NUM_SAMPLES
        noise = num_negatives / NUM_SAMPLES
        for positive, *negatives in scores:
            positive /= constant
            total -= math.log(positive / (positive + noise)) / N
            total -= sum(math.log(noise / (v / constant + noise)) for v in negatives) / N
    return total


def naive_mse(a, b):
    return mean((u - v) ** 2 for r, q in zip(a, b, strict=True) for u, v in zip(r, q, strict=True))


def naive_reuse_classifier(x, loss):
    return naive_mse([affine(loss.projector, row) for row in x["student_embedding"]], x["teacher_embedding"])


def naive_semantic(x, loss):
    projected = [affine(loss.projector, row) for row in x["student_embedding"]]
    logits = [affine(x["teacher_head"], row) for row in projected]
    return naive_mse(projected, x["teacher_embedding"]) + naive_mse(logits, x["teacher_logits"])


def flat(nested):
    return [v for part in nested for v in flat(part)] if isinstance(nested, list) else [nested]


def naive_weight_distribution(x, loss, num_quantiles=256):
    def quantiles(weights):
        values = sorted(flat(weights))
        centre, n = mean(values), len(values)
        deviation = math.sqrt(mean((v - centre) ** 2 for v in values))
        bounds = [(i * n // num_quantiles, -(-(i + 1) * n // num_quantiles)) for i in range(num_quantiles)]
        return [(mean(values[low:high]) - centre) / deviation for low, high in bounds]

    pairs = zip(quantiles(x["student_weight"]), quantiles(x["teacher_weight"]), strict=True)
    return mean((s - t) ** 2 for s, t in pairs)


# ---- the losses, with settings that are not the defaults, and what is fed to them

CASES = [
    ("cross_entropy", {}),
    ("cross_entropy", {"label_smoothing": 0.3}),
    ("binary_cross_entropy", {}),
    ("binary_cross_entropy", {"label_smoothing": 0.2, "sum_classes": True}),
    ("kl", {}),
    ("kl", {"temperature": 1.5}),
    ("hard_label", {}),
    ("decoupled", {}),
    ("decoupled", {"alpha": 2.0, "beta": 3.0, "temperature": 1.0}),
    ("logit_standardized", {}),
    ("logit_standardized", {"temperature": 1.0}),
    ("dist", {}),
    ("dist", {"beta": 2.0, "gamma": 0.5, "temperature": 3.0}),
    ("multi_level", {}),
    ("multi_level", {"temperatures": (1.0,)}),
    ("curriculum_temperature", {}),
    ("curriculum_temperature", {"start": 2.0, "span": 5.0}),
    ("relational", {}),
    ("relational", {"distance": 1.0, "angle": 0.0}),
    ("probabilistic", {}),
    ("correlation", {}),
    ("correlation", {"gamma": 0.8, "order": 4}),
    ("contrastive", {}),
    ("contrastive", {"dim": 9, "num_negatives": 4, "temperature": 0.3}),
    ("reuse_classifier", {}),
    ("semantic", {}),
    ("weight_distribution", {}),
    ("weight_distribution", {"num_quantiles": 7}),
]
NAMES = list(dict.fromkeys(name for name, _ in CASES))
each = pytest.mark.parametrize("name", NAMES)
OF_STUDENT = ("student_logits", "student_embedding", "student_weight")
OF_TEACHER = ("teacher_logits", "teacher_embedding", "teacher_weight")


def feed(n=N, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    teacher_head = nn.Linear(TEACHER_WIDTH, K).to(dtype).requires_grad_(False)
    for parameter in teacher_head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw))
    shapes = {
        "student_logits": (n, K),
        "teacher_logits": (n, K),
        "student_embedding": (n, STUDENT_WIDTH),
        "teacher_embedding": (n, TEACHER_WIDTH),
        "student_weight": (4, 3, 3, 3),
        "teacher_weight": (40, 9),
    }
    x = {key: 2 * torch.randn(shape, generator=draw, dtype=torch.float64) for key, shape in shapes.items()}
    return {key: value.to(dtype) for key, value in x.items()} | {
        "labels": torch.randint(K, (n,), generator=draw),
        "index": torch.randperm(NUM_SAMPLES, generator=draw)[:n],
        "teacher_head": teacher_head,
        "epoch": 4.0,
    }


def build(name, dtype=torch.float32, **settings):
    """The loss as a function of what it wants to be fed; a module has its own seed."""
    function = shelves.find("loss", name)
    if not inspect.isclass(function):
        return lambda *fed: function(*fed, **settings)
    torch.manual_seed(1)
    given = {
        "student_embedding": torch.Size((N, STUDENT_WIDTH)),
        "num_samples": NUM_SAMPLES,
        "teacher_embedding": torch.Size((N, TEACHER_WIDTH)),
        "num_classes": K,
    }
    return function(*(given[key] for key in shelves.built_with(function)), **settings).to(dtype)


def call(name, loss, x):
    torch.manual_seed(2)  # the negatives of contrastive
    return loss(*(x[key] for key in shelves.fed(shelves.find("loss", name))))


def students(name, x):
    """The tensors the student is taught by, now asking for a gradient."""
    return [x[key].requires_grad_() for key in shelves.fed(shelves.find("loss", name)) if key in OF_STUDENT]


def value_and_gradient(name, x, dtype=torch.float32, **settings):
    loss = build(name, dtype, **settings)
    given = students(name, x)
    value = call(name, loss, x)
    assert value.shape == ()
    return value.detach(), torch.autograd.grad(value, given)[0]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_equals_the_naive_reference(name, settings):
    x = feed()
    loss = build(name, **settings)
    before = copy.deepcopy(loss)
    value = call(name, loss, x)
    naive = {key: v.tolist() if isinstance(v, torch.Tensor) else v for key, v in x.items()}
    torch.manual_seed(2)
    assert value.item() == pytest.approx(globals()[f"naive_{name}"](naive, before, **settings), rel=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
def test_labels_may_be_probabilities(name):
    x = feed() | {"labels": torch.rand(N, K).softmax(dim=1)}
    naive = {key: v.tolist() if isinstance(v, torch.Tensor) else v for key, v in x.items()}
    value = call(name, build(name, label_smoothing=0.1), x)
    expected = globals()[f"naive_{name}"](naive, None, label_smoothing=0.1)
    assert value.item() == pytest.approx(expected, rel=1e-5)


@each
def test_gradient_is_the_derivative(name):
    x = feed(dtype=torch.float64)
    loss = build(name, torch.float64)
    if name == "contrastive":  # the first batch sets the constants, outside of the gradient
        call(name, loss, x)
        loss.eval()
    assert torch.autograd.gradcheck(lambda *_: call(name, loss, x), students(name, x))


@each
def test_gradient_reaches_the_student_and_what_is_learned_only(name):
    x = feed()
    teachers = [x[key].requires_grad_() for key in OF_TEACHER]
    given = students(name, x)
    loss = build(name)
    call(name, loss, x).backward()
    assert all(student.grad.abs().sum() > 0 for student in given)
    assert all(teacher.grad is None for teacher in teachers)
    learned = list(loss.parameters()) if isinstance(loss, nn.Module) else []
    assert all(parameter.grad.abs().sum() > 0 for parameter in learned)
    assert isinstance(loss, nn.Module) == (
        name
        in ("curriculum_temperature", "contrastive", "reuse_classifier", "semantic", "weight_distribution")
    )


def extremes():
    draw = torch.Generator().manual_seed(3)

    def sign(v):
        return 200 * torch.randn(v.shape, generator=draw).sign()

    def one_hot(v):
        return 200 * (2 * F.one_hot(torch.arange(len(v)) % v.shape[1], v.shape[1]).float() - 1)

    def zero_row(v):
        return v.clone().index_fill_(0, torch.tensor([0]), 0)

    def opposite(v):
        return v[:1] * torch.tensor([1.0, -1.0]).repeat(len(v))[: len(v)].view(-1, *[1] * (v.dim() - 1))

    def same_columns(v):
        return v[:, :1].expand(v.shape).clone()

    def same_rows(v):
        return v[:1].expand(v.shape).clone()

    makers = (sign, one_hot, torch.zeros_like, zero_row, opposite, same_columns, same_rows)
    yield from ((f"{s.__name__}/{t.__name__}", s, t) for s in makers for t in makers)


@each
def test_extreme_inputs_are_finite(name):
    for title, of_student, of_teacher in extremes():
        x = feed()
        for key in ("logits", "embedding", "weight"):
            flat_student, flat_teacher = (x[f"{who}_{key}"].flatten(1) for who in ("student", "teacher"))
            x[f"student_{key}"], x[f"teacher_{key}"] = of_student(flat_student), of_teacher(flat_teacher)
        value, gradient = value_and_gradient(name, x)
        assert value.isfinite() and gradient.isfinite().all(), title
    constant = feed() | {"student_weight": torch.full((50,), 0.1), "teacher_weight": torch.full((1,), 0.3)}
    value, gradient = value_and_gradient(name, constant)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 1e3


@each
@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_of_one_or_two_is_finite(name, n):
    value, gradient = value_and_gradient(name, feed(n))
    assert value.isfinite() and gradient.isfinite().all()
    if name == "relational" or (name in ("probabilistic", "correlation") and n == 1):
        assert value == pytest.approx(0, abs=1e-10) and gradient.abs().max() < 1e-5


def test_dist_leaves_out_the_part_a_batch_of_one_does_not_define():
    x = feed(1)
    assert call("dist", build("dist"), x) == call("dist", build("dist", gamma=0.0), x)


def close(a, b, share):
    return (a.double() - b.double()).norm() <= share * b.double().norm()


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_within_two_percent(name, dtype):
    half = feed(dtype=dtype)
    half["teacher_head"] = full_head = feed()["teacher_head"]
    exact = {key: v.double() if key in OF_STUDENT + OF_TEACHER else v for key, v in half.items()}
    exact["teacher_head"] = copy.deepcopy(full_head).double()
    value, gradient = value_and_gradient(name, exact, torch.float64)
    half_value, half_gradient = value_and_gradient(name, half)
    assert close(half_value, value, 0.02) and close(half_gradient, gradient, 0.02)

    x = feed() | {"teacher_head": full_head}
    value, gradient = value_and_gradient(name, x)
    with torch.autocast("cpu", dtype=dtype):
        auto_value, auto_gradient = value_and_gradient(name, x)
    assert close(auto_value, value, 0.02) and close(auto_gradient, gradient, 0.02)
    assert auto_value.dtype == torch.float32


@pytest.mark.parametrize("name", [n for n in NAMES if n != "contrastive"])  # it would draw other negatives
def test_doubling_the_batch_changes_nothing(name):
    x = feed()
    per_sample = [key for key, v in x.items() if isinstance(v, torch.Tensor) and "weight" not in key]
    twice = x | {key: torch.cat([x[key], x[key]]) for key in per_sample}
    loss = build(name)
    once, doubled = call(name, loss, x).item(), call(name, loss, twice).item()
    if name == "probabilistic":  # the mean of twice as many, half as probable neighbours
        assert doubled == pytest.approx(once / 2, rel=1e-4)
    elif name == "multi_level":  # the docstring's scale of its second and third part
        alone = sum(call("kl", build("kl", temperature=t), x).item() for t in (2.0, 3.0, 4.0, 5.0, 6.0))
        assert 2 * (once - alone) < doubled - alone < 4 * (once - alone)
    else:
        assert doubled == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "kl",
        "decoupled",
        "logit_standardized",
        "dist",
        "multi_level",
        "curriculum_temperature",
        "relational",
        "probabilistic",
        "correlation",
        "reuse_classifier",
        "semantic",
        "weight_distribution",
    ],
)
def test_zero_where_student_equals_teacher_and_more_elsewhere(name):
    x = feed(dtype=torch.float64)
    equal = x | {f"student_{key}": x[f"teacher_{key}"] for key in ("logits", "embedding", "weight")}
    loss = build(name, torch.float64)
    if hasattr(loss, "projector"):
        loss.projector = nn.Linear(TEACHER_WIDTH, TEACHER_WIDTH, dtype=torch.float64)
        nn.init.eye_(loss.projector.weight)
        nn.init.zeros_(loss.projector.bias)
        equal["teacher_logits"] = x["teacher_head"](x["teacher_embedding"])
    assert call(name, loss, equal).item() == pytest.approx(0, abs=1e-6)
    noise = torch.Generator().manual_seed(5)
    for _ in range(5):
        moved = dict(equal)
        for key in OF_STUDENT:
            moved[key] = equal[key] + 0.3 * torch.randn(equal[key].shape, generator=noise).double()
        assert call(name, loss, moved).item() > 1e-5


# ---- what single losses promise besides


def test_label_losses_equal_timms():
    # Imported here, because it is slow and the spawned processes do not need it.
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy

    x = feed()
    logits, labels = x["student_logits"], x["labels"]
    for sum_classes in (False, True):
        ours = call(
            "binary_cross_entropy",
            build("binary_cross_entropy", label_smoothing=0.1, sum_classes=sum_classes),
            x,
        )
        theirs = BinaryCrossEntropy(smoothing=0.1, sum_classes=sum_classes)(logits, labels)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    ours = call("cross_entropy", build("cross_entropy", label_smoothing=0.1), x)
    assert ours.item() == pytest.approx(LabelSmoothingCrossEntropy(0.1)(logits, labels).item(), rel=1e-6)


def test_decoupled_parts_add_up_to_kl():
    """KL = target + (1 - teacher's probability of the true class) * non-target, the paper's equation 7."""
    x = feed(1, torch.float64)
    sure = (x["teacher_logits"] / 4).softmax(dim=1)[0, x["labels"][0]].item()
    parts = call("decoupled", build("decoupled", alpha=1.0, beta=1 - sure), x)
    assert parts.item() == pytest.approx(call("kl", build("kl"), x).item(), rel=1e-9)


def test_decoupled_refuses_mixed_labels():
    with pytest.raises(ValueError, match="decoupled: labels are"):
        call("decoupled", build("decoupled"), feed() | {"labels": torch.rand(N, K)})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("decoupled", {"alpha": 0, "beta": 0}),
        ("dist", {"beta": 0, "gamma": 0}),
        ("relational", {"distance": 0, "angle": 0}),
    ],
)
def test_settings_that_leave_nothing_are_refused(name, settings):
    with pytest.raises(ValueError, match=f"{name}: .* are both 0: nothing is left of it"):
        call(name, build(name, **settings), feed())


def test_logit_standardized_ignores_size_and_offset():
    x = feed(dtype=torch.float64)
    value = call("logit_standardized", build("logit_standardized"), x)
    x["student_logits"] = 3 * x["student_logits"] + 5
    assert call("logit_standardized", build("logit_standardized"), x).item() == pytest.approx(value.item())


@pytest.mark.parametrize(
    ("epoch", "strength"), [(0.0, 0.0), (2.5, (1 - math.sqrt(0.5)) / 2), (5.0, 0.5), (10.0, 1.0), (30.0, 1.0)]
)
def test_temperature_climbs_with_a_growing_strength(epoch, strength):
    x = feed(dtype=torch.float64) | {"epoch": epoch}
    loss = build("curriculum_temperature", torch.float64)
    call("curriculum_temperature", loss, x).backward()
    gradient, step = loss.raw_temperature.grad.item(), 1e-6
    with torch.no_grad():
        loss.raw_temperature += step
        above = call("curriculum_temperature", loss, x).item()
        loss.raw_temperature -= 2 * step
        below = call("curriculum_temperature", loss, x).item()
    slope = (above - below) / (2 * step)
    assert abs(slope) > 1e-4
    assert gradient == pytest.approx(-strength * slope, rel=1e-5, abs=1e-12)


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
    student, teacher_head = Small(nn.Linear(STUDENT_WIDTH, K)), nn.Linear(TEACHER_WIDTH, K, bias=bias)
    loss = build("reuse_classifier")
    images = torch.randn(N, 10)
    shapes = {key: v.shape for key, v in student.state_dict().items()}
    loss.finish(student, teacher_head)
    expected = teacher_head(loss.projector(student.body(images).relu()))
    torch.testing.assert_close(student(images), expected, rtol=1e-5, atol=1e-5)
    assert {key: v.shape for key, v in student.state_dict().items()} == shapes
    assert head(student).weight.requires_grad


@pytest.mark.parametrize(
    ("classifier", "teacher_head", "message"),
    [
        (nn.Linear(STUDENT_WIDTH, K), nn.Sequential(nn.Linear(TEACHER_WIDTH, K)), "is a Sequential"),
        (nn.Linear(STUDENT_WIDTH, K, bias=False), nn.Linear(TEACHER_WIDTH, K), "with a bias"),
        (
            nn.utils.parametrizations.orthogonal(nn.Linear(STUDENT_WIDTH, K)),
            nn.Linear(TEACHER_WIDTH, K),
            "plain",
        ),
        (nn.Linear(STUDENT_WIDTH, K + 1), nn.Linear(TEACHER_WIDTH, K), r"has weights \(6, 7\)"),
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


# ---- two processes

RELATIONS = ["relational", "probabilistic", "correlation"]


def joined(rank, folder):
    """One of two processes with 2 and 4 of the 6 samples: the gradients of each relation, and a bank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(0, 2) if rank == 0 else slice(2, N)
    x = feed()
    mine = x | {key: x[key][rows] for key in ("student_embedding", "teacher_embedding", "index")}
    found = {"gathered": gather_batch(mine["student_embedding"]), "index": gather_batch(mine["index"])}
    for name in RELATIONS:
        found[name] = gradient_of_body(name, mine, gather=True)
        found[f"{name} alone"] = gradient_of_body(name, mine)
    loss = build("contrastive")
    call("contrastive", loss, mine)
    found |= loss.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def gradient_of_body(name, x, **settings):
    """The gradient of a layer that gives the student's embedding, as a network's would be."""
    weight = torch.eye(STUDENT_WIDTH).requires_grad_()
    call(name, build(name, **settings), x | {"student_embedding": x["student_embedding"] @ weight}).backward()
    return weight.grad


def test_two_processes_learn_what_one_does(tmp_path):
    torch.multiprocessing.spawn(joined, args=(tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x = feed()
    for found in ranks:
        assert torch.equal(found["gathered"], x["student_embedding"])
        assert torch.equal(found["index"], x["index"])
    for name in RELATIONS:
        single = gradient_of_body(name, x)
        averaged = (ranks[0][name] + ranks[1][name]) / 2  # what DDP does
        assert close(averaged, single, 1e-5), name
        assert not close((ranks[0][f"{name} alone"] + ranks[1][f"{name} alone"]) / 2, single, 0.1), name
    one = build("contrastive")
    call("contrastive", one, x)
    for bank in ("student_bank", "teacher_bank"):
        assert torch.equal(ranks[0][bank], ranks[1][bank])
        assert torch.allclose(ranks[0][bank], getattr(one, bank), atol=1e-6)
    assert torch.equal(ranks[0]["log_constants"], ranks[1]["log_constants"])
