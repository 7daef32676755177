"""Naive references of the losses on embeddings and weights: loops over Python floats."""

import math

import torch

from tests.losses.numbers_in_lists import affine, dot, mean, norm

# Settings that are not the defaults.
MORE = {
    "relational": [({"distance": 1.0, "angle": 0.0},)],
    "correlation": [({"gamma": 0.8, "order": 4},)],
    "contrastive": [({"dim": 9, "num_negatives": 4, "temperature": 0.3},)],
    "weight_distribution": [({"num_quantiles": 7},)],
}


def smooth_l1(a, b):
    gap = abs(a - b)
    return gap * gap / 2 if gap < 1 else gap - 0.5


def flat(nested):
    return [v for part in nested for v in flat(part)] if isinstance(nested, list) else [nested]


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


def naive_contrastive(x, loss, dim=128, num_negatives=None, temperature=0.07, momentum=0.5):
    """The first batch, with the reference code's ratios of probabilities instead of log odds."""
    num_samples, n = len(loss.student_bank), len(x["index"])
    num_negatives = num_negatives or num_samples - 1
    drawn = torch.randint(num_samples - 1, (n, num_negatives)).tolist()
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
        constant = mean(v for row in scores for v in row) * num_samples
        noise = num_negatives / num_samples
        for positive, *negatives in scores:
            positive /= constant
            total -= math.log(positive / (positive + noise)) / n
            total -= sum(math.log(noise / (v / constant + noise)) for v in negatives) / n
    return total


def naive_mse(a, b):
    return mean((u - v) ** 2 for r, q in zip(a, b, strict=True) for u, v in zip(r, q, strict=True))


def naive_reuse_classifier(x, loss):
    return naive_mse([affine(loss.projector, row) for row in x["student_embedding"]], x["teacher_embedding"])


def naive_semantic(x, loss):
    projected = [affine(loss.projector, row) for row in x["student_embedding"]]
    logits = [affine(x["teacher_head"], row) for row in projected]
    return naive_mse(projected, x["teacher_embedding"]) + naive_mse(logits, x["teacher_logits"])


def naive_weight_distribution(x, loss, num_quantiles=256):
    def quantiles(weights):
        values = sorted(flat(weights))
        centre, n = mean(values), len(values)
        deviation = math.sqrt(mean((v - centre) ** 2 for v in values))
        bounds = [(i * n // num_quantiles, -(-(i + 1) * n // num_quantiles)) for i in range(num_quantiles)]
        return [(mean(values[low:high]) - centre) / deviation for low, high in bounds]

    pairs = zip(quantiles(x["student_weight"]), quantiles(x["teacher_weight"]), strict=True)
    return mean((s - t) ** 2 for s, t in pairs)
