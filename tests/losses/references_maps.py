"""Naive references of the losses on feature maps: float64, elementary operations, one sample and one channel at a time."""

import math
from itertools import pairwise

import torch
from torch import nn

from tests.losses.numbers_in_lists import softmax
from trainer.projectors import ConvNorm, MapProjector

# Settings that are not the defaults, and shapes of maps with more channels than positions.
MORE = {
    "attention": [({"power": 3.0},)],
    "neuron_selectivity": [({}, {"student_map": (9, 2, 3), "teacher_map": (12, 3, 2)})],
    "activation_boundary": [({"margin": 0.8},)],
    "masked_generative": [({"masked": "positions", "ratio": 0.65},)],
    "one_for_all": [({"temperature": 2.0},), ({"own": 0.3, "width": 4, "gamma": 1.0},)],
    "vit_features": [
        ({"alpha": 0.5, "beta": 2.0, "ratio": 0.3},),
        ({}, {"student_maps": [(3, 4, 4), (3, 5, 3)], "teacher_maps": [(3, 2, 5), (3, 5, 2)]}),
    ],
}


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


def naive_hint(x, loss):
    return mean_square(x["projected_map"], x["teacher_map"])


def naive_attention(x, loss, power=2.0):
    s, t = x["student_map"], x["teacher_map"]
    total = 0.0
    a, b = one_size(s, t)
    for x, y in zip(a, b, strict=True):
        looks = []
        for map_ in (x, y):
            look = sum(channel.abs() ** power for channel in map_) / len(map_)
            looks.append(look / (look**2).sum().sqrt())
        total += mean_square(*looks)
    return total / len(a)


def naive_neuron_selectivity(x, loss):
    s, t = x["student_map"], x["teacher_map"]
    a, b = one_size(s, t)
    total = 0.0
    for x, y in zip(a, b, strict=True):
        x = [c.flatten() / (c**2).sum().sqrt() for c in x]
        y = [c.flatten() / (c**2).sum().sqrt() for c in y]
        for first, second, sign in ((x, x, 1), (y, y, 1), (x, y, -2)):
            kernels = [((p * q).sum() ** 2).item() for p in first for q in second]
            total += sign * sum(kernels) / len(kernels)
    return total / len(a)


def naive_similarity(x, loss):
    s, t = x["student_map"], x["teacher_map"]
    rows = []
    for map_ in (s, t):
        likeness = torch.tensor([[(x * y).sum() for y in map_] for x in map_], dtype=torch.float64)
        rows.append(torch.stack([row / (row**2).sum().sqrt() for row in likeness]))
    return ((rows[0] - rows[1]) ** 2).sum().item() / len(s) ** 2


def naive_fsp(x, loss):
    s, t = x["student_maps"], x["teacher_maps"]
    s = [run([project], x) for project, x in zip(loss.projectors, s, strict=True)]
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


def naive_margin_relu(x, loss):
    s, t = x["student_map"], x["teacher_map"]
    x = run([loss.connector], s)
    margins = [[v for v in t[:, c].flatten().tolist() if v < 0] for c in range(t.shape[1])]
    x, y = one_size(x, t)
    total = 0.0
    for c, negative in enumerate(margins):
        margin = sum(negative) / len(negative)
        for a, b in zip(x[:, c].flatten().tolist(), y[:, c].flatten().tolist(), strict=True):
            target = max(b, margin)
            total += 0.0 if target <= 0 and a <= target else (a - target) ** 2
    return total / x.numel()


def naive_activation_boundary(x, loss, margin=1.0):
    s, t = x["student_map"], x["teacher_map"]
    x, y = one_size(run([loss.connector], s), t)
    total = 0.0
    for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        total += (a + margin) ** 2 * (a > -margin and b <= 0) + (a - margin) ** 2 * (a <= margin and b > 0)
    return total / x.numel()


def naive_factor(x, loss):
    s, t = x["student_map"], x["teacher_map"]
    x, y = one_size(s, t)
    code, ours = run(loss.encoder, y), run(loss.translator, x)
    assert code.shape[1] == 2  # half of 5 channels, to the even number
    total = 0.0
    for a, b in zip(ours, code, strict=True):
        total += (a / (a**2).sum().sqrt() - b / (b**2).sum().sqrt()).abs().mean().item()
    return total / len(x) + 0.002 * mean_square(run(loss.decoder, code), y)


def naive_review(x, loss):
    s, t = x["student_maps"], x["teacher_maps"]
    below, total = None, 0.0
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


def naive_masked_generative(x, loss, masked="channels", ratio=0.15):
    s, t = x["student_map"], x["teacher_map"]
    x, y = one_size(run([loss.project], s), t)
    channels = masked == "channels"
    hidden = torch.rand((*x.shape[:2], 1, 1) if channels else (len(x), 1, *x.shape[2:])) < ratio
    assert 0 < hidden.sum() < hidden.numel()
    return mean_square(run(loss.generate, torch.where(hidden, 0.0, x)), y)


def naive_channel_wise(x, loss, temperature=4.0):
    s, t = x["projected_map"], x["teacher_map"]
    total = 0.0
    for x, y in zip(s.flatten(0, 1), t.flatten(0, 1), strict=True):
        q, p = softmax(x.flatten().tolist(), temperature), softmax(y.flatten().tolist(), temperature)
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return total / (s.shape[0] * s.shape[1]) * temperature**2


def naive_variational(x, loss):
    s, t = x["student_map"], x["teacher_map"]
    x, y = one_size(s, t)
    x, total = run(loss.regressor, x), 0.0
    for c, raw in enumerate(loss.raw_variance.tolist()):
        variance = math.log(1 + math.exp(raw)) + 1e-5
        total += (((x[:, c] - y[:, c]) ** 2 / variance + math.log(variance)) / 2).sum().item()
    return total / y.numel()


def naive_one_for_all(x, loss, gamma=1.5, temperature=1.0, width=None, own=1.0):
    def modified(rows):
        total = 0.0
        for student, teacher, label in zip(rows, x["teacher_logits"], x["labels"], strict=True):
            q, p = softmax(student, temperature), softmax(teacher, temperature)
            for k in range(len(teacher)):
                true = float(k == label)
                total -= ((p[k] + true) ** gamma - true) * math.log(q[k])
        return total / len(rows)

    total = own * modified(x["student_logits"])
    for map_, conv, linear in zip(x["student_maps"], loss.convs, loss.linears, strict=True):
        hidden = run([conv, nn.ReLU()], map_).mean((2, 3))
        total += modified([((linear.weight * row).sum(1) + linear.bias).tolist() for row in hidden])
    return total


def naive_vit_features(x, loss, alpha=1.0, beta=0.05, ratio=0.5):
    pairs = []
    for project, s, t in zip(loss.projectors, x["student_maps"], x["teacher_maps"], strict=True):
        pairs.append(one_size(run([project.conv], s) if isinstance(project, MapProjector) else s, t))
    total = alpha * sum(((s - t) ** 2).mean() for s, t in pairs[:-1]) / (len(pairs) - 1)
    s, t = pairs[-1]
    rows, columns = s.shape[2:]
    drawn = torch.rand(len(s), rows * columns)
    filled, hidden = s.clone(), []
    for n, noise in enumerate(drawn.tolist()):
        lowest = sorted(range(len(noise)), key=noise.__getitem__)
        for place in lowest[: len(noise) - int(len(noise) * (1 - ratio))]:
            hidden.append((n, place // columns, place % columns))
    for n, i, j in hidden:
        filled[n, :, i, j] = loss.token
    made = run(loss.generate, filled)
    wrong = [((made[n, :, i, j] - t[n, :, i, j]) ** 2).mean() for n, i, j in hidden]
    return total + beta * sum(wrong) / len(wrong)
