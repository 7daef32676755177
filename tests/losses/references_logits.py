"""Naive references of the losses on logits: loops over Python floats."""

import math

from tests.losses.numbers_in_lists import columns, divergence, dot, mean, norm, softmax

# Settings that are not the defaults.
MORE = {
    "cross_entropy": [({"label_smoothing": 0.3},)],
    "binary_cross_entropy": [({"label_smoothing": 0.2, "sum_classes": True},)],
    "kl": [({"temperature": 1.5},)],
    "decoupled": [({"alpha": 2.0, "beta": 3.0, "temperature": 1.0},)],
    "teacher_temperature": [({"weighted": True},), ({"temperature": 1.5, "weighted": True},)],
    "normalized": [({"gamma": 0.7, "temperature": 3.0},)],
    "refined": [({"alpha": 2.0, "beta": 0.5, "temperature": 1.5},), ({"alpha": 0.0},)],
    "logit_standardized": [({"temperature": 1.0},)],
    "dist": [({"beta": 2.0, "gamma": 0.5, "temperature": 3.0},)],
    "multi_level": [({"temperatures": (1.0,)},)],
    "curriculum_temperature": [({"start": 2.0, "span": 5.0},)],
}


def targets(x, smoothing):
    labels = x["labels"]
    one_hot = [[float(k == label) for k in range(len(x["student_logits"][0]))] for label in labels]
    rows = labels if isinstance(labels[0], list) else one_hot
    return [[(1 - smoothing) * v + smoothing / len(x["student_logits"][0]) for v in row] for row in rows]


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
    return total / len(x["labels"]) / (1 if sum_classes else len(x["student_logits"][0]))


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
        others = [k for k in range(len(s)) if k != label]
        rest = [[v[k] / (1 - v[label]) for k in others] for v in (p, q)]
        total += beta * divergence(*rest)
    return total / len(x["labels"]) * temperature**2


def naive_logit_standardized(x, loss, temperature=2.0):
    def standardize(row):
        centre = mean(row)
        deviation = math.sqrt(sum((v - centre) ** 2 for v in row) / (len(row) - 1))
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


def naive_teacher_temperature(x, loss, temperature=4.0, weighted=False):
    total = 0.0
    for s, t in zip(x["student_logits"], x["teacher_logits"], strict=True):
        powers = [p ** (1 / temperature) for p in softmax(t)]
        value = divergence([p / sum(powers) for p in powers], softmax(s))
        total += value * (sum(powers) if weighted else 1)
    return total / len(x["student_logits"])


def naive_normalized(x, loss, gamma=1.5, temperature=1.0):
    total = 0.0
    for s, t, label in zip(x["student_logits"], x["teacher_logits"], x["labels"], strict=True):
        total -= softmax(t)[label] * math.log(softmax(s)[label])
        others = [k for k in range(len(s)) if k != label]
        p, q = (softmax([row[k] for k in others], temperature) for row in (t, s))
        total -= gamma * temperature**2 * sum(a * math.log(b) for a, b in zip(p, q))
    return total / len(x["labels"])


def naive_refined(x, loss, alpha=1.0, beta=4.0, temperature=4.0):
    total = 0.0
    for s, t, label in zip(x["student_logits"], x["teacher_logits"], x["labels"], strict=True):
        sure, right = max(softmax(t, temperature)), softmax(s, temperature)[label]
        total += alpha * divergence([sure, 1 - sure], [right, 1 - right])
        less = [k for k in range(len(t)) if t[k] < t[label]]
        if less:
            total += beta * divergence(*(softmax([row[k] for k in less], temperature) for row in (t, s)))
    return total / len(x["labels"]) * temperature**2
