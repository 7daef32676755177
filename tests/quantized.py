"""Small quantized networks, which tests export."""

import functools

import torch
from torch import nn

from trainer.compression.integers import to_integers
from trainer.exporting.export import subject_of
from trainer.exporting.integer_steps import exponents_read
from trainer.exporting.quantizing import calibrate, fit_first_layers, quantized
from trainer.exporting.tracing import trace
from trainer.models.lenet5 import lenet5
from trainer.models.lenet300 import lenet300
from trainer.models.separable import separable


def sequence():
    """Grouped, strided and dilated convolutions, poolings with and without padding, numbers below zero."""
    return nn.Sequential(
        nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0)), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.AvgPool2d(2), nn.Conv2d(6, 5, 2), nn.Flatten(), nn.Linear(5 * 2, 7), nn.ReLU(), nn.Linear(7, 4),
    )  # fmt: skip


def made(net, shape, mean, std, bias_bits=8):
    """Returns a subject whose network is quantized, with sparse weights of few values."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1 and parameter.numel() > 60:
                parameter.copy_((parameter * 20).round() / 20 * (torch.rand_like(parameter) > 0.5))
    net, _ = quantized(net.eval(), {"model": "lenet5"}, shape, mean, std)
    fit_first_layers(net, trace(net, shape))
    images = torch.rand(32, *shape)
    spread = [torch.tensor(v).view(-1, 1, 1) for v in (mean, std)]
    calibrate(net, [(images - spread[0]) / spread[1]], net)
    to_integers(net, exponents_read(trace(net, shape)), 8, bias_bits)
    return subject_of(net, shape, mean=mean, std=std)


_MADE = {
    "sequence": lambda: made(sequence(), (3, 19, 12), [0.4, 0.5, 0.3], [0.2, 0.3, 0.25], 12),
    "residual": lambda: made(
        separable((1, 17, 14), 10, widths=(6, 6, 8), strides=(2, 1, 1), batch_norm=False, residual=True),
        (1, 17, 14),
        [0.13],
        [0.31],
    ),
    "lenet5": lambda: made(lenet5((1, 16, 16), 10, width=3, batch_norm=True), (1, 16, 16), [0.0], [1.0]),
    "lenet300": lambda: made(lenet300((1, 12, 12), 10, hidden=(30, 20)), (1, 12, 12), [0.0], [1.0]),
}
# Each is made once in a process, since that takes seconds; no test changes one.
NETS = {name: functools.cache(make) for name, make in _MADE.items()}
