"""Fully connected layers by oneDNN: what torch gives, up to rounding, and only where it is meant."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from trainer.compression.masks import set_mask
from trainer.compression.parametrizations import Mask
from trainer.compression.weights import weights_of
from trainer.distillation import onednn
from trainer.distillation.onednn import attach, detach, missing_types

WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"
served = pytest.mark.skipif(not WIDE, reason="without AVX-512 nothing is attached")


@pytest.fixture
def products(monkeypatch):
    """How many products oneDNN made; small ones too."""
    monkeypatch.setattr(onednn, "_least", lambda: 0)
    made, forward = [], onednn._Product.forward

    def counted(ctx, *arguments):
        made.append(arguments)
        return forward(ctx, *arguments)

    monkeypatch.setattr(onednn._Product, "forward", staticmethod(counted))
    return made


@pytest.mark.parametrize(
    ("vendor", "family", "least"),
    [("AuthenticAMD", 26, 2**21), ("AuthenticAMD", 25, 2**24), ("GenuineIntel", 6, 2**21)],
)
def test_small_products_of_processors_with_half_units_are_left_to_torch(vendor, family, least):
    text = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\n\nprocessor\t: 1\n"
    assert onednn.least_product(text) == least
    assert onednn.least_product("") == 2**21  # another system


def plain(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def a_layer(inputs=8, outputs=6, bias=True, learning=True):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    attach(network, learning)
    return network


@served
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (1, 8), (2, 3, 8), (2, 3, 4, 8)])
def test_results_and_gradients_are_torchs(shape, bias, products):
    network = a_layer(bias=bias)
    given = [torch.randn(shape, requires_grad=True)]
    if len(shape) > 2:
        given.append(torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]).requires_grad_())
    for x in given:
        tensors = [x, *network.parameters()]
        found, wanted = network(x), plain(network[0], x)
        direction = torch.randn_like(wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(found, tensors, direction),
            torch.autograd.grad(wanted, tensors, direction),
            rtol=1e-5,
            atol=1e-5,
        )
    assert len(products) == 3 * len(given)


@served
@pytest.mark.parametrize("sizes", [(128, 784, 300), (128, 1325, 400), (7, 3000, 333), (1000, 65, 129)])
def test_large_products_are_torchs(sizes):
    rows, inputs, outputs = sizes
    network = a_layer(inputs, outputs)
    x = torch.randn(rows, inputs, requires_grad=True)
    tensors = [x, *network.parameters()]
    exact = plain(copy.deepcopy(network[0]).double(), x.double())
    found = network(x)
    direction = torch.randn_like(found)
    assert not torch.equal(found, torch.zeros_like(found))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    theirs = torch.autograd.grad(plain(network[0], x), tensors, direction)
    for mine, other in zip(torch.autograd.grad(found, tensors, direction), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def laid_out(rows, columns):
    """Matrices of all strides that gradients, transposes and slices come in."""
    return [
        torch.randn(rows, columns),
        torch.randn(columns, rows).T,
        torch.randn(1, columns).expand(rows, columns),
        torch.randn(rows, 1).expand(rows, columns),
        torch.randn(1, 1).expand(rows, columns),
        torch.randn(2 * rows, 3 * columns)[::2, ::3],
        torch.randn(rows, columns + 5)[:, 2 : 2 + columns],
        torch.randn(rows * columns + 1)[1:].view(rows, columns),
    ]


@served
@pytest.mark.parametrize(
    "sizes", [(5, 8, 6), (48, 200, 64), (1, 8, 6), (5, 1, 6), (5, 8, 1), (1, 1, 1), (33, 100, 17)]
)
def test_strides_do_not_matter(sizes):
    torch.manual_seed(0)
    rows, inputs, outputs = sizes
    for a in laid_out(rows, inputs):
        for b in laid_out(outputs, inputs):
            for bias in (
                None,
                torch.randn(outputs),
                torch.randn(1).expand(outputs),
                torch.randn(2 * outputs)[::2],
            ):
                exact = F.linear(a.double(), b.double(), None if bias is None else bias.double())
                scale = (a.double().abs() @ b.double().abs().T).max() + 1
                assert (onednn._Product.apply(a, b, bias) - exact).abs().max() <= 1e-5 * scale


@served
def test_gradients_of_gradients(products):
    network = a_layer()
    x = torch.randn(5, 8, requires_grad=True)

    def penalty(of):
        (gradient,) = torch.autograd.grad(of(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), network[0].weight)[0]

    torch.testing.assert_close(
        penalty(network), penalty(lambda x: plain(network[0], x)), rtol=1e-5, atol=1e-5
    )
    assert len(products) > 3


@served
@pytest.mark.parametrize("learning", [True, False])
def test_only_where_gradients_are_wanted_or_only_where_not(learning, products):
    network = a_layer(learning=learning)
    x = torch.randn(5, 8, requires_grad=True)
    torch.testing.assert_close(network(x), plain(network[0], x))
    assert len(products) == learning
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain(network[0], x))
    assert len(products) == 1


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 0, 8)])
def test_vectors_and_nothing(shape):
    network = a_layer()
    x = torch.randn(shape)
    torch.testing.assert_close(network(x), plain(network[0], x))


def test_small_products_are_torchs_own():
    network = a_layer()
    x = torch.randn(50, 8)
    assert torch.equal(network(x), plain(network[0], x))


def test_other_precisions_are_torchs_own(products):
    network = a_layer()
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        network(x.double())
    assert torch.equal(network.double()(x.double()), plain(network[0], x.double()))
    assert not products


def test_what_is_traced_is_torchs_own(products):
    network = a_layer()
    exported = torch.export.export(network, (torch.randn(5, 8),))
    assert not products and "aten.linear" in str(exported.graph)


@served
def test_a_wrong_width_is_an_error(products):
    with pytest.raises(RuntimeError):
        a_layer()(torch.randn(5, 7))


@served
def test_masked_weights_learn_through_it(products):
    network = a_layer()
    detach(network)
    place = weights_of(network)["0"]
    set_mask(place, place.value.abs() > place.value.abs().median())
    assert isinstance(weights_of(network)["0"].parametrization, Mask)
    x, other = torch.randn(5, 8), copy.deepcopy(network)
    attach(network, learning=True)
    for net in (network, other):
        net(x).square().sum().backward()
    assert len(products) == 2
    mine, theirs = (net[0].parametrizations.weight.original.grad for net in (network, other))
    assert theirs.abs().max() > 0
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@served
def test_copies_and_pickles_have_layers_of_their_own(products):
    network, x = a_layer(), torch.randn(5, 8)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), network(x))
        with torch.no_grad():
            other[0].weight.zero_()
        assert torch.equal(other(x), other[0].bias.expand(5, -1))
        assert not torch.equal(network(x), other(x))


def test_what_is_someones_own_stays(products):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    network = nn.Sequential(nn.Linear(3, 3), Doubled(3, 3))
    network[0].forward = lambda x: x
    attach(network, learning=True)
    detach(network)
    x = torch.randn(2, 3)
    assert torch.equal(network(x), 2 * plain(network[1], x)) and not products


def test_detached_it_is_as_before(products):
    network = a_layer()
    detach(network)
    assert "forward" not in vars(network[0])
    network(torch.randn(5, 8))
    assert not products


def test_without_the_instructions_nothing_is_attached(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "forward" not in vars(a_layer()[0])


KINDS = [nn.LSTM, nn.GRU, nn.RNN]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def a_poor_processor(monkeypatch):
    """One whose recurrent layers have no type but float32."""
    monkeypatch.setattr(onednn, "_missing_types", lambda kind: frozenset(HALVES))


def recurrent(kind, **settings):
    torch.manual_seed(0)
    network = nn.Sequential(kind(4, 5, batch_first=True, **settings))
    attach(network, learning=True)
    return network


def outputs_and_gradients(layer, *given, dtype=None):
    """Inside autocast to a type, if one is given; the backward pass is outside it, as in a training."""
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        outputs, _ = layer(*given)
    values = outputs.data if hasattr(outputs, "batch_sizes") else outputs
    return values, torch.autograd.grad(values.float().square().sum(), list(layer.parameters()))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_processor_lacks_is_computed_in_float32_inside_autocast(kind, dtype, a_poor_processor):
    layer = recurrent(kind, num_layers=2, bidirectional=True)[0]
    states = torch.randn(4, 3, 5)
    given = (torch.randn(3, 6, 4), (states, 2 * states) if kind is nn.LSTM else states)
    wanted = outputs_and_gradients(layer, *given)
    found = outputs_and_gradients(layer, *given, dtype=dtype)
    with torch.autocast("cpu", dtype):
        half = layer(given[0].to(dtype))[0]  # as a convolution before it leaves it
        assert torch.is_autocast_enabled("cpu")
    of_half = layer(given[0].to(dtype).float())[0]
    assert found[0].dtype == half.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert torch.equal(half, of_half)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_computed_in_float32_too(kind, a_poor_processor):
    layer = recurrent(kind)[0]
    packed = pack_padded_sequence(torch.randn(3, 6, 4), torch.tensor([6, 3, 2]), batch_first=True)
    wanted = outputs_and_gradients(layer, packed)
    found = outputs_and_gradients(layer, packed, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(packed.to(torch.bfloat16))[0].data.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_copies_masks_and_detaching_go_with_recurrent_layers(a_poor_processor):
    network, x = recurrent(nn.LSTM), torch.randn(3, 6, 4)
    place = weights_of(network)["0.weight_ih_l0"]
    set_mask(place, place.value > 0)
    other = pickle.loads(pickle.dumps(recurrent(nn.LSTM)))
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed[0].bias_ih_l0.add_(1)
    for layer in (network[0], other[0], changed[0]):
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)[0]
        assert torch.equal(found, layer(x)[0])
    assert not torch.equal(changed[0](x)[0], network[0](x)[0])
    detach(network)
    assert "forward" not in vars(network[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
def test_attached_all_recurrent_layers_compute_on_this_processor(kind, dtype):
    layer, x = recurrent(kind)[0], torch.randn(3, 6, 4)
    wanted = outputs_and_gradients(layer, x)
    found = outputs_and_gradients(layer, x, dtype=dtype)
    with torch.autocast("cpu", dtype), torch.no_grad():
        torch.testing.assert_close(layer(x)[0], found[0], rtol=0.05, atol=0.05)
    assert (found[0].dtype == torch.float32) == (
        dtype in missing_types(layer)
    ) or kind is nn.GRU  # which gives float32 always
    torch.testing.assert_close(found[0].float(), wanted[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(found[1], wanted[1], rtol=0.1, atol=0.2)


def test_the_rehearsal_leaves_the_generator_alone_and_other_layers():
    before = torch.get_rng_state()
    for kind in KINDS:
        onednn._missing_types.__wrapped__(kind)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(missing_types(layer) for layer in (nn.Linear(2, 2), nn.LSTMCell(2, 2), nn.Conv2d(2, 2, 2)))


IMITATED = """
import torch
from torch import nn
from trainer.distillation import onednn
network = nn.Sequential(nn.LSTM(3, 4), nn.GRU(3, 4))
assert onednn.kinds_in_float32([network], torch.bfloat16) == ["LSTM"]
onednn.attach(network, learning=True)
x = torch.randn(5, 2, 3)
with torch.autocast("cpu", torch.bfloat16):
    found = network[0](x)[0]
found.sum().backward()
assert torch.equal(found, network[0](x)[0])
"""


def test_a_processor_without_avx512_trains_an_lstm_in_bfloat16():
    """Also where there is AVX-512: oneDNN is told to do without."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    environment["PYTHONPATH"] = str(Path(onednn.__file__).parents[2])
    subprocess.run([sys.executable, "-c", IMITATED], env=environment, check=True)
