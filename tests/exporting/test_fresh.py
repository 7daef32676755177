"""Timing and memory in a fresh process, and products of sparse matrices against the layers that they stand for."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from tests.exporting.light import HELD, fails, prepare
from trainer.exporting import timing
from trainer.exporting.fresh import measured
from trainer.exporting.sparse_products import with_sparse_products
from trainer.networks.quantizers import attach


def test_a_fresh_process_tells_time_and_memory():
    found = measured(prepare, {"seconds": 0.002}, (1, 4, 4), 1, (1, 5), most_seconds=0.1)
    assert 0.002 <= found["seconds"][1][0] <= found["seconds"][1][1]
    assert found["seconds"][5][0] >= 0.01 and found["load_cpu_seconds"] <= found["load_seconds"] * 1.5
    if timing.memory() is not None:
        assert HELD < found["own_bytes"] < 1.6 * HELD  # without the runtime's
        assert 2 * HELD < found["peak_bytes"] < 4 * HELD


def test_what_a_fresh_process_complains_of_is_told():
    with pytest.raises(RuntimeError, match=r"could not run it:(.|\n)*no such runtime"):
        measured(fails, {}, (1, 2, 2), 1)


def test_a_slow_call_is_timed_once():
    calls = []
    timing.latency(lambda images: (calls.append(1), time.sleep(0.02)), np.zeros(1), most_seconds=0.01)
    assert len(calls) == 2  # one to warm up
    calls = []
    timing.latency(lambda images: calls.append(1), np.zeros(1))
    assert len(calls) == timing.WARM_UP + timing.MOST_CALLS


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.grouped = nn.Conv2d(6, 6, 3, groups=3, padding=1)
        self.plain = nn.Conv2d(6, 4, 1, bias=False)
        self.head = nn.Linear(7, 3)
        self.dense = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        x = self.plain(torch.relu(self.grouped(self.first(x))))
        return self.dense(self.head(x)).mean((1, 2))


@pytest.mark.parametrize("layout", ["scipy CSR", "torch CSR"])
def test_sparse_products_are_the_layers(layout):
    torch.manual_seed(0)
    net = Mixed().eval()
    with torch.no_grad():
        for layer in (net.first, net.grouped, net.plain, net.head):
            layer.weight[torch.rand_like(layer.weight) < 0.6] = 0
    images = torch.randn(3, 2, 9, 9)
    expected = net(images)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    sparse, zeros = with_sparse_products(net, layout)
    with torch.inference_mode():
        torch.testing.assert_close(sparse(images), expected, atol=1e-5, rtol=1e-5)
    weights = [net.first.weight, net.plain.weight, net.head.weight]
    assert zeros == sum((w == 0).sum().item() for w in weights) / sum(w.numel() for w in weights)
    assert isinstance(sparse.grouped, nn.Conv2d) and isinstance(sparse.dense, nn.Linear)  # these stay dense
    assert not isinstance(sparse.first, nn.Conv2d) and not isinstance(sparse.head, nn.Linear)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("layout", ["scipy CSR", "torch CSR"])
def test_sparse_products_round_their_input_where_the_layers_did(layout):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        net[2].weight[:, :3] = 0
    attach(net, {"2": [-2, 3]})
    images = torch.randn(4, 6)
    sparse, _ = with_sparse_products(net, layout)
    assert not isinstance(sparse[2], nn.Linear)
    with torch.inference_mode():
        torch.testing.assert_close(sparse(images), net(images), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(
            net(images), nn.Sequential(net[0], net[1])(images) @ net[2].weight.T + net[2].bias, atol=1e-3
        )


def test_a_network_without_zeros_stays_dense():
    assert np.isnan(with_sparse_products(nn.Linear(3, 2), "scipy CSR")[1])


def test_onnxruntime_and_c_run_without_torch():
    code = "import sys, trainer.exporting.onnx_session, trainer.exporting.c_machines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
