"""What the naive references share: softmaxes, means and norms by loops over Python floats."""

import math


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


def affine(linear, row):
    return [dot(w, row) + b for w, b in zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)]
